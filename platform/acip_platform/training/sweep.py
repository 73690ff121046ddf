"""Run the calibrations of a sweep with Ray Tune: first its shared prunings ("trunks"), then its trials.

    trunk     one pruning that several trials share; it saves a state for each stop ratio (acip.calibration.shared_pruning)
    trial     one recipe: it starts from the state of its trunk, post-tunes, and measures its curve
    rung      a point of the post-tuning at which a trial is saved, and under asha measured and compared
    winner    the finished trial with the smallest area under excess loss (acip.sizing.excess_loss_area); its state becomes an artifact

Tune starts, retries and resumes trunks and trials. A sweep with the same name and trials resumes. The trials on a node share the
bases of the layers (BasisCache: one process computes them, all map them).

asha ends a trial at 1/8, 1/4 or 1/2 of its post-tuning if its area under excess loss is worse than the median of the trials that
reached that rung earlier. The winner is chosen by the same area on the same held-out text, so it is comparable between recipes. The
training loss is not: it depends on the sizes, the lambda and the distillation of the recipe. Tune does not keep rungs over a
restart: trials that run after it are compared with each other only.
"""

import functools
import gc
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import torch
from pyarrow.fs import FileSystem, FileType
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from acip.artifact.artifact import Artifact
from acip.artifact.read_back import read_back
from acip.base import Base, load_base
from acip.calibration import shared_pruning
from acip.calibration.loop import calibrate
from acip.calibration.state import CalibrationState, StepReport
from acip.data import WINDOWS_VERSION, TokenBatches
from acip.errors import AcipError
from acip.evaluate import trade_off
from acip.sizing.elastic_model import ElasticModel
from acip.sizing.excess_loss_area import excess_loss_area
from acip.sizing.model_sizes import cut_table
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Resources, root_cause
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking import run_descriptions
from acip_platform.tracking.provenance import provenance
from acip_platform.tracking.registry import CANDIDATE
from acip_platform.tracking.runs import Run
from acip_platform.training.completion import Heldout, finish, stored
from acip_platform.training.sweep_space import Space, Trial
from acip_platform.training.worker import Observer, Read, prepare, read_once

SMALLEST = 0.4  # the smallest size of the area that the winner is chosen by
RUNGS = (1, 2, 4, 8)  # in eighths of the post-tuning
RETRIES = 2  # of a trial whose process died
TUNE = {  # environment variables that Ray Tune reads while it runs
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # between snapshots; the default of 10 s or more would repeat trials that finished before a kill
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",  # no warning that snapshots are frequent
    "RAY_AIR_NEW_OUTPUT": "0",  # no tables: jobs/sweep.py prints them
}
os.environ.update({name: value for name, value in TUNE.items() if name not in os.environ})
logging.getLogger("ray.tune").setLevel(logging.WARNING)

CPU_BEGAN: ContextVar[float] = ContextVar("CPU seconds of this process when its present trial began")


@dataclass(frozen=True)
class Sweep:
    """One job and all trials of one space."""

    job: Job
    space: Space
    trials: tuple[Trial, ...]

    @classmethod
    def plan(cls, job: Job, space: Space) -> "Sweep":
        """Check the job and draw the trials; AcipError if they cannot run."""
        if job.num_workers > 1:
            raise AcipError(f"{job.name} has num_workers {job.num_workers}; a sweep's trials run on one worker each: set it to 1.")
        if 1.0 not in job.sizes or len(job.sizes) < 2:
            raise AcipError(f"{job.name} is measured at {list(job.sizes)}; a sweep needs 1.0 and smaller ones in sizes to choose by.")
        return cls(job, space, space.trials(job))

    @functools.cached_property
    def trunks(self) -> dict[str, list[Trial]]:
        """The trials of each pruning that several share, by name. A trial that shares with no other prunes by itself."""
        groups = (group for group in shared_pruning.shared_prunings([trial.job.recipe for trial in self.trials]) if len(group) > 1)
        return {f"trunk{n}": [self.trials[i] for i in group] for n, group in enumerate(groups)}

    @functools.cached_property
    def key(self) -> str:
        """The name under which the sweep is saved; a sweep with an equal key resumes."""
        content = [self.space.name, self.space.scheduler, [trial.job.by_content() for trial in self.trials], WINDOWS_VERSION]
        return f"{self.job.name}-{self.space.name}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Cost:
    """The time of a trial or trunk, from loading the model to its last report. CPU time is comparable on a busy machine."""

    seconds: float
    cpu_seconds: float  # of its process, since the last interruption

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> "Cost":
        return cls(metrics.get("time_total_s", 0.0), metrics.get("cpu_s", 0.0))


