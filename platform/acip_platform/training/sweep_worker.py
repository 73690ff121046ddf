"""The processes of a sweep, which Ray Tune runs: the shared prunings and the trials, and the task that makes the artifact of a trial.

acip_platform.training.sweep defines the terms and the order in which they run.
"""

import functools
import gc
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from pyarrow.fs import FileSystem, FileType
from ray import tune

from acip.artifact.artifact import Artifact
from acip.artifact.read_back import read_back
from acip.base import Base
from acip.calibration import shared_pruning
from acip.calibration.loop import calibrate
from acip.calibration.state import CalibrationState, StepReport
from acip.data import TokenBatches
from acip.errors import AcipError
from acip.evaluate import CurveSetup, trade_off
from acip.sizing.elastic_model import ElasticModel
from acip.sizing.excess_loss_area import excess_loss_area
from acip.sizing.model_sizes import cut_table
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.storage import base_models
from acip_platform.storage.checkpoints import Checkpoints
from acip_platform.storage.code_checkpoints import remove_codes
from acip_platform.storage.store import Store
from acip_platform.tracking import run_descriptions
from acip_platform.tracking.provenance import provenance
from acip_platform.tracking.registry import CANDIDATE
from acip_platform.tracking.runs import Run
from acip_platform.training.calibration_text import CalibrationText, read_once
from acip_platform.training.completion import Heldout, finish, stored
from acip_platform.training.layer_codes import codes_of
from acip_platform.training.sweep_space import Trial
from acip_platform.training.worker import Observer, bases_of, check_memory, prepare

SMALLEST = 0.4  # the smallest size of the area that the winner is chosen by
RUNGS = (1, 2, 4, 8)  # in eighths of the post-tuning
CPU_BEGAN: ContextVar[float] = ContextVar("CPU seconds of this process when its present trial began")
logging.getLogger("ray.tune").setLevel(logging.WARNING)


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
def run_shared_pruning(name: str, context: Mapping[str, Any]) -> None:
    """Prune once, and report a state for each trial that shares this pruning (a Tune trainable)."""
    jobs = {trial: Job.from_dict(context["jobs"][trial]) for trial in context["shared_prunings"][name]}
    job = min(jobs.values(), key=lambda job: job.recipe.stop_ratio)
    base, batches, observer = _start(name, context, job)

    def keep_state(ratios: list[float], state: CalibrationState) -> None:
        report({"trials": json.dumps([trial for trial, other in jobs.items() if other.recipe.stop_ratio in ratios])}, state)

    with _from(tune.get_checkpoint()) as folder:
        stop_ratios = {other.recipe.stop_ratio for other in jobs.values()}
        shared_pruning.prune(base.model, batches, job.recipe, stop_ratios, keep_state, folder, observer)
    observer.flush()


@_users_errors_reported
def run_trial(name: str, context: Mapping[str, Any]) -> None:
    """Calibrate from the state of the shared pruning or of the last rung, and measure the curve (a Tune trainable)."""
    job, fork = Job.from_dict(context["jobs"][name]), context["forks"].get(name)
    if isinstance(fork, Exception):
        raise fork
    base, batches, observer = _start(name, context, job)
    heldout = read_once(("heldout", job.base, job.heldout), lambda: Heldout.of(job, base))
    rungs = Rungs(job, base.model, heldout, observer, context["measure_rungs"])
    with _from(tune.get_checkpoint() or fork) as folder:
        calibration = calibrate(base.model, batches, job.recipe, resume=folder, observe=rungs)
    observer.flush()
    rungs.finish(ElasticModel(base.model, calibration.table))


