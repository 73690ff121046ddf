"""The alias in the registry decides what is served. It may move while the server runs; a version that cannot be loaded changes nothing."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from acip_platform.serve import replica
from acip_platform.serve.engine.model_cache import ModelCache
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import ModelVersion

from acip.artifact.artifact import Artifact
from tests.support.application import Application
from tests.support.engines import ENGINE, Resident
from tests.support.waiting import until


@pytest.fixture
def application(small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Application]:
    monkeypatch.setenv("ACIP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(replica, "RETRY_S", (0.0, 0.0))
    application = Application(tmp_path / "home", small_artifact)
    application.api.versions.config = {"models": None, "alias": "champion"}
    until(lambda: application.replica.warm, "the first version is not loaded")
    yield application
    application.close()


def promote(application: Application, folder: Path) -> ModelVersion:
    """Register another version and move the champion's alias to it, as a person does in MLflow's UI."""
    version = application.registry.register("small", str(folder), "", {})
    application.registry.client.set_registered_model_alias("small", "champion", version.version)
    return version


def served(application: Application) -> str:
    status, body = application.post("/v1/completions", model="small", prompt="It was", max_tokens=2)
    assert status == 200
    version: str = body["version"]
    return version


def test_server_follows_the_champion(application: Application, small_artifact: Artifact, tmp_path: Path) -> None:
    assert served(application) == "1"
    new = promote(application, Path(shutil.copytree(small_artifact.folder, tmp_path / "new")))
    application.runner.run(application.api.versions.refresh())
    assert {model.version.version for model in application.replica.models.resident} == {"1", new.version}, "both are in memory"
    assert served(application) == new.version
    application.registry.set_alias(application.version)
    application.runner.run(application.api.versions.refresh())
    assert served(application) == "1", "a rollback is served, too"


def test_version_that_cannot_be_loaded_leaves_the_old_one(
    application: Application, small_artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server logs the failure once and shows it with the model. It tries again, and serves the version when it can be loaded."""
    new = promote(application, tmp_path / "new")
    with caplog.at_level(logging.ERROR, "ray.serve"):
        application.runner.run(application.api.versions.refresh())
        application.runner.run(application.api.versions.refresh())
    (line,) = [record.getMessage() for record in caplog.records if "stays" in record.getMessage()]
    assert line.startswith(f"small, version {new.version} can't be loaded: there is no folder")
    assert served(application) == "1"
    (card,) = application.runner.run(application.api.cards())
    assert card["version"] == "1" and card["load_error"].startswith(f"version {new.version} can't be loaded: there is no folder")
    shutil.copytree(small_artifact.folder, tmp_path / "new")
    application.runner.run(application.api.versions.refresh())
    assert served(application) == new.version
    (card,) = application.runner.run(application.api.cards())
    assert "load_error" not in card


def test_failed_version_is_not_tried_again_at_once(application: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "RETRY_S", (3600.0, 3600.0))
    fetched, fetch = list[str](), Store.fetch

    def counted(store: Store, uri: str) -> Path:
        fetched.append(uri)
        return fetch(store, uri)

    monkeypatch.setattr(Store, "fetch", counted)
    promote(application, tmp_path / "new")
    for _ in range(3):
        application.runner.run(application.api.versions.refresh())
    assert fetched == [str(tmp_path / "new")]


def test_restarted_engine_loads_the_present_champion(application: Application, small_artifact: Artifact, tmp_path: Path) -> None:
    new = promote(application, Path(shutil.copytree(small_artifact.folder, tmp_path / "new")))
    application.version = application.registry.resolve("small", "1")
    restarted = replica.EngineReplica(
        [ModelVersion("small", "1", application.version.uri, (), {}, "champion")], 60.0, "cpu", 1, None, engine=ENGINE
    )
    try:
        # the version at the deployment comes first if it starts fast, because it is most often the champion
        until(lambda: new.version in {model.version.version for model in restarted.models.resident}, "the present champion is not loaded")
        until(lambda: restarted.warm, "no version is warm")
    finally:
        restarted.engine.close()


def test_served_version_stays_in_memory_while_another_is_loaded(application: Application, small_artifact: Artifact, tmp_path: Path) -> None:
    """With memory for one model, the new one is refused rather than the served one removed."""
    cache: ModelCache = application.replica.models
    (model,) = cache.resident
    cache.limit_bytes = int(1.5 * sum(small_artifact.tensors(file).decoded_bytes for file in ("factors", "dense", "rest")))
    new = promote(application, Path(shutil.copytree(small_artifact.folder, tmp_path / "new")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acip_platform.serve.engine.model_cache.WAIT_S", 0.0)
        application.runner.run(application.api.versions.refresh())
        assert cache.resident == [model]
        assert served(application) == "1"
    application.runner.run(application.replica.load(application.registry.resolve("small", new.version)))
    assert [each.version.version for each in cache.resident] == [new.version], "without a served version to keep, the older one leaves"
    assert isinstance(cache.resident[0], Resident)
