"""Let idle workers of the cluster take a share of a job's independent tasks: the layers to code, and the eigenproblems of the bases.

    this process     computes tasks all the time, in its own threads
    idle workers     Ray actors on resources that no job holds, from LOOK_S after the start; each has up to two tasks

A task is a function and a tuple of tensors, so that an idle worker needs neither the base model nor the files of the job. If a worker
is lost or fails, this process computes its tasks. Results do not depend on the worker, apart from different kinds of processors.

Idle workers are released when the tasks are finished. Until then, a waiting job that needs their resources and others keeps waiting.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from acip.utils.threads import one_thread_each

LOOK_S = 10.0  # between looks for idle resources. Work that takes less time stays in this process.
START_S = 120.0  # until a worker that has not started is given up: its resources were taken by a job
MOST = 64  # workers
MEMORY = 1 << 30  # bytes of a node that Ray reserves for a worker: Python with torch takes a half, a layer of a 7B model the other
TASKS = 2  # of a worker at a time, so that it does not wait for the next one

T = TypeVar("T")
R = TypeVar("R")


@ray.remote(max_restarts=0)
class IdleWorker:
    """An actor that computes tasks."""

    def ready(self) -> None:
        torch.set_num_threads(1)

    def run(self, function: Callable[[Any], R], item: Any) -> R:
        return function(item)


class IdleWorkers:
    """The idle workers of a cluster, as an `acip.utils.threads.Spread`. `shares` counts the finished tasks: own ones first."""

    def __init__(self, gpu: bool, look_s: float = LOOK_S) -> None:
        self.needs = {"CPU": 1.0, "memory": float(MEMORY)} | ({"GPU": 1.0} if gpu else {})
        self.look_s = look_s
        self.shares = [0]

    def __call__(self, function: Callable[[T], R], items: Iterable[T], threads: int = 0) -> Iterator[R]:
        """Yield `function(item)` of each item in their order. Its error is raised; of several at a time, the one of the earliest item."""
        source, lost, results = enumerate(items), list[tuple[int, T]](), dict[int, R]()
        running: dict[Future[R], tuple[int, T, _Worker | None]] = {}
        own, at = 1 + (threads or torch.get_num_threads()), 0

        def start(pool: ThreadPoolExecutor, worker: _Worker | None) -> bool:
            """Start the next task. Lost ones are computed by this process."""
            if lost and worker is None:
                number, item = lost.pop()
            elif len(results) >= own + TASKS * len(workers) or (following := next(source, None)) is None:
                return False  # results that wait for an earlier one take memory
            else:
                number, item = following
            running[pool.submit(function, item) if worker is None else pool.submit(worker.run, function, item)] = (number, item, worker)
            return True

        with one_thread_each(threads) as pool, ThreadPoolExecutor(TASKS * MOST) as waiting, self._workers() as workers:
            looked = time.monotonic()
            while True:
                busy = [worker for _, _, worker in running.values()]
                for _ in range(own - busy.count(None)):
                    start(pool, None)
                if time.monotonic() - looked >= self.look_s:
                    looked = time.monotonic()
                    self._look(workers)
                for worker in workers:
                    for _ in range((TASKS - busy.count(worker)) * worker.started()):
                        start(waiting, worker)
                if not running:
                    return
                finished = wait(running, self.look_s, FIRST_COMPLETED).done
                for future in sorted(finished, key=lambda each: running[each][0]):
                    number, item, computed_by = running.pop(future)
                    if computed_by is not None and future.exception() is not None:
                        lost.append((number, item))
                        computed_by.lost = True
                    else:
                        results[number] = future.result()
                        self.shares[computed_by.number if computed_by else 0] += 1
                while at in results:
                    yield results.pop(at)
                    at += 1

    @property
    def text(self) -> str:
        """A part of a sentence that tells the share of the idle workers, "" for none."""
        helped = [count for count in self.shares[1:] if count]
        return f"; {len(helped)} idle workers computed {sum(helped)} of {sum(self.shares)} parts" if helped else ""

    @contextmanager
    def _workers(self) -> Iterator[list["_Worker"]]:
        workers: list[_Worker] = []
        try:
            yield workers
        finally:
            for worker in workers:
                worker.stop()

    def _look(self, workers: list["_Worker"]) -> None:
        """Give up lost workers, and request workers for idle resources, unless some have not started yet."""
        for worker in [each for each in workers if each.lost or each.late()]:
            worker.stop()
            workers.remove(worker)
        if not ray.is_initialized() or not all(worker.started() for worker in workers):
            return
        idle = ray.available_resources()
        count = min(int(idle.get(kind, 0) / needed) for kind, needed in self.needs.items())
        for _ in range(min(count, MOST - len(workers))):
            workers.append(_Worker(self.needs, len(self.shares)))
            self.shares.append(0)


class _Worker:
    """An idle worker, as this process knows it."""

    def __init__(self, needs: dict[str, float], number: int) -> None:
        self.number, self.lost, self.requested = number, False, time.monotonic()
        self.actor: Any = IdleWorker.options(  # type: ignore[attr-defined]
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            memory=needs["memory"],
            scheduling_strategy=PlacementGroupSchedulingStrategy(None),  # type: ignore[arg-type]  # not on the resources of this job
        ).remote()
        self.first: Any = self.actor.ready.remote()

    def started(self) -> bool:
        """Return whether the worker takes tasks."""
        if self.first is not None and ray.wait([self.first], timeout=0)[0]:
            self.first = None
        return self.first is None and not self.lost

    def late(self) -> bool:
        return self.first is not None and time.monotonic() - self.requested > START_S

    def run(self, function: Callable[[T], R], item: T) -> R:
        """Compute a task and wait for its result. Tensors are copied, so that a view is not sent with all of its storage."""
        assert isinstance(item, tuple)
        sent = tuple(part.detach().cpu().clone() if isinstance(part, Tensor) else part for part in item)
        result: R = ray.get(self.actor.run.remote(function, sent))
        return result

    def stop(self) -> None:
        ray.kill(self.actor)
