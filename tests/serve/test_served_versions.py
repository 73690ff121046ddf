"""The versions that an HTTP replica serves, without engines and HTTP: the registry is a dictionary here, and a load succeeds or fails."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from acip_platform.serve import served_versions
from acip_platform.serve.coordinator import Choices, Coordinator
from acip_platform.serve.served_versions import ServedVersions
from acip_platform.tracking.registry import RETRY_LIMITS, ModelVersion, RegistryAwayError, RegistryError
from ray.exceptions import RayActorError
from requests.exceptions import ConnectionError as RequestsConnectionError

from acip.errors import AcipError
from tests.support.application import LocalHandle
from tests.support.waiting import PATIENCE_S

CHAMPIONS = {"models": None, "alias": "champion"}
CANDIDATES = {"models": None, "alias": "candidate"}


def version(name: str, number: str) -> ModelVersion:
    return ModelVersion(name, number, f"/{name}/{number}", (), {})


class FakeRegistry:
    """A registry whose `aliases` tests set: alias -> {model: version number}. Every version number exists, except those in `deleted`."""

    aliases: dict[str, dict[str, str]]
    deleted = frozenset[str]()
    away = False

    def __init__(self, settings: object) -> None:
        if self.away:
            raise RequestsConnectionError("no route")

    def models(self) -> list[str]:
        return sorted({name for at in self.aliases.values() for name in at})

    def versions(self, name: str, tags: object) -> list[ModelVersion]:
        return [replace(version(name, at[name]), aliases=(alias,)) for alias, at in self.aliases.items() if name in at]

    def resolve(self, name: str, which: str) -> ModelVersion:
        if which.isdigit() and which not in self.deleted:
            return version(name, which)
        if name not in self.aliases.get(which, {}):
            raise RegistryError(f"{name} has no alias {which}")
        return version(name, self.aliases[which][name])

    def named(self, name: str, alias: str) -> ModelVersion:
        return self.resolve(name, alias)


class Loads:
    """The loads so far, as (name, version, version that stays meanwhile). Versions in `broken` can't be loaded."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str, str | None]] = []
        self.broken: set[str] = set()
        self.allowed = asyncio.Event()
        self.allowed.set()
        self.begun = asyncio.Event()

    async def __call__(self, new: ModelVersion, instead_of: ModelVersion | None) -> None:
        self.begun.set()
        await self.allowed.wait()
        if new.version in self.broken:
            raise AcipError("its file is missing")
        self.done.append((new.name, new.version, None if instead_of is None else instead_of.version))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> type[FakeRegistry]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://registry")
    for name, value in RETRY_LIMITS.items():
        monkeypatch.setenv(name, value)  # so that threads do not set and delete them at the same time
    monkeypatch.setattr(served_versions, "Registry", FakeRegistry)
    monkeypatch.setattr(FakeRegistry, "aliases", {"champion": {"small": "1"}}, raising=False)
    monkeypatch.setattr(FakeRegistry, "away", False)
    return FakeRegistry


class Served(ServedVersions):
    """The versions, which begin with version 1 of `small`, and what they have told."""

    def __init__(self, coordinator: Any = None) -> None:
        self.loads, self.told = Loads(), list[dict[str, bool]]()
        handle: Any = coordinator or LocalHandle(Coordinator())
        super().__init__([version("small", "1")], handle, self.loads, self.told.append)
        self.config = CHAMPIONS

    @property
    def numbers(self) -> dict[str, str]:
        return {name: served.version for name, served in self.items()}

    async def until(self, numbers: dict[str, str]) -> None:
        """Wait until these versions are served."""
        async with asyncio.timeout(PATIENCE_S):
            while self.numbers != numbers:
                await asyncio.sleep(0.01)

    def stop(self) -> None:
        for task in self._background:
            task.cancel()


def test_the_aliases_decide_what_is_served(registry: type[FakeRegistry]) -> None:
    async def steps() -> None:
        served = Served()
        await served.refresh()
        assert (served.numbers, served.loads.done) == ({"small": "1"}, []), "nothing has changed, so nothing is loaded"
        registry.aliases["champion"] = {"small": "2", "other": "5"}
        await served.refresh()
        assert served.numbers == {"small": "2", "other": "5"}
        assert served.loads.done == [("other", "5", None), ("small", "2", "1")], "version 1 stays in memory while 2 is loaded"
        del registry.aliases["champion"]["small"]
        await served.refresh()
        assert served.numbers == {"other": "5"}

    asyncio.run(steps())


def test_a_version_that_cannot_be_loaded_is_reported_until_it_can(registry: type[FakeRegistry]) -> None:
    async def steps() -> None:
        served = Served()
        served.loads.broken = {"2", "7"}
        registry.aliases["champion"] = {"small": "2", "new": "7", "other": "5"}
        await served.refresh()
        assert served.numbers == {"small": "1", "other": "5"}, "the others change"
        assert served.failed == {name: f"version {at} can't be loaded: its file is missing" for name, at in (("new", "7"), ("small", "2"))}
        assert served.told[-1] == {"small": True, "new": True, "other": False}
        served.loads.broken = {"7"}
        await served.refresh()
        assert served.numbers == {"small": "2", "other": "5"}
        assert served.told[-1] == {"small": False, "new": True, "other": False}

    asyncio.run(steps())


