"""The state that all HTTP replicas of an application share: the versions that requests chose, and the exports that run.

    every Api ──► Coordinator ──► one Ray task for each export (export_task)

It is a deployment with one replica, because neither the store nor the registry can hold this state: a choice of `POST .../load` belongs to
one endpoint, while several endpoints may share a registry; and a queue needs one place that counts. No completion passes through it.
If it dies, Ray Serve starts it again. The HTTP replicas then tell it the choices; queued and running exports are lost, and can be
requested again. Finished exports are in the store. This module imports neither torch nor MLflow, so that the process stays small.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from acip_platform.serve.export_task import Work, export_task
from acip_platform.settings import Settings

Choices = dict[str, tuple[str, dict[str, Any]]]  # model -> (version number or alias that a request chose, `user_config` at that time)
LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)  # errors of a call to a deployment whose replica is gone

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


class Coordinator:
    """The shared state of an application. Each export reserves `num_cpus`; at most `at_once` run, and `max_queued` wait."""

    def __init__(self, num_cpus: float = 1, at_once: int = 1, max_queued: int = 16, keep: int = 1000) -> None:
        self.chosen: Choices = {}
        self._changed = asyncio.Condition()
        self.keep, self.max_active = keep, at_once + max_queued
        self.task: Any = ray.remote(num_cpus=num_cpus, max_retries=0)(export_task)
        self._semaphore = asyncio.Semaphore(at_once)
        self._records: dict[str, Record] = {}
        self._background: set[asyncio.Task[None]] = set()  # the event loop keeps weak references only

    # ---- the served versions

    async def choose(self, name: str, which: str, config: dict[str, Any]) -> None:
        """Serve a version number or an alias of a model from now on, while `user_config` is `config`."""
        async with self._changed:
            self.chosen[name] = which, config
            self._changed.notify_all()

    async def choices(self, known: Choices) -> AsyncIterator[Choices]:
        """Yield the choices, at once and after each change. `known` are those that the caller received earlier."""
        self.chosen = known | self.chosen
        seen: Choices | None = None

        def is_new() -> bool:
            return self.chosen != seen

        while True:
            async with self._changed:
                await self._changed.wait_for(is_new)
                seen = dict(self.chosen)
            yield seen

    # ---- exports

    async def export(self, settings: Settings, record: Record, work: Work, known: Record | None) -> Record | None:
        """Start an export, or return the record of the one that runs, or that finished since the caller read `known`.

        None if the queue is full.
        """
        now = self._records.get(record.id)
        if now is not None and (now.active or now != known):
            return now
        if sum(other.active for other in self._records.values()) >= self.max_active:
            return None
        self._put(record)
        # a separate context: canceling a request cancels the Ray tasks that were started in its context
        running = asyncio.create_task(self._run(settings, record, work), context=contextvars.Context())
        self._background.add(running)
        running.add_done_callback(self._background.discard)
        return record

    async def record(self, id: str) -> Record | None:
        """Return the record of an export of this process, or None."""
        return self._records.get(id)

    async def records(self) -> list[Record]:
        """Return the records of all exports of this process."""
        return list(self._records.values())

    async def _run(self, settings: Settings, record: Record, work: Work) -> None:
        async with self._semaphore:
            try:
                async for progress in self.task.remote(settings, work):
                    record.update(**await progress)
            except Exception as error:
                log.exception("materialization %s failed", record.id)
                record.update(status="failed", error=_reason(error))

    def _put(self, record: Record) -> None:
        self._records.pop(record.id, None)
        self._records[record.id] = record
        finished = sorted((other for other in self._records.values() if not other.active), key=lambda other: other.finished or 0)
        for other in finished[: max(0, len(finished) - self.keep)]:
            del self._records[other.id]


def _reason(error: Exception) -> str:
    """Return the error message that clients receive for a task that failed without a result."""
    if isinstance(error, OutOfMemoryError):
        return "the node ran out of memory. Use a smaller size, or a node with more memory."
    if isinstance(error, WorkerCrashedError | NodeDiedError):
        return "the export process died: it was stopped, or its node ran out of memory. Try again."
    culprit = "Ray" if isinstance(error, RayError) else "the server"
    return f"{culprit} failed ({type(error).__name__}); the server's log has the details."
