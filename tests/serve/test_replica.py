"""The deployment that holds the weights, without Serve: which models it loads, and what it reports if it can't load one."""

import asyncio
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from acip_platform.serve import replica
from acip_platform.serve.api import Api
from acip_platform.serve.engine import model_cache
from acip_platform.serve.http.keys import Keys
from acip_platform.serve.http.requests import CompletionRequest
from acip_platform.serve.replica import EngineReplica
from acip_platform.tracking.registry import ModelVersion

from acip.artifact.artifact import Artifact
from acip.layers.packing import PackedLinear, packable
from tests.support.engines import ENGINE, Resident, embedded_only
from tests.support.waiting import PATIENCE_S, until

Start = Callable[..., EngineReplica]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Return a function that starts a replica."""
    monkeypatch.setenv("ACIP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(replica, "RETRY_S", (0.2, 0.2))
    replicas: list[EngineReplica] = []

    def make(*versions: ModelVersion) -> EngineReplica:
        replicas.append(EngineReplica(list(versions), timeout_s=PATIENCE_S, device="cpu", num_cpus=1, memory_gb=None, engine=ENGINE))
        return replicas[-1]

    yield make
    for started in replicas:
        started.warm = True  # ends the retries
        started.engine.close()


def version(name: str, uri: object) -> ModelVersion:
    return ModelVersion(name, "1", str(uri), ("champion",), {})


def weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of all weights of an artifact without codes in memory."""
    return sum(artifact.tensors(file).decoded_bytes for file in ("factors", "dense", "rest"))


def wait_for_state(engine: EngineReplica, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until the state of a replica fulfills a condition, and return the state."""
    state: dict[str, Any] = {}

    def poll() -> bool:
        state.clear()
        state.update(asyncio.run(engine.ready()))
        return condition(state)

    until(poll, lambda: f"the state of the engine remains {state}")
    return state


def test_model_that_cannot_be_loaded_does_not_affect_others(start: Start, small_artifact: Artifact, tmp_path: Path) -> None:
    engine = start(version("gone", tmp_path / "gone"), version("small", small_artifact.folder))
    state = wait_for_state(engine, lambda state: state["warm"])
    assert list(state["failed"]) == ["gone"]
    assert [card["id"] for card in asyncio.run(engine.cards())["body"]] == ["small"]
    refused = asyncio.run(engine.card(version("gone", tmp_path / "gone")))
    assert (refused["status"], refused["body"]["error"]["code"]) == (503, "artifact_unavailable"), "the client is not at fault"


def test_missing_artifact_is_loaded_once_it_exists(start: Start, small_artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "away"
    engine = start(version("small", folder))
    state = wait_for_state(engine, lambda state: bool(state["failed"]))
    assert not state["warm"]
    shutil.copytree(small_artifact.folder, folder)
    assert wait_for_state(engine, lambda state: state["warm"])["failed"] == {}


def test_concurrent_requests_load_a_model_once(
    start: Start, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_artifact.folder, other)
    engine = start(version("small", small_artifact.folder))
    wait_for_state(engine, lambda state: state["warm"])
    release, loads = threading.Event(), []

    class Slow(Resident):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            loads.append(threading.current_thread().name)
            assert release.wait(PATIENCE_S), "the load was not released"
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(engine.models, "kind", Slow)

    async def ask(name: str, uri: object) -> str:
        request = CompletionRequest(model=name, prompt="It was", max_tokens=2, ignore_eos=True)
        return [event.kind async for events in engine.stream(version(name, uri), request) for event in events][-1]

    async def send_all() -> tuple[list[str], list[str]]:
        waiting = [asyncio.create_task(ask("other", other)) for _ in range(40)]
        await asyncio.sleep(0.1)
        waiting[0].cancel()  # a canceled request must not cancel the load
        answered = [await asyncio.wait_for(ask("small", small_artifact.folder), PATIENCE_S) for _ in range(3)]
        release.set()
        return answered, await asyncio.gather(*waiting[1:])

    answered, waited = asyncio.run(send_all())
    assert answered == ["done"] * 3
    assert waited == ["done"] * 39
    assert len(loads) == 1


def test_weights_are_packed_only_if_memory_is_free(start: Start, small_artifact: Artifact) -> None:
    unlimited = start(version("small", small_artifact.folder)).models  # loads the model at the same time
    needs = weight_bytes(small_artifact)
    for limit_bytes, packed in ((needs, False), (2 * needs, True)):
        limited = model_cache.ModelCache(unlimited.engine, unlimited.store, "cpu", limit_bytes, kind=Resident)
        layers = limited.get(version("small", small_artifact.folder)).any_size.layers.values()
        assert {isinstance(layer.original, PackedLinear) for layer in layers} == {packed and packable(torch.empty(1, 1))}
        assert limited.used_bytes <= limit_bytes


def test_packed_weights_are_evicted_before_models(start: Start, small_artifact: Artifact) -> None:
    unlimited = start(version("small", small_artifact.folder)).models
    needs = weight_bytes(small_artifact)
    limited = model_cache.ModelCache(unlimited.engine, unlimited.store, "cpu", 2 * needs, kind=Resident)
    first = limited.get(version("first", small_artifact.folder))
    assert (first.weights.packed_bytes > 0) == packable(torch.empty(1, 1))
    second = limited.get(version("second", small_artifact.folder))
    assert limited.resident == [first, second]
    assert first.weights.packed_bytes == second.weights.packed_bytes == 0
    assert limited.used_bytes == 2 * needs
    engine: Any = unlimited.engine
    for served in (first, second):
        (*_, last) = engine.events(served, CompletionRequest(prompt="It was", max_tokens=3, ignore_eos=True))
        assert last.data["usage"]["completion_tokens"] == 3


def test_listing_models_loads_none(small_artifact: Artifact) -> None:
    """The list contains all models, whether the engine holds them or not."""

    class CardsOnly(Api):
        async def _call(self, method: str, *args: Any) -> Any:
            assert method == "cards", "only `cards` loads no model"
            return [{"id": "small", "version": "1", "curve": []}]

    api = CardsOnly(None, None, [version("small", "here"), version("other", "there")], 8, Keys())  # type: ignore[arg-type]
    small, other = asyncio.run(api.cards())
    assert small == {"id": "small", "version": "1", "curve": []}
    assert {"id": "other", "object": "model", "version": "1"}.items() <= other.items()


@embedded_only
def test_a_replica_with_files_is_ready_before_the_registry_answers(
    start: Start, small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = threading.Event(), threading.Event()
    champion = replace(version("small", small_artifact.folder), alias="champion")

    class SlowRegistry:
        def __init__(self, settings: Any) -> None: ...

        def resolve(self, name: str, which: str) -> ModelVersion:
            asked.set()
            assert answered.wait(PATIENCE_S)
            return champion

    monkeypatch.setattr("acip_platform.tracking.registry.Registry", SlowRegistry)
    monkeypatch.setattr("acip_platform.storage.resident_files.FREE_SHARE", 0.0)
    first = start(champion)
    assert asked.wait(PATIENCE_S)
    assert not first.warm  # it has no files yet, so it waits for the version to load
    answered.set()
    until(lambda: first.warm, "no model is loaded")
    asked.clear()
    answered.clear()
    second = start(champion)
    until(lambda: second.warm, "the replica waits for the registry")
    answered.set()
    assert asked.wait(PATIENCE_S)


def test_a_replica_imports_neither_mlflow_nor_scikit_learn() -> None:
    """Their imports take seconds, before a replica can load a model."""
    code = "import sys, acip_platform.serve.replica; assert not {'mlflow', 'sklearn'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
