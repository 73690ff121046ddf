"""Runs and the model registry. The only place that uses mlflow.

A run records what a person wants to see: recipe, metrics, figures, small files, and the artifact's URI. Weights never
pass through MLflow: a registered version points at the URI, and the alias `champion` chooses what is served.
"""

import json
import logging
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from requests.exceptions import RequestException
from sqlalchemy.exc import SQLAlchemyError

from acip.errors import AcipError
from acip.utils.coerce import did_you_mean
from acip_platform.settings import Settings, masked, sqlite_path
from acip_platform.tracking.provenance import commit

mpl.use("Agg")
logging.getLogger("mlflow").setLevel(logging.WARNING)  # after its import, which sets another level
from matplotlib.figure import Figure

CHAMPION = "champion"  # what is served
CANDIDATE = "candidate"  # what may become it
CHAMPIONS = "champions"  # tag of a registered model: the versions that were its champion, in order
EXPERIMENT_NOTE = "mlflow.note.content"  # tag of an experiment: its description
AXES = (
    'What the metrics are drawn over (MLflow labels every x axis "Step"): `tradeoff/*`, `divergence/*`, `perplexity/*`, `task/*`, '
    "`efficiency/*`, `quantized/*`, `size/*` and `excess_loss_nats/*` are over the size of the model in percent of the original, 100 at "
    "the right; all other metrics are over optimizer steps."
)
LOCAL_SERVER = "http://127.0.0.1:5000"  # of `mlflow server`
RUNS_TABLE = "runs?workflowType=machine_learning"  # MLflow 3 opens an experiment in its view for GenAI, which has no such metrics
BATCH = 1000  # metrics of one request at most

log = logging.getLogger(__name__)

IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # seconds, instead of minutes


