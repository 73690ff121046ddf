"""Completions of a few example prompts at a grid of sizes, for the slider of the page.

This server's model generates them greedily while no request runs. A file keeps them for the next start. Of a model with coded layers, the
base model is recorded only once a request has loaded it, because it takes twice the memory of a coded size.
"""

import hashlib
import json
import logging
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from acip.errors import AcipError, BudgetError
from acip.evaluate.samples import PROMPTS
from acip.sizing.budget import Budget, Convention
from acip.utils.atomic import atomic_file
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.http.requests import ChatRequest, CompletionRequest
from acip_platform.serve.text.model_text import ModelText
from acip_platform.serve.text_engine import TextEngine

SIZES: dict[Convention, tuple[float, ...]] = {
    "linear": (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
    "bytes": (0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 1.0),
}
MAX_TOKENS = 48
# For models with a chat template. The demo's base model (SmolLM2 135M) answers each of them well.
QUESTIONS = ("What is the capital of France?", "Give me three tips for a good night's sleep.", "What is photosynthesis?")
IDLE_S = 0.5  # time without any request, before the next recording
POLL_S = 0.2

log = logging.getLogger("ray.serve")


def examples(model: ResidentModel) -> tuple[str, ...]:
    """Return the example prompts: questions for a model with a chat template, else beginnings of texts."""
    return QUESTIONS if ModelText.of(model).chat else PROMPTS


class Recorder:
    """A recorder of samples. It records each model in a separate thread while the engine is idle. The files are in `folder`."""

    def __init__(self, engine: TextEngine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self._recorded: dict[str, dict[float, list[str]]] = {}  # by file, so that no reference keeps a model in memory
        self._lock = threading.Lock()

    def add(self, model: ResidentModel) -> None:
        """Start recording a model."""
        with self._lock:
            self._recorded[self._file(model).name] = self._read(model)
        threading.Thread(target=self._record, args=(weakref.ref(model),), daemon=True, name="recording").start()

    def of(self, model: ResidentModel) -> list[dict[str, Any]]:
        """Return the samples of a model that are recorded so far, by prompt, in descending order of size."""
        with self._lock:
            recorded = dict(self._recorded.get(self._file(model).name, {}))
        chat = ModelText.of(model).chat
        return [
            {
                "prompt": prompt, "chat": chat, "max_tokens": MAX_TOKENS, "temperature": 0,
                "completions": [{"size": size, "text": texts[i]} for size, texts in sorted(recorded.items(), reverse=True)],
            }
            for i, prompt in enumerate(examples(model))
        ]  # fmt: skip

    def _record(self, reference: "weakref.ref[ResidentModel]") -> None:
        model = reference()
        sizes = SIZES[model.convention] if model is not None else ()
        for size in sizes:
            del model  # while this thread waits, it must not keep the model in memory
            model = self._when_ready(reference, size)
            if model is None:
                return
            if size in self._recorded[self._file(model).name]:
                continue
            try:
                texts = self._answers(model, size)
            except BudgetError as error:
                log.info("no recording at %s: %s", size, error)
                continue
            except AcipError as error:  # the model was unloaded
                log.info("no recording at %s: %s", size, error)
                return
            with self._lock:
                self._recorded[self._file(model).name][size] = texts
            self._write(model)

    def _when_ready(self, reference: "weakref.ref[ResidentModel]", size: float) -> ResidentModel | None:
        """Wait until no request runs and the model can be recorded at a size. Return the model, or None if it was unloaded."""
        while True:
            self._wait_until_idle()
            model = reference()
            if model is None:
                return None
            with suppress(BudgetError):
                cut = model.cut(Budget(ratio=size, convention=model.convention))
                if cut.versions is None and not model.weights.is_loaded(cut):
                    del model
                    continue
            return model

    def _answers(self, model: ResidentModel, size: float) -> list[str]:
        """Return the text for each example prompt: from one request, or from one per chat."""
        prompts, settings = examples(model), {"size_ratio": size, "max_tokens": MAX_TOKENS, "temperature": 0.0}
        requests: list[CompletionRequest | ChatRequest] = (
            [ChatRequest.parse({"messages": [{"role": "user", "content": prompt}], **settings}) for prompt in prompts]
            if ModelText.of(model).chat
            else [CompletionRequest.parse({"prompt": list(prompts), **settings})]
        )
        texts = [""] * len(prompts)
        for first, request in enumerate(requests):
            for event in self.engine.events(model, request):
                if event.kind == "error":
                    raise AcipError(str(event.data))
                texts[first + event.index] += event.text
        return texts

    def _wait_until_idle(self) -> None:
        since = time.monotonic()
        while time.monotonic() - since < IDLE_S:
            time.sleep(POLL_S)
            if self.engine.open:
                since = time.monotonic()

    def _file(self, model: ResidentModel) -> Path:
        """Return the file of a model's samples. Its name is a hash of all that they depend on."""
        place = [model.version.uri, str(model.any_size.model.device), model.convention]
        content = json.dumps([model.artifact.manifest["files"], examples(model), MAX_TOKENS, *place])
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"

    def _read(self, model: ResidentModel) -> dict[float, list[str]]:
        try:
            kept = json.loads(self._file(model).read_text(encoding="utf-8"))
            return {float(size): texts for size, texts in kept.items() if len(texts) == len(examples(model))}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _write(self, model: ResidentModel) -> None:
        try:
            with atomic_file(self._file(model)) as partial:
                partial.write_text(json.dumps(self._recorded[self._file(model).name]), encoding="utf-8")
        except OSError as error:
            log.warning("the recorded samples can't be written: %s", error)
