"""The models in memory. A model is loaded at its first request; the least recently used leave if memory runs short."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from acip.artifact.artifact import Artifact
from acip.errors import AcipError
from acip_platform.serve.engine.errors import MemoryFullError, ModelUnavailableError
from acip_platform.serve.engine.resident_model import ResidentModel

if TYPE_CHECKING:  # they import boto3 and MLflow
    from acip_platform.storage.store import Store
    from acip_platform.tracking.registry import ModelVersion

WEIGHTS = ("factors", "dense", "rest")
COPIED = ("dense", "rest")  # the most that packing copies, on a CPU
WAIT_S = 60.0  # for the requests of a model that must be removed

_building = threading.Lock()  # accelerate's empty parameters affect all threads at once

Key = tuple[str, str, str]  # name, version, URI


class Host(Protocol):
    """The engine that steps the models."""

    def add(self, model: ResidentModel) -> None: ...
    def remove(self, model: ResidentModel) -> bool: ...


def key_of(version: "ModelVersion") -> Key:
    return version.name, version.version, version.uri


@dataclass
class CacheEntry:
    """A model that is in memory or is being loaded."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    model: ResidentModel | None = None
    weight_bytes: int = 0
    copy_bytes: int = 0  # of packed copies of weights, which are freed before any model leaves
    used: float = 0.0  # seconds of time.monotonic

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.copy_bytes


def _memory_bytes(artifact: Artifact, files: Sequence[str]) -> int:
    """Return the bytes that the tensors of an artifact take in memory. They may be stored in fewer."""
    return sum(artifact.tensors(file).decoded_bytes for file in files)


class ModelCache:
    """Models by version. `on_load` is called with each model once it is loaded."""

    def __init__(
        self, engine: Host, store: "Store", device: str, limit_bytes: int, on_load: Callable[[ResidentModel], None] = lambda _: None
    ) -> None:
        self.engine, self.store, self.device, self.limit_bytes, self.on_load = engine, store, device, limit_bytes, on_load
        self._entries: dict[Key, CacheEntry] = {}
        self._lock = threading.Lock()

    @property
    def resident(self) -> list[ResidentModel]:
        return [entry.model for entry in list(self._entries.values()) if entry.model is not None]

    @property
    def used_bytes(self) -> int:
        return sum(entry.total_bytes for entry in list(self._entries.values()))

    def find(self, version: "ModelVersion") -> ResidentModel | None:
        """Return the model if it is in memory."""
        entry = self._entries.get(key_of(version))
        if entry is None or entry.model is None:
            return None
        entry.used = time.monotonic()
        return entry.model

    def get(self, version: "ModelVersion") -> ResidentModel:
        """Return the model, and load it first if necessary. It blocks for seconds or minutes, so never call it in an event loop.

        Raise a ModelUnavailableError, a MemoryFullError, or an AcipError for a model that cannot be served here.
        """
        with self._lock:
            entry = self._entries.setdefault(key_of(version), CacheEntry())
        with entry.lock:
            entry.used = time.monotonic()
            model = entry.model  # which may leave again at any time
            if model is None:
                try:
                    model = entry.model = self._load(version, entry)
                except BaseException:
                    entry.weight_bytes = entry.copy_bytes = 0
                    raise
                self.on_load(model)
            return model

    def _load(self, version: "ModelVersion", entry: CacheEntry) -> ResidentModel:
        try:
            artifact = Artifact.open(self.store.fetch(version.uri))
        except AcipError as error:
            raise ModelUnavailableError(str(error)) from error
        weight_bytes = _memory_bytes(artifact, WEIGHTS)
        if weight_bytes > self.limit_bytes:
            raise AcipError(
                f"{version.name} needs {weight_bytes:,} bytes of memory for all its sizes; this server may use {self.limit_bytes:,}. "
                "Raise memory_gb, or export one size with jobs/materialize.py."
            )
        self._make_room(weight_bytes, entry)
        copy_bytes = _memory_bytes(artifact, COPIED)
        with _building:
            packed = self.device == "cpu" and self._reserve_copies(copy_bytes, entry)
            model = ResidentModel(version, artifact, self.device, packed=packed)
        entry.copy_bytes = model.packed_bytes
        self.engine.add(model)
        return model

    def _reserve_copies(self, copy_bytes: int, entry: CacheEntry) -> bool:
        """Reserve memory for packed copies. Return whether there is enough that is free."""
        with self._lock:
            free = self.limit_bytes - self.used_bytes
            entry.copy_bytes = copy_bytes if copy_bytes <= free else 0
            return copy_bytes <= free

    def _make_room(self, weight_bytes: int, coming: CacheEntry) -> None:
        """Reserve memory for weights: free packed copies first, then models that no request uses. Wait if all are in use."""
        deadline = time.monotonic() + WAIT_S
        while True:
            with self._lock:
                entries = sorted((entry for entry in self._entries.values() if entry.weight_bytes), key=lambda entry: entry.used)
                for entry in entries:
                    if self.used_bytes + weight_bytes > self.limit_bytes and entry.copy_bytes and entry.model is not None:
                        entry.model.unpack()
                        entry.copy_bytes = 0
                if self.used_bytes + weight_bytes <= self.limit_bytes:
                    coming.weight_bytes = weight_bytes
                    return
                for entry in entries:
                    if entry.model is not None and self.engine.remove(entry.model):
                        entry.model, entry.weight_bytes, entry.copy_bytes = None, 0, 0
                        break
                else:
                    if time.monotonic() > deadline:
                        raise MemoryFullError("every model in memory is in use; try again in a moment.")
            time.sleep(0.1)
