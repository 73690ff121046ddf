"""The jobs of a fleet side by side: each starts as soon as what it asks for is free, and one failing does not stop the others.

    waiting, widest and heaviest first  ->  running, on the nodes there are  ->  outcomes, as they come

The first in line is never starved: another may overtake it only where it would still fit beside all that overtook it
(`JobQueue`), so it waits for those alone that ran when it came first. A job that waits holds nothing and is not known to
Ray. Where each worker lands is Ray's decision; a worker whose node is lost is placed again by Ray Train.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from acip.errors import AcipError
from acip_platform.scheduling.fleet import FleetError, Job

LOOK_EVERY_S = 1.0  # for nodes that came or went
PATIENCE_S = 600.0  # with lost nodes, before what fits nowhere any more is given up
CPUS = 4.0  # of a worker that has a GPU, at most

Nodes = Sequence[dict[str, float]]  # the resources of each, "GPU" and "CPU" among them


@dataclass(frozen=True)
class Resources:
    """What a job gets of the cluster: `workers`, each with so many GPUs and CPUs on one node."""

    gpus: float
    cpus: float
    workers: int = 1


def nodes() -> list[dict[str, float]]:
    """The nodes of the cluster that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def pool(text: str) -> list[dict[str, float]]:
    """'8xGPU:1,CPU:14' -> the eight nodes that an autoscaler may start. Ray does not tell a job how many that are."""
    match = re.fullmatch(r"([1-9]\d{0,3})x([A-Za-z]+:\d+(?:,[A-Za-z]+:\d+)*)", text)
    node = {key: float(value) for key, value in (part.split(":") for part in match[2].split(","))} if match else {}
    if not match or not node.keys() <= {"GPU", "CPU"}:
        raise FleetError(f"a pool of {text!r}; it must be like 8xGPU:1,CPU:14: how many nodes, and the GPUs and CPUs of each.")
    return [node] * int(match[1])


def resources_of(job: Job, nodes: Nodes) -> Resources:
    """The part of `job` on a cluster of `nodes`. What can never fit is a FleetError now, not a wait without end.

    Unless the job says: one GPU, where there are any, and with it up to 4 CPUs, but no more than leave every GPU of a node its
    own; on CPUs alone, as many as its workers can have.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    gpus = job.gpus if job.gpus >= 0 else float(bool(with_gpus))
    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    if job.cpus >= 0:
        cpus = job.cpus
    elif gpus and with_gpus:
        cpus = min(CPUS, int(100 * gpus * min(node.get("CPU", 0) / node["GPU"] for node in with_gpus)) / 100)
    else:
        cpus = next((float(n) for n in range(most, 0, -1) if fits([Resources(gpus, n, job.num_workers)], nodes)), 1.0)
    part = Resources(gpus, cpus, job.num_workers)
    if not fits([part], nodes):
        workers = f"{part.workers} workers with " if part.workers > 1 else ""
        have = [sum(node.get(kind, 0) for node in nodes) for kind in ("GPU", "CPU")]
        raise FleetError(
            f"{job.name} asks for {workers}{gpus:g} GPUs and {cpus:g} CPUs; the cluster has {have[0]:g} and {have[1]:g}"
            f"{f' on {len(nodes)} nodes' if len(nodes) > 1 else ''}. Lower what is asked for (num_workers, gpus, cpus), add "
            "nodes, or name with --pool what an autoscaler may start."
        )
    return part


def fits(parts: Sequence[Resources], nodes: Nodes) -> bool:
    """Whether all these workers have room at the same time: the largest first, each on the first node that has it."""
    free = sorted([node.get("GPU", 0.0), node.get("CPU", 0.0)] for node in nodes)  # what needs no GPU goes where there is none
    for gpus, cpus in sorted(((part.gpus, part.cpus) for part in parts for _ in range(part.workers)), reverse=True):
        for node in free:
            if node[0] >= gpus - 1e-6 and node[1] >= cpus - 1e-6:
                node[0] -= gpus
                node[1] -= cpus
                break
        else:
            return False
    return True


def cost(job: Job) -> float:
    """Parameters times tokens, to compare jobs by; 0 where nothing at hand tells the parameters."""
    return parameters(job) * job.windows * job.recipe.seq_len


def parameters(job: Job) -> float:
    """About how many: half the bytes of a folder's weights, else what the base's name says, or the job's ('Llama-2-13b')."""
    folder = Path(job.base)
    if folder.is_dir() and (size := sum(file.stat().st_size for file in folder.glob("*.safetensors"))):
        return size / 2
    for name in (job.base, job.name):
        if match := re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z\d])", name.lower()):
            return float(match[1]) * {"b": 1e9, "m": 1e6}[match[2]]
    return 0.0


