"""MLflow on PostgreSQL: concurrent fleets and concurrent promotions lose nothing and leave one champion."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.promotion import compare, promote_if_better
from acip_platform.tracking.registry import CANDIDATE, CHAMPION, Registry
from acip_platform.tracking.runs import Tracking

from acip.artifact.artifact import Artifact
from tests.conftest import write_fleet
from tests.platform.tracking.test_promotion_races import Contest
from tests.support import postgres
from tests.support.ports import free_port
from tests.support.waiting import PATIENCE_S, exit_code, stop, until

pytestmark = pytest.mark.slow  # some minutes, for the database, the tables of MLflow, and four calibrations
CALIBRATE = Path(__file__).parents[3] / "jobs" / "calibrate_all.py"


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres.running() as uri:
        yield uri


@pytest.fixture(scope="module")
def mlflow(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a tracking server on the database, as infra/ does, and return its URL."""
    folder = tmp_path_factory.mktemp("mlflow")
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        str(Path(sys.executable).with_name("mlflow")), "server", "--backend-store-uri", database, "--artifacts-destination", str(folder),
        "--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--workers", "2",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:

        def is_healthy() -> bool:
            assert server.poll() is None, (folder / "log").read_text()
            try:
                return httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
            except httpx.TransportError:
                return False

        until(is_healthy, lambda: f"the MLflow server does not respond:\n{(folder / 'log').read_text()}")
        yield url
    finally:
        stop(server)


def test_concurrent_promotions_leave_the_best_champion(database: str, small_artifact: Artifact, tmp_path: Path) -> None:
    """Eight registries on one database promote concurrently. The result is eight versions with verdicts and one champion."""
    contest = Contest(small_artifact, tmp_path / "home", database)
    barrier = threading.Barrier(8)

    def register_and_promote(i: int) -> str:
        registry = Registry(contest.settings)
        artifact = contest.artifacts[i % 4]
        barrier.wait(PATIENCE_S)
        version = registry.register("contested", f"{artifact.folder}{'/.' * (i // 4)}", "", {"quality": str(i % 4)})
        return str(promote_if_better(registry, contest.store, version, artifact))

    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(register_and_promote, range(8)))
    versions = contest.registry.versions("contested", {})
    assert len(versions) == 8
    assert all(version.tags["verdict"] in verdicts for version in versions)
    champions = [version for version in versions if CHAMPION in version.aliases]
    assert [version.tags["quality"] for version in champions] == ["3"]
    assert all(CANDIDATE not in version.aliases for version in champions)


def test_two_concurrent_fleets(
    mlflow: str, s3_server: dict[str, str], small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fleets share a registry and a store. Both calibrate `small`, and each also calibrates a model of its own."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    prefix = f"s3://models/{tmp_path.name}"
    stores = {"ACIP_ARTIFACT_URI": f"{prefix}/artifacts", "ACIP_CHECKPOINT_URI": f"{prefix}/runs"}
    environment = {**os.environ, **stores, "MLFLOW_TRACKING_URI": mlflow, "RAY_ADDRESS": "local"}
    processes = []
    for i, fleet_name in enumerate(("one", "two")):
        models = [f"name: {name}, base: {small_base}, set: {{seed: {i}}}" for name in ("small", fleet_name)]
        fleet = write_fleet(tmp_path / f"{fleet_name}.yaml", "post_tune_steps: 20", *models)
        env = {**environment, "ACIP_HOME": str(tmp_path / fleet_name)}
        with (tmp_path / f"{fleet_name}.log").open("w") as log:
            command = [sys.executable, str(CALIBRATE), "--fleet", str(fleet)]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [exit_code(process, tmp_path / f"{fleet_name}.log") for process, fleet_name in zip(processes, ("one", "two"), strict=True)]
    finally:
        for process in processes:
            stop(process)
    logs = [(tmp_path / f"{fleet_name}.log").read_text() for fleet_name in ("one", "two")]
    assert codes == [0, 0], "\n".join(logs)

    settings = Settings.from_env(
        {"ACIP_HOME": str(tmp_path / "look"), "MLFLOW_TRACKING_URI": mlflow, "ACIP_ARTIFACT_URI": environment["ACIP_ARTIFACT_URI"]}
    )
    tracking, registry, store = Tracking(settings, "acip/small"), Registry(settings), Store(settings.store, settings.home)
    runs = tracking.client.search_runs([tracking.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["fleet small"] * 2 + ["one", "small", "small", "two"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in (run for run in runs if "artifact_uri" in run.data.tags):
        logged = {metric.step for metric in tracking.client.get_metric_history(run.info.run_id, "loss_nats")}
        assert logged == set(range(1, 21)), "every step is logged once"
        assert len(tracking.client.get_metric_history(run.info.run_id, "loss_nats")) == 20
    versions = registry.versions("small", {})
    assert len(versions) == 2 == len({version.uri for version in versions})
    assert [len(registry.versions(name, {})) for name in ("one", "two")] == [1, 1]
    (champion,) = [version for version in versions if CHAMPION in version.aliases]
    (candidate,) = [version for version in versions if version is not champion]
    assert not compare(store.open(candidate.uri).manifest, store.open(champion.uri).manifest, "the champion").leads
    assert all(version.tags["verdict"] for version in versions)
