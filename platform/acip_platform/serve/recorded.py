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
from acip_platform.serve.engine import Engine
from acip_platform.serve.request import CompletionRequest
from acip_platform.serve.served import Served

SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
MAX_TOKENS = 48
IDLE_S = 0.5  # how long nobody must have asked anything
LOOK_S = 0.2

log = logging.getLogger("ray.serve")


class Recorder:
    """A thread that records one model after the other, while the engine has nothing else to do."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self._made: dict[str, dict[float, list[str]]] = {}  # by file: a model that leaves must not stay for its samples' sake
        self._lock = threading.Lock()

    def add(self, served: Served) -> None:
        with self._lock:
            self._made[self._file(served).name] = self._read(served)
        threading.Thread(target=self._record, args=(weakref.ref(served),), daemon=True, name="recording").start()

    def of(self, served: Served) -> list[dict[str, Any]]:
        with self._lock:
            made = dict(self._made.get(self._file(served).name, {}))
        return [
            {
                "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0,
                "completions": [{"size": size, "text": texts[i]} for size, texts in sorted(made.items(), reverse=True)],
            }
            for i, prompt in enumerate(PROMPTS)
        ]  # fmt: skip

    def _record(self, reference: "weakref.ref[Served]") -> None:
        for size in SIZES:
            self._wait()
            served = reference()
            if served is None:
                return
            if size in self._made[self._file(served).name]:
                continue
            request = CompletionRequest(prompt=list(PROMPTS), size_ratio=size, max_tokens=MAX_TOKENS, temperature=0.0)
            texts = [""] * len(PROMPTS)
            try:
                for event in self.engine.events(served, request):
                    texts[event.index] += event.text
                    if event.kind == "error":
                        raise AcipError(str(event.data))
            except AcipError as error:  # a size that this model does not have, or it was unloaded
                log.info("no recording at %s: %s", size, error)
                return
            with self._lock:
                self._made[self._file(served).name][size] = texts
            self._write(served)
            del served

    def _wait(self) -> None:
        since = time.monotonic()
        while time.monotonic() - since < IDLE_S:
            time.sleep(LOOK_S)
            if self.engine.open:
                since = time.monotonic()

    def _file(self, served: Served) -> Path:
        what = json.dumps([served.artifact.manifest["files"], served.version.uri, PROMPTS, MAX_TOKENS, str(served.any_size.model.device)])
        return self.folder / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"

    def _read(self, served: Served) -> dict[float, list[str]]:
        try:
            kept = json.loads(self._file(served).read_text(encoding="utf-8"))
            return {float(size): texts for size, texts in kept.items() if len(texts) == len(PROMPTS)}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _write(self, served: Served) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self._file(served).with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(self._made[self._file(served).name]), encoding="utf-8")
            partial.replace(self._file(served))
        except OSError as error:
            log.warning("recordings can't be kept: %s", error)
