"""The models in memory. A model is loaded at its first request; the least recently used leave if memory runs short."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import CODES
from acip.errors import AcipError
from acip_platform.serve.engine.errors import MemoryFullError, ModelUnavailableError
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.storage.resident_files import ResidentFiles

if TYPE_CHECKING:  # they import boto3 and MLflow
    from acip_platform.storage.store import Store
    from acip_platform.tracking.registry import ModelVersion

WAIT_S = 60.0  # for the requests of a model that must be removed

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
    memory: "ModelMemory | None" = None  # of this model
    used: float = 0.0  # seconds of time.monotonic
    kept: int = 0  # the number of `ModelCache.keep` that it is in

    @property
    def total_bytes(self) -> int:
        return 0 if self.memory is None else self.memory.weight_bytes + self.memory.copy_bytes


class ModelMemory:
    """The memory of one model, as a `Memory` for its weights. `advance_bytes` are reserved for the weights that it loads first."""

    def __init__(self, cache: "ModelCache", name: str, advance_bytes: int) -> None:
        self.cache, self.name, self.advance_bytes = cache, name, advance_bytes
        self.weight_bytes = 0  # reserved; the model holds them or is reading them
        self.copy_bytes = 0  # of packed copies of weights, which are freed before anything else
        self._lock = threading.Lock()  # of the counts; nothing else is locked while it is held

    def reserve(self, bytes: int) -> None:
        with self._lock:
            advance = min(bytes, self.advance_bytes)
            self.advance_bytes -= advance
        if bytes > advance:
            self.cache.make_room(bytes - advance, self)

    def release(self, bytes: int) -> None:
        self.add(-bytes)

    def add(self, bytes: int) -> None:
        with self._lock:
            self.weight_bytes += bytes

    def end_advance(self) -> None:
        """Give back what was reserved in advance and not used."""
        with self._lock:
            self.weight_bytes -= self.advance_bytes
            self.advance_bytes = 0

    def reserve_copies(self, bytes: int) -> bool:
        return self.cache.reserve_copies(bytes, self)


class ModelCache:
    """Models by version. `on_load` is called with each model once it is loaded. `files` is a folder for files that replicas share."""

    def __init__(
        self,
        engine: Host,
        store: "Store",
        device: str,
        limit_bytes: int,
        on_load: Callable[[ResidentModel], None] = lambda _: None,
        code_copies: float = 1.0,
        kind: type[ResidentModel] = ResidentModel,
        max_size: str | None = None,
        files: Path | None = None,
    ) -> None:
        self.kind, self.max_size = kind, max_size
        self.files = files if device == "cpu" else None  # other devices have memory of their own
        self.engine, self.store, self.device, self.limit_bytes, self.on_load = engine, store, device, limit_bytes, on_load
        self.code_copies = code_copies
        self._entries: dict[Key, CacheEntry] = {}
        self._lock = threading.Lock()

    @property
    def resident(self) -> list[ResidentModel]:
        return [entry.model for entry in list(self._entries.values()) if entry.model is not None]

    @property
    def used_bytes(self) -> int:
        """The bytes of all weights and packed copies in memory, and of those that are being loaded."""
        return sum(entry.total_bytes for entry in list(self._entries.values()))

    def find(self, version: "ModelVersion") -> ResidentModel | None:
        """Return the model if it is in memory."""
        entry = self._entries.get(key_of(version))
        if entry is None or entry.model is None:
            return None
        entry.used = time.monotonic()
        return entry.model

    def starts_fast(self, version: "ModelVersion") -> bool:
        """Return whether this node has files of a version, so that loading it takes little more than mapping them."""
        try:
            return self.files is not None and ResidentFiles(self.files, Artifact.open(self.store.fetch(version.uri))).written
        except AcipError:
            return False

    @contextmanager
    def keep(self, version: "ModelVersion") -> Iterator[None]:
        """Inside the block, a model that is in memory does not leave it to make room for others."""
        with self._lock:
            entry = self._entries.setdefault(key_of(version), CacheEntry())
            entry.kept += 1
        try:
            yield
        finally:
            with self._lock:
                entry.kept -= 1

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
                    entry.memory = None
                    raise
                self.on_load(model)
            return model

    def _load(self, version: "ModelVersion", entry: CacheEntry) -> ResidentModel:
        try:
            artifact = Artifact.open(self.store.fetch(version.uri))
        except AcipError as error:
            raise ModelUnavailableError(str(error)) from error
        least_bytes = _first_bytes(artifact)
        if least_bytes > self.limit_bytes:
            sizes = "a coded size" if CODES in artifact.manifest else "all its sizes"
            raise AcipError(
                f"{version.name} needs {least_bytes:,} bytes of memory for {sizes}; this server may use {self.limit_bytes:,}. "
                "Raise memory_gb, or export one size with jobs/materialize.py."
            )
        memory = entry.memory = ModelMemory(self, version.name, least_bytes)
        self.make_room(least_bytes, memory)
        model = self.kind(
            version, artifact, self.device, packed=self.device == "cpu", memory=memory, code_copies=self.code_copies,
            max_size=self.max_size, files=None if self.files is None else ResidentFiles(self.files, artifact),
        )  # fmt: skip
        memory.end_advance()
        self.engine.add(model)
        return model

    def reserve_copies(self, copy_bytes: int, memory: ModelMemory) -> bool:
        """Reserve memory for packed copies. Return whether there is enough that is free."""
        with self._lock:
            if self.used_bytes + copy_bytes > self.limit_bytes:
                return False
            memory.copy_bytes += copy_bytes
            return True

    def make_room(self, weight_bytes: int, memory: ModelMemory) -> None:
        """Reserve memory for weights: free packed copies first, then codes and models that no request uses. Wait if all are in use.

        Raise a MemoryFullError if the model exceeds the limit alone, or if the others remain in use.
        """
        deadline = time.monotonic() + WAIT_S
        while True:
            with self._lock:
                shared = self._shared(memory)  # as it was before: a request that ends meanwhile makes room for the next attempt
                if self._free(weight_bytes, memory):
                    memory.add(weight_bytes)
                    return
                if memory.weight_bytes + weight_bytes > self.limit_bytes and (time.monotonic() > deadline or not shared):
                    raise MemoryFullError(
                        f"{memory.name} needs {memory.weight_bytes + weight_bytes:,} bytes of memory for this size and the others in use; "
                        f"this server may use {self.limit_bytes:,}. Request a smaller size, or raise memory_gb."
                    )
                if time.monotonic() > deadline:
                    raise MemoryFullError("every model in memory is in use; try again in a moment.")
            time.sleep(0.1)

    def _shared(self, memory: ModelMemory) -> bool:
        """Return whether requests hold several sizes of a model: the weights of others leave when these requests end."""
        return any(entry.memory is memory and entry.model is not None and entry.model.weights.sizes > 1 for entry in self._entries.values())

    def _free(self, weight_bytes: int, memory: ModelMemory) -> bool:
        """Free memory until `weight_bytes` fit. Return whether they do."""

        def fits() -> bool:
            return self.used_bytes + weight_bytes <= self.limit_bytes

        entries = sorted((entry for entry in self._entries.values() if entry.memory is not None), key=lambda entry: entry.used)
        for entry in entries:
            if not fits() and entry.memory is not None and entry.model is not None:
                entry.model.weights.unpack()
                entry.memory.copy_bytes = 0
        for entry in entries:
            if not fits() and entry.model is not None:
                entry.model.weights.drop_unused()
        for entry in entries:
            model = entry.model if entry.memory is not memory and not entry.kept else None
            if not fits() and model is not None and model.weights.close():
                self.engine.remove(model)
                entry.model, entry.memory = None, None
        return fits()


def _first_bytes(artifact: Artifact) -> int:
    """Return the bytes of the weights that are loaded first: those of one coded size, or, without codes, all."""
    codes = artifact.table().byte_sizes
    if codes is not None:
        return codes.memory(codes.versions(0))
    return sum(artifact.tensors(name).decoded_bytes for name in ("factors", "dense", "rest"))
