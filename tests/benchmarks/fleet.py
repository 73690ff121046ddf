"""Measure how well a fleet uses the GPUs of a Ray cluster that loses a node during the run.

    python tests/benchmarks/fleet.py             20 models on 4 nodes with a fake GPU each, about 3 minutes
    python tests/benchmarks/fleet.py --quick     models that take a third of the time
    python tests/benchmarks/fleet.py --share     one model on a worker of a node with four fake GPUs; the others are idle and help
    python tests/benchmarks/fleet.py --check     exit with 1 if the occupancy is below 90 %, or a model is not finished

The nodes are separate raylets on this machine (`ray.cluster_utils.Cluster`). `acip_platform.scheduling.job_queue.run_all` schedules the
jobs. Each creates a placement group with the resources from `resources_of`, as Ray Train does. The work of a model is a sleep in
proportion to its parameters, +-20 %. Work on the lost node restarts on another node; the time until the loss counts as busy.

Occupancy is the GPU-seconds spent in sleeps, divided by the GPU-seconds of the live nodes, from the first start to the last end. It does
not include the start of Ray Train's workers (10 to 20 s).

With `--share`, the layers of one model are sleeps of equal length, in the order in which a job codes them. Occupancy is that of all four
GPUs until the last layer is finished; without help it would be 25 %. Idle workers are requested after 10 s and take a few seconds to start.
"""

import argparse
import random
import sys
import threading
import time
from typing import Any

import ray
import torch
from acip_platform.scheduling.events import on_this_node
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Resources, nodes, parameters, resources_of, run_all
from acip_platform.training.idle_workers import IdleWorkers
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

SIZES_B = (1, 3, 7, 7, 8, 13, 14)  # billions of parameters
SECONDS_PER_B = 3.0
GOAL = 0.9
SHARED_GOAL = 0.6  # of a model that takes minutes; the start of the workers counts


@ray.remote(num_cpus=0)
class Log:
    """Records the name, node and start of each task, and its end if it finished."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def start(self, name: str, node: str) -> int:
        self.rows.append({"name": name, "node": node, "start": time.time(), "end": None})
        return len(self.rows) - 1

    def end(self, row: int) -> None:
        self.rows[row]["end"] = time.time()

    def all(self) -> list[dict[str, Any]]:
        return self.rows


@ray.remote(max_retries=-1)
def work(log: Any, name: str, seconds: float) -> None:
    row = ray.get(log.start.remote(name, ray.get_runtime_context().get_node_id()))
    time.sleep(seconds)
    ray.get(log.end.remote(row))


def run(job: Job, part: Resources, log: Any, seconds: float) -> dict[str, Any]:
    """Run the tasks of one job in a placement group with one bundle per worker, as Ray Train does."""
    group = placement_group([{"GPU": part.gpus, "CPU": part.cpus}] * part.workers)
    try:
        bundles = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(part.workers)]
        ray.get([work.options(num_gpus=part.gpus, num_cpus=part.cpus, scheduling_strategy=bundle).remote(log, job.name, seconds)
                 for bundle in bundles])  # fmt: skip
    finally:
        remove_placement_group(group)
    return {}


def fleet(count: int, gangs: int, rng: random.Random) -> list[Job]:
    """Return `count` jobs in random order. `gangs` of them are 70B models on two workers."""
    jobs = [Job(f"m{i}-{rng.choice(SIZES_B)}b", "lab/model") for i in range(count - gangs)]
    jobs += [Job(f"m{i}-70b", "lab/model", num_workers=2) for i in range(count - gangs, count)]
    rng.shuffle(jobs)
    return jobs


def occupancy(count: int, gangs: int, seconds_per_b: float, machines: int = 4, seed: int = 0) -> tuple[float, set[str]]:
    """Run one fleet. Return the occupancy and the names of the finished models."""
    rng = random.Random(seed)
    jobs = fleet(count, gangs, rng)
    seconds = {job.name: min(20.0, parameters(job) / 1e9) * seconds_per_b * rng.uniform(0.8, 1.2) for job in jobs}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        workers = [cluster.add_node(num_cpus=4, num_gpus=1, object_store_memory=80 << 20) for _ in range(machines)]
        cluster.wait_for_nodes()
        log = Log.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
        shares = {job.name: resources_of(job, nodes()) for job in jobs}
        lost: list[tuple[str, float]] = []

        def lose_one() -> None:
            cluster.remove_node(workers[-1], allow_graceful=False)
            lost.append((workers[-1].node_id, time.time()))

        total = sum(seconds[job.name] * job.num_workers for job in jobs)
        killer = threading.Timer(0.4 * total / machines, lose_one)
        killer.start()
        done = set()
        for outcome in run_all(jobs, shares, lambda job: run(job, shares[job.name], log, seconds[job.name])):
            print(f"  {outcome.job.name:8s} {outcome.error or 'done'}", flush=True)
            done |= {outcome.job.name} if outcome.error is None else set()
        killer.cancel()
        return busy(ray.get(log.all.remote()), machines, lost), done
    finally:
        ray.shutdown()
        cluster.shutdown()


def shared_occupancy(layers: int, seconds: float, machines: int = 4) -> float:
    """Spread the layers of one model over its own worker and idle ones. Return the occupancy of all GPUs."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": machines, "num_gpus": machines - 1, "object_store_memory": 80 << 20}
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        workers, began = IdleWorkers(gpu=True), time.monotonic()

        def code(item: tuple[Any, ...]) -> None:
            time.sleep(seconds)

        for _ in workers(code, ((torch.zeros(1),) for _ in range(layers)), threads=1):
            pass
        took = time.monotonic() - began
        print(f"  {layers} layers of {seconds:g} s in {took:.0f} s{workers.text}")
        return layers * seconds / (machines * took)
    finally:
        ray.shutdown()
        cluster.shutdown()


def busy(rows: list[dict[str, Any]], machines: int, lost: list[tuple[str, float]]) -> float:
    first, last = min(row["start"] for row in rows), max(row["end"] for row in rows if row["end"])
    lost_at = dict(lost)
    used = sum((row["end"] or lost_at[row["node"]]) - row["start"] for row in rows)
    available = machines * (last - first) - sum(last - time_ for time_ in lost_at.values())
    print(f"  {used:.0f} of {available:.0f} GPU-seconds used, {len(rows)} tasks, {len(lost)} nodes lost")
    return used / available


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--share", action="store_true", help="idle GPUs help with the layers of one model")
    args = parser.parse_args()
    if args.share:
        share = shared_occupancy(70 if args.quick else 224, 1.5)
        print(f"GPU occupancy while one model is coded: {share:.1%}, without idle workers 25.0% (goal: {SHARED_GOAL:.0%})")
        return int(args.check and share < SHARED_GOAL)
    share, done = occupancy(20, 2, SECONDS_PER_B / (3 if args.quick else 1))
    print(f"GPU occupancy: {share:.1%} (goal: {GOAL:.0%}); {len(done)} of 20 models finished")
    return int(args.check and (share < GOAL or len(done) < 20))


if __name__ == "__main__":
    sys.exit(main())
