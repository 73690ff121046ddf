"""The model registry: versions of calibrated models, and the aliases that select one of them.

A version points at a LoggedModel (acip_platform.tracking.logged_models) and holds the URI of an artifact in its tag `artifact_uri`. Weights
never pass through MLflow. Versions from before there were LoggedModels have the URI as their source. The version with the alias `champion`
is served.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from requests.exceptions import RequestException
from sqlalchemy.exc import SQLAlchemyError

from acip.errors import AcipError
from acip.utils.coerce import did_you_mean
from acip_platform.settings import Settings, masked
from acip_platform.tracking.versions import MODEL_ID
from acip_platform.tracking.versions import ModelVersion as ModelVersion  # noqa: PLC0414 - other modules import it from here

CHAMPION = "champion"  # alias of the version that is served
CANDIDATE = "candidate"  # alias of a version that a person may promote
ARTIFACT_URI = "artifact_uri"  # tag of a version: its artifact
CHAMPIONS = "champions"  # tag of a registered model: its past and present champions, in order

RETRY_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # seconds; the defaults add up to minutes


_lock = threading.Lock()
_inside: Counter[str] = Counter()  # blocks of `environment` that set each variable
_outside: dict[str, str | None] = {}  # its value outside of them, None = not set


class RegistryError(AcipError):
    """The registry does not hold a model, version or alias. The message lists what it holds."""


class RegistryAwayError(AcipError):
    """The registry does not answer, or fails."""


@contextmanager
def few_retries() -> Iterator[None]:
    """Limit MLflow's retries and timeouts inside the block, because a calibration waits for them.

    Limits that are set in the environment stay as they are.
    """
    with environment(RETRY_LIMITS, override=False):
        yield


@contextmanager
def environment(variables: Mapping[str, str], override: bool = True) -> Iterator[None]:
    """Set environment variables inside the block; without `override`, only those that are not set outside of such blocks.

    Several threads may be inside at the same time, with equal values. The last one to leave restores the variables.
    """
    with _lock:
        own = [name for name in variables if override or _outside.get(name, os.environ.get(name)) is None]
        for name in own:
            _outside.setdefault(name, os.environ.get(name))
            _inside[name] += 1
            os.environ[name] = variables[name]
    try:
        yield
    finally:
        with _lock:
            for name in own:
                _inside[name] -= 1
                if _inside[name]:
                    continue
                if (before := _outside.pop(name)) is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = before


@contextmanager
def reached(settings: Settings | None = None) -> Iterator[None]:
    """Raise RegistryAwayError inside the block where MLflow's server or database fails. MLflow's client has retried for minutes by then.

    It is also a decorator. Without `settings`, the error names the tracking URI of the environment.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, RequestException) as error:  # ImportError: a database driver is missing
        where = masked((settings or Settings.from_env()).tracking_uri)
        message = masked(str(error)).splitlines()[0].rstrip(".")
        raise RegistryAwayError(f"the registry at {where} can't be reached: {message}. Check MLFLOW_TRACKING_URI.") from error


