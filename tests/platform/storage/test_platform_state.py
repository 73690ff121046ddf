"""Settings, store, and registry with the default backends."""

from pathlib import Path

import pytest
from acip_platform.settings import Settings
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.registry import Registry, RegistryError
from acip_platform.tracking.runs import Tracking

from acip.artifact.artifact import Artifact
from acip.errors import AcipError


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
    assert registry.named("tiny").uri == registry.named(f"tiny@{second.version}").uri == "/somewhere/b"
    run.finish("FINISHED")
    assert Tracking(settings, "fleet").start("model", "f1", {}).run_id == run.run_id
    with pytest.raises(RegistryError, match="did you mean 'tiny'"):
        registry.resolve("tinny")
    with pytest.raises(RegistryError, match="no version or alias 'challenger'"):
        registry.resolve("tiny", "challenger")
    with pytest.raises(RegistryError, match="no version or alias '99999999999999999999'"):
        registry.named("tiny@" + 20 * "9")


def test_registry_holds_names_with_apostrophes(settings: Settings) -> None:
    """Other programs that share the registry may register them."""
    registry, run = Registry(settings), Tracking(settings, "fleet").start("model", "f2", {})
    registry.register("bob's model", "/somewhere/b", run.run_id, {})
    assert [version.uri for version in registry.versions("bob's model", {})] == ["/somewhere/b"]
    with pytest.raises(RegistryError, match="model \"bob's model\" has no version or alias 'champion'; it has 1"):
        registry.resolve("bob's model")


def test_passwords_are_not_shown() -> None:
    shown = repr(Settings.from_env({"MLFLOW_TRACKING_URI": "postgresql://user:hunter2@db/mlflow"}))
    assert "hunter2" not in shown
    assert "user:***@db" in shown


def test_storage_locations_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_env({"ACIP_ARTIFACT_URI": "here/artifacts", "ACIP_CHECKPOINT_URI": "s3://bucket/runs"})
    assert (settings.store, settings.runs) == (str(tmp_path / "here" / "artifacts"), "s3://bucket/runs")
    with pytest.raises(StoreError, match=r"http://x/y is not supported"):
        Store.of(settings).open("http://x/y")


@pytest.mark.parametrize(
    "uri", ["gs://bucket/x", "s3://", "s3:///x", "s3:/bucket/x", "file:/x", "file://x/y", "file:///x#1", "file:///x?y"]
)
def test_uris_that_name_another_place_are_refused(uri: str) -> None:
    with pytest.raises(AcipError, match=r"ACIP_ARTIFACT_URI is '.*'; it must be a folder, file:///folder, or s3://bucket/prefix"):
        Settings.from_env({"ACIP_ARTIFACT_URI": uri})


def test_special_characters_of_a_file_uri_stay_in_the_path(tmp_path: Path) -> None:
    """An artifact that is stored at file:///folder#1 must not replace the folder."""
    (tmp_path / "run").mkdir()
    kept = tmp_path / "run" / "kept"
    kept.touch()
    for name in ("run#1", "run?1"):
        new = tmp_path / "new"
        new.mkdir()
        (new / "manifest.json").touch()
        store = Store(f"file://{tmp_path}/{name}", tmp_path / "cache")
        assert store.exists(store.put(new, "small"))
        assert (tmp_path / name / "small" / "manifest.json").is_file()
    assert kept.is_file()
    with pytest.raises(StoreError, match=r"file://host/x is not supported"):
        Store("file://host/x", tmp_path / "cache").exists("file://host/x")


@pytest.mark.parametrize("name", ["ACIP_HOME", "ACIP_ARTIFACT_URI", "ACIP_CHECKPOINT_URI", "MLFLOW_TRACKING_URI"])
def test_home_folder_of_an_unknown_user_is_an_error(name: str) -> None:
    with pytest.raises(AcipError, match=f"{name} is '~no-such-user/x', whose home folder is not known"):
        Settings.from_env({name: "~no-such-user/x"})


def test_white_space_around_settings_is_ignored(tmp_path: Path) -> None:
    env = {"ACIP_HOME": f"{tmp_path}\n", "ACIP_ARTIFACT_URI": " s3://bucket/x\n", "MLFLOW_TRACKING_URI": "http://mlflow:5000\n"}
    settings = Settings.from_env(env)
    assert (settings.home, settings.store, settings.tracking_uri) == (tmp_path, "s3://bucket/x", "http://mlflow:5000")
    assert Settings.from_env(env | {"MLFLOW_TRACKING_URI": " "}).tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_secrets_are_not_passed_to_workers(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    """Worker variables contain no secrets, because the dashboard of Ray shows the environment of a job."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3")
    variables = settings.worker_env()
    assert variables["AWS_ENDPOINT_URL"] == "http://s3"
    assert variables["ACIP_HOME"] == str(settings.home)
    assert "hunter2" not in variables.values()


def test_store_errors_name_the_missing_part(settings: Settings, small_artifact: Artifact) -> None:
    store = Store(settings.store, settings.home / "cache")
    assert store.exists(str(small_artifact.folder))
    assert not store.exists(store.uri("nothing"))
    with pytest.raises(StoreError, match="moved or deleted"):
        store.fetch(store.uri("nothing"))
    with pytest.raises(StoreError, match="s3://bucket/prefix"):
        Store("s3://", Path()).exists("s3://bucket")


def test_added_folders_are_immutable(tmp_path: Path) -> None:
    """A complete folder is never overwritten, an incomplete folder is refused, and a folder in transfer is not listed."""
    store = Store(str(tmp_path / "store"), tmp_path / "cache")

    def folder(content: str) -> Path:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "last").write_text(content)
        return tmp_path / "new"

    uri = store.add(folder("first"), "some/where/one", "last")
    assert store.add(folder("second"), "some/where/one", "last") == uri
    assert not (tmp_path / "new").exists()
    assert store.exists(uri, "last") and not store.exists(uri)
    (tmp_path / "store/some/where/.two.xyz/new").mkdir(parents=True)
    (tmp_path / "store/some/where/.two.xyz/new/last").touch()
    assert list(store.complete("some", "last")) == [uri] and store.complete("other", "last") == {}
    assert store.read([f"{uri}/last"]) == [b"first"]
    with pytest.raises(StoreError, match=r"can't read .*last: No such file"):
        store.read([f"{uri}/other/last"])
    (tmp_path / "store/some/three").mkdir()
    (tmp_path / "store/some/three/weights").touch()
    with pytest.raises(StoreError, match="exists without last: remove it"):
        store.add(folder("third"), "some/three", "last")
    assert sorted(path.name for path in (tmp_path / "store/some").iterdir()) == ["three", "where"]
