"""Clients that disconnect at a random moment, and a check that the engine drops their requests."""

import asyncio
import random
import re
import time
from collections import Counter
from typing import Any

import psutil

from tests.benchmarks.clients import TIMEOUT_S, Connection, RequestError, Workload, events
from tests.benchmarks.servers import Server

LONGEST_WAIT_S = 0.5  # before a client disconnects without having read anything
GAUGES = ("acip_requests_running", "acip_requests_waiting")
SETTLE_S = 180.0  # time limit for the engine to become idle
CPU_SAMPLE_S = 3.0
EXTRA_MEMORY_MIB = 64  # allowed growth of the engine's memory, which the allocator keeps
EXTRA_HANDLES = 4  # allowed growth in threads, and in open files
IDLE_CORES = 0.2  # an idle engine uses less; one that still generates for disconnected clients uses 1 or more
MEMORY = "memory, MiB"


def disconnect(workload: Workload, count: int, concurrent: int, seed: int) -> dict[str, int]:
    """Send `count` requests and disconnect from each at a random moment. Return the counts by moment, and those of failed requests."""
    return asyncio.run(_disconnect(workload, count, concurrent, random.Random(seed)))


async def _disconnect(workload: Workload, count: int, concurrent: int, rng: random.Random) -> dict[str, int]:
    moments = Counter[str]()
    numbers = iter(range(count))

    async def client() -> None:
        for _ in numbers:
            moment = rng.choice(("after sending", "waiting", "in the stream", "not streamed"))
            body = workload.body(rng.randrange(1 << 20), rng.randint(1, 2 * workload.max_tokens), stream=moment != "not streamed")
            connection = Connection(workload.url)
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    moments[await _until(moment, connection, body, rng)] += 1
            except (RequestError, OSError, EOFError, ValueError, KeyError, TimeoutError) as error:
                moments[f"failed: {type(error).__name__} {error}"[:100]] += 1
            finally:
                connection.close()

    await asyncio.gather(*(client() for _ in range(concurrent)))
    return dict(moments)


async def _until(moment: str, connection: Connection, body: dict[str, Any], rng: random.Random) -> str:
    """Send a request and return at the given moment. Returns the moment, or "answered in full" if the stream ended first."""
    if moment == "in the stream":
        pieces = rng.randint(1, body["max_tokens"])
        async for event in events(await connection.post(body)):
            if "error" in event:
                raise RequestError(str(event["error"])[:200])
            pieces -= 1
            if not pieces:
                return moment
        return "answered in full"
    connection.reader, connection.writer = await asyncio.open_connection(connection.host, connection.port)
    await connection.send(body)
    if moment != "after sending":
        await asyncio.sleep(rng.uniform(0, LONGEST_WAIT_S))
    return moment


# ---- the state of the engine


def idle_state(server: Server) -> dict[str, float]:
    """Wait until the engine is idle, SETTLE_S at most, and return its state. Recording samples for the page counts as work."""
    engine, end = server.largest(), time.monotonic() + SETTLE_S
    while (busy := cores_busy(engine)) > IDLE_CORES or any(gauges(server).values()):
        if time.monotonic() > end:
            break
    with engine.oneshot():
        return {
            MEMORY: engine.memory_info().rss / 2**20,
            "cores busy": busy,
            "threads": engine.num_threads(),
            "open files": engine.num_fds(),
            **gauges(server),
        }


def cores_busy(process: psutil.Process) -> float:
    before = process.cpu_times()
    time.sleep(CPU_SAMPLE_S)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / CPU_SAMPLE_S


def gauges(server: Server) -> dict[str, float]:
    text = server.text("/metrics")
    samples = {name: re.findall(rf"^{name}(?:\{{.*\}})? (\S+)", text, re.MULTILINE) for name in GAUGES}
    return {name: sum(map(float, values)) if values else float("nan") for name, values in samples.items()}


def leaks(disconnects: dict[str, Any]) -> list[str]:
    """Return the values that grew by more than is allowed, and failed requests."""
    before, after = disconnects["before"], disconnects["after"]
    handles = {name: before[name] + EXTRA_HANDLES for name in ("threads", "open files")}
    allowed = {MEMORY: before[MEMORY] + EXTRA_MEMORY_MIB, "cores busy": IDLE_CORES, **handles}
    found = [
        f"{name} after the disconnects: {value:g} > {allowed.get(name, 0):g}"
        for name, value in after.items()
        if not value <= allowed.get(name, 0)
    ]
    failed = sum(n for moment, n in disconnects["moments"].items() if moment.startswith("failed"))
    if failed:
        found.append(f"{failed} of the disconnecting clients failed")
    if not disconnects["alive"]:
        found.append("no answer after the disconnects")
    return found
