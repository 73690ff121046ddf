"""Which models are resident: loaded when they are first asked for; the least recently used leave when memory runs short."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from acip.artifact.artifact import Artifact
from acip.errors import AcipError
from acip_platform.serve.engine.engine import Engine
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.http.errors import RequestError
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import ModelVersion

WEIGHTS = ("factors.safetensors", "dense.safetensors", "rest.safetensors")
COPIED = ("dense.safetensors", "rest.safetensors")  # at most, where weights are packed on a CPU
WAIT_S = 60.0  # for those who use a model that has to leave

_building = threading.Lock()  # accelerate makes parameters empty in every thread at once

Key = tuple[str, str, str]  # name, version, URI


def key_of(version: ModelVersion) -> Key:
    return version.name, version.version, version.uri


@dataclass
class CacheEntry:
    """A model that is there or is coming."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    served: ResidentModel | None = None
    needs: int = 0  # bytes
    copies: int = 0  # bytes of packed weights beside, which go before anything that is needed

    @property
    def holds(self) -> int:
        return self.needs + self.copies

    used: float = 0.0  # seconds of time.monotonic


class ModelCache:
    def __init__(
        self, engine: Engine, store: Store, device: str, limit_bytes: int, loaded: Callable[[ResidentModel], None] = lambda _: None
    ) -> None:
        self.engine, self.store, self.device, self.limit_bytes, self.loaded = engine, store, device, limit_bytes, loaded
        self._places: dict[Key, CacheEntry] = {}
        self._lock = threading.Lock()

    @property
    def resident(self) -> list[ResidentModel]:
        return [place.served for place in list(self._places.values()) if place.served is not None]

    def find(self, version: ModelVersion) -> ResidentModel | None:
        """The model, if it is there."""
        place = self._places.get(key_of(version))
        if place is None or place.served is None:
            return None
        place.used = time.monotonic()
        return place.served

    def get(self, version: ModelVersion) -> ResidentModel:
        """The model, loaded if it has to be: that takes its time, so not in an event loop."""
        with self._lock:
            place = self._places.setdefault(key_of(version), CacheEntry())
        with place.lock:
            place.used = time.monotonic()
            served = place.served  # which may leave again at any time
            if served is None:
                try:
                    served = place.served = self._load(version, place)
                except BaseException:
                    place.needs = place.copies = 0
                    raise
                self.loaded(served)
            return served

    def _load(self, version: ModelVersion, place: CacheEntry) -> ResidentModel:
        try:
            artifact = Artifact.open(self.store.fetch(version.uri))
        except AcipError as error:  # not the fault of who asks
            raise RequestError(str(error), "model", "artifact_unavailable", 503) from error
        needs = sum(artifact.manifest["files"][file]["bytes"] for file in WEIGHTS)
        if needs > self.limit_bytes:
            raise AcipError(
                f"{version.name} needs {needs:,} bytes of memory for all its sizes; this server may use {self.limit_bytes:,}. "
                "Raise memory_gb, or export one size with jobs/materialize.py."
            )
        self._make_room(needs, place)
        copies = sum(artifact.manifest["files"][file]["bytes"] for file in COPIED)
        with _building:
            served = ResidentModel(version, artifact, self.device, packed=self.device == "cpu" and self._spare(copies, place))
        place.copies = served.packed_bytes
        self.engine.add(served)
        return served

    def _spare(self, copies: int, place: CacheEntry) -> bool:
        """Reserve memory for packed weights, if there is as much that nobody has."""
        with self._lock:
            free = self.limit_bytes - sum(place.holds for place in self._places.values())
            place.copies = copies if copies <= free else 0
            return copies <= free

    def _make_room(self, needs: int, coming: CacheEntry) -> None:
        """Reserve memory: first that of packed weights, then that of models. Models that are in use are waited for."""
        deadline = time.monotonic() + WAIT_S
        while True:
            with self._lock:
                there = sorted((place for place in self._places.values() if place.needs), key=lambda place: place.used)
                for place in there:
                    if sum(place.holds for place in there) + needs > self.limit_bytes and place.copies and place.served is not None:
                        place.served.unpack()
                        place.copies = 0
                if sum(place.holds for place in there) + needs <= self.limit_bytes:
                    coming.needs = needs
                    return
                for place in there:
                    if place.served is not None and self.engine.remove(place.served):
                        place.served, place.needs, place.copies = None, 0, 0
                        break
                else:
                    if time.monotonic() > deadline:
                        raise RequestError("every model in memory is in use; try again in a moment.", "model", "memory_full", 503)
            time.sleep(0.1)
