"""What goes on while something that serving rests on is gone: the registry at the start and later, the artifact of a resident model."""

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
from tests.support.server import JOB, free_port
from tests.support.waiting import PATIENCE_S, until

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
ASKED: dict[str, Any] = {"model": "small@0.6", "prompt": "It was", "max_tokens": 8, "temperature": 0}
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}  # MLflow's client tries for minutes by default


@pytest.fixture
def away() -> dict[str, str]:
    """The environment of a registry whose server is not there."""
    return {**QUICK, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"}


@pytest.fixture
def folder(small_artifact: Artifact, tmp_path: Path) -> Path:
    """An artifact that is about to be deleted."""
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


def text(app: Application) -> str:
    status, body = app.post("/v1/completions", **ASKED)
    assert status == 200, body
    return str(body["choices"][0]["text"])


def change(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for key, value in env.items():
        monkeypatch.setenv(key, value)


# ---- the registry


def test_a_registry_that_is_away_at_the_start_is_named(away: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve deploy`: the reason that `serve status` shows."""
    change(monkeypatch, {**away, "ACIP_HOME": str(tmp_path)})
    with pytest.raises(RegistryAwayError, match=r"registry at http://127.0.0.1:\d+ can't be reached: .* Check MLFLOW_TRACKING_URI"):
        build({})


@pytest.mark.slow  # the whole job: its imports take longer than all the others
def test_the_job_says_in_a_line_that_the_registry_is_away(away: dict[str, str], tmp_path: Path) -> None:
    env = {**os.environ, **away, "ACIP_HOME": str(tmp_path), "RAY_ADDRESS": "local"}
    command = [sys.executable, str(JOB), "--port", str(free_port())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    assert f"error: the registry at {away['MLFLOW_TRACKING_URI']} can't be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_while_the_registry_is_away_what_is_served_is_served(
    app: Application, away: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = text(app)
    new = app.registry.register("small", f"{app.version.uri}/.", "", {})
    there = os.environ.get("MLFLOW_TRACKING_URI")
    change(monkeypatch, away)
    status, body = app.post("/v1/models/small/load", version=new.version)
    assert status == 503
    assert body["error"]["code"] == "registry_unavailable"
    assert away["MLFLOW_TRACKING_URI"] in body["error"]["message"]
    assert "Version 1 of small is served as before" in body["error"]["message"]
    assert text(app) == before

    app.replica.engine.close()
    app.start()  # an engine that is replaced meanwhile does not need the registry either
    until(lambda: app.ask("GET", "/ready")[0] == 200, "the new engine is not ready")
    assert text(app) == before

    assert there is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # it is back
    status, body = app.post("/v1/models/small/load", version=new.version)
    assert (status, body["version"]) == (200, new.version)


# ---- the artifact


def test_a_resident_model_outlives_its_artifact(app: Application, folder: Path) -> None:
    before = text(app)
    shutil.rmtree(folder)
    assert text(app) == before
    for size in (0.9, 0.45):  # sizes that were not asked for before
        assert app.post("/v1/completions", **{**ASKED, "model": f"small@{size}"})[0] == 200
    assert [app.ask("GET", path)[0] for path in ("/v1/models", "/v1/models/small", "/v1/models/small/tradeoff", "/ready")] == [200] * 4
    assert app.post("/v1/models/small/load", version="1")[0] == 200, "it is still in memory"
    status, body = app.post("/v1/materializations", model="small@0.6")
    assert (status, body["error"]["code"]) == (503, "artifact_unavailable"), "an export reads the artifact"


@pytest.mark.parametrize(
    ("lose", "says"),
    [
        (shutil.rmtree, "there is no folder {}. Was the artifact moved or deleted?"),
        (lambda folder: (folder / MANIFEST).unlink(), "{} holds no manifest.json"),
        (lambda folder: (folder / "factors.safetensors").unlink(), "{}/factors.safetensors is missing"),
        (lambda folder: os.truncate(folder / "dense.safetensors", 99), "{}/dense.safetensors is 99 bytes; its size in the manifest is"),
    ],
)
def test_what_is_loaded_later_says_what_is_missing(
    app: Application, small_artifact: Artifact, tmp_path: Path, lose: Callable[[Path], object], says: str
) -> None:
    other = Path(shutil.copytree(small_artifact.folder, tmp_path / "other"))
    version = app.registry.register("small", str(other), "", {})
    lose(other)
    status, body = app.post("/v1/models/small/load", version=version.version)
    assert (status, body["error"]["code"]) == (503, "artifact_unavailable")
    assert says.format(other) in body["error"]["message"]
    assert text(app), "version 1 is served as before"
    assert app.ask("GET", "/ready")[0] == 200


def test_an_engine_that_is_replaced_without_its_artifact_says_so_until_it_is_back(
    app: Application, folder: Path, small_artifact: Artifact
) -> None:
    before = text(app)
    shutil.rmtree(folder)
    app.replica.engine.close()
    app.start()
    until(lambda: b"load_failed" in app.ask("GET", "/ready")[1], "the engine does not say that it failed")
    status, body = app.ask("GET", "/ready")
    assert status == 503
    assert f"small can't be loaded: there is no folder {folder}".encode() in body
    assert app.post("/v1/completions", **ASKED)[0] == 503
    shutil.copytree(small_artifact.folder, folder)
    until(lambda: app.ask("GET", "/ready")[0] == 200, "it is not loaded again")
    assert text(app) == before
