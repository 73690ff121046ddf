"""The versions that an HTTP replica serves. They follow the registry, `user_config` and the choices of requests.

    registry ─────── aliases ──┐
    user_config ─── `models` ──┼──► refresh: select, `load` what is new ──► ServedVersions: name -> version
    Coordinator ─── choices ───┘

This module depends on neither HTTP nor the engines. `load` brings a version into memory, and raises an AcipError if that fails.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle

from acip.errors import AcipError
from acip_platform.serve.coordinator import LOST, Choices, Coordinator
from acip_platform.serve.engine.model_cache import key_of
from acip_platform.settings import Settings, masked, sqlite_path
from acip_platform.tracking.registry import CHAMPION, ModelVersion, Registry, RegistryAwayError, RegistryError, few_retries, reached

TIMEOUT_S = 30.0  # to resolve a version
POLL_S = 15.0  # between two looks at the aliases in the registry
RETRY_S = 1.0

Load = Callable[[ModelVersion, ModelVersion | None], Awaitable[Any]]  # (version, the version that stays in memory meanwhile)

log = logging.getLogger("ray.serve")


class ServedVersions(Mapping[str, ModelVersion]):
    """The version that is served under each name. `versions` are served until the registry answers.

    `on_failed` receives, after each refresh, whether the selected version of each model could not be loaded.
    """

    def __init__(
        self, versions: list[ModelVersion], coordinator: "DeploymentHandle[Coordinator]", load: Load,
        on_failed: Callable[[dict[str, bool]], None],
    ) -> None:  # fmt: skip
        self.coordinator, self.load, self.on_failed = coordinator, load, on_failed
        self.config: dict[str, Any] = {}
        self.chosen: Choices = {}
        self.failed: dict[str, str] = {}  # model -> why the selected version is not served
        self._served = {version.name: version for version in versions}
        self._refreshing = asyncio.Lock()
        self._background: list[asyncio.Task[None]] = []

    def __getitem__(self, name: str) -> ModelVersion:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    async def configure(self, config: dict[str, Any]) -> None:
        """Serve the `models` with the `alias` of a `user_config` from now on. The first call starts to follow the registry."""
        self.config = config
        if not self._background:
            self._background = [asyncio.create_task(self._follow()), asyncio.create_task(self._poll())]
        else:
            await self.refresh()

    async def _follow(self) -> None:
        """Follow the choices that requests made at any HTTP replica."""
        while True:
            try:
                choices: Any = self.coordinator.options(stream=True).choices.remote(self.chosen)
                async for self.chosen in choices:
                    await self.refresh()
            except LOST:
                pass  # Ray Serve replaces the coordinator
            except Exception:
                log.exception("the choices of versions can't be followed")
            await asyncio.sleep(RETRY_S)

    async def _poll(self) -> None:
        """Follow the aliases in the registry."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.refresh()
            except Exception:
                log.exception("the registry can't be followed")

    async def refresh(self) -> None:
        """Serve what the registry, `user_config` and the choices of requests select now.

        A new version is served when it is loaded. The present one is served meanwhile, and stays if that fails (the engines try again, less
        and less often), if the selected version was deleted, or if the registry does not answer.
        """
        async with self._refreshing:
            try:
                selected, failed = await asyncio.to_thread(_selected, self.config, self.chosen)
            except (RegistryError, RegistryAwayError) as error:
                log.warning("the served versions stay as they are: %s", error)
                return
            versions = {}
            for version in selected:
                name, served = version.name, self._served.get(version.name)
                if served is None or key_of(served) != key_of(version):
                    try:
                        await self.load(version, served)
                        log.warning("%s: version %s is served from now on", name, version.version)  # the server's log shows no info
                        served = version
                    except AcipError as error:
                        failed[name] = f"version {version.version} can't be loaded: {error}"
                if served is not None:
                    versions[name] = served
            for name, reason in failed.items():
                if name in self._served:
                    versions.setdefault(name, self._served[name])
                if self.failed.get(name) != reason:
                    log.error("%s, %s; the served version stays", name, reason)
            self._served, self.failed = versions, failed
            self.on_failed({name: name in failed for name in [*versions, *failed]})

    async def resolve(self, name: str, which: str) -> ModelVersion:
        """Return the version of a number or an alias. Raise a RegistryError or RegistryAwayError."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await asyncio.to_thread(_resolved, name, which)
        except TimeoutError as error:
            raise RegistryAwayError(f"the registry does not answer within {TIMEOUT_S:g} s.") from error

    async def choose(self, version: ModelVersion, which: str) -> None:
        """Serve `version`, which is loaded and has been resolved from `which`, at all HTTP replicas until `user_config` changes."""
        await self.coordinator.choose.remote(version.name, which, self.config)
        self.chosen = {**self.chosen, version.name: (which, self.config)}
        async with self._refreshing:  # a refresh that began earlier does not undo it
            self._served[version.name] = version


# ---- what the registry holds


def registered(settings: Settings, names: list[str] | None, alias: str, missing: dict[str, str] | None = None) -> list[ModelVersion]:
    """Return the versions to serve: those of `names`, or of every registered model with the alias that is not another program's.

    Raise a RegistryAwayError if the registry is not available, and a RegistryError if there is no such version. With `missing`, the names
    without a version are added to it, with the reason, and the other versions are returned.
    """
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise RegistryError(f"models is {names!r}; it must be a list of names, like [small, other@3], or null for all models.")
    alias = str(alias)  # a version number in YAML is a number
    with reached(settings):
        database = sqlite_path(settings.tracking_uri)
        new = database is not None and not database.exists()  # opening the registry would create it
        registry = None if new else Registry(settings)
        versions = [] if registry is None else _named(registry, names, alias, missing) if names else _with_alias(registry, alias)
        if not versions:
            aliases = _aliases(registry) if registry is not None else ""
            raise RegistryError(
                f"no model at {masked(settings.tracking_uri)} has the alias {alias!r}: there is nothing to serve. "
                + (f"Choose another --alias ({aliases})." if aliases else "Calibrate some with `python jobs/calibrate_all.py`.")
            )
        return versions


def _named(registry: Registry, names: list[str], alias: str, missing: dict[str, str] | None) -> list[ModelVersion]:
    """Return the version of each of `names`, like NAME or NAME@WHICH."""
    versions: dict[str, ModelVersion] = {}
    for name in names:
        try:
            version = registry.named(name, alias)
        except RegistryError as error:
            if missing is None:
                raise
            missing[name.partition("@")[0]] = str(error)
            continue
        other = versions.setdefault(version.name, version)
        if other.version != version.version:
            raise RegistryError(f"{version.name} is requested at versions {other.version} and {version.version}; choose one.")
    return list(versions.values())


def _with_alias(registry: Registry, alias: str) -> list[ModelVersion]:
    versions: list[ModelVersion] = []
    for name in registry.models():
        with contextlib.suppress(RegistryError):
            versions.append(registry.resolve(name, alias))
    return [version for version in versions if not version.is_foreign]


def _aliases(registry: Registry) -> str:
    """Return a text that lists the aliases of each model that is not another program's."""
    versions = {name: registry.versions(name, {}) for name in registry.models()}
    by_model = {
        name: [alias for each in own for alias in each.aliases]
        for name, own in versions.items()
        if not any(each.is_foreign for each in own)
    }
    return "; ".join(f"{name} has {', '.join(aliases) or 'none'}" for name, aliases in by_model.items())


def _selected(config: dict[str, Any], chosen: Choices) -> tuple[list[ModelVersion], dict[str, str]]:
    """Return the versions that `user_config` and the choices of requests select, and the models without such a version, with the reason.

    Raise a RegistryError if there is no version at all, or a RegistryAwayError. A new `user_config` ends the choices that were made before.
    """
    settings, missing = Settings.from_env(), dict[str, str]()
    with few_retries():
        versions = {each.name: each for each in registered(settings, config.get("models"), config.get("alias", CHAMPION), missing)}
    for name, (which, at_that_time) in chosen.items():
        if name in versions and at_that_time == config:
            try:
                versions[name] = _resolved(name, which)
            except RegistryError as error:
                missing[name] = str(error)
                del versions[name]
    return list(versions.values()), missing


def _resolved(name: str, which: str) -> ModelVersion:
    settings = Settings.from_env()
    with reached(settings), few_retries():
        return Registry(settings).resolve(name, which)