class Registry:
    """The registered models, their versions and aliases."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.client = settings, MlflowClient(tracking_uri=settings.tracking_uri)

    def register(
        self, name: str, uri: str, run_id: str, tags: Mapping[str, str], description: str = "", about: str = "", model_id: str = ""
    ) -> ModelVersion:
        """Register the artifact at `uri` as a version of `name`, or return the version that already has this URI.

        `description` describes the version, `about` the model. The version points at the LoggedModel `model_id`, if it is given.
        """
        try:
            self.client.create_registered_model(name, description=about)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for known in map(self._version, self.client.search_model_versions(f"name = {_quoted(name)}")):
            if known.uri == uri:
                return known
        source, pointers = (f"models:/{model_id}", {ARTIFACT_URI: uri, MODEL_ID: model_id}) if model_id else (uri, {})
        with environment({"MLFLOW_TRACKING_URI": self.settings.tracking_uri}):  # where a registry in a database looks for the LoggedModel
            created = self.client.create_model_version(
                name, source, run_id, {**tags, **pointers}, description=description, model_id=model_id or None
            )
        return self._version(created)

    def link(self, version: ModelVersion, model_id: str) -> None:
        """Record in a version and in its LoggedModel that they belong together. The page of the LoggedModel then names the version."""
        if version.model_id != model_id:
            self.tag(version, {MODEL_ID: model_id})
        versions = json.loads(self.client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
        own = {"name": version.name, "version": version.version}
        if own not in [{**each, "version": str(each["version"])} for each in versions]:  # MLflow's server has added it as a number
            self.client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*versions, own])})

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Add `tags` to `version`."""
        for key, value in tags.items():
            self.client.set_model_version_tag(version.name, version.version, key, value)

    def set_alias(self, version: ModelVersion, alias: str = CHAMPION) -> None:
        """Move `alias` to `version`."""
        self.client.set_registered_model_alias(version.name, alias, version.version)

    def champion(self, name: str) -> ModelVersion | None:
        """Return the champion of a registered model, or None if it has no champion."""
        current = self.client.get_registered_model(name).aliases.get(CHAMPION)
        return None if current is None else self.resolve(name, str(current))

    def set_champion(self, version: ModelVersion) -> None:
        """Make `version` the champion and append it to the model's list of champions.

        The alias is set first, so every version in the list has had it.
        """
        past = self.champions(version.name)
        self.set_alias(version)
        if past[-1:] != [version.version]:
            self._store_champions(version.name, [*past, version.version])
        if CANDIDATE in self.resolve(version.name, version.version).aliases:
            self.client.delete_registered_model_alias(version.name, CANDIDATE)

    def previous_champion(self, name: str) -> ModelVersion:
        """Return the champion before the present one. Deleted versions are skipped."""
        current = self.resolve(name)
        for number in reversed(self.champions(name)[:-1]):
            with suppress(RegistryError):
                return self.resolve(name, number)
        raise RegistryError(f"{name} had no champion before version {current.version}. Name the version to promote.")

    def roll_back(self, name: str) -> ModelVersion:
        """Make the previous champion the champion again, and return it."""
        previous, past = self.previous_champion(name), self.champions(name)[:-1]
        while past[-1] != previous.version:
            past.pop()
        self._store_champions(name, past)
        self.set_alias(previous)
        return previous

    def champions(self, name: str) -> list[str]:
        """Return the versions that have been champion, the present one last. A champion that was set in MLflow's UI is included."""
        model = self.client.get_registered_model(name)
        past = [version for version in model.tags.get(CHAMPIONS, "").split(", ") if version]
        current = model.aliases.get(CHAMPION)
        return past if current is None or past[-1:] == [str(current)] else [*past, str(current)]

    def _store_champions(self, name: str, champions: list[str]) -> None:
        self.client.set_registered_model_tag(name, CHAMPIONS, ", ".join(champions))

    def models(self) -> list[str]:
        """Return the names of all registered models, sorted."""
        names: list[str] = []
        page = None
        while page != "":
            models = self.client.search_registered_models(page_token=page)
            names.extend(model.name for model in models)
            page = models.token or ""
        return sorted(names)

    def versions(self, name: str, tags: Mapping[str, str]) -> list[ModelVersion]:
        """Return the versions of `name` that have all of `tags`, newest first."""
        conditions = [f"name = {_quoted(name)}", *(f"tags.{key} = '{value}'" for key, value in tags.items())]
        listed = [self._version(version) for version in self.client.search_model_versions(" and ".join(conditions))]
        aliases = self.client.get_registered_model(name).aliases if listed else {}  # search results do not include aliases
        named = [replace(each, aliases=tuple(alias for alias, at in aliases.items() if str(at) == each.version)) for each in listed]
        return sorted(named, key=lambda version: -int(version.version))

    def resolve(self, name: str, which: str = CHAMPION) -> ModelVersion:
        """Return the version of `name` that `which`, an alias or a version number, selects.

        RegistryError if it does not exist. Aliases move: resolve once and keep the result.
        """
        try:
            numbered = which.isdigit() and len(which) < 10  # a longer number overflows the database's integer type
            version = self.client.get_model_version(name, which) if numbered else self.client.get_model_version_by_alias(name, which)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            models = self.models()
            if name not in models:
                available = f"it holds: {', '.join(models)}" if models else "it is empty: run jobs/calibrate_all.py first"
                raise RegistryError(f"no model {name!r} in the registry{did_you_mean(name, models)}; {available}.") from error
            aliases = self.client.get_registered_model(name).aliases
            versions = [each.version + "".join(f" ({alias})" for alias in each.aliases) for each in self.versions(name, {})]
            hint = did_you_mean(which, aliases)
            raise RegistryError(
                f"model {name!r} has no version or alias {which!r}{hint}; it has {', '.join(versions) or 'none'}."
            ) from error
        return replace(self._version(version), alias="" if numbered else which)

    def named(self, text: str, usual: str = CHAMPION) -> ModelVersion:
        """Return the version that `text` selects: NAME@WHICH with an alias or a version number, or NAME for the alias `usual`."""
        name, _, which = text.partition("@")
        return self.resolve(name, which or usual)

    def _version(self, version: Any) -> ModelVersion:
        aliases = tuple(version.aliases) if version.aliases else ()
        tags = dict(version.tags)
        return ModelVersion(version.name, str(version.version), tags.get(ARTIFACT_URI, version.source), aliases, tags)


def _quoted(text: str) -> str:
    """Return `text` as a value of MLflow's searches. Other programs register names with apostrophes."""
    return f'"{text}"' if "'" in text else f"'{text}'"