@contextmanager
def few_retries() -> Iterator[None]:
    """Inside, a server that is down is given up soon, unless the environment says how soon: a calibration stands still meanwhile."""
    added = {name: value for name, value in IMPATIENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


class RegistryError(AcipError):
    """A model, version or alias that the registry doesn't hold. Says what it holds."""


class RegistryAwayError(AcipError):
    """The registry does not answer, or fails."""


@contextmanager
def reached(settings: Settings | None = None) -> Iterator[None]:
    """What MLflow says of a server or a database that it can't ask, as ours. Its client has tried for minutes by then.

    Also as a decorator of what a job runs; without `settings`, those of the environment.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, RequestException) as error:  # ImportError: of a database's driver
        where = masked((settings or Settings.from_env()).tracking_uri)
        said = masked(str(error)).splitlines()[0].rstrip(".")
        raise RegistryAwayError(f"the registry at {where} can't be asked: {said}. Is it running? Check MLFLOW_TRACKING_URI.") from error


@dataclass(frozen=True)
class ModelVersion:
    """A registered any-size model: where its artifact is."""

    name: str
    version: str
    uri: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]


class Monitor(SystemMetricsMonitor):
    """MLflow's ends for good where it can't reach the server once; this one goes on when the server is back."""

    def monitor(self) -> None:
        while not self._shutdown_event.is_set():
            super().monitor()
            self._shutdown_event.wait(self.sampling_interval)


class Tracking:
    """One experiment of one tracking store."""

    def __init__(self, settings: Settings, experiment: str) -> None:
        if database := sqlite_path(settings.tracking_uri):
            database.parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=settings.tracking_uri)
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            local = settings.tracking_uri.startswith("sqlite:")
            location = (settings.home / "mlruns").as_uri() if local else None
            try:
                self.experiment_id = self.client.create_experiment(experiment, location, {EXPERIMENT_NOTE: AXES})
            except MlflowException:  # another process was faster
                found = self.client.get_experiment_by_name(experiment)
        if found is not None:
            self.experiment_id = found.experiment_id
            if EXPERIMENT_NOTE not in found.tags:  # what a person wrote there stays
                self.client.set_experiment_tag(found.experiment_id, EXPERIMENT_NOTE, AXES)

    def start(self, name: str, fingerprint: str, tags: Mapping[str, str], parent: "Run | None" = None) -> "Run":
        """The run of this fingerprint, gone on with if an earlier attempt began it; inside `parent`."""
        query = f"tags.acip_fingerprint = '{fingerprint}'"
        earlier = self.client.search_runs([self.experiment_id], query, max_results=1)
        inside = {MLFLOW_PARENT_RUN_ID: parent.run_id} if parent else {}
        if earlier:
            run = earlier[0]
            self.client.update_run(run.info.run_id, status="RUNNING")
        else:
            known = {**resolve_tags(), MLFLOW_GIT_COMMIT: commit(), "acip_fingerprint": fingerprint}
            run = self.client.create_run(self.experiment_id, run_name=name, tags=known)
        started = Run(self.client, run.info.run_id)
        started.tags({**tags, **inside})
        return started


@dataclass(frozen=True)
class Run:
    client: MlflowClient
    run_id: str

    @classmethod
    def of(cls, settings: Settings, run_id: str) -> "Run":
        """One that was started elsewhere."""
        return cls(MlflowClient(tracking_uri=settings.tracking_uri), run_id)

    @property
    def experiment_id(self) -> str:
        return self.client.get_run(self.run_id).info.experiment_id

    def params(self, params: Mapping[str, Any]) -> None:
        """MLflow keeps a parameter's first value: what a later attempt changed (its evaluation, recomputing) is in recipe.json."""
        known = self.client.get_run(self.run_id).data.params
        new = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in known]
        self.client.log_batch(self.run_id, params=new)

    def tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def describe(self, markdown: str) -> None:
        """What the run's page says on top."""
        self.tags({MLFLOW_RUN_NOTE: markdown})

    def last_step(self, key: str) -> int:
        """The last step at which `key` was logged; 0 if never. A resumed run doesn't log a step twice."""
        return max(self.steps(key), default=0)

    def steps(self, key: str) -> set[int]:
        """The steps at which `key` was logged."""
        return {metric.step for metric in self.client.get_metric_history(self.run_id, key)}

    def metrics(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """In batches of whole steps, so that the last step that is there was logged with all it has. NaN and infinity are no metrics."""
        now = int(time.time() * 1000)
        batch: list[Metric] = []
        for step, values in rows:
            if len(batch) + len(values) > BATCH:
                self.client.log_batch(self.run_id, metrics=batch)
                batch = []
            batch += [Metric(key, value, now, step) for key, value in values.items() if math.isfinite(value)]
        self.client.log_batch(self.run_id, metrics=batch)

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """CPU, GPU, memory, disk and network of this machine in the run, while inside."""
        monitor = Monitor(self.run_id, resume_logging=True, tracking_uri=self.client.tracking_uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def figure(self, figure: Figure, name: str) -> None:
        self.client.log_figure(self.run_id, figure, name)

    def json(self, content: Any, name: str) -> None:
        self.client.log_text(self.run_id, json.dumps(content, indent=1), name)

    def read_json(self, name: str) -> Any:
        """What `json` wrote; None if nothing did."""
        if not self._has(name):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(Path(self.client.download_artifacts(self.run_id, name, folder)).read_text(encoding="utf-8"))

    def folder(self, folder: Path, name: str) -> None:
        self.client.log_artifacts(self.run_id, str(folder), name)

    def table(self, data: Mapping[str, list[Any]], name: str) -> None:
        """As rows and columns in the run's artifacts, once: MLflow would add the same rows again."""
        if not self._has(name):
            self.client.log_table(self.run_id, dict(data), name)

    def _has(self, name: str) -> bool:
        return name in {item.path for item in self.client.list_artifacts(self.run_id)}

    def finish(self, status: str) -> None:
        """What was done is done, also where MLflow can't be told, after minutes: that is only said."""
        try:
            self.client.set_terminated(self.run_id, status)
        except MlflowException as error:
            log.warning("the end of run %s isn't recorded: %s", self.run_id, masked(str(error)))

    @contextmanager
    def ending(self, status: Callable[[], str] = lambda: "FINISHED") -> Iterator[None]:
        """Inside is the run's work: it ends as `status` says then, or FAILED where something is raised."""
        try:
            yield
        except BaseException:
            self.finish("FAILED")
            raise
        self.finish(status())


def artifacts_inside(settings: Settings, run_id: str) -> dict[str, str]:
    """The artifacts' URIs of the runs inside a fleet's or a sweep's run, by the runs' names."""
    client = MlflowClient(tracking_uri=settings.tracking_uri)
    try:
        experiment = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        raise RegistryError(f"there is no run {run_id!r} in {masked(settings.tracking_uri)}: {error.message}") from error
    inside = client.search_runs([experiment], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'", order_by=["attributes.start_time ASC"])
    done = [run for run in inside if "artifact_uri" in run.data.tags]
    names = Counter(run.info.run_name for run in done)
    labels = [run.info.run_name + (f" {run.info.run_id[:6]}" if names[run.info.run_name] > 1 else "") for run in done]
    found = {label: run.data.tags["artifact_uri"] for label, run in zip(labels, done, strict=True)}
    if not found:
        raise RegistryError(f"none of the {len(inside)} runs inside {run_id} has an artifact: nothing in it is finished yet.")
    return found


def runs_page(settings: Settings, experiment_id: str) -> str:
    """The address of an experiment's table of runs; of a local file's, that of the server which the last screen says how to start."""
    server = masked(settings.tracking_uri).rstrip("/") if settings.tracking_uri.startswith("http") else LOCAL_SERVER
    return f"{server}/#/experiments/{experiment_id}/{RUNS_TABLE}"


def check_registers(settings: Settings) -> None:
    """RegistryError, before the long work, where its end could not be registered: MLflow's server takes no path of another machine."""
    if settings.tracking_uri.startswith("http") and "://" not in settings.store:
        raise RegistryError(
            f"MLflow's server at {masked(settings.tracking_uri)} registers no local path, and artifacts would go to {settings.store}: "
            "set ACIP_ARTIFACT_URI to s3://bucket/prefix, or leave MLFLOW_TRACKING_URI out."
        )


class Registry:
    """Registered any-size models."""

    def __init__(self, settings: Settings) -> None:
        self.client = MlflowClient(tracking_uri=settings.tracking_uri)

    def register(self, name: str, uri: str, run_id: str, tags: Mapping[str, str], description: str = "", about: str = "") -> ModelVersion:
        """A new version of `name` at `uri`, described; the same URI is registered once. `about` describes the model."""
        try:
            self.client.create_registered_model(name, description=about)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self.client.search_model_versions(f"name = '{name}'"):
            if version.source == uri:
                return self._version(version)
        return self._version(self.client.create_model_version(name, uri, run_id, dict(tags), description=description))

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_model_version_tag(version.name, version.version, key, value)

    def set_alias(self, version: ModelVersion, alias: str = CHAMPION) -> None:
        self.client.set_registered_model_alias(version.name, alias, version.version)

    def champion(self, name: str) -> ModelVersion | None:
        """Of a model that is there; None = it has none."""
        now = self.client.get_registered_model(name).aliases.get(CHAMPION)
        return None if now is None else self.resolve(name, str(now))

    def set_champion(self, version: ModelVersion) -> None:
        """Make `version` the champion, and remember the one before. Whoever is remembered had the alias by then."""
        past = self.champions(version.name)
        self.set_alias(version)
        if past[-1:] != [version.version]:
            self._remember(version.name, [*past, version.version])
        if CANDIDATE in self.resolve(version.name, version.version).aliases:
            self.client.delete_registered_model_alias(version.name, CANDIDATE)

    def back(self, name: str) -> ModelVersion:
        """The champion before is the champion again. Versions that were deleted are passed over."""
        now = self.resolve(name)
        past = self.champions(name)[:-1]
        while past:
            try:
                before = self.resolve(name, past[-1])
            except RegistryError:
                past.pop()
                continue
            self._remember(name, past)
            self.set_alias(before)
            return before
        raise RegistryError(f"{name} had no champion before version {now.version}. Name the version that shall be it.")

    def champions(self, name: str) -> list[str]:
        """Versions that were the champion, the one that is it last, also where someone chose it in the UI."""
        model = self.client.get_registered_model(name)
        past = [version for version in model.tags.get(CHAMPIONS, "").split(", ") if version]
        now = model.aliases.get(CHAMPION)
        return past if now is None or past[-1:] == [str(now)] else [*past, str(now)]

    def _remember(self, name: str, champions: list[str]) -> None:
        self.client.set_registered_model_tag(name, CHAMPIONS, ", ".join(champions))

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
        listed = [self._version(found) for found in self.client.search_model_versions(" and ".join(conditions))]
        aliases = self.client.get_registered_model(name).aliases if listed else {}  # a search leaves them out
        named = [replace(found, aliases=tuple(alias for alias, at in aliases.items() if str(at) == found.version)) for found in listed]
        return sorted(named, key=lambda version: -int(version.version))

    def resolve(self, name: str, which: str = CHAMPION) -> ModelVersion:
        """`which` is an alias or a version number, RegistryError where there is none. Resolve once and keep it: aliases move."""
        try:
            numbered = which.isdigit() and len(which) < 10  # longer ones are no integers to a database
            found = self.client.get_model_version(name, which) if numbered else self.client.get_model_version_by_alias(name, which)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            models = self.models()
            if name not in models:
                have = f"it holds: {', '.join(models)}" if models else "it is empty: run jobs/calibrate_all.py first"
                raise RegistryError(f"no model {name!r} in the registry{did_you_mean(name, models)}; {have}.") from error
            aliases = self.client.get_registered_model(name).aliases
            there = [each.version + "".join(f" ({alias})" for alias in each.aliases) for each in self.versions(name, {})]
            hint = did_you_mean(which, aliases)
            raise RegistryError(f"model {name!r} has no version or alias {which!r}{hint}; it has {', '.join(there) or 'none'}.") from error
        return self._version(found)

    def named(self, text: str, usual: str = CHAMPION) -> ModelVersion:
        """NAME, its `usual` version, or NAME@WHICH, an alias or a version number."""
        name, _, which = text.partition("@")
        return self.resolve(name, which or usual)

    def _version(self, version: Any) -> ModelVersion:
        aliases = tuple(version.aliases) if version.aliases else ()
        return ModelVersion(version.name, str(version.version), version.source, aliases, dict(version.tags))
