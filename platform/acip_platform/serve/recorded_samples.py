"""Completions of a few example prompts at sizes on a grid, made in idle time, so that a slider shows text while it moves.

They are greedy, real, and made by this server's model; kept in a file for the next start.
"""

import hashlib
import json
import logging
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from acip.errors import AcipError
from acip.evaluate.samples import PROMPTS
from acip_platform.serve.engine.engine import Engine
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.http.requests import ChatRequest, CompletionRequest

SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
MAX_TOKENS = 48
# For models with a chat template. The demo's base model (SmolLM2 135M) answers each of them well.
QUESTIONS = ("What is the capital of France?", "Give me three tips for a good night's sleep.", "What is photosynthesis?")
IDLE_S = 0.5  # how long nobody must have asked anything
LOOK_S = 0.2

log = logging.getLogger("ray.serve")


def examples(served: ResidentModel) -> tuple[str, ...]:
    """Example prompts: questions where the model has a chat template, else beginnings of texts."""
    return QUESTIONS if served.chat else PROMPTS


class Recorder:
    """A thread that records one model after the other, while the engine has nothing else to do."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self._made: dict[str, dict[float, list[str]]] = {}  # by file: a model that leaves must not stay for its samples' sake
        self._lock = threading.Lock()

    def add(self, served: ResidentModel) -> None:
        with self._lock:
            self._made[self._file(served).name] = self._read(served)
        threading.Thread(target=self._record, args=(weakref.ref(served),), daemon=True, name="recording").start()

    def of(self, served: ResidentModel) -> list[dict[str, Any]]:
        with self._lock:
            made = dict(self._made.get(self._file(served).name, {}))
        return [
            {
                "prompt": prompt, "chat": served.chat, "max_tokens": MAX_TOKENS, "temperature": 0,
                "completions": [{"size": size, "text": texts[i]} for size, texts in sorted(made.items(), reverse=True)],
            }
            for i, prompt in enumerate(examples(served))
        ]  # fmt: skip

    def _record(self, reference: "weakref.ref[ResidentModel]") -> None:
        for size in SIZES:
            self._wait()
            served = reference()
            if served is None:
                return
            if size in self._made[self._file(served).name]:
                continue
            try:
                texts = self._answers(served, size)
            except AcipError as error:  # a size that this model does not have, or it was unloaded
                log.info("no recording at %s: %s", size, error)
                return
            with self._lock:
                self._made[self._file(served).name][size] = texts
            self._write(served)
            del served

    def _answers(self, served: ResidentModel, size: float) -> list[str]:
        """The text for each example prompt, in one request, or one for each chat."""
        prompts, how = examples(served), {"size_ratio": size, "max_tokens": MAX_TOKENS, "temperature": 0.0}
        requests: list[CompletionRequest | ChatRequest] = (
            [ChatRequest.parse({"messages": [{"role": "user", "content": prompt}], **how}) for prompt in prompts]
            if served.chat
            else [CompletionRequest.parse({"prompt": list(prompts), **how})]
        )
        texts = [""] * len(prompts)
        for first, request in enumerate(requests):
            for event in self.engine.events(served, request):
                if event.kind == "error":
                    raise AcipError(str(event.data))
                texts[first + event.index] += event.text
        return texts

    def _wait(self) -> None:
        since = time.monotonic()
        while time.monotonic() - since < IDLE_S:
            time.sleep(LOOK_S)
            if self.engine.open:
                since = time.monotonic()

    def _file(self, served: ResidentModel) -> Path:
        what = json.dumps(
            [served.artifact.manifest["files"], served.version.uri, examples(served), MAX_TOKENS, str(served.any_size.model.device)]
        )
        return self.folder / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"

    def _read(self, served: ResidentModel) -> dict[float, list[str]]:
        try:
            kept = json.loads(self._file(served).read_text(encoding="utf-8"))
            return {float(size): texts for size, texts in kept.items() if len(texts) == len(examples(served))}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _write(self, served: ResidentModel) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self._file(served).with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(self._made[self._file(served).name]), encoding="utf-8")
            partial.replace(self._file(served))
        except OSError as error:
            log.warning("recordings can't be kept: %s", error)
