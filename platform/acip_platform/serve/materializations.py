"""Materializations: sizes of registered models that are exported to the store in the background, each one once.

    queued -> running -> succeeded | failed        one Ray task each (export_task), started by the Coordinator, at most `at_once` of them

The id is a hash of the version and its cut (`Cut.key`), so budgets that result in the same cut share one materialization. The store is the
source of truth: an export is a folder `exports/NAME/VERSION/size-0.6000[-bytes][-KIND]-HASH-CHECKSUM` whose provenance.json is written
last. A restarted server, or another one, reads the exports from there. The Coordinator holds the records of the others, so each HTTP
replica finds all of them. Failed and deleted materializations can be requested again.

A record's `sha256` is the hash of the folder's provenance.json, which lists the SHA-256 of every other file, so it covers the whole
folder. `bytes` is the total of all its files.
"""

import asyncio
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from acip.errors import AcipError, ArtifactError
from acip.export.folder import PROVENANCE
from acip.export.quantization import Kind, counted, kind_of
from acip.sizing.budget import Budget, Convention
from acip.sizing.cut_table import CutTable
from acip_platform.serve.coordinator import Coordinator, Record
from acip_platform.serve.engine.resident_model import removed_at_stop
from acip_platform.serve.export_task import Work, sums
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.http.requests import naming_field
from acip_platform.serve.replica_errors import converted
from acip_platform.serve.size_facts import size_facts
from acip_platform.settings import Settings
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.registry import ModelVersion

EXPORTS = "exports"  # key in the store
REFRESH_INTERVAL_S = 30.0  # the shortest interval between two listings of the store
MAX_TABLES = 16  # cut tables in the cache, one per version

log = logging.getLogger("ray.serve")


