"""The deployment that holds the weights, without Serve: which models it loads, and what it tells while it can't."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from acip_platform.serve import replica
from acip_platform.serve.api import Api
from acip_platform.serve.engine import model_cache
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.http.keys import Keys
from acip_platform.serve.http.requests import CompletionRequest
from acip_platform.serve.replica import EngineReplica
from acip_platform.tracking.registry import ModelVersion

from acip.artifact.artifact import Artifact
from acip.layers.packing import PackedLinear, packable
from tests.support.waiting import PATIENCE_S, until

Start = Callable[..., EngineReplica]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("ACIP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(replica, "RETRY_S", (0.2, 0.2))
    began: list[EngineReplica] = []

    def make(*versions: ModelVersion) -> EngineReplica:
        began.append(EngineReplica(list(versions), timeout_s=PATIENCE_S, device="cpu", num_cpus=1, memory_gb=None))
        return began[-1]

    yield make
    for each in began:
        each.warm = True  # nothing is tried again
        each.engine.close()


def version(name: str, uri: object) -> ModelVersion:
    return ModelVersion(name, "1", str(uri), ("champion",), {})


def settled(engine: EngineReplica, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    state: dict[str, Any] = {}

    def look() -> bool:
        state.clear()
        state.update(asyncio.run(engine.ready()))
        return is_so(state)

    until(look, lambda: f"the engine stays {state}")
    return state


def test_a_model_that_cannot_be_loaded_leaves_the_others(start: Start, small_artifact: Artifact, tmp_path: Path) -> None:
    engine = start(version("gone", tmp_path / "gone"), version("small", small_artifact.folder))
    state = settled(engine, lambda state: state["warm"])
    assert list(state["failed"]) == ["gone"]
    assert [card["id"] for card in asyncio.run(engine.cards())["body"]] == ["small"]
    refused = asyncio.run(engine.card(version("gone", tmp_path / "gone")))
    assert (refused["status"], refused["body"]["error"]["code"]) == (503, "artifact_unavailable"), "this is not a fault of the client"


def test_what_comes_back_is_loaded_without_a_restart(start: Start, small_artifact: Artifact, tmp_path: Path) -> None:
    place = tmp_path / "away"
    engine = start(version("small", place))
    state = settled(engine, lambda state: bool(state["failed"]))
    assert not state["warm"]
    shutil.copytree(small_artifact.folder, place)
    assert settled(engine, lambda state: state["warm"])["failed"] == {}


def test_many_who_wait_for_a_model_load_it_once_in_one_thread(
    start: Start, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_artifact.folder, other)
    engine = start(version("small", small_artifact.folder))
    settled(engine, lambda state: state["warm"])
    go, loads = threading.Event(), []

    class Slow(ResidentModel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            loads.append(threading.current_thread().name)
            assert go.wait(PATIENCE_S), "nobody let it go on"
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(model_cache, "ResidentModel", Slow)

    async def ask(name: str, uri: object) -> str:
        request = CompletionRequest(model=name, prompt="It was", max_tokens=2, ignore_eos=True)
        return [event.kind async for events in engine.stream(version(name, uri), request) for event in events][-1]

    async def all_of_them() -> tuple[list[str], list[str]]:
        waiting = [asyncio.create_task(ask("other", other)) for _ in range(40)]
        await asyncio.sleep(0.1)
        waiting[0].cancel()  # who leaves does not take it from the others
        answered = [await asyncio.wait_for(ask("small", small_artifact.folder), PATIENCE_S) for _ in range(3)]
        go.set()
        return answered, await asyncio.gather(*waiting[1:])

    answered, waited = asyncio.run(all_of_them())
    assert answered == ["done"] * 3
    assert waited == ["done"] * 39
    assert len(loads) == 1


def test_weights_are_packed_where_nobody_has_the_memory(start: Start, small_artifact: Artifact) -> None:
    there = start(version("small", small_artifact.folder)).models  # which loads it at the same time
    needs = sum(small_artifact.manifest["files"][file]["bytes"] for file in model_cache.WEIGHTS)
    for limit_bytes, packed in ((needs, False), (2 * needs, True)):
        tight = model_cache.ModelCache(there.engine, there.store, "cpu", limit_bytes)
        layers = tight.get(version("small", small_artifact.folder)).any_size.layers.values()
        assert {isinstance(layer.original, PackedLinear) for layer in layers} == {packed and packable(torch.empty(1, 1))}
        assert tight.used_bytes <= limit_bytes


def test_packed_weights_leave_before_any_model(start: Start, small_artifact: Artifact) -> None:
    there = start(version("small", small_artifact.folder)).models
    needs = sum(small_artifact.manifest["files"][file]["bytes"] for file in model_cache.WEIGHTS)
    tight = model_cache.ModelCache(there.engine, there.store, "cpu", 2 * needs)
    first = tight.get(version("first", small_artifact.folder))
    assert (first.packed_bytes > 0) == packable(torch.empty(1, 1))
    second = tight.get(version("second", small_artifact.folder))
    assert tight.resident == [first, second]
    assert first.packed_bytes == second.packed_bytes == 0
    assert tight.used_bytes == 2 * needs
    engine: Any = there.engine
    for served in (first, second):
        (*_, last) = engine.events(served, CompletionRequest(prompt="It was", max_tokens=3, ignore_eos=True))
        assert last.data["usage"]["completion_tokens"] == 3


def test_a_list_of_models_loads_none(small_artifact: Artifact) -> None:
    """Whether the engine holds them or not, all are told of."""

    class Asked(Api):
        async def _ask(self, method: str, *args: Any) -> Any:
            assert method == "cards", "which loads nothing"
            return [{"id": "small", "version": "1", "curve": []}]

    api = Asked(None, [version("small", "here"), version("other", "there")], 8, Keys(), 0)  # type: ignore[arg-type]
    small, other = asyncio.run(api.cards())
    assert small == {"id": "small", "version": "1", "curve": []}
    assert {"id": "other", "object": "model", "version": "1"}.items() <= other.items()
