"""A server that stops: it refuses new requests with 503, and ends the streams that exceed its drain time with an error.

test_lifecycle.py checks that shorter answers are finished.
"""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import Server
from tests.support.waiting import PATIENCE_S, until

DRAIN_S = 20
STREAMS = 8
LONG: dict[str, Any] = {"prompt": ["a"] * 16, "n": 8, "max_tokens": 500, "ignore_eos": True, "stream": True}  # half a million tokens in all


@pytest.fixture
def stopping(served_home: Path) -> Iterator[Server]:
    """Start a separate server with a short drain time, which the streams exceed."""
    server = Server(served_home, "--drain", str(DRAIN_S))
    try:
        server.wait_until_free()
        yield server
    finally:
        server.stop()


def ask(server: Server, method: str, path: str) -> httpx.Response | None:
    """Return the response, or None if the server no longer listens."""
    body = {"model": "small", "prompt": "a", "max_tokens": 1} if method == "POST" else None
    try:
        return httpx.request(method, server.url + path, json=body, timeout=PATIENCE_S)
    except httpx.TransportError:
        return None


def test_stopping_server_refuses_requests_and_ends_streams_with_an_error(stopping: Server) -> None:
    server = stopping
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(server.post, **LONG) for _ in range(STREAMS)]
        until(lambda: server.open == STREAMS, "fewer than all streams are open")
        server.process.send_signal(signal.SIGINT)
        until(lambda: (response := ask(server, "GET", "/health")) is None or response.status_code == 503, "the server does not stop")
        for method, path in (("GET", "/health"), ("GET", "/ready"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("HEAD", "/")):
            response = ask(server, method, path)
            assert response is not None, "the server exited before its streams ended"
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["content-type"] == "application/json"
            if method != "HEAD":
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("service_unavailable", "not_ready")
        for stream in streams:
            assert stream.result().status_code == 200
            *_, last = [line for line in stream.result().text.split("\n\n") if line]
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "service_unavailable"
    assert server.process.wait(PATIENCE_S) == 0
