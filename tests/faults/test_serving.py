"""Serving without its dependencies: an unreachable registry, at the start or later, and a deleted artifact of a resident model."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from acip_platform.serve import replica
from acip_platform.serve.api import build
from acip_platform.tracking.registry import RegistryAwayError

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST
from tests.support.application import Application
from tests.support.ports import free_port
from tests.support.server import JOB
from tests.support.waiting import PATIENCE_S, until

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
COMPLETION: dict[str, Any] = {"model": "small@0.6", "prompt": "It was", "max_tokens": 8, "temperature": 0}
SHORT_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}  # by default MLflow retries for minutes


@pytest.fixture
def unreachable_registry() -> dict[str, str]:
    """Return the environment variables of a registry whose server is not running."""
    return {**SHORT_TIMEOUTS, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"}


@pytest.fixture
def folder(small_artifact: Artifact, tmp_path: Path) -> Path:
    """Return the folder of an artifact copy that a test may delete."""
    return Path(shutil.copytree(small_artifact.folder, tmp_path / "artifact"))


@pytest.fixture
def app(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Application]:
    monkeypatch.setenv("ACIP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(replica, "RETRY_S", (0.2, 0.2))
    app = Application(tmp_path / "home", Artifact.open(folder))
    until(lambda: app.ask("GET", "/ready")[0] == 200, "the model is not loaded")
    yield app
    app.close()


def generate(app: Application) -> str:
    status, body = app.post("/v1/completions", **COMPLETION)
    assert status == 200, body
    return str(body["choices"][0]["text"])


def set_environment(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for key, value in env.items():
        monkeypatch.setenv(key, value)


# ---- the registry


def test_build_names_an_unreachable_registry(unreachable_registry: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve deploy` raises the error that `serve status` shows."""
    set_environment(monkeypatch, {**unreachable_registry, "ACIP_HOME": str(tmp_path)})
    with pytest.raises(RegistryAwayError, match=r"registry at http://127.0.0.1:\d+ can't be reached: .* Check MLFLOW_TRACKING_URI"):
        build({})


@pytest.mark.slow  # it runs the whole job, whose imports take longer than all other tests here
def test_the_job_reports_an_unreachable_registry_in_one_line(unreachable_registry: dict[str, str], tmp_path: Path) -> None:
    env = {**os.environ, **unreachable_registry, "ACIP_HOME": str(tmp_path), "RAY_ADDRESS": "local"}
    command = [sys.executable, str(JOB), "--port", str(free_port())]
    finished = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert finished.returncode == 2
    assert f"error: the registry at {unreachable_registry['MLFLOW_TRACKING_URI']} can't be reached" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_resident_models_are_served_without_the_registry(
    app: Application, unreachable_registry: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = generate(app)
    new_version = app.registry.register("small", f"{app.version.uri}/.", "", {})
    original_uri = os.environ.get("MLFLOW_TRACKING_URI")
    set_environment(monkeypatch, unreachable_registry)
    status, body = app.post("/v1/models/small/load", version=new_version.version)
    assert status == 503
    assert body["error"]["code"] == "registry_unavailable"
    assert unreachable_registry["MLFLOW_TRACKING_URI"] in body["error"]["message"]
    assert "Version 1 of small is served as before" in body["error"]["message"]
    assert generate(app) == before

    app.replica.engine.close()
    app.start()  # a new engine does not need the registry either
    until(lambda: app.ask("GET", "/ready")[0] == 200, "the new engine is not ready")
    assert generate(app) == before

    assert original_uri is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the registry is available again
    status, body = app.post("/v1/models/small/load", version=new_version.version)
    assert (status, body["version"]) == (200, new_version.version)


# ---- the artifact


def test_a_resident_model_outlives_its_artifact(app: Application, folder: Path) -> None:
    before = generate(app)
    shutil.rmtree(folder)
    assert generate(app) == before
    for size in (0.9, 0.45):  # sizes that were not requested before
        assert app.post("/v1/completions", **{**COMPLETION, "model": f"small@{size}"})[0] == 200
    assert [app.ask("GET", path)[0] for path in ("/v1/models", "/v1/models/small", "/v1/models/small/tradeoff", "/ready")] == [200] * 4
    assert app.post("/v1/models/small/load", version="1")[0] == 200, "version 1 is still in memory"
    status, body = app.post("/v1/materializations", model="small@0.6")
    assert (status, body["error"]["code"]) == (503, "artifact_unavailable"), "an export needs the artifact"


@pytest.mark.parametrize(
    ("remove_files", "message"),
    [
        (shutil.rmtree, "there is no folder {}. Was the artifact moved or deleted?"),
        (lambda folder: (folder / MANIFEST).unlink(), "{} holds no manifest.json"),
        (lambda folder: (folder / "factors.safetensors").unlink(), "{}/factors.safetensors is missing"),
        (lambda folder: os.truncate(folder / "dense.safetensors", 99), "{}/dense.safetensors is 99 bytes; its size in the manifest is"),
    ],
)
def test_loading_a_damaged_artifact_names_the_missing_file(
    app: Application, small_artifact: Artifact, tmp_path: Path, remove_files: Callable[[Path], object], message: str
) -> None:
    copy = Path(shutil.copytree(small_artifact.folder, tmp_path / "other"))
    version = app.registry.register("small", str(copy), "", {})
    remove_files(copy)
    status, body = app.post("/v1/models/small/load", version=version.version)
    assert (status, body["error"]["code"]) == (503, "artifact_unavailable")
    assert message.format(copy) in body["error"]["message"]
    assert generate(app), "version 1 is still served"
    assert app.ask("GET", "/ready")[0] == 200


def test_a_new_engine_reports_a_missing_artifact_until_it_is_restored(app: Application, folder: Path, small_artifact: Artifact) -> None:
    before = generate(app)
    shutil.rmtree(folder)
    app.replica.engine.close()
    app.start()
    until(lambda: b"load_failed" in app.ask("GET", "/ready")[1], "the engine does not report its failure")
    status, body = app.ask("GET", "/ready")
    assert status == 503
    assert f"small can't be loaded: there is no folder {folder}".encode() in body
    assert app.post("/v1/completions", **COMPLETION)[0] == 503
    shutil.copytree(small_artifact.folder, folder)
    until(lambda: app.ask("GET", "/ready")[0] == 200, "the model is not loaded again")
    assert generate(app) == before