@dataclass(frozen=True)
class Outcome:
    """The result of a trial. `rows` is its last measured curve, with all sizes only if it is `finished`."""

    trial: Trial
    rows: list[dict[str, Any]]
    share: int  # of the post-tuning, in eighths
    cost: Cost
    error: str | None
    state: tune.Checkpoint | None

    @property
    def finished(self) -> bool:
        return self.error is None and self.share == RUNGS[-1]

    @property
    def area(self) -> float:
        """The area under excess loss in nats; infinite if there is no curve, or if a loss is not finite."""
        area = excess_loss_area(self.rows, SMALLEST) if self.rows else math.inf
        return area if math.isfinite(area) else math.inf


# ---- in the driver


def run(sweep: Sweep, share: Resources, settings: Settings, runs: Mapping[str, Run], events: Any) -> tuple[list[Outcome], dict[str, Cost]]:
    """Run or resume all trunks and trials. Returns the outcomes of the trials and the costs of the trunks by name."""
    jobs = {trial.name: trial.job.to_dict() for trial in sweep.trials}
    context = {
        "settings": settings,
        "jobs": jobs,
        "runs": {name: trial_run.run_id for name, trial_run in runs.items()},
        "threads": max(1, int(share.cpus)),
        "events": events,
    }
    sharing = {name: [trial.name for trial in group] for name, group in sweep.trunks.items()}
    pruned = _fit(sweep.key, "trunks", _trunk, list(sharing), {**context, "trunks": sharing}, share, settings) if sharing else {}
    forks: dict[str, tune.Checkpoint | Exception] = {}
    for name, group in sharing.items():
        result = pruned[name]
        if error := (result.metrics or {}).get("error"):
            forks |= dict.fromkeys(group, AcipError(f"its pruning failed: {error}"))
        elif result.error:
            forks |= dict.fromkeys(group, RuntimeError(f"its pruning failed: {root_cause(result.error)}"))
        for checkpoint, metrics in result.best_checkpoints or []:
            forks |= dict.fromkeys(json.loads(metrics["trials"]), checkpoint)
    asha = sweep.space.scheduler == "asha"
    scheduler = ASHAScheduler(time_attr="share", max_t=RUNGS[-1], grace_period=RUNGS[0], reduction_factor=2) if asha else None
    context |= {"forks": forks, "measure_rungs": asha}
    results = _fit(sweep.key, "trials", _trial, list(jobs), context, share, settings, scheduler)
    outcomes = []
    for trial in sweep.trials:
        result = results[trial.name]
        metrics = result.metrics or {}
        error = metrics.get("error") or (root_cause(result.error) if result.error else None)
        rows = json.loads(metrics.get("curve", "[]"))
        outcomes.append(Outcome(trial, rows, metrics.get("share", 0), Cost.of(metrics), error, result.checkpoint))
    if not any(result.error for result in (*pruned.values(), *results.values())):  # else the next attempt needs the states of the trunks
        _delete(chain.from_iterable((c for c, _ in result.best_checkpoints or []) for result in pruned.values()))
    return outcomes, {name: Cost.of(result.metrics or {}) for name, result in pruned.items()}


