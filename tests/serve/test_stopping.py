"""A server that is told to stop: whoever comes meanwhile is told to come back, and a stream that is cut ends with an error.

That answers have their time is shown in test_serve_life.py.
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
from tests.support.waiting import until

DRAIN_S = 5
STREAMS = 8
LONG: dict[str, Any] = {"prompt": ["a"] * 16, "n": 8, "max_tokens": 500, "ignore_eos": True, "stream": True}  # half a million tokens in all


@pytest.fixture
def stopping(served_home: Path) -> Iterator[Server]:
    """A server of its own: it has little time to stop, and stays in it."""
    server = Server(served_home, "--drain", str(DRAIN_S))
    try:
        server.wait_until_free()
        yield server
    finally:
        server.stop()


def ask(server: Server, method: str, path: str) -> httpx.Response | None:
    """The answer; None where the server does not listen any more."""
    body = {"model": "small", "prompt": "a", "max_tokens": 1} if method == "POST" else None
    try:
        return httpx.request(method, server.url + path, json=body, timeout=60)
    except httpx.TransportError:
        return None


def test_whoever_comes_is_told_and_a_stream_that_is_cut_says_so(stopping: Server) -> None:
    server = stopping
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(server.post, **LONG) for _ in range(STREAMS)]
        until(lambda: server.open == STREAMS, "not all are being answered")
        server.process.send_signal(signal.SIGINT)
        until(lambda: (told := ask(server, "GET", "/health")) is None or told.status_code == 503, "the server does not stop")
        for method, path in (("GET", "/health"), ("GET", "/ready"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("HEAD", "/")):
            told = ask(server, method, path)
            assert told is not None, "the server ended before what it was answering"
            assert told.status_code == 503
            assert int(told.headers["retry-after"]) >= 1
            assert told.headers["content-type"] == "application/json"
            if method != "HEAD":
                error = told.json()["error"]
                assert (error["type"], error["code"]) == ("service_unavailable", "not_ready")
        for stream in streams:
            assert stream.result().status_code == 200
            *_, last = [line for line in stream.result().text.split("\n\n") if line]
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "service_unavailable"
    assert server.process.wait(300) == 0
