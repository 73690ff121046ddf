"""Materializations: sizes of registered models that are exported to the store in the background, each one once.

    queued -> running -> succeeded | failed        one Ray task each (export_task), at most `at_once` of them at a time

The id is a hash of the version and its cut (`Cut.key`), so budgets that result in the same cut share one materialization. The store is the
source of truth: an export is a folder `exports/NAME/VERSION/size-0.6000[-bytes][-KIND]-HASH-CHECKSUM` whose provenance.json is written
last. A restarted server, or another one, reads the exports from there. Failed and deleted materializations can be requested again.

A record's `sha256` is the hash of the folder's provenance.json, which lists the SHA-256 of every other file, so it covers the whole
folder. `bytes` is the total of all its files.
"""

import asyncio
import contextvars
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError

from acip.errors import AcipError, ArtifactError
from acip.export.folder import PROVENANCE
from acip.export.quantization import Kind, counted, kind_of
from acip.sizing.budget import Budget, Convention
from acip.sizing.cut_table import CutTable
from acip_platform.serve.engine.resident_model import removed_at_stop
from acip_platform.serve.export_task import Work, export_task, sums
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.http.requests import naming_field
from acip_platform.serve.size_facts import size_facts
from acip_platform.settings import Settings
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.registry import ModelVersion

EXPORTS = "exports"  # key in the store
REFRESH_INTERVAL_S = 30.0  # the shortest interval between two listings of the store
MAX_TABLES = 16  # cut tables in the cache, one per version

log = logging.getLogger("ray.serve")


@dataclass
class Record:
    """One materialization, in the format that clients receive."""

    id: str
    model: str
    version: str
    size: dict[str, Any]
    quantize: str | None
    created: int
    status: str = "queued"
    uri: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    finished: int | None = None
    error: str | None = None

    @property
    def active(self) -> bool:
        return self.status in ("queued", "running")

    def update(self, **facts: Any) -> None:
        for key, value in facts.items():
            setattr(self, key, value)
        if not self.active:
            self.finished = int(time.time())

    def as_json(self) -> dict[str, Any]:
        return {"object": "materialization", **asdict(self)}