def _fit(
    key: str,
    name: str,
    trainable: Callable[..., None],
    trials: Sequence[str],
    context: Mapping[str, Any],
    share: Resources,
    settings: Settings,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Run Tune over `trials` in the folder runs/key/name, from its last snapshot if there is one. Returns Tune's results by trial."""
    resources = {"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {})
    ready = tune.with_resources(tune.with_parameters(trainable, context=dict(context)), resources)
    space = {"trial": tune.grid_search(list(trials))}
    folder = f"{settings.runs}/{key}"
    if tune.Tuner.can_restore(f"{folder}/{name}"):
        tuner = tune.Tuner.restore(f"{folder}/{name}", ready, resume_unfinished=True, resume_errored=True, param_space=space)
    else:
        tuner = tune.Tuner(
            ready,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="area" if scheduler else None,
                mode="min" if scheduler else None,
                scheduler=scheduler,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=folder,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=None if name == "trunks" else 1),
                verbose=0,
            ),
        )
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune would return partial results after Ctrl-C, as if the trials had ended
    results = tuner.fit()
    return {Path(results[i].path).name: results[i] for i in range(len(results))}


def winner(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the finished trial with the smallest area under excess loss; the first if several are equal."""
    return min((outcome for outcome in outcomes if outcome.finished), key=lambda outcome: outcome.area, default=None)


def front(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the Pareto front: finished trials with a size below 1 at which no trial is better in both size and loss."""
    done = [outcome for outcome in outcomes if outcome.finished]
    points = [(row["got"], row["loss"]) for outcome in done for row in outcome.rows if row["asked"] < 1]

    def beaten(got: float, loss: float) -> bool:
        return any(point[0] <= got and point[1] <= loss and point != (got, loss) for point in points)

    return [outcome for outcome in done if any(not beaten(row["got"], row["loss"]) for row in outcome.rows if row["asked"] < 1)]


def keep(
    sweep: Sweep, outcomes: Sequence[Outcome], share: Resources, settings: Settings, runs: Mapping[str, Run], events: Any
) -> dict[str, dict[str, Any]]:
    """Make the artifacts that the space file asks for, register them with the winner as candidate, and delete the saved states.

    Returns the summary of `finish` by trial, the winner last. AcipError if an artifact cannot be made.
    """
    best = winner(outcomes)
    if best is None:
        return {}
    done = [outcome for outcome in outcomes if outcome.finished]
    chosen = {"winner": [], "front": front(outcomes), "all": done}[sweep.space.keep]
    chosen = [outcome for outcome in chosen if outcome is not best] + [best]  # the last registered version is the candidate
    kept = {outcome.trial.name for outcome in chosen}
    _delete(outcome.state for outcome in outcomes if outcome.state and outcome.error is None and outcome.trial.name not in kept)
    task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=RETRIES)(_artifact_or_error)

    def start(outcome: Outcome) -> ray.ObjectRef[dict[str, Any]]:
        return task.remote(outcome.trial, outcome.state, settings, runs[outcome.trial.name].run_id, max(1, int(share.cpus)), events)

    summaries = [*ray.get([start(outcome) for outcome in chosen[:-1]]), ray.get(start(best))]
    for outcome, summary in zip(chosen, summaries, strict=True):
        if "error" in summary:
            raise AcipError(f"the artifact of {outcome.trial.name} can't be made: {summary['error']}")
    _delete(outcome.state for outcome in chosen if outcome.state)
    return {outcome.trial.name: summary for outcome, summary in zip(chosen, summaries, strict=True)}


def _delete(states: Iterable[tune.Checkpoint]) -> None:
    """Delete saved states."""
    for state in states:
        with suppress(FileNotFoundError):  # an earlier attempt deleted it
            _files(state).delete_dir(state.path)


def _files(state: tune.Checkpoint) -> FileSystem:
    assert state.filesystem is not None  # Ray derives it from the path
    return state.filesystem


# ---- in the workers