def _start(name: str, context: Mapping[str, Any], job: Job) -> tuple[Base, TokenBatches, Observer]:
    """Return the parametrized base, its batches, and the observer: the start of a shared pruning or a trial."""
    settings: Settings = context["settings"]

    def emit(kind: str, **facts: Any) -> None:
        context["events"].put.remote({"model": f"{job.name} {name}", "kind": kind, **facts})

    gc.collect()  # the process may have run another trial before
    torch.set_num_threads(context["threads"])
    run = Run.of(settings, context["runs"][name])
    base, device = base_models.load(job.base, job.recipe.dtype, job.trust_remote_code, Store.of(settings).cache), _device()
    read_once(("read back", job.base, job.recipe.exclude), lambda: read_back(base, job.recipe))
    torch.nn.Module.to(base.model, device)
    check_memory(job, base, device, emit, held=True)
    windows = CalibrationText.of(job, base, settings, emit).windows
    return base, prepare(job, base, windows, settings, emit, device), Observer(job, run, emit, device)


def file_system(state: tune.Checkpoint) -> FileSystem:
    """Return the file system of a saved state."""
    assert state.filesystem is not None  # Ray derives it from the path
    return state.filesystem


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _from(state: tune.Checkpoint | None) -> Iterator[str | None]:
    """Yield the folder of a saved state to resume from; None if there is none or if it was deleted."""
    if state is None or file_system(state).get_file_info(state.path).type == FileType.NotFound:
        yield None
        return
    with state.as_directory() as folder:
        yield folder


def report(metrics: Mapping[str, Any], state: CalibrationState | None) -> None:
    """Report metrics to Tune, with a state to resume from if there is one."""
    values = {**metrics, "cpu_s": time.process_time() - CPU_BEGAN.get()}
    if state is None:
        tune.report(values)
        return
    with tempfile.TemporaryDirectory() as folder:
        state.save(folder)
        tune.report(values, checkpoint=tune.Checkpoint.from_directory(folder))


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
            report({"share": at, **metrics}, state)

    def measured(self, any_size: ElasticModel, sizes: tuple[float, ...]) -> dict[str, Any]:
        """Measure the curve at `sizes`, and its area under excess loss."""
        text = self.heldout.text
        rows = trade_off(
            any_size, sizes, CurveSetup(self.heldout.windows, text.source, self.job.recipe.stop_ratio, text.protocol, text.start)
        )
        return {"area": excess_loss_area(rows, SMALLEST), "curve": json.dumps(rows)}

    def finish(self, any_size: ElasticModel) -> None:
        """Measure the whole curve, and report it with the last state."""
        metrics = self.measured(any_size, self.job.sizes)
        if self.observer.run.last_step("tradeoff/perplexity") == 0:
            self.observer.run.metrics(
                [(0, {"area_under_excess_nats": metrics["area"]}), *run_descriptions.curve(json.loads(metrics["curve"]))]
            )
        self.observer.emit("stage", text=f"area under excess loss {metrics['area']:.4f}")
        report({"share": RUNGS[-1], **metrics}, self.state)


def artifact_or_error(*args: Any) -> dict[str, Any]:
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
    base = base_models.load(job.base, job.recipe.dtype, job.trust_remote_code, store.cache)
    heldout = Heldout.of(job, base)
    if not store.exists(store.uri(key)):
        torch.nn.Module.to(base.model, device)
        checkpoints = Checkpoints(settings, f"{job.name}-{job.fingerprint}", emit)
        check_memory(job, base, device, emit, held=True)
        text = CalibrationText.of(job, base, settings, emit)
        codes = codes_of(job, base, text.windows, run, emit, checkpoints, device, cache=bases_of(settings))
        batches = prepare(job, base, text.windows, settings, emit, device)
        with _from(state) as folder:
            calibration = calibrate(base.model, batches, job.recipe, resume=folder)
        origin = provenance(job) | text.provenance | {"attempt": key, "mlflow_run": run.run_id}
        stored(settings, key, lambda folder: Artifact.save(folder, base, calibration, origin, codes))
        if codes is not None:
            remove_codes(checkpoints)
    return finish(job, store.uri(key), run, settings, heldout, device, emit, alias=CANDIDATE)
