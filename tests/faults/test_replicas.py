"""Two HTTP replicas and two engines: what one HTTP replica knows, the other knows, and killed replicas cost only the requests in flight."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import torch
from acip_platform.serve.export_task import lock
from acip_platform.serve.http.edge import PROXY_ENV
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from acip.artifact.artifact import Artifact
from tests.support.ports import free_port
from tests.support.server import make_home
from tests.support.waiting import PATIENCE_S, until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")]
CLIENTS = 6
REPLICAS = {"Api": 2, "Engine": 2, "Coordinator": 1}
ARGUMENTS = {"http_replicas": 2, "replicas": 2, "num_cpus": 0.5, "export_cpus": 0, "drain_s": 1}
COMPLETION: dict[str, Any] = {"model": "small@0.6", "prompt": "It was", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@dataclass
class Endpoint:
    home: Path
    url: str

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def processes(self, deployment: str) -> list[psutil.Process]:
        """Return the processes of a deployment's replicas."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:acip:{deployment}" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def wait_for_replicas(self) -> None:
        """Wait until two HTTP replicas, two engines and the coordinator run."""

        def complete() -> bool:
            deployments = serve.status().applications["acip"].deployments
            states = {name: deployment.replica_states for name, deployment in deployments.items()}
            counts = {name: len(self.processes(name)) for name in states}  # Ray Serve notices a death later
            return counts == REPLICAS and states == {name: {"RUNNING": count} for name, count in REPLICAS.items()}

        until(complete, lambda: f"replicas are missing: {serve.status().applications['acip']}")

    def deploy(self, *deployments: dict[str, Any]) -> None:
        """Deploy the application like `serve deploy`."""
        application = {"name": "acip", "route_prefix": "/", "import_path": "acip_platform.serve.api:build", "args": ARGUMENTS}
        config = ServeDeploySchema.model_validate({"applications": [application | {"deployments": deployments}]})
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(config)

    def kill(self, deployment: str) -> float:
        """Kill one replica and return the time."""
        killed = self.processes(deployment)[0]
        killed.kill()
        killed.wait(PATIENCE_S)
        return time.monotonic()

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over its rows with the labels."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def versions(self) -> set[str]:
        """Return the versions in several answers. Ray Serve distributes the requests over both HTTP replicas."""
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda _: self.client.post("/v1/completions", json={**COMPLETION, "max_tokens": 1}).json(), range(24))
            return {answer["version"] for answer in answers}


@pytest.fixture(scope="module")
def endpoint(small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    home, port = make_home(tmp_path_factory.mktemp("replicas"), small_artifact, heldout_tokens), free_port()
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**PROXY_ENV, "ACIP_HOME": str(home), "RAY_metrics_report_interval_ms": "1000"}.items():
            environment.setenv(name, value)
        ray.init(address="local", num_cpus=2, object_store_memory=100 << 20, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        endpoint = Endpoint(home, f"http://127.0.0.1:{port}")
        endpoint.deploy()
        until(lambda: endpoint.client.get("/ready").status_code == 200, "the endpoint is not ready")
        endpoint.wait_for_replicas()
        yield endpoint
        endpoint.client.close()
        serve.shutdown()
        ray.shutdown()
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=PATIENCE_S)
    assert not alive, "Ray left processes behind"


def test_metrics_are_summed_over_the_replicas(endpoint: Endpoint) -> None:
    request = {**COMPLETION, "model": "talker@0.8"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: endpoint.client.post("/v1/completions", json=request), range(40)))
    assert {answer.status_code for answer in answers} == {200}
    labels = {"model": "talker", "size": "0.80"}
    tokens = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
    until(lambda: endpoint.metric("acip_generated_tokens_total", **labels) == tokens, "the tokens are not counted")
    assert endpoint.metric("acip_requests_total", model="talker", status="200") == 40
    assert endpoint.metric("acip_time_to_first_token_seconds_count", **labels) == 40
    assert endpoint.metric("acip_requests_running") == endpoint.metric("acip_requests_waiting") == 0
    (node,) = ray.nodes()
    exported = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
    series = [line for line in exported.splitlines() if line.startswith("ray_acip_requests_total") and 'model="talker"' in line]
    assert len(series) == 2, "both HTTP replicas must have answered, or this test shows nothing"