def _users_errors_reported(work: Callable[..., None]) -> Callable[..., None]:
    """Report errors of the user instead of raising them, because Tune would retry a trial that raises."""

    @functools.wraps(work)
    def trainable(config: dict[str, Any], context: Mapping[str, Any]) -> None:
        CPU_BEGAN.set(time.process_time())
        try:
            work(config["trial"], context)
        except AcipError as error:
            tune.report({"error": str(error), "share": 0, "area": math.inf})

    return trainable


@_users_errors_reported
def _trunk(name: str, context: Mapping[str, Any]) -> None:
    """Prune once, and report a state for each trial of this trunk (a Tune trainable)."""
    jobs = {trial: Job.from_dict(context["jobs"][trial]) for trial in context["trunks"][name]}
    job = min(jobs.values(), key=lambda job: job.recipe.stop_ratio)
    base, batches, observer = _start(name, context, job)

    def keep_state(ratios: list[float], state: CalibrationState) -> None:
        _report({"trials": json.dumps([trial for trial, other in jobs.items() if other.recipe.stop_ratio in ratios])}, state)

    with _from(tune.get_checkpoint()) as folder:
        stop_ratios = {other.recipe.stop_ratio for other in jobs.values()}
        shared_pruning.prune(base.model, batches, job.recipe, stop_ratios, keep_state, folder, observer)
    observer.flush()


@_users_errors_reported
def _trial(name: str, context: Mapping[str, Any]) -> None:
    """Calibrate from the state of the trunk or of the last rung, and measure the curve (a Tune trainable)."""
    job, fork = Job.from_dict(context["jobs"][name]), context["forks"].get(name)
    if isinstance(fork, Exception):
        raise fork
    base, batches, observer = _start(name, context, job)
    heldout = read_once(Read(("heldout", job.base, job.heldout), lambda: Heldout.of(job, base)))
    rungs = Rungs(job, base.model, heldout, observer, context["measure_rungs"])
    with _from(tune.get_checkpoint() or fork) as folder:
        calibration = calibrate(base.model, batches, job.recipe, resume=folder, observe=rungs)
    observer.flush()
    rungs.finish(ElasticModel(base.model, calibration.table))


def _start(name: str, context: Mapping[str, Any], job: Job) -> tuple[Base, TokenBatches, Observer]:
    """Return what trunks and trials start with: the parametrized base, its batches, and the observer."""
    settings: Settings = context["settings"]

    def emit(kind: str, **facts: Any) -> None:
        context["events"].put.remote({"model": f"{job.name} {name}", "kind": kind, **facts})

    gc.collect()  # the process may have run another trial before
    torch.set_num_threads(context["threads"])
    run = Run.of(settings, context["runs"][name])
    base, device = load_base(job.base, job.recipe.dtype, job.trust_remote_code), _device()
    read_once(Read(("read back", job.base, job.recipe.exclude), lambda: read_back(base, job.recipe)))
    torch.nn.Module.to(base.model, device)
    return base, prepare(job, base, settings, emit, device), Observer(job, run, emit, device)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _from(state: tune.Checkpoint | None) -> Iterator[str | None]:
    """Yield the folder of a saved state to resume from; None if there is none or if it was deleted."""
    if state is None or _files(state).get_file_info(state.path).type == FileType.NotFound:
        yield None
        return
    with state.as_directory() as folder:
        yield folder


def _report(metrics: Mapping[str, Any], state: CalibrationState | None) -> None:
    """Report metrics to Tune, with a state to resume from if there is one."""
    report = {**metrics, "cpu_s": time.process_time() - CPU_BEGAN.get()}
    if state is None:
        tune.report(report)
        return
    with tempfile.TemporaryDirectory() as folder:
        state.save(folder)
        tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


@contextmanager
def _as_found(layers: Mapping[str, Any]) -> Iterator[None]:
    """Put the layers into evaluation mode; on exit, restore the mode of every module, and the rank of every layer."""
    modes = [(module, module.training) for layer in layers.values() for module in layer.modules()]
    ranks = [(layer, layer.rank) for layer in layers.values()]
    for layer in layers.values():
        layer.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for layer, rank in ranks:
            layer.set_rank(rank)


