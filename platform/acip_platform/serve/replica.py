"""The deployment that holds the weights: an engine, its resident models, and streams of what happens to each request.

Answers with plain values: an exception would reach the client as a Ray traceback.
"""

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import psutil
import torch

from acip.errors import AcipError
from acip.sizing.budget import GIGA, in_bytes
from acip_platform.serve.engine.engine import DEFAULT_CHAT_TOKENS, ActiveRequest, Engine, Event
from acip_platform.serve.engine.model_cache import Key, ModelCache, key_of
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.http.errors import as_response
from acip_platform.serve.http.requests import ChatRequest, CompletionRequest, ModelSizeRequest
from acip_platform.serve.recorded_samples import Recorder
from acip_platform.serve.size_facts import as_json
from acip_platform.serve.tradeoff import trade_off
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import ModelVersion

SHARE = 0.8  # of the free memory, where no limit is given
MESSAGES_PER_S = 50  # that are sent to clients in all: each passes three processes, so many streams send more at once
LOADING = 4  # models at once: they share the disk
RETRY_S = (5.0, 300.0)  # between attempts to load what failed at the start, doubling

log = logging.getLogger("ray.serve")


class EngineReplica:
    def __init__(
        self, versions: list[ModelVersion], timeout_s: float, device: str, num_cpus: int, memory_gb: float | None,
        default_max_tokens: int = DEFAULT_CHAT_TOKENS,
    ) -> None:  # fmt: skip
        if device == "cpu":
            torch.set_num_threads(max(1, num_cpus))
        self.settings = Settings.from_env()
        self.engine = Engine(timeout_s, default_max_tokens)
        self.recorder = Recorder(self.engine, self.settings.home / "cache" / "recorded")
        limit = in_bytes(memory_gb, GIGA) if memory_gb else int(SHARE * _free(device))
        store = Store.of(self.settings)
        self.models = ModelCache(self.engine, store, device, limit, self.recorder.add)
        self.failed: dict[str, str] = {}  # model -> why it can't be loaded
        self.warm = False
        self._loading: dict[Key, asyncio.Future[ResidentModel]] = {}
        self._loaders = ThreadPoolExecutor(LOADING, "loader")  # not those that answer: a model may be long in coming
        self._trade_offs: weakref.WeakKeyDictionary[ResidentModel, dict[str, Any]] = weakref.WeakKeyDictionary()
        threading.Thread(target=self._load, args=(versions,), daemon=True, name="loading").start()

    def _load(self, versions: list[ModelVersion]) -> None:
        """The first models, while the page is there already; until there is one, what failed is tried again (storage may be away)."""
        wait_s, most_s = RETRY_S
        while True:
            for version in versions:
                try:
                    self._warm(version)
                    self.warm = True
                    self.failed.pop(version.name, None)
                except Exception as error:
                    log.exception("%s can't be loaded", version.name)
                    told = str(error) if isinstance(error, AcipError) else f"{type(error).__name__} while it was loaded; see the log."
                    self.failed[version.name] = told
            if self.warm:
                return
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, most_s)

    def _warm(self, version: ModelVersion) -> None:
        for event in self.engine.events(self.models.get(version), CompletionRequest(prompt="a", max_tokens=1, temperature=0.0)):
            if event.kind == "error":
                raise AcipError(f"{version.name} could not make a token: {event.data['body']['error']['message']}")

    async def ready(self) -> dict[str, Any]:
        return {"warm": self.warm, "failed": self.failed}

    async def cards(self) -> dict[str, Any]:
        """Of the models in memory."""
        return {"body": [served.card() for served in self.models.resident]}

    async def card(self, version: ModelVersion) -> dict[str, Any]:
        return await self._answered(lambda served: served.card(), version)

    async def trade_off(self, version: ModelVersion) -> dict[str, Any]:
        def made(served: ResidentModel) -> dict[str, Any]:
            body = self._trade_offs.get(served)
            if body is None:
                body = self._trade_offs[served] = as_json(trade_off(served))
            return body | {"recorded": self.recorder.of(served)}

        return await self._answered(made, version)

    async def size(self, version: ModelVersion, request: ModelSizeRequest) -> dict[str, Any]:
        """What a size comes to, without generating anything."""
        return await self._answered(lambda s: s.size(s.cut(request.name_and_budget([s.version.name])[1])), version)

    async def _answered(self, make: Callable[[ResidentModel], Any], version: ModelVersion) -> dict[str, Any]:
        """{"body"}, or {"status", "body"} of an error."""
        try:
            return {"body": await asyncio.to_thread(make, await self._served(version))}
        except Exception as error:
            return _failed(error)

    async def _served(self, version: ModelVersion) -> ResidentModel:
        """The model. Whoever needs one that is not there waits for the same thread to load it."""
        served = self.models.find(version)
        if served is not None:
            return served
        key = key_of(version)
        if key not in self._loading:
            self._loading[key] = asyncio.get_running_loop().run_in_executor(self._loaders, self.models.get, version)
            self._loading[key].add_done_callback(lambda _: self._loading.pop(key))
        return await asyncio.shield(self._loading[key])

    async def stream(self, version: ModelVersion, request: CompletionRequest | ChatRequest) -> AsyncIterator[list[Event]]:
        """Events of one request, some at a time: the head first; where nobody reads a stream, the rest at once."""
        received = time.monotonic()
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[list[Event]]()
        ticket: ActiveRequest | None = None
        gone = False

        def begin(served: ResidentModel) -> ActiveRequest:
            nonlocal ticket
            ticket = self.engine.submit(served, request, lambda events: loop.call_soon_threadsafe(queue.put_nowait, events), received)
            if gone:
                self.engine.cancel(ticket)
            return ticket

        try:
            try:
                began = await asyncio.to_thread(begin, await self._served(version))
            except Exception as error:
                yield [Event("error", data=_failed(error))]
                return
            yield [began.head()]
            last, said, finished = 0.0, list[Event](), False
            while not finished:
                said += await queue.get()
                rest = last + self.engine.open / MESSAGES_PER_S - time.monotonic()
                if rest > 0 and said[-1].kind not in ("done", "error"):
                    await asyncio.sleep(rest)
                while not queue.empty():
                    said += queue.get_nowait()
                finished = said[-1].kind in ("done", "error")
                if said and (request.stream or finished or said[0].kind == "start"):
                    yield merged(said)
                    last, said = time.monotonic(), []
        finally:
            gone = True
            if ticket is not None:
                self.engine.cancel(ticket)

    def check_health(self) -> None:
        if not self.engine.alive:
            raise RuntimeError("the engine's thread has ended")


def merged(events: list[Event]) -> list[Event]:
    """The same with neighboring texts of a choice in one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if last is not None and last.kind == "text" and event.kind in ("text", "end") and last.index == event.index:
            logprobs = (last.logprobs or []) + (event.logprobs or []) or None
            out[-1] = Event(event.kind, event.index, last.text + event.text, logprobs, event.data)
        else:
            out.append(event)
    return out


def _failed(error: Exception) -> dict[str, Any]:
    request_id = uuid4().hex
    status, body = as_response(error, request_id)
    if status >= 500 and status != 503:
        log.error("request %s failed", request_id, exc_info=error)
    return {"status": status, "body": body}


def _free(device: str) -> int:
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info()[0])
