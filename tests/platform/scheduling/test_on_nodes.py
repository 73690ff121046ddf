"""A fleet on a cluster of several raylets with simulated GPUs, one of which is lost."""

import re
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from acip_platform.scheduling.events import on_this_node
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import nodes, resources_of, run_all
from ray.cluster_utils import Cluster

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
    pages = [urllib.request.urlopen(url, timeout=PATIENCE_S).read().decode() for url in urls]
    lines = [match for page in pages for match in re.findall(rf"^{name}{{(.*)}}", page, re.M)]
    return {label for line in lines for label in re.findall(r'(\w+)="', line)} or {"nothing"}


@pytest.mark.slow
def test_a_fleet_survives_a_lost_node(cluster: Cluster) -> None:
    """A job with two workers runs first. Then single jobs run, and one of them finishes although it loses its node."""
    jobs = [Job(f"m{i}-{i}b", "lab/model") for i in range(1, 4)] + [Job("gang-70b", "lab/model", num_workers=2)]
    resources = {job.name: resources_of(job, nodes()) for job in jobs}
    log = Log.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    started: list[str] = []

    def start(job: Job) -> dict[str, Any]:
        started.append(job.name)
        return run(job, resources[job.name], log, 1.5)

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
    assert started == ["gang-70b", "m3-3b", "m2-2b", "m1-1b"]
    names = [row["name"] for row in ray.get(log.all.remote())]
    assert names.count(interrupted[0]) == 2, "the job restarted on the other node"


@pytest.mark.slow
def test_gpus_are_busy() -> None:
    busy_share, rows = occupancy(20, 2, 1.0)
    assert len(rows) == 20
    assert busy_share >= 0.9