class Materializations:
    """The materializations of one store, for use in one event loop.

    Each Ray task reserves `num_cpus`, and is queued until they are free.
    """

    def __init__(self, settings: Settings, at_once: int = 1, num_cpus: float = 1, max_queued: int = 16, keep: int = 1000) -> None:
        self.settings, self.keep, self.max_active = settings, keep, at_once + max_queued
        self.store = Store.of(settings)
        self.task: Any = ray.remote(num_cpus=num_cpus, max_retries=0)(export_task)
        self._semaphore, self._refreshing, self._refreshed = asyncio.Semaphore(at_once), asyncio.Lock(), -REFRESH_INTERVAL_S
        self._records: dict[str, Record] = {}
        self._tables: dict[str, tuple[CutTable, int]] = {}  # by artifact: its table, and the number of directions removed at the stop ratio
        self._background: set[asyncio.Task[None]] = set()  # the event loop keeps weak references only

    async def start(self, version: ModelVersion, budget: Budget, quantize: str | None = None) -> dict[str, Any]:
        """Return the record of this size of a version. Start its export unless it exists or is running.

        Raises BudgetError for a size that can't be reached, and RequestError with 400, 429 (the queue is full) or 503 (the store is not
        available).
        """
        record, work = await asyncio.to_thread(self._plan, version, budget, quantize)
        if (known := self._records.get(record.id)) and known.active:
            return known.as_json()
        stored = await asyncio.to_thread(self._stored, f"{EXPORTS}/{_name(version)}", {record.id})
        known = self._records.get(record.id)  # read again: another request may have run meanwhile
        if known and (known.active or (stored and known.uri == stored[0].uri)):
            return known.as_json()
        if stored:
            self._put(stored[0])
            return stored[0].as_json()
        if sum(other.active for other in self._records.values()) >= self.max_active:
            message = f"{self.max_active} materializations are queued or running, which is the limit. Try again when some have finished."
            raise RequestError(message, code="queue_full", status=429)
        self._put(record)
        # a separate context: canceling a request cancels the Ray tasks that were started in its context
        running = asyncio.create_task(self._run(record, work), context=contextvars.Context())
        self._background.add(running)
        running.add_done_callback(self._background.discard)
        return record.as_json()

    async def convention(self, version: ModelVersion) -> Convention:
        """Return the convention of sizes of a version that are requested without one."""
        return (await asyncio.to_thread(self._table, version.uri))[0].convention

    async def get(self, id: str) -> dict[str, Any]:
        """Return the record with this id. Raises RequestError 404 if there is none."""
        if id not in self._records and re.fullmatch(r"mat-[0-9a-f]{16}", id):
            await self._refresh()
        if id not in self._records:
            message = f"no materialization {id!r}. GET /v1/materializations lists them; POST starts one."
            raise RequestError(message, "id", "materialization_not_found", 404)
        return self._records[id].as_json()

    async def list(self) -> Sequence[dict[str, Any]]:
        """Return all records, newest first."""
        await self._refresh()
        return [record.as_json() for record in sorted(self._records.values(), key=lambda record: -record.created)]

    async def _refresh(self) -> None:
        """Add exports of earlier or other processes from the store, at most every REFRESH_INTERVAL_S seconds."""
        async with self._refreshing:
            if time.monotonic() - self._refreshed < REFRESH_INTERVAL_S:
                return
            known = {id for id, record in self._records.items() if record.status == "succeeded"}
            for record in await asyncio.to_thread(self._stored, EXPORTS, None, known):
                if record.id not in self._records or self._records[record.id].status == "failed":
                    self._put(record)
            self._refreshed = time.monotonic()

    async def _run(self, record: Record, work: Work) -> None:
        async with self._semaphore:
            try:
                async for progress in self.task.remote(self.settings, work):
                    record.update(**await progress)
            except Exception as error:
                log.exception("materialization %s failed", record.id)
                record.update(status="failed", error=_reason(error))
        if record.status == "failed":
            self._tables.pop(work.artifact, None)  # the artifact may have been replaced

    def _plan(self, version: ModelVersion, budget: Budget, quantize: str | None) -> tuple[Record, Work]:
        """Return a new record, and the work that it stands for."""
        kind = _kind(quantize)
        table, at_stop = self._table(version.uri)
        budget = counted(budget, kind)
        with naming_field(budget):
            cut = table.cut(budget)
        try:
            kind = kind_of(cut, kind)
        except ArtifactError as error:
            raise RequestError(str(error), "quantize") from error
        identity = cut.removed if cut.versions is None else cut.key  # the ids of ranks are those of version 0.1
        code = hashlib.sha256(json.dumps([version.name, version.version, version.uri, identity, kind]).encode()).hexdigest()[:16]
        record = Record(f"mat-{code}", version.name, version.version, size_facts(cut, at_stop), kind, int(time.time()))
        size = f"{cut.sizes['linear']:.4f}" if cut.versions is None else f"{cut.sizes['bytes']:.4f}-bytes"
        size += f"-{kind}" if kind else ""
        facts = {key: getattr(record, key) for key in ("id", "model", "version", "size", "quantize")}
        title = f"{_name(version).partition('/')[0]}-{size}"
        key = f"{EXPORTS}/{_name(version)}/size-{size}-{code}"
        return record, Work(version.uri, budget, cut.key, kind, title, key, facts)

    def _table(self, uri: str) -> tuple[CutTable, int]:
        if uri not in self._tables:
            try:
                artifact = self.store.open(uri)
                table, recipe = artifact.table(), artifact.recipe
            except AcipError as error:
                raise RequestError(str(error), "model", "artifact_unavailable", 503) from error
            at_stop = removed_at_stop(table, recipe)
            while len(self._tables) >= MAX_TABLES:
                self._tables.pop(next(iter(self._tables)), None)
            self._tables[uri] = table, at_stop
        return self._tables[uri]

    def _stored(self, under: str, wanted: set[str] | None, known: set[str] | None = None) -> Sequence[Record]:
        """Return complete exports in the store, oldest first: those `wanted`, or, for None, the newest that are not `known`."""
        try:
            times = self.store.complete(under, PROVENANCE)
            ids = {uri: f"mat-{match[1]}" for uri in times if (match := re.search(r"/size-[^/]*-([0-9a-f]{16})-[0-9a-f]{8}$", uri))}
            uris = [uri for uri in ids if (ids[uri] not in (known or set()) if wanted is None else ids[uri] in wanted)]
            uris = sorted(uris, key=lambda uri: (times[uri], uri))[-self.keep :]
            raws = self.store.read([f"{uri}/{PROVENANCE}" for uri in uris])
        except StoreError as error:
            raise RequestError(str(error), None, "store_unavailable", 503) from error
        records = [_record(uri, raw, int(times[uri])) for uri, raw in zip(uris, raws, strict=True)]
        return [record for record in records if record is not None]

    def _put(self, record: Record) -> None:
        self._records.pop(record.id, None)
        self._records[record.id] = record
        finished = sorted((other for other in self._records.values() if not other.active), key=lambda other: other.finished or 0)
        for other in finished[: max(0, len(finished) - self.keep)]:
            del self._records[other.id]


def _record(uri: str, raw: bytes, finished: int) -> Record | None:
    """Return the record of a folder in the store, or None if its provenance does not describe a materialization."""
    try:
        facts: Mapping[str, Any] = json.loads(raw)["materialization"]
        return Record(**facts, created=finished, status="succeeded", uri=uri, finished=finished, **sums(raw))
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s/%s does not describe a materialization; the folder is skipped", uri, PROVENANCE)
        return None


def _kind(quantize: str | None) -> Kind | None:
    if quantize is None or quantize in ("nf4", "fp4", "int8"):
        return quantize  # type: ignore[return-value]
    raise RequestError(f'quantize is {quantize!r}; it must be "nf4", "fp4", "int8" or null.', "quantize")


def _name(version: ModelVersion) -> str:
    """Return NAME/VERSION as part of a key, with unsafe characters of the name replaced."""
    return re.sub(r"^\.+|[^A-Za-z0-9._-]", "_", version.name) + f"/{version.version}"


def _reason(error: Exception) -> str:
    """Return the error message that clients receive for a task that failed without a result."""
    if isinstance(error, OutOfMemoryError):
        return "the node ran out of memory. Use a smaller size, or a node with more memory."
    if isinstance(error, WorkerCrashedError | NodeDiedError):
        return "the export process died: it was stopped, or its node ran out of memory. Try again."
    culprit = "Ray" if isinstance(error, RayError) else "the server"
    return f"{culprit} failed ({type(error).__name__}); the server's log has the details."
