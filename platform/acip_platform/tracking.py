"""Runs and the model registry. The only place that uses mlflow.

A run records what a person wants to see: recipe, metrics, figures, small files, and the artifact's URI. Weights never
pass through MLflow: a registered version points at the URI, and the alias `champion` chooses what is served.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from acip.errors import AcipError
from acip.recipe import did_you_mean
from acip_platform.settings import Settings

mpl.use("Agg")
logging.getLogger("mlflow").setLevel(logging.WARNING)  # after its import, which sets another level
from matplotlib.figure import Figure

CHAMPION = "champion"  # what is served
CANDIDATE = "candidate"  # what may become it


class RegistryError(AcipError):
    """A model, version or alias that the registry doesn't hold. Says what it holds."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered any-size model: where its artifact is."""

    name: str
    version: str
    uri: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]


class Tracking:
    """One experiment of one tracking store."""

    def __init__(self, settings: Settings, experiment: str) -> None:
        if settings.tracking_uri.startswith("sqlite:///"):
            Path(settings.tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=settings.tracking_uri)
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            local = settings.tracking_uri.startswith("sqlite:")
            location = (settings.home / "mlruns").as_uri() if local else None
            try:
                self.experiment_id = self.client.create_experiment(experiment, artifact_location=location)
            except MlflowException:  # another process was faster
                found = self.client.get_experiment_by_name(experiment)
        if found is not None:
            self.experiment_id = found.experiment_id

    def start(self, name: str, fingerprint: str, tags: Mapping[str, str]) -> "Run":
        """The run of this fingerprint, gone on with if an earlier attempt began it."""
        query = f"tags.acip_fingerprint = '{fingerprint}'"
        earlier = self.client.search_runs([self.experiment_id], query, max_results=1)
        if earlier:
            run = earlier[0]
            self.client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self.client.create_run(self.experiment_id, run_name=name, tags={**tags, "acip_fingerprint": fingerprint})
        return Run(self.client, run.info.run_id, self.experiment_id)


@dataclass(frozen=True)
class Run:
    client: MlflowClient
    run_id: str
    experiment_id: str

    def params(self, params: Mapping[str, Any]) -> None:
        self.client.log_batch(self.run_id, params=[Param(key, str(value)[:6000]) for key, value in params.items()])

    def tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def last_step(self, key: str) -> int:
        """The last step at which `key` was logged; 0 if never. A resumed run doesn't log a step twice."""
        return max((metric.step for metric in self.client.get_metric_history(self.run_id, key)), default=0)

    def metrics(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for step, values in rows for key, value in values.items()]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def figure(self, figure: Figure, name: str) -> None:
        self.client.log_figure(self.run_id, figure, name)

    def folder(self, folder: Path, name: str) -> None:
        self.client.log_artifacts(self.run_id, str(folder), name)

    def table(self, data: Mapping[str, list[Any]], name: str) -> None:
        self.client.log_table(self.run_id, dict(data), name)

    def finish(self, status: str) -> None:
        self.client.set_terminated(self.run_id, status)


class Registry:
    """Registered any-size models."""

    def __init__(self, settings: Settings) -> None:
        self.client = MlflowClient(tracking_uri=settings.tracking_uri)

    def register(self, name: str, uri: str, run_id: str, tags: Mapping[str, str]) -> ModelVersion:
        """A new version of `name` at `uri`; the same URI is registered once."""
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self.client.search_model_versions(f"name = '{name}'"):
            if version.source == uri:
                return self._version(version)
        return self._version(self.client.create_model_version(name, source=uri, run_id=run_id, tags=dict(tags)))

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_model_version_tag(version.name, version.version, key, value)

    def set_alias(self, version: ModelVersion, alias: str = CHAMPION) -> None:
        self.client.set_registered_model_alias(version.name, alias, version.version)

    def models(self) -> list[str]:
        names: list[str] = []
        page = None
        while page != "":
            models = self.client.search_registered_models(page_token=page)
            names.extend(model.name for model in models)
            page = models.token or ""
        return sorted(names)

    def versions(self, name: str, tags: Mapping[str, str]) -> list[ModelVersion]:
        """The versions with these tags, the newest first."""
        conditions = [f"name = '{name}'", *(f"tags.{key} = '{value}'" for key, value in tags.items())]
        found = self.client.search_model_versions(" and ".join(conditions))
        return sorted(map(self._version, found), key=lambda version: -int(version.version))

    def resolve(self, name: str, which: str = CHAMPION) -> ModelVersion:
        """`which` is an alias or a version number. Resolve once and keep the version: aliases move."""
        try:
            found = self.client.get_model_version(name, which) if which.isdigit() else self.client.get_model_version_by_alias(name, which)
        except MlflowException as error:
            models = self.models()
            if name not in models:
                have = f"it holds: {', '.join(models)}" if models else "it is empty: run jobs/calibrate_all.py first"
                raise RegistryError(f"no model {name!r} in the registry{did_you_mean(name, models)}; {have}.") from error
            raise RegistryError(f"model {name!r} has no version or alias {which!r}.") from error
        return self._version(found)

    def _version(self, version: Any) -> ModelVersion:
        aliases = tuple(version.aliases) if version.aliases else ()
        return ModelVersion(version.name, str(version.version), version.source, aliases, dict(version.tags))
