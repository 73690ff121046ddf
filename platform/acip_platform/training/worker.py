"""Calibrate one base model with Ray Train: `run_job` starts the workers, and each runs `calibrate_one`.

    load -> text -> code, if the recipe says so -> parametrize -> trial step -> calibrate (checkpoints, resume) -> artifact
    -> curve -> registry

A model that does not fit in memory is coded, parametrized and scored a block at a time (block_ranks.py), if its recipe does not train.
The artifact is saved before it is measured, and the saved copy is measured. A worker that dies resumes from its last checkpoint. A
worker writes a checkpoint at once if its node is about to be removed, or if its job is stopped. A job with a complete artifact is not
calibrated again. Metrics that MLflow cannot take while it is down are kept in memory, and at the end in a checkpoint. Progress goes to
the driver through an `EventQueue`.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from mlflow.exceptions import MlflowException
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer

from acip.artifact.artifact import Artifact
from acip.artifact.read_back import read_back
from acip.base import Base
from acip.calibration import memory_check
from acip.calibration.basis_cache import BasisCache
from acip.calibration.loop import calibrate, trial_step
from acip.calibration.parametrize import parametrize
from acip.calibration.state import CalibrationState, StepReport, history
from acip.data import TokenBatches
from acip.errors import AcipError, CalibrationError, lacks_memory
from acip.layers import sharding
from acip.layers.targets import targets
from acip.recipe import Recipe
from acip.sizing.budget import GIGA, in_bytes
from acip.utils.malloc import return_freed_memory
from acip_platform.reporting.mask_samples import FILE, MaskSamples
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Resources
from acip_platform.settings import Settings
from acip_platform.storage import base_models
from acip_platform.storage.checkpoints import Checkpoints, Emit
from acip_platform.storage.code_checkpoints import remove_codes
from acip_platform.storage.store import Store
from acip_platform.tracking.provenance import provenance
from acip_platform.tracking.registry import few_retries
from acip_platform.tracking.runs import Run
from acip_platform.training.block_ranks import calibrated_by_block
from acip_platform.training.calibration_text import CalibrationText, samples_text
from acip_platform.training.completion import Heldout, finish, stored
from acip_platform.training.idle_workers import IdleWorkers
from acip_platform.training.layer_codes import codes_of

REPORT_EVERY_S = 10.0
MLFLOW_REST_S = 60.0  # between attempts while MLflow is down
LOOK_S = 1.0  # between checks whether this node is about to be removed
# errors that a second attempt would raise again
LASTING = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)
Work = Callable[[dict[str, Any]], dict[str, Any]]

log = logging.getLogger(__name__)


def run_job(
    job: Job, share: Resources, settings: Settings, run: Run, attempt: str, events: Any, work: Work | None = None, **facts: Any
) -> dict[str, Any]:
    """Run `job` with Ray Train and return the summary of its first worker. An equal `attempt` resumes.

    `work` is the function that each worker runs (None = `calibrate_one`); `facts` are further entries of its config.
    AcipError if the job fails in a way that a user can mend.
    """
    resources = {"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {})
    result = TorchTrainer(
        worker,  # type: ignore[arg-type]
        train_loop_config={
            "job": job.to_dict(),
            "settings": settings,  # as an object: the dashboard shows its repr, which masks secrets, but the values of a dict
            "run": run.run_id,
            "attempt": attempt,
            "threads": max(1, int(share.cpus)),
            "events": events,
            "work": work or calibrate_one,
            "fingerprint": job.fingerprint,  # of the files at the time of submission
            **facts,
        },
        scaling_config=ray.train.ScalingConfig(num_workers=job.num_workers, use_gpu=share.gpus > 0, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name=attempt,
            storage_path=settings.runs,
            failure_config=ray.train.FailureConfig(max_failures=2),  # removed nodes are not counted
        ),
    ).fit()
    summary: dict[str, Any] = result.return_value  # type: ignore[attr-defined]
    if "error" in summary:
        raise AcipError(summary["error"])
    return summary


def worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run `config["work"]`. Errors that would recur are returned as values, because Ray retries a worker that raises."""
    try:
        result: dict[str, Any] = config["work"](config)
        return result
    except AcipError as error:
        return {"error": str(error)}
    except LASTING as error:
        if lacks_memory(error) or sharding.workers() > 1:  # raise: the other workers would wait for this one
            raise
        log.exception("the job failed and is not retried")
        return {"error": f"{type(error).__name__}: {error}"}