def test_a_version_chosen_at_one_replica_is_served_by_all(endpoint: Endpoint) -> None:
    registry = Registry(Settings.from_env())
    new = registry.register("small", str(endpoint.home / "talker"), "", {})
    assert endpoint.versions() == {"1"}
    endpoint.client.post("/v1/models/small/load", json={"version": new.version}).raise_for_status()
    until(lambda: endpoint.versions() == {new.version}, "an HTTP replica serves the old version")
    for deployment in ("Api", "Coordinator"):
        endpoint.kill(deployment)
        endpoint.wait_for_replicas()
        until(lambda: endpoint.versions() == {new.version}, f"the choice is lost with the {deployment}")
    endpoint.client.post("/v1/models/small/load", json={"alias": "champion"}).raise_for_status()
    until(lambda: endpoint.versions() == {"1"}, "an HTTP replica serves the chosen version")


def test_user_config_changes_the_alias_without_a_restart(endpoint: Endpoint) -> None:
    registry, engines = Registry(Settings.from_env()), endpoint.processes("Engine")
    candidate = registry.register("small", str(endpoint.home / "talker"), "", {})
    registry.set_alias(candidate, "candidate")
    endpoint.deploy({"name": "Api", "user_config": {"models": None, "alias": "candidate"}})
    until(lambda: endpoint.versions() == {candidate.version}, "the candidate is not served")
    endpoint.deploy()
    until(lambda: endpoint.versions() == {"1"}, "the champion is not served")
    assert endpoint.processes("Engine") == engines


def test_an_export_outlives_the_replica_that_started_it(endpoint: Endpoint) -> None:
    workplaces = endpoint.home / "exporting"
    workplaces.mkdir(parents=True, exist_ok=True)

    def records() -> list[dict[str, Any]]:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: endpoint.client.get(f"/v1/materializations/{id}"), range(16)))
        assert {answer.status_code for answer in answers} == {200}
        return [answer.json() for answer in answers]

    with lock(workplaces):  # the task waits for this lock
        id = endpoint.client.post("/v1/materializations", json={"model": "small@0.6"}).raise_for_status().json()["id"]
        until(lambda: all(record["status"] == "running" for record in records()), "an HTTP replica does not know that the export runs")
        for _ in range(2):
            endpoint.kill("Api")
        endpoint.wait_for_replicas()
        assert {record["status"] for record in records()} == {"running"}
        assert endpoint.client.post("/v1/materializations", json={"model": "small@0.6"}).json()["id"] == id
    until(lambda: all(record["status"] == "succeeded" for record in records()), lambda: f"the export does not end: {records()[0]}")
    assert endpoint.client.get(f"/v1/materializations/{id}/archive").status_code == 200


def test_killed_replicas_fail_only_the_requests_in_flight(endpoint: Endpoint) -> None:
    """Clients send one request after the other. Those that are sent after a replica was killed succeed, and the counts never fall."""
    stop, answered = threading.Event(), list[tuple[float, int]]()  # (when it was sent, status)

    def client(number: int) -> None:
        while not stop.is_set():
            sent = time.monotonic()
            answered.append((sent, httpx.post(f"{endpoint.url}/v1/completions", json=COMPLETION, timeout=PATIENCE_S).status_code))

    kills: list[float] = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            for deployment in ("Api", "Engine"):
                count = len(answered)
                until(lambda count=count: len(answered) > count + 30, "the endpoint does not answer")  # type: ignore[misc]
                counted = endpoint.metric("acip_requests_total", status="200")
                kills.append(endpoint.kill(deployment))
                endpoint.wait_for_replicas()
                assert endpoint.metric("acip_requests_total", status="200") >= counted
            count = len(answered)
            until(lambda: len(answered) > count + 30, "the endpoint does not answer")
        finally:
            stop.set()
        for finished in clients:
            finished.result()
    failed = [sent for sent, status in answered if status != 200]
    assert len(failed) <= len(kills) * CLIENTS
    late = [sent - kill for sent in failed for kill in kills[:1] if sent > kill]
    assert all(any(0 < kill - sent < PATIENCE_S for kill in kills) for sent in failed), (
        f"requests failed that were sent after the kill: {late}"
    )
