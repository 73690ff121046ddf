"""Fleets that contend for one model at once: whatever the order of what they do, the best is the champion, and each has a verdict."""

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

RIVALS = 3


class Turns:
    """Threads that do one thing each in the order that is told, and go on alone when the others are done."""

    def __init__(self, order: Iterator[int]) -> None:
        self.order, self.changed = order, threading.Condition()
        self.busy = set(range(RIVALS))
        self.now = next(order)

    def take(self, who: int, call: Any) -> Any:
        with self.changed:
            assert self.changed.wait_for(lambda: self.now == who, PATIENCE_S), f"it is never the turn of {who}"
            try:
                return call()
            finally:
                self._next()

    def leave(self, who: int) -> None:
        with self.changed:
            self.busy.discard(who)
            if self.now == who:
                self._next()

    def _next(self) -> None:
        if self.busy:
            self.now = next(which for which in self.order if which in self.busy)
        self.changed.notify_all()


class Taking(Registry):
    """A registry, each of whose calls waits for its turn."""

    def __init__(self, settings: Settings, turns: Turns, who: int) -> None:
        super().__init__(settings)
        client = self.client

        class Client:
            def __getattr__(self, name: str) -> Any:
                return lambda *args, **more: turns.take(who, lambda: getattr(client, name)(*args, **more))

        self.client = Client()  # type: ignore[assignment]


class Contest:
    """A registry, and four artifacts of one model with ever better curves."""

    def __init__(self, artifact: Artifact, home: Path, tracking_uri: str = "") -> None:
        self.settings = Settings.from_env({"ACIP_HOME": str(home), "MLFLOW_TRACKING_URI": tracking_uri})
        home.mkdir()
        self.registry, self.store = Registry(self.settings), Store(self.settings.store, home / "cache")
        self.registry.client.get_experiment_by_name("Default")  # makes the database
        curves = [rows(2.0, 2.1, 2.2, 2.6 - 0.1 * quality) for quality in range(4)]
        self.artifacts = [
            Artifact.open(copytree(artifact.folder, home / f"artifact-{quality}")).record_curve(curve)
            for quality, curve in enumerate(curves)
        ]
        self.contests = 0

    def enter(self, name: str, quality: int) -> ModelVersion:
        return self.registry.register(name, str(self.artifacts[quality].folder), "", {"quality": str(quality)})


@pytest.fixture(scope="module")
def contest(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Contest:
    return Contest(small_artifact, tmp_path_factory.mktemp("contest") / "home")


MIXED = st.lists(st.integers(0, RIVALS - 1), min_size=60, max_size=60)
INTERRUPTED = st.integers(0, 14).map(lambda steps: [0] * steps + [1] * 60)  # by another's whole contest


@fuzz(st.permutations([0, 1, 2, 3]), st.booleans(), MIXED | INTERRUPTED, share=0.15)
def test_the_best_is_the_champion_in_any_order(contest: Contest, qualities: list[int], there: bool, order: list[int]) -> None:
    """`there`: one of the four is the champion before the three others contend."""
    contest.contests += 1
    name = f"contest-{contest.contests}"
    old = [contest.enter(name, qualities[RIVALS])] if there else []
    for version in old:
        promote_if_better(contest.registry, contest.store, version, contest.artifacts[qualities[RIVALS]])
    entered = [contest.enter(name, quality) for quality in qualities[:RIVALS]]
    turns = Turns(_endless(order))

    def run(who: int) -> None:
        try:
            registry = Taking(contest.settings, turns, who)
            promote_if_better(registry, contest.store, entered[who], contest.artifacts[qualities[who]])
        finally:
            turns.leave(who)

    threads = [threading.Thread(target=run, args=(who,)) for who in range(RIVALS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    best = max((*old, *entered), key=lambda version: int(version.tags["quality"]))
    versions = {version.version: version for version in contest.registry.versions(name, {})}
    assert len(versions) == RIVALS + len(old)
    assert CHAMPION in versions[best.version].aliases
    assert CANDIDATE not in versions[best.version].aliases
    assert all(version.tags["verdict"] for version in versions.values()), "each was told"
    assert versions[best.version].tags["verdict"].startswith(CHAMPION)


def _endless(order: list[int]) -> Iterator[int]:
    while True:
        yield from order
        yield from range(RIVALS)
