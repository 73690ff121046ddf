"""MLflow runs: what a job records for people to read.

A run holds the recipe, metrics, figures, small files and the URI of the artifact. Weights never pass through MLflow.
"""

import json
import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from mlflow.entities import LifecycleStage, LoggedModelInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from acip.sizing.budget import is_coded
from acip_platform.settings import Settings, masked, sqlite_path
from acip_platform.tracking.provenance import commit
from acip_platform.tracking.registry import RegistryError

mpl.use("Agg")
logging.getLogger("mlflow").setLevel(logging.WARNING)  # after its import, which sets another level
from matplotlib.figure import Figure

EXPERIMENT_NOTE = "mlflow.note.content"  # tag of an experiment: its description
AXES = (
    'The x axis of each metric, which MLflow always labels "Step": for `tradeoff/*`, `divergence/*`, `perplexity/*`, `task/*`, '
    "`efficiency/*`, `quantized/*`, `size/*` and `excess_loss_nats/*` it is the size of the model in percent of the original, with 100 "
    "at the right. For `bytes/*` it is the size of a coded model in thousandths of the bytes of the original. For all other metrics it is "
    "the optimizer step."
)
LOCAL_SERVER = "http://127.0.0.1:5000"  # default address of `mlflow server`
TRAINING_VIEW = "workflowType=machine_learning"  # MLflow 3 opens an experiment in its GenAI view, which does not show these metrics
BATCH = 1000  # most metrics in one request
BYTES = "bytes/"  # beginning of the names of a coded size's metrics

log = logging.getLogger(__name__)


def at_size(row: Mapping[str, Any], values: Mapping[str, float]) -> tuple[int, dict[str, float]]:
    """Return (step, metrics) of the size of a curve's row: percent for sizes of ranks, thousandths of the bytes for coded sizes."""
    if is_coded(row):
        return round(row["asked"] * 1000), {f"{BYTES}{name}": value for name, value in values.items()}
    return round(row["asked"] * 100), dict(values)


class Monitor(SystemMetricsMonitor):
    """A system metrics monitor that continues after a failed request. MLflow's own monitor stops at the first one."""

    def monitor(self) -> None:
        while not self._shutdown_event.is_set():
            super().monitor()
            self._shutdown_event.wait(self.sampling_interval)


class Tracking:
    """One experiment in one tracking store. It is created if it does not exist; RegistryError if it was deleted."""

    def __init__(self, settings: Settings, experiment: str) -> None:
        if database := sqlite_path(settings.tracking_uri):
            database.parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=settings.tracking_uri)
        existing = self.client.get_experiment_by_name(experiment)
        if existing is None:
            local = settings.tracking_uri.startswith("sqlite:")
            location = (settings.home / "mlruns").as_uri() if local else None
            try:
                self.experiment_id = self.client.create_experiment(experiment, location, {EXPERIMENT_NOTE: AXES})
            except MlflowException:  # another process has created it meanwhile
                existing = self.client.get_experiment_by_name(experiment)
        if existing is not None:
            self.experiment_id = existing.experiment_id
            if existing.lifecycle_stage != LifecycleStage.ACTIVE:
                raise RegistryError(
                    f"the experiment {experiment!r} was deleted in MLflow. Restore it (mlflow experiments restore --experiment-id "
                    f"{self.experiment_id}), or remove it for good (mlflow gc --experiment-ids {self.experiment_id})."
                )
            if EXPERIMENT_NOTE not in existing.tags:  # a description that a person wrote is kept
                self.client.set_experiment_tag(existing.experiment_id, EXPERIMENT_NOTE, AXES)

    def start(self, name: str, fingerprint: str, tags: Mapping[str, str], parent: "Run | None" = None) -> "Run":
        """Start the run with this fingerprint as a child of `parent`, or resume it if an earlier attempt has created it."""
        query = f"tags.acip_fingerprint = '{fingerprint}'"
        earlier = self.client.search_runs([self.experiment_id], query, max_results=1)
        parent_tag = {MLFLOW_PARENT_RUN_ID: parent.run_id} if parent else {}
        if earlier:
            run = earlier[0]
            self.client.update_run(run.info.run_id, status="RUNNING")
        else:
            context = {**resolve_tags(), MLFLOW_GIT_COMMIT: commit(), "acip_fingerprint": fingerprint}
            run = self.client.create_run(self.experiment_id, run_name=name, tags=context)
        started = Run(self.client, run.info.run_id)
        started.tags({**tags, **parent_tag})
        return started


