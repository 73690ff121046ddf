"""The lifecycle of a server: full queues, clients that disconnect or do not read, a killed engine, other versions, Ctrl-C."""

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Tracking

from tests.support.server import Server, text
from tests.support.waiting import PATIENCE_S, until

REQUESTS, SLOTS = 90, 64  # concurrent requests, and how many of them the server accepts
LONG: dict[str, Any] = {"model": "small", "prompt": ["a"] * 16, "ignore_eos": True}


async def flood(url: str) -> tuple[httpx.Response, list[httpx.Response]]:
    """Send more long requests than the server accepts, half of them streams.

    Return the response of /ready and the first responses; cancel the other requests.
    """
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=httpx.Limits(max_connections=REQUESTS + 10)) as client:
        bodies = [{**LONG, "max_tokens": 500, "stream": i % 2 == 0} for i in range(REQUESTS)]  # seconds of work each
        tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
        done, waiting = set[Any](), set(tasks)
        while len(done) < REQUESTS - SLOTS:
            new, waiting = await asyncio.wait(waiting, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            assert new, f"waited for {PATIENCE_S:g} s: only {len(done)} of {REQUESTS} requests were refused"
            done |= new
        while (ready := await client.get("/ready")).status_code != 200 and not any(task.done() for task in waiting):
            await asyncio.sleep(0.1)  # a pause of this machine
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return ready, [task.result() for task in done]


def test_full_queue_is_429_and_disconnected_clients_make_room(server: Server) -> None:
    before = server.metric("acip_generated_tokens_total")
    ready, first = asyncio.run(flood(server.url))
    assert ready.status_code == 200, "a busy server must stay ready"
    refused = [response for response in first if response.status_code != 200]
    assert len(first) >= REQUESTS - SLOTS
    assert refused, "a place is free only if an answer was complete before the last request arrived"
    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"] == {
            "message": "the server is busy and its queue is full; try again in a moment.",
            "type": "rate_limit_error", "param": None, "code": "queue_full",
        }  # fmt: skip
    server.ask(max_tokens=1)
    until(lambda: server.open == 0, "disconnected clients are still counted")
    assert server.metric("acip_generated_tokens_total") - before < SLOTS * 16 * 500 / 2, (
        "the server must not finish the answers of disconnected clients"
    )


def test_clients_that_do_not_read_hold_no_slot(server: Server) -> None:
    """Five clients request streams and never read a byte. Their requests complete, and a later request is answered."""
    body = json.dumps({**LONG, "model": "talker", "size_ratio": 0.95, "max_tokens": 200, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    url, labels = httpx.URL(server.url), 'model="talker",size="0.95"'  # no other test requests it

    def complete() -> float:
        return server.metric("acip_generated_tokens_total", labels)

    with contextlib.ExitStack() as stack:
        for _ in range(5):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((url.host, url.port))
            client.sendall(head + body)
        server.ask(max_tokens=2, ignore_eos=True)
        until(lambda: complete() == 5 * 16 * 200, lambda: f"{complete():g} tokens are counted")
        until(lambda: server.open == 0, "a client that does not read holds a slot")


def test_killed_engine_is_replaced_and_its_requests_are_retried_or_fail(server: Server) -> None:
    def engine() -> psutil.Process:
        (found,) = filter(is_engine, server.processes())
        return found

    def is_engine(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):  # it has ended
            return "Engine" in process.name() + "".join(process.cmdline())
        return False

    before, killed = text(server.ask(size_ratio=0.5)), engine()
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(server.post, **LONG, max_tokens=250)
        with server.generating(**LONG, n=8, max_tokens=500) as lines:
            killed.kill()
            *_, last = lines
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_restarting", "a stream that has begun can't be retried"
        assert whole.result().status_code == 200, "the request must be retried on the new engine"
        assert whole.result().json()["usage"]["completion_tokens"] == 16 * 250
    assert engine() != killed
    assert text(server.ask(size_ratio=0.5)) == before, "the new engine must serve the same version"


@pytest.fixture
def candidate(server: Server, served_home: Path) -> Iterator[str]:
    """Register the artifact of `talker` as a version of `small` with the alias `candidate`. Serve version 1 again after the test."""
    settings = Settings.from_env({"ACIP_HOME": str(served_home)})
    run = Tracking(settings, "test").start("again", "g", {})
    new = Registry(settings).register("small", str(served_home / "talker"), run.run_id, {})
    Registry(settings).set_alias(new, "candidate")
    yield new.version
    server.client.post("/v1/models/small/load", json={"version": "1"}).raise_for_status()


def test_another_version_is_served_without_a_restart(server: Server, served_home: Path, candidate: str) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert server.post("/v1/chat/completions", **chat).status_code == 400, "version 1 has no template"
    with server.generating(**LONG, max_tokens=400) as lines:
        card = server.client.post("/v1/models/small/load", json={"alias": "candidate"}).json()
        assert (card["id"], card["version"], card["artifact"]) == ("small", candidate, str(served_home / "talker"))
        assert server.ask(max_tokens=2)["version"] == candidate
        head, *_, last = lines
        assert (json.loads(head.removeprefix("data: "))["version"], last) == ("1", "data: [DONE]"), (
            "a running request must keep its version"
        )
    assert server.client.get("/v1/models/small").json()["version"] == candidate
    assert server.post("/v1/chat/completions", **chat).json()["version"] == candidate, "the new version must bring its template"
    assert server.client.post("/v1/models/small/load", json={"version": "1"}).json()["version"] == "1"
    assert server.ask(max_tokens=2)["version"] == "1"


def test_server_follows_the_alias(server: Server, served_home: Path, candidate: str) -> None:
    """An alias that is moved in the registry, for example in MLflow's UI, changes what a running server serves."""
    registry = Registry(Settings.from_env({"ACIP_HOME": str(served_home)}))
    server.client.post("/v1/models/small/load", json={"alias": "champion"}).raise_for_status()
    assert server.ask(max_tokens=2)["version"] == "1"
    try:
        registry.set_alias(registry.resolve("small", candidate))
        until(lambda: server.ask(max_tokens=2)["version"] == candidate, "the server does not follow the alias")
    finally:
        registry.set_alias(registry.resolve("small", "1"))
    until(lambda: server.ask(max_tokens=2)["version"] == "1", "the server does not follow the alias back")


def test_ctrl_c_finishes_answers_and_leaves_no_process(server_to_stop: Server) -> None:
    server, processes = server_to_stop, server_to_stop.processes()
    assert len(processes) > 5
    with server.generating(**LONG, max_tokens=400, stream_options={"include_usage": True}) as lines:
        server.process.send_signal(signal.SIGINT)
        *_, usage, done = lines
        assert (json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"], done) == (16 * 400, "data: [DONE]")
    assert server.process.wait(PATIENCE_S) == 0
    # Ray may log warnings about the machine between these lines or after them
    ends = [line for line in server.log.read_text().splitlines() if line in ("stopped.", "Traceback (most recent call last):")]
    assert ends == ["stopped."]
    assert psutil.wait_procs(processes, timeout=PATIENCE_S)[1] == []