def calibrate_one(config: dict[str, Any]) -> dict[str, Any]:
    """Calibrate, store, measure and register one model: all work of a worker. Returns the summary of `finish`, {} on other ranks."""
    job: Job = Job.from_dict(config["job"])
    settings: Settings = config["settings"]
    torch.set_num_threads(config["threads"])
    run = Run.of(settings, config["run"])
    store = Store.of(settings)
    key = f"{job.name}/{config['attempt']}"

    def emit(kind: str, **facts: Any) -> None:
        if sharding.rank() == 0:
            config["events"].put.remote({"model": job.name, "kind": kind, **facts})

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emit("stage", text=f"loading {job.base}")
    base = base_models.load(job.base, job.recipe.dtype, job.trust_remote_code, store.cache)
    read_back(base, job.recipe)
    heldout = Heldout.of(job, base)
    checkpoints = Checkpoints(settings, config["attempt"], emit)
    free_bytes = memory_check.available(base.model, device)
    needed = memory_check.plan(base.model, job.recipe, free_bytes, device, job.num_workers, heldout.text.context, samples_text(job))
    if needed.streamed:
        return_freed_memory()
    if not sharding.decided(store.exists(store.uri(key)), device):
        if job.num_workers == 1 and not needed.by_block:  # several workers move each layer when it is sharded
            torch.nn.Module.to(base.model, device)
        observer = _calibrate(job, base, run, settings, key, checkpoints, emit, device, config["events"], needed.by_block)
    else:
        observer = Observer(job, run, emit, device, checkpoints)
        with checkpoints.newest() as folder:
            observer.recall(folder)
    if sharding.rank() > 0:
        return {}
    observer.catch_up()
    del base  # the saved copy is measured
    return finish(job, store.uri(key), run, settings, heldout, device, emit, config["fingerprint"], streamed="measure" in needed.streamed)


def _calibrate(
    job: Job,
    base: Base,
    run: Run,
    settings: Settings,
    key: str,
    checkpoints: Checkpoints,
    emit: Emit,
    device: torch.device,
    events: Any,
    streamed: bool,
) -> "Observer":
    """Code, parametrize and calibrate, from the last checkpoint if there is one; rank 0 stores the artifact.

    With `code: bits`, the layers are coded only. All of this is done a block at a time if the job is `streamed`.
    Finished codes are stored beside the checkpoints until the artifact holds them.
    """
    recipe = job.recipe
    check_memory(job, base, device, emit)
    text = CalibrationText.of(job, base, settings, emit, streamed)
    codes = codes_of(job, base, text.windows, run, emit, checkpoints, device, streamed, bases_of(settings))
    observer = Observer(job, run, emit, device, checkpoints, events)
    origin = provenance(job) | text.provenance | {"attempt": key, "mlflow_run": run.run_id}
    if recipe.code == "bits":
        assert codes is not None
        uri = stored(settings, key, lambda folder: Artifact.save_coded(folder, base, recipe, codes, origin))
        emit("stage", text=f"artifact saved: {uri}")
        remove_codes(checkpoints)
        return observer
    if streamed:
        with calibrated_by_block(job, base, text.windows, checkpoints, emit, device) as calibration:
            uri = stored(settings, key, lambda folder: Artifact.save(folder, base, calibration, origin, codes))
        emit("stage", text=f"artifact saved: {uri}")
        remove_codes(checkpoints)
        return observer
    batches = prepare(job, base, text.windows, settings, emit, device)
    run_trial_step(base.model, batches, recipe, emit)
    with run.system_metrics() if sharding.rank() == 0 else nullcontext(), checkpoints.newest() as folder:
        if folder is not None:
            emit("stage", text=f"resuming from checkpoint {folder.name}")
        calibration = calibrate(base.model, batches, recipe, resume=folder, observe=observer)
    sharding.gather(base.model)
    if sharding.rank() == 0:
        uri = stored(settings, key, lambda folder: Artifact.save(folder, base, calibration, origin, codes))
        emit("stage", text=f"artifact saved: {uri}")
        if codes is not None:
            remove_codes(checkpoints)
    return observer


def prepare(job: Job, base: Base, windows: torch.Tensor, settings: Settings, emit: Emit, device: torch.device) -> TokenBatches:
    """Parametrize `base` in place and return the batches of `windows`, those of the calibration text."""
    recipe = job.recipe
    batches = TokenBatches(windows, recipe.batch_size, recipe.seed)
    began = time.monotonic()
    workers = IdleWorkers(device.type == "cuda")
    if recipe.basis != "svd":
        emit("stage", text=f"{recipe.basis} basis of {min(len(windows), recipe.sample_windows)} windows: from the cache, or computed now")

    def progress(done: int, total: int) -> None:
        emit("parametrize", done=done, total=total)

    parametrize(base.model, recipe, windows, progress, cache=bases_of(settings), spread=workers)
    emit("stage", text=f"{recipe.basis} basis of {len(targets(base.model))} layers in {time.monotonic() - began:.0f} s{workers.text}")
    return batches


