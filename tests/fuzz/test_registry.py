"""Fuzz tests of registry content: tags, aliases, URIs, and the curves of registered artifacts."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.promotion import compare, promote_if_better
from acip_platform.tracking.registry import CHAMPION, CHAMPIONS, ModelVersion, Registry
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import check_manifest
from acip.errors import AcipError, ArtifactError
from acip.sizing.budget import Curve
from tests.support.fuzzing import WORDS, fuzz, harmed

URIS = WORDS | st.builds(
    str.__add__,
    st.sampled_from(["s3://", "s3://models", "s3://models/", "S3://models/a", "s3:///a", "file://", "file:///", "file://[", "http://127.0.0.1:9/",
                     "gs://", "models:/", "runs:/x/", "/", "/proc/self/", "sqlite:///", "//", "~/"]),
    st.text(max_size=10) | st.sampled_from(["a/../../b", "a" * 1100, "%2e%2e/x", "a?b#c", "a\nb"]),
)  # fmt: skip


class RegistryWithVersions:
    """A registry with two valid versions of `small`, and a store, in one home folder."""

    def __init__(self, home: Path, artifact: Artifact) -> None:
        self.home, self.artifact = home, artifact
        settings = Settings.from_env({"ACIP_HOME": str(home)})
        self.registry, self.store = Registry(settings), Store(settings.store, home / "cache")
        self.registry.client.get_experiment_by_name("Default")  # creates the database
        self.first, self.second = (self.registry.register("small", uri, "", {}) for uri in (str(artifact.folder), f"{artifact.folder}/."))


@pytest.fixture(scope="module")
def registered(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> RegistryWithVersions:
    return RegistryWithVersions(tmp_path_factory.mktemp("registry") / "home", small_artifact)


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in s3_server.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to an empty working folder and assert that it stays empty."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


@fuzz(URIS, share=0.5)
def test_uris(registered: RegistryWithVersions, s3: None, working_folder: Path, uri: str) -> None:
    """URIs that do not point to an artifact raise an AcipError and write no files."""
    with contextlib.suppress(AcipError):
        assert not registered.store.exists(uri)
    for method in (registered.store.open, registered.store.fetch):
        with contextlib.suppress(AcipError):
            folder = method(uri)
            assert isinstance(folder, Path) and folder.is_dir(), "fetch returns an existing local folder without opening it"
    assert {path.name for path in registered.home.iterdir()} <= {"mlflow.db", "cache", "artifacts"}


@fuzz(URIS, st.dictionaries(st.sampled_from(["verdict", "fingerprint", "area"]), WORDS, max_size=2), share=0.3)
def test_champion_with_any_uri(registered: RegistryWithVersions, s3: None, working_folder: Path, uri: str, tags: dict[str, str]) -> None:
    """The next version gets a verdict or an AcipError, whatever the URI of the champion."""
    try:
        hostile = registered.registry.client.create_model_version("small", uri, "", tags)
        registered.registry.client.set_registered_model_alias("small", CHAMPION, hostile.version)
    except (MlflowException, ValueError):  # MLflow refuses the value
        return
    finally:
        (working_folder / "mlflow.db").unlink(missing_ok=True)  # MLflow's client creates its default store for some URIs
    with contextlib.suppress(AcipError):
        assert promote_if_better(registered.registry, registered.store, registered.first, registered.artifact).why
    assert registered.registry.versions("small", {})[0].uri == uri


@fuzz(WORDS | st.from_regex(r"[0-9 ,²٣-]{0,12}", fullmatch=True), WORDS | st.from_regex(r"[0-9²٣]{1,30}", fullmatch=True), share=0.5)
def test_tags_and_aliases(registered: RegistryWithVersions, tag: str, alias: str) -> None:
    registry = registered.registry
    with contextlib.suppress(MlflowException, ValueError):  # MLflow refuses the tag
        registry.client.set_registered_model_tag("small", CHAMPIONS, tag)
    registry.set_alias(registered.first)
    assert registry.champions("small")[-1] == registered.first.version
    with contextlib.suppress(AcipError):
        assert isinstance(registry.roll_back("small"), ModelVersion)
    for name in ("small", alias):
        with contextlib.suppress(AcipError):
            assert registry.resolve(name, alias).name == name
    registry.set_champion(registered.second)
    assert registry.resolve("small").version == registered.second.version


CURVE = [
    {"asked": size, "got": size, "loss": 3 - size, "perplexity": 20.0, "corpus": "text", "context": 64, "windows": 8, "stderr": 0.1,
     "evaluation": [{"kind": "efficiency", "label": "efficiency", "values": {"tokens_per_s": 1.0}}]}
    for size in (1.0, 0.8, 0.5)
]  # fmt: skip
ROWS = harmed(CURVE, st.none() | st.floats() | st.integers() | st.sampled_from([10**400, 2**50, True, "1.0", [], {}, -0.0, 1e308, 1e-320]))


@fuzz(ROWS, ROWS, share=1.5)
def test_curves(small_artifact: Artifact, first: Any, second: Any) -> None:
    """Comparing two curves that pass validation always gives a verdict."""
    manifests = []
    for curve in (first, second):
        manifests.append({**json.loads(json.dumps(small_artifact.manifest)), "curve": curve})
        try:
            check_manifest(manifests[-1], "here")
        except ArtifactError:
            return
        Curve.of(curve)
    assert compare(manifests[0], manifests[1], "the other").why
