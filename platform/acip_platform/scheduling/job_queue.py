"""The queue of a fleet's jobs. Each job starts as soon as its resources are free, and a failed job does not stop the others.

    waiting jobs, largest first  ->  running jobs  ->  outcomes, in the order in which jobs end

The first job in the queue is not starved: another job may overtake it only if the first job would still fit beside all jobs that
have overtaken it (`JobQueue`). It therefore waits only for the jobs that were running when it became first. A waiting job holds no
resources and is not submitted to Ray. Ray places the workers, and Ray Train replaces a worker whose node is lost.
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

POLL_S = 1.0  # between two looks at the nodes of the cluster
PATIENCE_S = 600.0  # after nodes are lost, until jobs that no longer fit are given up
MAX_CPUS = 4.0  # most CPUs of a worker with a GPU, by default

Nodes = Sequence[dict[str, float]]  # the resources of each node, with the keys "GPU" and "CPU"


@dataclass(frozen=True)
class Resources:
    """The resources of a job: a number of workers, and the GPUs and CPUs of each. A worker runs on one node."""

    gpus: float
    cpus: float
    workers: int = 1


def nodes() -> list[dict[str, float]]:
    """Return the resources of the live nodes of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def pool(text: str) -> list[dict[str, float]]:
    """Parse the nodes that an autoscaler may start: '8xGPU:1,CPU:14' is eight nodes. Ray does not report them to a job."""
    match = re.fullmatch(r"([1-9]\d{0,3})x([A-Za-z]+:\d+(?:,[A-Za-z]+:\d+)*)", text)
    node = {key: float(value) for key, value in (part.split(":") for part in match[2].split(","))} if match else {}
    if not match or not node.keys() <= {"GPU", "CPU"}:
        raise FleetError(f"the pool is {text!r}; it must be like 8xGPU:1,CPU:14: the number of nodes, and the GPUs and CPUs of each.")
    return [node] * int(match[1])


def resources_of(job: Job, nodes: Nodes) -> Resources:
    """Return the resources of `job` on a cluster of `nodes`. FleetError if it can never fit.

    Unless the job sets them, a worker gets one GPU if the cluster has GPUs, with up to 4 CPUs, limited to the CPUs per GPU of the
    smallest node. Without GPUs, it gets as many CPUs as all workers can have at the same time.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    gpus = job.gpus if job.gpus >= 0 else float(bool(with_gpus))
    most_cpus = int(max((node.get("CPU", 0) for node in nodes), default=0))
    if job.cpus >= 0:
        cpus = job.cpus
    elif gpus and with_gpus:
        cpus = min(MAX_CPUS, int(100 * gpus * min(node.get("CPU", 0) / node["GPU"] for node in with_gpus)) / 100)
    else:
        cpus = next((float(n) for n in range(most_cpus, 0, -1) if fits([Resources(gpus, n, job.num_workers)], nodes)), 1.0)
    resources = Resources(gpus, cpus, job.num_workers)
    if not fits([resources], nodes):
        workers = f"{resources.workers} workers with " if resources.workers > 1 else ""
        available = [sum(node.get(kind, 0) for node in nodes) for kind in ("GPU", "CPU")]
        raise FleetError(
            f"{job.name} needs {workers}{gpus:g} GPUs and {cpus:g} CPUs; the cluster has {available[0]:g} and {available[1]:g}"
            f"{f' on {len(nodes)} nodes' if len(nodes) > 1 else ''}. Lower num_workers, gpus or cpus, add nodes, or list the "
            "nodes that an autoscaler may start with --pool."
        )
    return resources


def fits(requests: Sequence[Resources], nodes: Nodes) -> bool:
    """Return whether all workers of `requests` fit at the same time. First-fit decreasing."""
    free = sorted([node.get("GPU", 0.0), node.get("CPU", 0.0)] for node in nodes)  # nodes without GPUs first, for workers that need none
    for gpus, cpus in sorted(((each.gpus, each.cpus) for each in requests for _ in range(each.workers)), reverse=True):
        for node in free:
            if node[0] >= gpus - 1e-6 and node[1] >= cpus - 1e-6:
                node[0] -= gpus
                node[1] -= cpus
                break
        else:
            return False
    return True


def cost(job: Job) -> float:
    """Return parameters times tokens, to order jobs by; 0 if the number of parameters is not known."""
    return parameters(job) * job.windows * job.recipe.seq_len


def parameters(job: Job) -> float:
    """Estimate the number of parameters: half the bytes of a folder's weights, else the number in the base's or the job's name ('13b')."""
    folder = Path(job.base)
    if folder.is_dir() and (size := sum(file.stat().st_size for file in folder.glob("*.safetensors"))):
        return size / 2
    for name in (job.base, job.name):
        if match := re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z\d])", name.lower()):
            return float(match[1]) * {"b": 1e9, "m": 1e6}[match[2]]
    return 0.0


