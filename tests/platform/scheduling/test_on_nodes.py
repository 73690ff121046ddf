"""A cluster of several raylets with simulated GPUs: idle ones take a share of a job's tasks, and a fleet survives the loss of one."""

import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from acip_platform.scheduling.events import on_this_node
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import nodes, resources_of, run_all
from acip_platform.training.idle_workers import IdleWorkers
from ray.cluster_utils import Cluster
from torch import Tensor

from acip.calibration.bases import solve
from acip.coding.coded_model import code_layers
from acip.coding.statistics import LayerStatistics
from acip.utils.threads import each_in_turn
from tests.benchmarks.fleet import Log, occupancy, run
from tests.infra.test_dashboard import RAY_CORE
from tests.support.waiting import PATIENCE_S, until


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a cluster of two nodes with one simulated GPU each."""
    node: dict[str, Any] = {"num_cpus": 4, "num_gpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_ray_exports_the_dashboard_metrics(cluster: Cluster) -> None:
    """Ray exports the metrics of the dashboard that need no real GPU on the ports that Prometheus scrapes."""
    expected = {"ray_node_mem_used": set(), "ray_node_mem_total": set(), **RAY_CORE}

    def missing() -> list[str]:
        return [name for name in expected if not expected[name] <= exported_labels(name)]

    until(lambda: not missing(), lambda: f"Ray does not export {missing()}", every_s=1)


def exported_labels(name: str) -> set[str]:
    """Return the labels of a metric on the pages that Prometheus scrapes."""
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]
    try:
        pages = [urllib.request.urlopen(url, timeout=PATIENCE_S).read().decode() for url in urls]
    except OSError:  # a node does not serve its metrics yet
        return set()
    lines = [match for page in pages for match in re.findall(rf"^{name}{{(.*)}}", page, re.M)]
    return {label for line in lines for label in re.findall(r'(\w+)="', line)} or {"nothing"}


Task = tuple[Tensor]
Function = Callable[[Task], int]


def tasks(count: int) -> Iterator[Task]:
    return ((torch.arange(10.0 * count)[i : i + 1],) for i in range(count))


def square(item: Task) -> int:
    return int(item[0]) ** 2


def helped(folder: Path, function: Function = square) -> Function:
    """Return a function that computes in this process only after at least two idle workers have computed something."""
    own = os.getpid()

    def computed(item: Task) -> int:
        if os.getpid() != own:
            (folder / str(os.getpid())).touch()
            return function(item)
        until(lambda: len(list(folder.iterdir())) >= 2, "no idle workers compute tasks")
        return square(item)

    return computed


def idle_gpus() -> float:
    return ray.available_resources().get("GPU", 0)


def test_idle_workers_compute_a_share_of_the_tasks_in_order(cluster: Cluster, tmp_path: Path) -> None:
    workers = IdleWorkers(gpu=True, look_s=0.05)
    assert list(workers(helped(tmp_path), tasks(40), threads=1)) == [i**2 for i in range(40)]
    own, *others = workers.shares
    assert own > 0
    helpers = len([share for share in others if share])
    assert helpers >= 2
    assert own + sum(others) == 40
    assert workers.text == f"; {helpers} idle workers computed {sum(others)} of 40 parts"
    until(lambda: idle_gpus() == 2, "the idle workers hold their GPUs")


@pytest.mark.parametrize("end", ["dies", "fails"])
def test_tasks_of_lost_workers_are_computed_by_the_process_itself(end: str, cluster: Cluster, tmp_path: Path) -> None:
    def failing(item: Task) -> int:
        if end == "dies":
            os._exit(1)
        raise ValueError("out of memory there")

    workers = IdleWorkers(gpu=True, look_s=0.05)
    assert list(workers(helped(tmp_path, failing), tasks(20), threads=1)) == [i**2 for i in range(20)]
    assert workers.shares[0] == 20
    assert workers.text == ""


def test_errors_are_raised_and_idle_workers_released(cluster: Cluster, tmp_path: Path) -> None:
    def failing(item: Task) -> int:
        raise ValueError(f"task {int(item[0])} is wrong")

    with pytest.raises(ValueError, match="task 0 is wrong"):
        list(IdleWorkers(gpu=True, look_s=0.05)(failing, tasks(3), threads=1))
    results: Any = IdleWorkers(gpu=True, look_s=0.05)(helped(tmp_path), tasks(40), threads=1)
    assert next(results) == 0
    results.close()
    until(lambda: idle_gpus() == 2, "the idle workers hold their GPUs")


def test_short_work_and_held_resources_start_no_idle_workers(cluster: Cluster) -> None:
    workers = IdleWorkers(gpu=True)
    assert list(workers(square, tasks(5))) == [i**2 for i in range(5)]
    hold = ray.remote(num_gpus=1)(lambda: time.sleep(600))
    holders = [hold.remote() for _ in range(2)]
    until(lambda: idle_gpus() == 0, "the GPUs are not held")
    workers = IdleWorkers(gpu=True, look_s=0.0)
    assert list(workers(square, tasks(5))) == [i**2 for i in range(5)]
    assert workers.shares == [5]
    for holder in holders:
        ray.cancel(holder, force=True)
    until(lambda: idle_gpus() == 2, "the GPUs are still held")


def test_codes_and_bases_of_idle_workers_equal_those_of_the_process(cluster: Cluster) -> None:
    """All have one thread, and the same processor."""
    torch.manual_seed(0)
    layers = {f"layer{i}": torch.nn.Linear(24, 16, bias=False, dtype=torch.bfloat16) for i in range(30)}
    moments = {name: torch.randn(64, 24) for name in layers}
    metrics = {name: x.T @ x for name, x in moments.items()}
    statistics = {name: LayerStatistics(metric, torch.ones(16)) for name, metric in metrics.items()}

    def results(spread: Any) -> tuple[list[Any], list[Tensor]]:
        coded = dict(code_layers(layers, statistics, [0.05, 0.02], spread=spread))
        solved = solve(layers, metrics, spread=spread)
        assert list(coded) == list(solved) == list(layers)
        return [(bytes(v.stream), v.steps) for each in coded.values() for v in each.versions], list(solved.values())

    class Slow(IdleWorkers):
        """Idle workers that have computed a task before this process computes one."""

        def __call__(self, function: Any, items: Any, threads: int = 0) -> Iterator[Any]:
            own, shares = os.getpid(), self.shares

            def computed(item: Any) -> Any:
                if os.getpid() == own:
                    until(lambda: sum(shares[1:]) >= 1, "no idle worker computes tasks")
                return function(item)

            return super().__call__(computed, items, 1)

    codes, bases = results(Slow(gpu=True, look_s=0.05))
    expected_codes, expected_bases = results(each_in_turn)
    assert all(a == c and torch.equal(b, d) for (a, b), (c, d) in zip(codes, expected_codes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bases, expected_bases, strict=True))


@pytest.mark.slow
def test_a_fleet_survives_a_lost_node(cluster: Cluster) -> None:
    """A job with two workers runs first. Then single jobs run, and one of them finishes although it loses its node."""
    jobs = [Job(f"m{i}-{i}b", "lab/model") for i in range(1, 4)] + [Job("gang-70b", "lab/model", num_workers=2)]
    resources = {job.name: resources_of(job, nodes()) for job in jobs}
    log = Log.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    started: list[str] = []

    def start(job: Job) -> dict[str, Any]:
        started.append(job.name)
        return run(job, resources[job.name], log, 15.0)

    (node,) = cluster.worker_nodes
    interrupted: list[str] = []

    def remove_node() -> None:
        """Remove the node while a single job runs on it."""

        def running_there() -> list[str]:
            return [row["name"] for row in ray.get(log.all.remote())[2:] if row["node"] == node.node_id]

        interrupted.extend(until(running_there, "no single job runs on the second node"))
        cluster.remove_node(node, allow_graceful=False)

    remover = threading.Thread(target=remove_node)
    remover.start()
    outcomes = list(run_all(jobs, resources, start))
    remover.join()
    assert {outcome.job.name: outcome.error for outcome in outcomes} == {job.name: None for job in jobs}
    assert outcomes[0].job.name == "gang-70b"
    assert (started[0], sorted(started[1:3]), started[3:]) == ("gang-70b", ["m2-2b", "m3-3b"], ["m1-1b"])
    names = [row["name"] for row in ray.get(log.all.remote())]
    assert names.count(interrupted[0]) == 2, "the job restarted on the other node"


@pytest.mark.slow
def test_gpus_are_busy() -> None:
    busy_share, rows = occupancy(20, 2, 3.0)
    assert len(rows) == 20
    assert busy_share >= 0.9
