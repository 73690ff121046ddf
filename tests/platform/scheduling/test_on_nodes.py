"""A fleet on a cluster of several nodes (raylets of their own, with GPUs that only Ray believes in), of which one is lost."""

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
    """Two nodes with a GPU each."""
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


def test_ray_counts_what_the_dashboard_shows(cluster: Cluster) -> None:
    """Those of Ray's metrics that need no real GPU, at the ports that Prometheus asks."""
    wanted = {"ray_node_mem_used": set(), "ray_node_mem_total": set(), **RAY_CORE}

    def missing() -> list[str]:
        return [name for name in wanted if not wanted[name] <= _labels(name)]

    until(lambda: not missing(), lambda: f"Ray does not tell {missing()}", every_s=1)


def _labels(name: str) -> set[str]:
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]
    pages = [urllib.request.urlopen(url, timeout=PATIENCE_S).read().decode() for url in urls]
    lines = [match for page in pages for match in re.findall(rf"^{name}{{(.*)}}", page, re.M)]
    return {label for line in lines for label in re.findall(r'(\w+)="', line)} or {"nothing"}


@pytest.mark.slow
def test_a_fleet_goes_on_where_a_node_was_lost(cluster: Cluster) -> None:
    """A gang of two first; then single ones, of which one loses its node, and is done all the same."""
    jobs = [Job(f"m{i}-{i}b", "lab/model") for i in range(1, 4)] + [Job("gang-70b", "lab/model", num_workers=2)]
    shares = {job.name: resources_of(job, nodes()) for job in jobs}
    log = Log.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    started: list[str] = []

    def start(job: Job) -> dict[str, Any]:
        started.append(job.name)
        return run(job, shares[job.name], log, 1.5)

    (node,) = cluster.worker_nodes
    struck: list[str] = []

    def strike() -> None:
        """Take the node away when a single job works on it."""

        def look() -> list[str]:
            return [row["name"] for row in ray.get(log.all.remote())[2:] if row["node"] == node.node_id]

        struck.extend(until(look, "no single job works on the second node"))
        cluster.remove_node(node, allow_graceful=False)

    striker = threading.Thread(target=strike)
    striker.start()
    outcomes = list(run_all(jobs, shares, start))
    striker.join()
    assert {outcome.job.name: outcome.error for outcome in outcomes} == {job.name: None for job in jobs}
    assert outcomes[0].job.name == "gang-70b"
    assert started == ["gang-70b", "m3-3b", "m2-2b", "m1-1b"]
    names = [row["name"] for row in ray.get(log.all.remote())]
    assert names.count(struck[0]) == 2, "begun again on the other node"


@pytest.mark.slow
def test_the_gpus_are_busy() -> None:
    share_of, done = occupancy(20, 2, 1.0)
    assert len(done) == 20
    assert share_of >= 0.9