class Rungs:
    """An observer of a trial: it saves the state at each rung, and measures the curve there if `measure_rungs` is set.

    The model is as before after each call, so that a trial does not depend on being measured. `finish` measures the whole curve.
    """

    def __init__(self, job: Job, model: Any, heldout: Heldout, observer: Observer, measure_rungs: bool) -> None:
        self.job, self.model, self.heldout, self.observer, self.measure_rungs = job, model, heldout, observer, measure_rungs
        self.state: CalibrationState | None = None  # of the last post-tuning step
        self.passed = 0  # the last rung

    def __call__(self, reports: list[StepReport], state: CalibrationState) -> None:
        self.observer(reports, state)
        if reports[-1].phase != "post_tune":
            return
        self.state = state
        at = max((rung for rung in RUNGS[:-1] if reports[-1].progress >= rung / RUNGS[-1]), default=0)
        if self.passed < at and reports[-1].progress < 1:
            self.passed = at
            metrics: dict[str, Any] = {}
            if self.measure_rungs:
                sizes = sorted(self.job.sizes, reverse=True)
                some = tuple(dict.fromkeys((*sizes[::2], sizes[-1])))  # every other size; the end of the trial measures all
                with _as_found(state.layers):
                    metrics = self.measured(ElasticModel(self.model, cut_table(self.model, state.scores, self.job.recipe)), some)
            _report({"share": at, **metrics}, state)

    def measured(self, any_size: ElasticModel, sizes: tuple[float, ...]) -> dict[str, Any]:
        """Measure the curve at `sizes`, and its area under excess loss."""
        text = self.heldout.text
        rows = trade_off(any_size, self.heldout.windows, text.source, sizes, self.job.recipe.stop_ratio, text.protocol, start=text.start)
        return {"area": excess_loss_area(rows, SMALLEST), "curve": json.dumps(rows)}

    def finish(self, any_size: ElasticModel) -> None:
        """Measure the whole curve, and report it with the last state."""
        metrics = self.measured(any_size, self.job.sizes)
        if self.observer.run.last_step("tradeoff/perplexity") == 0:
            self.observer.run.metrics(
                [(0, {"area_under_excess_nats": metrics["area"]}), *run_descriptions.curve(json.loads(metrics["curve"]))]
            )
        self.observer.emit("stage", text=f"area under excess loss {metrics['area']:.4f}")
        _report({"share": RUNGS[-1], **metrics}, self.state)


def _artifact_or_error(*args: Any) -> dict[str, Any]:
    """Call `_artifact`, and return errors of the user as values: Ray would wrap raised ones in its own traceback."""
    try:
        return _artifact(*args)
    except AcipError as error:
        return {"error": str(error)}


def _artifact(trial: Trial, state: tune.Checkpoint | None, settings: Settings, run_id: str, threads: int, events: Any) -> dict[str, Any]:
    """Make the artifact of a finished trial from its state, and measure, log and register it as candidate (a Ray task)."""
    job = trial.job

    def emit(kind: str, **facts: Any) -> None:
        events.put.remote({"model": f"{job.name} {trial.name}", "kind": kind, **facts})

    torch.set_num_threads(threads)
    device = _device()
    run = Run.of(settings, run_id)
    store, key = Store.of(settings), f"{job.name}/{job.name}-{job.fingerprint}"
    base = load_base(job.base, job.recipe.dtype, job.trust_remote_code)
    heldout = Heldout.of(job, base)
    if not store.exists(store.uri(key)):
        torch.nn.Module.to(base.model, device)
        batches = prepare(job, base, settings, emit, device)
        with _from(state) as folder:
            calibration = calibrate(base.model, batches, job.recipe, resume=folder)
        origin = provenance(job) | {"attempt": key, "mlflow_run": run.run_id}
        stored(settings, key, lambda folder: Artifact.save(folder, base, calibration, origin))
    return finish(job, store.uri(key), run, settings, heldout, device, emit, alias=CANDIDATE)
