"""Concurrent promotions of one model: in any order of registry calls, the best version is champion and each has a verdict."""

import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.promotion import promote_if_better
from acip_platform.tracking.registry import CANDIDATE, CHAMPION, ModelVersion, Registry
from hypothesis import strategies as st

from acip.artifact.artifact import Artifact
from tests.platform.tracking.test_promotion import rows
from tests.support.fuzzing import fuzz
from tests.support.waiting import PATIENCE_S

THREADS = 3


class Turns:
    """A scheduler that lets threads make one call each in a given order, until all threads have finished."""

    def __init__(self, order: Iterator[int]) -> None:
        self.order, self.condition = order, threading.Condition()
        self.active = set(range(THREADS))
        self.current = next(order)

    def run_in_turn(self, thread_id: int, call: Any) -> Any:
        with self.condition:
            assert self.condition.wait_for(lambda: self.current == thread_id, PATIENCE_S), f"thread {thread_id} never got its turn"
            try:
                return call()
            finally:
                self._next()

    def finish(self, thread_id: int) -> None:
        with self.condition:
            self.active.discard(thread_id)
            if self.current == thread_id:
                self._next()

    def _next(self) -> None:
        if self.active:
            self.current = next(waiting for waiting in self.order if waiting in self.active)
        self.condition.notify_all()


class ScheduledRegistry(Registry):
    """A registry whose client calls wait for their turn."""

    def __init__(self, settings: Settings, turns: Turns, thread_id: int) -> None:
        super().__init__(settings)
        client = self.client

        class Client:
            def __getattr__(self, name: str) -> Any:
                return lambda *args, **kwargs: turns.run_in_turn(thread_id, lambda: getattr(client, name)(*args, **kwargs))

        self.client = Client()  # type: ignore[assignment]


class Contest:
    """A registry, and four artifacts of one model with increasingly better curves."""

    def __init__(self, artifact: Artifact, home: Path, tracking_uri: str = "") -> None:
        self.settings = Settings.from_env({"ACIP_HOME": str(home), "MLFLOW_TRACKING_URI": tracking_uri})
        home.mkdir()
        self.registry, self.store = Registry(self.settings), Store(self.settings.store, home / "cache")
        self.registry.client.get_experiment_by_name("Default")  # creates the database
        curves = [rows(2.0, 2.1, 2.2, 2.6 - 0.1 * quality) for quality in range(4)]
        self.artifacts = [
            Artifact.open(copytree(artifact.folder, home / f"artifact-{quality}")).record_curve(curve)
            for quality, curve in enumerate(curves)
        ]
        self.count = 0

    def register(self, name: str, quality: int) -> ModelVersion:
        return self.registry.register(name, str(self.artifacts[quality].folder), "", {"quality": str(quality)})


@pytest.fixture(scope="module")
def contest(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Contest:
    return Contest(small_artifact, tmp_path_factory.mktemp("contest") / "home")


RANDOM_ORDERS = st.lists(st.integers(0, THREADS - 1), min_size=60, max_size=60)
ONE_INTERRUPTION = st.integers(0, 14).map(lambda steps: [0] * steps + [1] * 60)  # all calls of thread 1 run between two calls of thread 0


@fuzz(st.permutations([0, 1, 2, 3]), st.booleans(), RANDOM_ORDERS | ONE_INTERRUPTION, share=0.15)
def test_the_best_version_becomes_champion_in_any_order(
    contest: Contest, qualities: list[int], has_champion: bool, order: list[int]
) -> None:
    """The best version becomes champion. With `has_champion`, one of the four versions is champion before the others start."""
    contest.count += 1
    name = f"contest-{contest.count}"
    earlier = [contest.register(name, qualities[THREADS])] if has_champion else []
    for version in earlier:
        promote_if_better(contest.registry, contest.store, version, contest.artifacts[qualities[THREADS]])
    entered = [contest.register(name, quality) for quality in qualities[:THREADS]]
    turns = Turns(_repeat(order))

    def run(thread_id: int) -> None:
        try:
            registry = ScheduledRegistry(contest.settings, turns, thread_id)
            promote_if_better(registry, contest.store, entered[thread_id], contest.artifacts[qualities[thread_id]])
        finally:
            turns.finish(thread_id)

    threads = [threading.Thread(target=run, args=(thread_id,)) for thread_id in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    best = max((*earlier, *entered), key=lambda version: int(version.tags["quality"]))
    versions = {version.version: version for version in contest.registry.versions(name, {})}
    assert len(versions) == THREADS + len(earlier)
    assert CHAMPION in versions[best.version].aliases
    assert CANDIDATE not in versions[best.version].aliases
    assert all(version.tags["verdict"] for version in versions.values()), "every version has a verdict"
    assert versions[best.version].tags["verdict"].startswith(CHAMPION)


def _repeat(order: list[int]) -> Iterator[int]:
    while True:
        yield from order
        yield from range(THREADS)