@pytest.mark.parametrize("trouble", ["away", "empty"])
def test_the_versions_stay_if_the_registry_does_not_name_any(registry: type[FakeRegistry], trouble: str) -> None:
    async def steps() -> None:
        served = Served()
        if trouble == "away":
            registry.away = True
            with pytest.raises(RegistryAwayError, match="registry at http://registry can't be reached: no route"):
                await served.resolve("small", "2")
        else:
            registry.aliases["champion"] = {}
        await served.refresh()
        assert (served.numbers, served.told) == ({"small": "1"}, [])

    asyncio.run(steps())


def test_a_deleted_version_does_not_stop_the_updates_of_other_models(registry: type[FakeRegistry], monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps() -> None:
        served = Served()
        served.config = {"models": ["small", "other", "chosen"], "alias": "champion"}
        registry.aliases["champion"] = {"small": "1", "other": "5", "chosen": "1"}
        await served.choose(version("chosen", "8"), "8")
        await served.refresh()
        assert served.numbers == {"small": "1", "other": "5", "chosen": "8"}
        registry.aliases["champion"] = {"other": "6", "chosen": "1"}
        monkeypatch.setattr(registry, "deleted", frozenset({"8"}))
        await served.refresh()
        assert served.numbers == {"small": "1", "other": "6", "chosen": "8"}, "a version that is served stays"
        assert served.failed == {"small": "small has no alias champion", "chosen": "chosen has no alias 8"}
        assert served.told[-1] == {"small": True, "other": False, "chosen": True}

    asyncio.run(steps())


def test_a_registry_that_hangs_is_away(registry: type[FakeRegistry], monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(served_versions, "TIMEOUT_S", 0.0)
    monkeypatch.setattr(asyncio, "to_thread", hang)
    with pytest.raises(RegistryAwayError, match="does not answer within 0 s"):
        asyncio.run(Served().resolve("small", "2"))


def test_a_choice_lasts_until_user_config_changes(registry: type[FakeRegistry]) -> None:
    registry.aliases |= {"candidate": {"small": "3"}}

    async def steps() -> None:
        served = Served()
        await served.choose(await served.resolve("small", "2"), "2")
        assert served.numbers == {"small": "2"}
        await served.refresh()
        assert served.numbers == {"small": "2"}, "the alias has not moved, but the choice counts"
        await served.choose(await served.resolve("small", "candidate"), "candidate")
        registry.aliases["candidate"] = {"small": "4"}
        await served.refresh()
        assert served.numbers == {"small": "4"}, "a chosen alias is followed"
        served.config = CANDIDATES
        registry.aliases["candidate"] = {"small": "5"}
        await served.choose(await served.resolve("small", "1"), "1")
        served.config = CHAMPIONS
        registry.aliases["champion"] = {"small": "6"}
        await served.refresh()
        assert served.numbers == {"small": "6"}, "the choice belongs to the former user_config"

    asyncio.run(steps())


def test_a_refresh_that_began_earlier_does_not_undo_a_choice(registry: type[FakeRegistry]) -> None:
    async def steps() -> None:
        served = Served()
        registry.aliases["champion"] = {"small": "2"}
        served.loads.allowed.clear()
        refresh = asyncio.create_task(served.refresh())
        await served.loads.begun.wait()
        choice = asyncio.create_task(served.choose(version("small", "3"), "3"))
        await asyncio.sleep(0)
        served.loads.allowed.set()
        await asyncio.gather(refresh, choice)
        assert served.numbers == {"small": "3"}

    asyncio.run(steps())


class Restarting(Coordinator):
    """A coordinator that is lost after its first answer. Another one takes its place, and has no choices."""

    def __init__(self) -> None:
        super().__init__()
        self.known: list[Choices] = []  # that the callers knew

    async def choices(self, known: Choices) -> AsyncIterator[Choices]:
        self.known.append(known)
        if len(self.known) == 2:
            self.chosen = {}
        async for choices in super().choices(known):
            yield choices
            if len(self.known) == 1:
                raise RayActorError


def test_choices_are_followed_and_outlive_the_coordinator(registry: type[FakeRegistry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_versions, "RETRY_S", 0.0)
    monkeypatch.setattr(served_versions, "POLL_S", 0.01)

    async def steps() -> None:
        coordinator = Restarting()
        here, there = (Served(LocalHandle(coordinator)) for _ in range(2))
        await here.choose(version("small", "2"), "2")
        await here.configure(CHAMPIONS)
        while len(coordinator.known) < 2:
            await asyncio.sleep(0.01)
        assert coordinator.chosen == {"small": ("2", CHAMPIONS)}, "the new coordinator learns the choices from its callers"
        await there.configure(CHAMPIONS)
        await there.until({"small": "2"})
        await here.choose(version("small", "3"), "3")
        await there.until({"small": "3"})
        registry.aliases["champion"]["other"] = "1"
        await there.until({"small": "3", "other": "1"})
        await there.configure(CANDIDATES)
        assert there.numbers == {"small": "3", "other": "1"}, "nothing has this alias"
        for served in (here, there):
            served.stop()

    asyncio.run(asyncio.wait_for(steps(), PATIENCE_S))