class JobQueue:
    """Who waits, who runs, and who may start on the nodes there are."""

    def __init__(self, jobs: Sequence[Job], shares: dict[str, Resources]) -> None:
        self.shares = shares

        def rank(job: Job) -> tuple[float, float, float]:
            part = shares[job.name]
            return part.workers * part.gpus, part.workers * part.cpus * (not part.gpus), cost(job)

        self.waiting = sorted(jobs, key=rank, reverse=True)  # stable: equals in the order of the file
        self.running: list[Job] = []
        self.overtook: list[Job] = []  # of those that run: who started after the first in line had come first
        self.first: Job | None = None

    def next(self, nodes: Nodes) -> Job | None:
        """The job that starts now, if one may."""
        possible = [job for job in self.waiting if self._fit([job], nodes)]
        if not possible:
            return None
        first = possible[0]
        if first is not self.first:
            self.first, self.overtook = first, []
        for job in possible:
            if self._fit([*self.running, job], nodes) and (job is first or self._fit([*self.overtook, job, first], nodes)):
                self.waiting.remove(job)
                self.running.append(job)
                self.overtook.append(job)
                return job
        return None

    def end(self, job: Job) -> None:
        self.running.remove(job)
        self.overtook = [other for other in self.overtook if other is not job]

    def _fit(self, jobs: list[Job], nodes: Nodes) -> bool:
        return fits([self.shares[job.name] for job in jobs], nodes)


@dataclass(frozen=True)
class Outcome:
    job: Job
    summary: dict[str, Any] | None  # what the worker returned
    error: str | None


def run_all(
    jobs: Sequence[Job], shares: dict[str, Resources], run: Callable[[Job], dict[str, Any]], nodes: Callable[[], Nodes] = nodes
) -> Iterator[Outcome]:
    """`run` each job in a thread of its own when its turn comes; outcomes as they come."""

    def guarded(job: Job) -> Outcome:
        try:
            return Outcome(job, run(job), None)
        except Exception as error:  # whatever it is, the other models go on and the last screen says it
            return Outcome(job, None, root_cause(error))

    line, running = JobQueue(jobs, shares), dict[Future[Outcome], Job]()
    threads = ThreadPoolExecutor(max_workers=max(1, len(jobs)))
    try:
        moved = time.monotonic()
        while line.waiting or running:
            there = nodes()
            while job := line.next(there):
                running[threads.submit(guarded, job)] = job
            if running:
                moved = time.monotonic()
            elif time.monotonic() - moved > PATIENCE_S:
                break
            else:  # every node that could hold what waits is lost
                time.sleep(LOOK_EVERY_S)
            for done in wait(running, LOOK_EVERY_S, FIRST_COMPLETED).done:
                line.end(running.pop(done))
                yield done.result()
    finally:  # who interrupts doesn't wait for what runs: it ends with Ray's connection
        threads.shutdown(wait=False, cancel_futures=True)
    for job in line.waiting:
        yield Outcome(job, None, f"the cluster lost nodes, and {PATIENCE_S / 60:g} minutes later none had come that it fits on.")


def root_cause(error: BaseException) -> str:
    """The innermost message: Ray wraps a worker's exception several times."""
    while True:
        inner = error.__cause__ or next(iter(getattr(error, "worker_failures", {}).values()), None)
        if not isinstance(inner, BaseException):
            return f"{type(error).__name__}: {error}".strip().splitlines()[-1] if not isinstance(error, AcipError) else str(error)
        error = inner
