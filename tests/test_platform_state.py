"""Settings, store and registry on the embedded defaults."""

from pathlib import Path

import pytest
from acip_platform.settings import Settings
from acip_platform.store import Store, StoreError
from acip_platform.tracking import Registry, RegistryError, Tracking

from acip.artifact import Artifact


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings.from_env({"ACIP_HOME": str(tmp_path_factory.mktemp("home"))})


def test_registry_round_trip(settings: Settings) -> None:
    run = Tracking(settings, "fleet").start("model", "f1", {})
    run.params({"lr": 1e-3})
    run.metrics([(1, {"loss_nats": 3.0}), (2, {"loss_nats": 2.5})])
    assert run.last_step("loss_nats") == 2
    registry = Registry(settings)
    first = registry.register("tiny", "/somewhere/a", run.run_id, {"size": "any"})
    registry.set_alias(first)
    assert registry.register("tiny", "/somewhere/a", run.run_id, {}).version == first.version
    second = registry.register("tiny", "/somewhere/b", run.run_id, {})
    assert registry.resolve("tiny").uri == "/somewhere/a"
    assert registry.resolve("tiny", second.version).uri == "/somewhere/b"
    registry.set_alias(second)
    assert registry.resolve("tiny").uri == "/somewhere/b"
    run.finish("FINISHED")
    assert Tracking(settings, "fleet").start("model", "f1", {}).run_id == run.run_id
    with pytest.raises(RegistryError, match="did you mean 'tiny'"):
        registry.resolve("tinny")
    with pytest.raises(RegistryError, match="no version or alias 'challenger'"):
        registry.resolve("tiny", "challenger")


def test_passwords_are_not_shown() -> None:
    shown = repr(Settings.from_env({"MLFLOW_TRACKING_URI": "postgresql://user:hunter2@db/mlflow"}))
    assert "hunter2" not in shown
    assert "user:***@db" in shown


def test_secrets_are_not_passed_on(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    """Ray shows a job's environment to everyone who sees its dashboard."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3")
    passed = settings.worker_env()
    assert passed["AWS_ENDPOINT_URL"] == "http://s3"
    assert passed["ACIP_HOME"] == str(settings.home)
    assert "hunter2" not in passed.values()


def test_store_says_what_is_missing(settings: Settings, small_artifact: Artifact) -> None:
    store = Store(settings.store, settings.home / "cache")
    assert store.exists(str(small_artifact.folder))
    assert not store.exists(store.uri("nothing"))
    with pytest.raises(StoreError, match="moved or deleted"):
        store.fetch(store.uri("nothing"))
    with pytest.raises(StoreError, match="s3://bucket/prefix"):
        Store("s3://", Path()).exists("s3://bucket")