def bases_of(settings: Settings) -> BasisCache:
    """Return the cache of bases on this node."""
    return BasisCache(settings.home / "cache" / "bases", in_bytes(settings.basis_cache_gb, GIGA))


def run_trial_step(model: torch.nn.Module, batches: TokenBatches, recipe: Recipe, emit: Emit) -> None:
    """Take one step that changes nothing, so that a lack of memory or a loss that cannot be trained is reported within seconds."""
    began = time.monotonic()
    loss = trial_step(model, batches, recipe)
    took = time.monotonic() - began
    emit(
        "stage",
        text=f"trial step at full shape: loss {loss:.3f} in {took:.1f} s; {len(batches.windows):,} windows of {recipe.seq_len} tokens",
    )


def check_memory(job: Job, base: Base, device: torch.device, emit: Emit, held: bool = False) -> None:
    """Raise CalibrationError if the predicted peak does not fit into the device's memory. All workers follow the first one's decision.

    Set `held` if the caller holds the whole model in memory. A calibration that has to be streamed is then an error.
    """
    free_bytes, error = memory_check.available(base.model, device), None
    try:
        needed = memory_check.check(base.model, job.recipe, free_bytes, device, job.num_workers, job.eval_context, samples_text(job))
        if job.tasks and "measure" in needed.streamed:
            raise CalibrationError(
                "tasks are scored with the whole model in memory, and this model does not fit. Remove `tasks`, and run jobs/evaluate.py "
                "on a machine with more memory."
            )
        if held and needed.by_block:
            raise CalibrationError(
                "the trials of a sweep hold the whole model in memory, which does not fit. Calibrate it with jobs/calibrate_all.py."
            )
        streams = f"; a block at a time: {', '.join(needed.streamed)}" if needed.streamed else ""
        emit("stage", text=f"needs {needed.peak / 1e9:.1f} of {free_bytes / 1e9:.1f} GB, peak in {needed.worst}{streams}")
    except CalibrationError as refusal:
        error = refusal
    if not sharding.decided(error is None, device):
        raise error or CalibrationError("the memory of another worker is too small.")


