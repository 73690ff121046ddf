"""What others wrote into the registry: tags, aliases, URIs, and the curves of artifacts that it points at."""

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


class Held:
    """A registry and a store, two versions of `small` that are well, and what the folder around them holds."""

    def __init__(self, home: Path, artifact: Artifact) -> None:
        self.home, self.artifact = home, artifact
        settings = Settings.from_env({"ACIP_HOME": str(home)})
        self.registry, self.store = Registry(settings), Store(settings.store, home / "cache")
        self.registry.client.get_experiment_by_name("Default")  # makes the database
        self.first, self.second = (self.registry.register("small", uri, "", {}) for uri in (str(artifact.folder), f"{artifact.folder}/."))


@pytest.fixture(scope="module")
def held(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Held:
    return Held(tmp_path_factory.mktemp("registry") / "home", small_artifact)


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in s3_server.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, in which nothing may appear."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


@fuzz(URIS, share=0.5)
def test_uris(held: Held, s3: None, outside: Path, uri: str) -> None:
    """None of these is an artifact, so nothing is opened; most of them are nothing at all."""
    with contextlib.suppress(AcipError):
        assert not held.store.exists(uri)
    for method in (held.store.open, held.store.fetch):
        with contextlib.suppress(AcipError):
            found = method(uri)
            assert isinstance(found, Path) and found.is_dir(), "a folder, which only opening tells from an artifact"
    assert {path.name for path in held.home.iterdir()} <= {"mlflow.db", "cache", "artifacts"}


@fuzz(URIS, st.dictionaries(st.sampled_from(["verdict", "fingerprint", "area"]), WORDS, max_size=2), share=0.3)
def test_a_champion_that_points_anywhere(held: Held, s3: None, outside: Path, uri: str, tags: dict[str, str]) -> None:
    """The next version is judged all the same, or told what is in the way."""
    try:
        hostile = held.registry.client.create_model_version("small", uri, "", tags)
        held.registry.client.set_registered_model_alias("small", CHAMPION, hostile.version)
    except (MlflowException, ValueError):  # MLflow itself refuses it
        return
    finally:
        (outside / "mlflow.db").unlink(missing_ok=True)  # MLflow's client creates its default store for some URIs
    with contextlib.suppress(AcipError):
        assert promote_if_better(held.registry, held.store, held.first, held.artifact).why
    assert held.registry.versions("small", {})[0].uri == uri


@fuzz(WORDS | st.from_regex(r"[0-9 ,²٣-]{0,12}", fullmatch=True), WORDS | st.from_regex(r"[0-9²٣]{1,30}", fullmatch=True), share=0.5)
def test_tags_and_aliases(held: Held, tag: str, which: str) -> None:
    registry = held.registry
    with contextlib.suppress(MlflowException, ValueError):  # MLflow itself takes no such tag
        registry.client.set_registered_model_tag("small", CHAMPIONS, tag)
    registry.set_alias(held.first)
    assert registry.champions("small")[-1] == held.first.version
    with contextlib.suppress(AcipError):
        assert isinstance(registry.back("small"), ModelVersion)
    for name in ("small", which):
        with contextlib.suppress(AcipError):
            assert registry.resolve(name, which).name == name
    registry.set_champion(held.second)
    assert registry.resolve("small").version == held.second.version


CURVE = [
    {"asked": size, "got": size, "loss": 3 - size, "perplexity": 20.0, "corpus": "text", "context": 64, "windows": 8, "stderr": 0.1,
     "evaluation": [{"kind": "efficiency", "label": "efficiency", "values": {"tokens_per_s": 1.0}}]}
    for size in (1.0, 0.8, 0.5)
]  # fmt: skip
ROWS = harmed(CURVE, st.none() | st.floats() | st.integers() | st.sampled_from([10**400, 2**50, True, "1.0", [], {}, -0.0, 1e308, 1e-320]))


@fuzz(ROWS, ROWS, share=1.5)
def test_curves(small_artifact: Artifact, ours: Any, theirs: Any) -> None:
    """Whatever curves two artifacts have that were opened, one of them leads."""
    manifests = []
    for curve in (ours, theirs):
        manifests.append({**json.loads(json.dumps(small_artifact.manifest)), "curve": curve})
        try:
            check_manifest(manifests[-1], "here")
        except ArtifactError:
            return
        Curve.of(curve)
    assert compare(manifests[0], manifests[1], "the other").why