@dataclass(frozen=True)
class Run:
    """One MLflow run, and everything that can be recorded in it."""

    client: MlflowClient
    run_id: str

    @classmethod
    def of(cls, settings: Settings, run_id: str) -> "Run":
        """Return a run that another process has started."""
        return cls(MlflowClient(tracking_uri=settings.tracking_uri), run_id)

    @property
    def experiment_id(self) -> str:
        return self.client.get_run(self.run_id).info.experiment_id

    def params(self, params: Mapping[str, Any]) -> None:
        """Log the parameters that are not logged yet.

        MLflow does not change a logged value. Settings that a later attempt changed (such as the evaluation) are in recipe.json.
        """
        logged = self.client.get_run(self.run_id).data.params
        new = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in logged]
        self.client.log_batch(self.run_id, params=new)

    def tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def describe(self, markdown: str) -> None:
        """Set the description at the top of the run's page."""
        self.tags({MLFLOW_RUN_NOTE: markdown})

    def uses(self, model_id: str) -> None:
        """Record that the run starts from a LoggedModel. The page of the run then links it."""
        self.client.log_inputs(self.run_id, models=[LoggedModelInput(model_id)])

    def last_step(self, key: str) -> int:
        """Return the last step at which `key` was logged, or 0. A resumed run uses it to log each step once."""
        return max(self.steps(key), default=0)

    def steps(self, key: str) -> set[int]:
        """Return the steps at which `key` was logged."""
        return {metric.step for metric in self.client.get_metric_history(self.run_id, key)}

    def metrics(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log rows of (step, metrics). NaN and infinity are left out.

        A batch holds whole steps, so the last logged step always has all its metrics.
        """
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
        """Log CPU, GPU, memory, disk and network use of this machine while inside the block."""
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
        """Return the content that `json` has stored under `name`, or None."""
        if not self._has(name):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(Path(self.client.download_artifacts(self.run_id, name, folder)).read_text(encoding="utf-8"))

    def folder(self, folder: Path, name: str) -> None:
        self.client.log_artifacts(self.run_id, str(folder), name)

    def table(self, data: Mapping[str, list[Any]], name: str) -> None:
        """Log columns as a table, unless it exists: MLflow would append the same rows again."""
        if not self._has(name):
            self.client.log_table(self.run_id, dict(data), name)

    def _has(self, name: str) -> bool:
        return name in {item.path for item in self.client.list_artifacts(self.run_id)}

    def finish(self, status: str) -> None:
        """Set the final status. If MLflow stays unreachable, only a warning is logged, because the work itself is done."""
        try:
            self.client.set_terminated(self.run_id, status)
        except MlflowException as error:
            log.warning("could not record the end of run %s: %s", self.run_id, masked(str(error)))

    @contextmanager
    def ending(self, status: Callable[[], str] = lambda: "FINISHED") -> Iterator[None]:
        """Finish the run at the end of the block: with the result of `status`, or as FAILED after an exception."""
        try:
            yield
        except BaseException:
            self.finish("FAILED")
            raise
        self.finish(status())


def artifacts_inside(settings: Settings, run_id: str) -> dict[str, str]:
    """Return the artifact URIs of the child runs of a fleet's or a sweep's run, by run name.

    RegistryError if the run does not exist or no child has an artifact.
    """
    client = MlflowClient(tracking_uri=settings.tracking_uri)
    try:
        experiment = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        raise RegistryError(f"there is no run {run_id!r} in {masked(settings.tracking_uri)}: {error.message}") from error
    children = client.search_runs([experiment], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'", order_by=["attributes.start_time ASC"])
    done = [run for run in children if "artifact_uri" in run.data.tags]
    names = Counter(run.info.run_name for run in done)
    labels = [run.info.run_name + (f" {run.info.run_id[:6]}" if names[run.info.run_name] > 1 else "") for run in done]
    uris = {label: run.data.tags["artifact_uri"] for label, run in zip(labels, done, strict=True)}
    if not uris:
        raise RegistryError(f"none of the {len(children)} child runs of {run_id} has an artifact: none has finished yet.")
    return uris


def runs_page(settings: Settings, experiment_id: str) -> str:
    """Return the URL of an experiment's table of runs. For a local database it is the default address of `mlflow server`."""
    return _page(settings, experiment_id, "runs")


def models_page(settings: Settings, experiment_id: str) -> str:
    """Return the URL of an experiment's table of models."""
    return _page(settings, experiment_id, "models")


def _page(settings: Settings, experiment_id: str, tab: str) -> str:
    server = masked(settings.tracking_uri).rstrip("/") if settings.tracking_uri.startswith("http") else LOCAL_SERVER
    return f"{server}/#/experiments/{experiment_id}/{tab}?{TRAINING_VIEW}"