class JobQueue:
    """The waiting and running jobs of a fleet, and the rule that decides which job starts next. `shares` are their resources by name."""

    def __init__(self, jobs: Sequence[Job], shares: dict[str, Resources]) -> None:
        self.shares = shares

        def rank(job: Job) -> tuple[float, float, float]:
            each = shares[job.name]
            return each.workers * each.gpus, each.workers * each.cpus * (not each.gpus), cost(job)

        self.waiting = sorted(jobs, key=rank, reverse=True)  # stable: equal jobs keep the order of the file
        self.running: list[Job] = []
        self.overtook: list[Job] = []  # running jobs that started after the present first job became first
        self.first: Job | None = None

    def next(self, nodes: Nodes) -> Job | None:
        """Move the next job that may start on `nodes` to the running jobs and return it; None if no job may start."""
        eligible = [job for job in self.waiting if self._fit([job], nodes)]
        if not eligible:
            return None
        first = eligible[0]
        if first is not self.first:
            self.first, self.overtook = first, []
        for job in eligible:
            if self._fit([*self.running, job], nodes) and (job is first or self._fit([*self.overtook, job, first], nodes)):
                self.waiting.remove(job)
                self.running.append(job)
                self.overtook.append(job)
                return job
        return None

    def end(self, job: Job) -> None:
        """Remove a job that has ended."""
        self.running.remove(job)
        self.overtook = [other for other in self.overtook if other is not job]

    def _fit(self, jobs: list[Job], nodes: Nodes) -> bool:
        return fits([self.shares[job.name] for job in jobs], nodes)


@dataclass(frozen=True)
class Outcome:
    """The result of one job: a summary, or an error."""

    job: Job
    summary: dict[str, Any] | None  # what the worker returned; None after an error
    error: str | None


def run_all(
    jobs: Sequence[Job], shares: dict[str, Resources], run: Callable[[Job], dict[str, Any]], nodes: Callable[[], Nodes] = nodes
) -> Iterator[Outcome]:
    """Call `run` for each job in its own thread when it may start. Yield the outcomes in the order in which jobs end."""

    def guarded(job: Job) -> Outcome:
        try:
            return Outcome(job, run(job), None)
        except Exception as error:  # the other jobs continue, and the last screen shows the error
            return Outcome(job, None, root_cause(error))

    queue, running = JobQueue(jobs, shares), dict[Future[Outcome], Job]()
    threads = ThreadPoolExecutor(max_workers=max(1, len(jobs)))
    try:
        last_running = time.monotonic()
        while queue.waiting or running:
            present = nodes()
            while job := queue.next(present):
                running[threads.submit(guarded, job)] = job
            if running:
                last_running = time.monotonic()
            elif time.monotonic() - last_running > PATIENCE_S:
                break
            else:  # every node with room for a waiting job is lost
                time.sleep(POLL_S)
            for done in wait(running, POLL_S, FIRST_COMPLETED).done:
                queue.end(running.pop(done))
                yield done.result()
    finally:  # an interrupt does not wait for running jobs: they end when the connection to Ray closes
        threads.shutdown(wait=False, cancel_futures=True)
    for job in queue.waiting:
        yield Outcome(
            job, None, f"the cluster lost nodes, and within {PATIENCE_S / 60:g} minutes no node with room for this job was added."
        )


def root_cause(error: BaseException) -> str:
    """Return the message of the innermost exception. Ray wraps a worker's exception several times."""
    while True:
        inner = error.__cause__ or next(iter(getattr(error, "worker_failures", {}).values()), None)
        if not isinstance(inner, BaseException):
            return f"{type(error).__name__}: {error}".strip().splitlines()[-1] if not isinstance(error, AcipError) else str(error)
        error = inner