class Observer:
    """An observer of the calibration loop: it sends metrics to MLflow and progress to the driver, and writes checkpoints.

    It changes neither model nor state. `checkpoints` is None outside of Ray Train; then none are written. `events` is the EventQueue that
    tells whether the job is stopped.
    """

    def __init__(
        self, job: Job, run: Run, emit: Emit, device: torch.device, checkpoints: Checkpoints | None = None, events: Any = None
    ) -> None:
        self.job, self.run, self.emit, self.device, self.checkpoints, self.events = job, run, emit, device, checkpoints, events
        self.look_s = min(LOOK_S, checkpoints.every_s) if checkpoints else math.inf
        self.tokens = job.recipe.batch_size * job.recipe.gradient_accumulation_steps * job.recipe.seq_len
        self.rows: list[tuple[int, dict[str, float]]] = []  # (step, metrics) that MLflow does not have yet
        self.logged: int | None = None  # the last step that MLflow has; None = unknown
        self.masks: MaskSamples | None = None
        self.sent: list[int] = []  # the last step of `masks` that MLflow has
        self.reported = self.saved = self.looked = self.stepped = time.monotonic()
        self.leaving = False  # a checkpoint was written since the notice that a node is about to be removed, or that the job stops
        self.rests_until = 0.0
        self.phase = ""
        self.phase_began = (time.monotonic(), 0.0)  # (time, progress)

    def __call__(self, reports: list[StepReport], state: CalibrationState) -> None:
        now = time.monotonic()
        tokens_per_s = self.tokens * len(reports) / (now - self.stepped)
        self.stepped = now
        if not self.phase:  # first call: the checkpoint holds steps that an earlier attempt may not have logged
            self._remember(report for report in state.history if report.step < reports[0].step)
        self.rows += [(report.step, self._metrics(report) | {"tokens_per_s": tokens_per_s}) for report in reports]
        report = reports[-1]
        if report.phase != self.phase:
            self.phase, self.phase_began = report.phase, (now, report.progress)
        ends = report.progress == 1.0
        if report.phase == "prune" and sharding.rank() == 0:
            self._sample(state, report.step)
        if ends or now - self.reported >= REPORT_EVERY_S:
            self.reported = now
            self.flush()
            since, at = self.phase_began
            done = report.progress - at
            eta_s = (now - since) * (1 - report.progress) / done if done > 0 else None
            facts = dataclasses.asdict(report) | {"stop": self.job.recipe.stop_ratio, "tokens_per_s": tokens_per_s, "eta_s": eta_s}
            self.emit("step", **facts)
        if self.checkpoints is not None and sharding.decided(ends or now - self.looked >= self.look_s, self.device):
            self._checkpoint(self.checkpoints, state, ends)

    def _checkpoint(self, checkpoints: Checkpoints, state: CalibrationState, ends: bool) -> None:
        """Write a checkpoint if one is due, if a node is about to be removed or the job stops, or at the end if MLflow lacks steps."""
        self.looked = time.monotonic()
        stops = self._job_stops(saved=self.leaving or ends)
        leaving = sharding.decided(stops or ray.train.get_preemption_info() is not None, self.device)
        at_once = (leaving and not self.leaving) or (ends and bool(self.rows))
        if sharding.decided(at_once or self.looked - self.saved >= checkpoints.every_s, self.device):
            if leaving and not self.leaving:
                reason = "the job stops" if stops else "a node is about to be removed"
                self.emit("stage", text=f"{reason}: writing a checkpoint of step {state.step}")
            written = sharding.rank() > 0 or checkpoints.write(state)  # the other workers have the same state
            self.leaving = leaving and sharding.decided(written, self.device)
            self.saved = self.stepped = time.monotonic()
            if stops and self.leaving:
                self._job_stops(saved=True)

    def _job_stops(self, saved: bool) -> bool:
        """Return whether the driver is about to stop, and tell it whether everything so far is saved. Only the first worker asks."""
        if self.events is None or sharding.rank() > 0:
            return False
        with suppress(RayError):  # the driver is lost, and Ray will end this worker
            return bool(ray.get(self.events.is_stopping.remote(self.job.name, saved), timeout=LOOK_S))
        return False

    def _remember(self, reports: Iterable[StepReport]) -> None:
        """Queue the metrics of steps that were taken by an earlier attempt."""
        self.rows = [(report.step, self._metrics(report)) for report in reports]

    def recall(self, folder: Path | None) -> None:
        """Queue the steps in the last checkpoint of a finished attempt, which may not all have reached MLflow."""
        if folder is not None:
            self._remember(history(folder))

    def _metrics(self, report: StepReport) -> dict[str, float]:
        """Return the metrics of a step. Sizes fall while pruning but are drawn at random in post-tuning, so they have two names."""
        task = {} if report.task_loss is None else {"text_loss_nats": report.task_loss}
        if report.phase == "prune":
            falling = {"size_ratio": report.size, "lambda": report.lambda_, "directions_alive": report.live}
            return {"loss_nats": report.loss, **task, **falling}
        at_stop = {"loss_at_stop_ratio_nats": report.loss} if report.size <= self.job.recipe.stop_ratio else {}
        return {"loss_nats": report.loss, **task, "trained_size_ratio": report.size, **at_stop}

    def _sample(self, state: CalibrationState, step: int) -> None:
        """Sample the masks of a few layers, continuing the samples of an earlier attempt."""
        if self.masks is None:
            earlier: dict[str, Any] | None = None
            with suppress(Exception), few_retries():  # of MLflow's file store; a figure must not stop a calibration
                earlier = self.run.read_json(FILE)
            self.masks = MaskSamples(**earlier) if earlier else MaskSamples.of(state.scores)
        self.masks.take(state, step)

    def flush(self) -> None:
        """Send the queued metrics to MLflow. While it is down they stay queued, and the calibration continues."""
        if sharding.rank() > 0 or time.monotonic() < self.rests_until:
            return
        try:
            with few_retries():
                self._log()
        except MlflowException as error:
            self.logged, self.rests_until = None, time.monotonic() + MLFLOW_REST_S  # a part may have arrived
            self.emit("stage", text=f"MLflow can't be reached ({type(error).__name__}); {len(self.rows)} steps are queued")

    def catch_up(self) -> None:
        """Send all queued metrics at the end of the job, with the full retries of MLflow's client, which take minutes."""
        if self.rows:
            self._log()

    def _log(self) -> None:
        if self.logged is None:
            self.logged = self.run.last_step("loss_nats")
        self.run.metrics([(step, values) for step, values in self.rows if step > self.logged])
        if self.masks is not None and self.masks.steps[-1:] != self.sent:
            with suppress(Exception):  # of MLflow's file store, as in _sample
                self.run.json(self.masks.to_dict(), FILE)
                self.sent = self.masks.steps[-1:]
        self.logged = max((step for step, _ in self.rows), default=self.logged)
        self.rows = []