class Materializations:
    """The materializations of one store. `coordinator` is the handle of the Coordinator, which runs them."""

    def __init__(self, settings: Settings, coordinator: "DeploymentHandle[Coordinator]", keep: int = 1000) -> None:
        self.settings, self.coordinator, self.keep = settings, coordinator, keep
        self.store = Store.of(settings)
        self._stored: dict[str, Record] = {}  # complete exports in the store, as far as they are known
        self._refreshing, self._refreshed = asyncio.Lock(), -REFRESH_INTERVAL_S
        self._listed: set[str] = set()  # URIs of the last listing of the store
        self._listed_at = 0.0  # time of that listing, in seconds since 1970
        self._tables: dict[str, tuple[CutTable, int]] = {}  # by artifact: its table, and the number of directions removed at the stop ratio

    async def start(self, version: ModelVersion, budget: Budget, quantize: str | None = None) -> dict[str, Any]:
        """Return the record of this size of a version. Start its export unless it exists or is running.

        Raises BudgetError for a size that can't be reached, and RequestError with 400, 429 (the queue is full) or 503 (the store or the
        coordinator is not available).
        """
        record, work = await asyncio.to_thread(self._plan, version, budget, quantize)
        known = await self._ask("record", record.id)
        if known and known.active:
            return known.as_json()
        if known and known.status == "failed":  # the artifact may have been replaced
            self._tables.pop(version.uri, None)
            record, work = await asyncio.to_thread(self._plan, version, budget, quantize)
        stored = await asyncio.to_thread(self._read, f"{EXPORTS}/{_name(version.name, version.version)}", {record.id})
        if stored:
            return (known if known and known.uri == stored[0].uri else stored[0]).as_json()
        started = await self._ask("export", self.settings, record, work, known)
        if started is None:
            message = "too many materializations are queued or running. Try again when some have finished."
            raise RequestError(message, code="queue_full", status=429)
        return started.as_json()

    async def convention(self, version: ModelVersion) -> Convention:
        """Return the convention of sizes of a version that are requested without one."""
        return (await asyncio.to_thread(self._table, version.uri))[0].convention

    async def get(self, id: str) -> dict[str, Any]:
        """Return the record with this id.

        Raises RequestError with 404 if there is none or if its export was deleted from the store, and with 503 if the store is not
        available.
        """
        record = await self._ask("record", id) or self._stored.get(id)
        if record is None and re.fullmatch(r"mat-[0-9a-f]{16}", id):
            await self._refresh()
            record = self._stored.get(id)
        if record is None:
            message = f"no materialization {id!r}. GET /v1/materializations lists them; POST starts one."
            raise RequestError(message, "id", "materialization_not_found", 404)
        if record.status == "succeeded" and not await asyncio.to_thread(self._exists, record):
            again = await asyncio.to_thread(self._read, f"{EXPORTS}/{_name(record.model, record.version)}", {id})
            if not again:
                message = f"the export of materialization {id!r} was deleted from the store. POST /v1/materializations makes it again."
                raise RequestError(message, "id", "materialization_not_found", 404)
            record = again[-1]  # another server has made it again
        return record.as_json()

    async def list(self) -> Sequence[dict[str, Any]]:
        """Return all records, newest first. Exports that were deleted from the store are left out once it was listed again."""
        await self._refresh()
        records = {record.id: record for record in await self._ask("records") if not self._is_deleted(record)}
        records |= {id: record for id, record in self._stored.items() if id not in records or records[id].status == "failed"}
        oldest_first = sorted(records.values(), key=lambda record: record.created)
        return [record.as_json() for record in reversed(oldest_first[-self.keep :])]

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
        name = _name(version.name, version.version)
        title, key = f"{name.partition('/')[0]}-{size}", f"{EXPORTS}/{name}/size-{size}-{code}"
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

    def _exists(self, record: Record) -> bool:
        try:
            return self.store.exists(str(record.uri), PROVENANCE)
        except StoreError as error:
            raise RequestError(str(error), None, "store_unavailable", 503) from error

    def _is_deleted(self, record: Record) -> bool:
        """Return whether a record of the coordinator is of an export that the last listing of the store would hold, but does not."""
        listed_later = record.finished is not None and record.finished + REFRESH_INTERVAL_S < self._listed_at
        return record.status == "succeeded" and listed_later and record.uri not in self._listed

    def _read(self, under: str, wanted: set[str] | None, known: set[str] | None = None) -> Sequence[Record]:
        """Return complete exports in the store, oldest first.

        They are those with the ids `wanted`, or, for None, the newest at URIs that are not `known`.
        """
        try:
            listed_at, times = time.time(), self.store.complete(under, PROVENANCE)
            if wanted is None:
                self._listed, self._listed_at = set(times), listed_at
            ids = {uri: f"mat-{match[1]}" for uri in times if (match := re.search(r"/size-[^/]*-([0-9a-f]{16})-[0-9a-f]{8}$", uri))}
            uris = [uri for uri in ids if (uri not in (known or set()) if wanted is None else ids[uri] in wanted)]
            uris = sorted(uris, key=lambda uri: (times[uri], uri))[-self.keep :]
            raws = self.store.read([f"{uri}/{PROVENANCE}" for uri in uris])
        except StoreError as error:
            raise RequestError(str(error), None, "store_unavailable", 503) from error
        records = [_record(uri, raw, int(times[uri])) for uri, raw in zip(uris, raws, strict=True)]
        return [record for record in records if record is not None]

    async def _refresh(self) -> None:
        """Add exports of earlier or other processes from the store, at most every REFRESH_INTERVAL_S seconds."""
        async with self._refreshing:
            if time.monotonic() - self._refreshed < REFRESH_INTERVAL_S:
                return
            known = {str(record.uri) for record in self._stored.values()}
            for record in await asyncio.to_thread(self._read, EXPORTS, None, known):
                self._stored[record.id] = record
            self._stored = {id: record for id, record in self._stored.items() if record.uri in self._listed}
            for id in list(self._stored)[: -self.keep]:
                del self._stored[id]
            self._refreshed = time.monotonic()

    async def _ask(self, method: str, *args: Any) -> Any:
        with converted("coordinator"):
            return await getattr(self.coordinator, method).remote(*args)


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


def _name(model: str, version: str) -> str:
    """Return MODEL/VERSION as part of a key, with unsafe characters of the name replaced."""
    return re.sub(r"^\.+|[^A-Za-z0-9._-]", "_", model) + f"/{version}"
