"""Clients that vanish at a random moment, and what is left of their requests in the engine."""

import asyncio
import random
import re
import time
from collections import Counter
from typing import Any

import psutil

from tests.benchmarks.clients import PATIENCE_S, Ask, Connection, Refused, events
from tests.benchmarks.servers import Server

LONGEST_WAIT_S = 0.5  # of a client that leaves without having read anything
GAUGES = ("acip_requests_running", "acip_requests_waiting")
SETTLE_S, LOOK_S = 180.0, 3.0
MEMORY_MIB = 64  # that the engine may have more of afterwards: the allocator's own
MORE = 4  # threads and open files, likewise
BUSY = 0.2  # of a core: an engine that goes on for clients that are gone takes one or more
MEMORY = "memory, MiB"


def vanish(ask: Ask, count: int, at_once: int, seed: int) -> dict[str, int]:
    """Ask `count` times and leave at a random moment. How many left when, and how many were refused or failed."""
    return asyncio.run(_vanish(ask, count, at_once, random.Random(seed)))


async def _vanish(ask: Ask, count: int, at_once: int, rng: random.Random) -> dict[str, int]:
    left = Counter[str]()
    numbers = iter(range(count))

    async def client() -> None:
        for _ in numbers:
            moment = rng.choice(("after asking", "waiting", "in the stream", "not streamed"))
            body = ask.body(rng.randrange(1 << 20), rng.randint(1, 2 * ask.max_tokens), stream=moment != "not streamed")
            connection = Connection(ask.url)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    left[await _leave(connection, body, moment, rng)] += 1
            except (Refused, OSError, EOFError, ValueError, KeyError, TimeoutError) as error:
                left[f"failed: {type(error).__name__} {error}"[:100]] += 1
            finally:
                connection.close()

    await asyncio.gather(*(client() for _ in range(at_once)))
    return dict(left)


async def _leave(connection: Connection, body: dict[str, Any], moment: str, rng: random.Random) -> str:
    """Ask and leave at this moment; which moment it was."""
    if moment == "in the stream":
        pieces = rng.randint(1, body["max_tokens"])
        async for event in events(await connection.post(body)):
            if "error" in event:
                raise Refused(str(event["error"])[:200])
            pieces -= 1
            if not pieces:
                return moment
        return "answered in full"
    connection.reader, connection.writer = await asyncio.open_connection(connection.host, connection.port)
    await connection.send(body)
    if moment != "after asking":
        await asyncio.sleep(rng.uniform(0, LONGEST_WAIT_S))
    return moment


# ---- what is left


def settled(server: Server) -> dict[str, float]:
    """The engine once it has nothing to do any more, recordings for its page included, or after minutes of waiting for that."""
    engine, end = server.largest(), time.monotonic() + SETTLE_S
    while (busy := cores_busy(engine)) > BUSY or any(gauges(server).values()):
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
    time.sleep(LOOK_S)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / LOOK_S


def gauges(server: Server) -> dict[str, float]:
    text = server.text("/metrics")
    found = {name: re.findall(rf"^{name}(?:\{{.*\}})? (\S+)", text, re.MULTILINE) for name in GAUGES}
    return {name: sum(map(float, values)) if values else float("nan") for name, values in found.items()}


def left_behind(vanished: dict[str, Any]) -> list[str]:
    before, after = vanished["before"], vanished["after"]
    allowed = {MEMORY: before[MEMORY] + MEMORY_MIB, "cores busy": BUSY, **{what: before[what] + MORE for what in ("threads", "open files")}}
    found = [
        f"after the vanished, {what}: {now:g} > {allowed.get(what, 0):g}" for what, now in after.items() if not now <= allowed.get(what, 0)
    ]
    failed = sum(n for how, n in vanished["left"].items() if how.startswith("failed"))
    if failed:
        found.append(f"{failed} of the vanishing clients were refused")
    if not vanished["alive"]:
        found.append("no answer after the vanished")
    return found
