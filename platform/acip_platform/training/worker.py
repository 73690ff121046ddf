"""One base model on one Ray Train worker: `calibrate_one` is what the worker does, from loading to registering.

    load -> parametrize -> one real step -> calibrate (checkpoints, resume) -> artifact -> curve -> registry

The artifact is saved before it is evaluated, and evaluated from what was saved. A worker that dies goes on from its last
checkpoint; one whose node is going away leaves one at once; a job whose artifact is complete is not calibrated again. What MLflow
can't take while it is down waits here, and at the end in a checkpoint. Progress goes to the driver through an `Inbox`.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from mlflow.exceptions import MlflowException
from ray.train.torch import TorchTrainer

from acip.artifact.artifact import Artifact
from acip.artifact.read_back import read_back
from acip.base import Base, load_base
from acip.calibration import memory_check
from acip.calibration.basis_cache import BasisCache
from acip.calibration.loop import calibrate, trial_step
from acip.calibration.parametrize import parametrize
from acip.calibration.state import CalibrationState, StepReport, history
from acip.data import TokenBatches, documents, token_windows
from acip.errors import AcipError, CalibrationError, lacks_memory
from acip.layers import sharding
from acip.layers.targets import targets
from acip.recipe import Recipe
from acip.sizing.budget import GIGA, in_bytes
from acip_platform.reporting.mask_samples import FILE, MaskSamples
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Resources
from acip_platform.settings import Settings
from acip_platform.storage.checkpoints import Checkpoints
from acip_platform.storage.store import Store
from acip_platform.tracking.provenance import provenance
from acip_platform.tracking.registry import few_retries
from acip_platform.tracking.runs import Run
from acip_platform.training.completion import Heldout, finish, stored

REPORT_EVERY_S = 10.0
MLFLOW_REST_S = 60.0  # between attempts at an MLflow that is down
LOOK_S = 1.0  # between looks for a node's notice that it is going away
LASTING = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)
Work = Callable[[dict[str, Any]], dict[str, Any]]

log = logging.getLogger(__name__)


def run_job(
    job: Job, share: Resources, settings: Settings, run: Run, attempt: str, inbox: Any, work: Work | None = None, **facts: Any
) -> dict[str, Any]:
    """Do `job` on one Ray Train worker; returns its summary. The run's name decides what is resumed.

    `work` is what the worker does (None = calibrate), and `facts` is what it is told besides.
    """
    resources = {"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {})
    result = TorchTrainer(
        worker,  # type: ignore[arg-type]
        train_loop_config={
            "job": job.to_dict(),
            "settings": settings,  # as it is: Ray shows a dict's values to whoever sees the dashboard, and of this its repr
            "run": run.run_id,
            "attempt": attempt,
            "threads": max(1, int(share.cpus)),
            "inbox": inbox,
            "work": work or calibrate_one,
            "fingerprint": job.fingerprint,  # of the files as they were when the job was submitted
            **facts,
        },
        scaling_config=ray.train.ScalingConfig(num_workers=job.num_workers, use_gpu=share.gpus > 0, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name=attempt,
            storage_path=settings.runs,
            failure_config=ray.train.FailureConfig(max_failures=2),  # nodes that were taken away aren't counted
        ),
    ).fit()
    summary: dict[str, Any] = result.return_value  # type: ignore[attr-defined]
    if "error" in summary:
        raise AcipError(summary["error"])
    return summary


def worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run `config["work"]` and return errors that a second attempt would meet again as values: Ray retries what is raised."""
    try:
        result: dict[str, Any] = config["work"](config)
        return result
    except AcipError as error:
        return {"error": str(error)}
    except LASTING as error:
        if lacks_memory(error) or sharding.workers() > 1:  # the others would wait for this one
            raise
        log.exception("this is not tried again")
        return {"error": f"{type(error).__name__}: {error}"}


def calibrate_one(config: dict[str, Any]) -> dict[str, Any]:
    """The worker's whole work. Returns a summary with the artifact's URI, the version and the curve."""
    job: Job = Job.from_dict(config["job"])
    settings: Settings = config["settings"]
    torch.set_num_threads(config["threads"])
    run = Run.of(settings, config["run"])
    store = Store.of(settings)
    key = f"{job.name}/{config['attempt']}"

    def say(kind: str, **facts: Any) -> None:
        if sharding.rank() == 0:
            config["inbox"].put.remote({"model": job.name, "kind": kind, **facts})

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say("stage", text=f"loading {job.base}")
    base = load_base(job.base, job.recipe.dtype, job.trust_remote_code)
    read_back(base, job.recipe)
    heldout = Heldout.of(job, base)
    checkpoints = Checkpoints(settings, config["attempt"], say)
    if not sharding.decided(store.exists(store.uri(key)), device):
        if job.num_workers == 1:  # else the layers go there one by one, each worker's part of them
            torch.nn.Module.to(base.model, device)
        observer = _calibrated(job, base, run, settings, key, checkpoints, say, device)
    else:
        observer = Observer(job, run, say, device, checkpoints)
        with checkpoints.newest() as folder:
            observer.recall(folder)
    if sharding.rank() > 0:
        return {}
    observer.catch_up()
    return finish(job, store.uri(key), run, settings, heldout, device, say, config["fingerprint"])


def _calibrated(
    job: Job, base: Base, run: Run, settings: Settings, key: str, checkpoints: Checkpoints, say: Callable[..., None], device: torch.device
) -> "Observer":
    """Parametrize and calibrate, from the last checkpoint if there is one; the first worker stores the artifact."""
    recipe = job.recipe
    batches = prepared(job, base, settings, say, device)
    tried(base.model, batches, recipe, say)
    observer = Observer(job, run, say, device, checkpoints)
    with run.system_metrics() if sharding.rank() == 0 else nullcontext(), checkpoints.newest() as folder:
        if folder is not None:
            say("stage", text=f"going on from the last checkpoint, {folder.name}")
        calibration = calibrate(base.model, batches, recipe, resume=folder, observe=observer)
    sharding.gather(base.model)
    if sharding.rank() == 0:
        origin = provenance(job) | {"attempt": key, "mlflow_run": run.run_id}
        uri = stored(settings, key, lambda folder: Artifact.save(folder, base, calibration, origin))
        say("stage", text=f"artifact saved: {uri}")
    return observer


@dataclass(frozen=True)
class Read:
    """Something to read: all that decides it, and how."""

    decides: tuple[Any, ...]
    read: Callable[[], Any] = field(compare=False)


@lru_cache(maxsize=4)
def once(what: Read) -> Any:
    """What this process read before isn't read again: the trials of a sweep share their text."""
    return what.read()


def prepared(job: Job, base: Base, settings: Settings, say: Callable[..., None], device: torch.device) -> TokenBatches:
    """Parametrize `base`, where it fits into memory. Returns the text of the calibration."""
    recipe = job.recipe
    # a longer run than is expected reads them again in another order
    decides = (job.base, job.data, recipe.seq_len, job.windows)
    windows = once(Read(decides, lambda: token_windows(documents(job.data, "train"), base.tokenizer, recipe.seq_len, job.windows)))
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))]
    batches = TokenBatches(windows, recipe.batch_size, recipe.seed)

    _fits(job, base, device, say)
    began = time.monotonic()
    cache = BasisCache(settings.home / "cache" / "bases", in_bytes(settings.basis_cache_gb, GIGA))
    parametrize(base.model, recipe, windows, lambda done, total: say("parametrize", done=done, total=total), cache=cache)
    say("stage", text=f"{recipe.basis} basis of {len(targets(base.model))} layers in {time.monotonic() - began:.0f} s")
    return batches


def tried(model: torch.nn.Module, batches: TokenBatches, recipe: Recipe, say: Callable[..., None]) -> None:
    """One step, before the many: what doesn't fit or doesn't learn is said in the first seconds."""
    began = time.monotonic()
    loss = trial_step(model, batches, recipe)
    took = time.monotonic() - began
    say(
        "stage",
        text=f"one real step: loss {loss:.3f} in {took:.1f} s, at full shape; {len(batches.windows):,} windows of {recipe.seq_len} tokens",
    )


def _fits(job: Job, base: Base, device: torch.device, say: Callable[..., None]) -> None:
    """Refuse, before the work, what the device's memory can't hold. All workers do what the first decides."""
    there, error = memory_check.available(base.model, device), None
    try:
        needed = memory_check.check(base.model, job.recipe, there, device, job.num_workers)
        say("stage", text=f"needs {needed.peak / 1e9:.1f} of {there / 1e9:.1f} GB, most in {needed.worst}")
    except CalibrationError as refusal:
        error = refusal
    if not sharding.decided(error is None, device):
        raise error or CalibrationError("another worker's memory is too small.")


class Observer:
    """Hears each step of the loop: metrics to MLflow, progress to the driver, checkpoints. Changes nothing.

    Without `checkpoints` there are none; with them, it is on a worker of Ray Train.
    """

    def __init__(self, job: Job, run: Run, say: Callable[..., None], device: torch.device, checkpoints: Checkpoints | None = None) -> None:
        self.job, self.run, self.say, self.device, self.checkpoints = job, run, say, device, checkpoints
        self.look_s = min(LOOK_S, checkpoints.every_s) if checkpoints else math.inf
        self.tokens = job.recipe.batch_size * job.recipe.gradient_accumulation_steps * job.recipe.seq_len
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.logged: int | None = None  # the last step that MLflow has; None = it has to be asked
        self.masks: MaskSamples | None = None
        self.sent: list[int] = []  # the last of their steps that MLflow has
        self.reported = self.saved = self.looked = self.stepped = time.monotonic()
        self.leaving = False  # there is a checkpoint from after the node's notice that it is going away
        self.rests_until = 0.0
        self.phase = ""
        self.phase_began = (time.monotonic(), 0.0)  # when, and at which progress

    def __call__(self, reports: list[StepReport], state: CalibrationState) -> None:
        now = time.monotonic()
        tokens_per_s = self.tokens * len(reports) / (now - self.stepped)
        self.stepped = now
        if not self.phase:  # the first look: what an attempt before this one didn't get to MLflow is in the checkpoint
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
            self.say("step", **facts)
        if self.checkpoints is not None and sharding.decided(ends or now - self.looked >= self.look_s, self.device):
            self._checkpoint(self.checkpoints, state, ends)

    def _checkpoint(self, checkpoints: Checkpoints, state: CalibrationState, ends: bool) -> None:
        """When it is time, before this node is taken away, and at the end if MLflow hasn't got everything."""
        self.looked = time.monotonic()
        leaving = ray.train.get_preemption_info() is not None  # the first worker's answer, on all of them
        at_once = (leaving and not self.leaving) or (ends and bool(self.rows))
        if sharding.decided(at_once or self.looked - self.saved >= checkpoints.every_s, self.device):
            if leaving and not self.leaving:
                self.say("stage", text=f"a node is being taken away: a checkpoint of step {state.step}")
            written = sharding.rank() > 0 or checkpoints.write(state)  # the others have the same state
            self.leaving = leaving and sharding.decided(written, self.device)
            self.saved = self.stepped = time.monotonic()

    def _remember(self, reports: Iterable[StepReport]) -> None:
        self.rows = [(report.step, self._metrics(report)) for report in reports]

    def recall(self, folder: Path | None) -> None:
        """Of an attempt that has its artifact: what it may not have got to MLflow is in its last checkpoint."""
        if folder is not None:
            self._remember(history(folder))

    def _metrics(self, report: StepReport) -> dict[str, float]:
        """What says something in this phase: sizes fall while pruning, and are drawn in post-tuning, two kinds of curve."""
        own = {} if report.task_loss is None else {"text_loss_nats": report.task_loss}
        if report.phase == "prune":
            falling = {"size_ratio": report.size, "lambda": report.lambda_, "directions_alive": report.live}
            return {"loss_nats": report.loss, **own, **falling}
        at_stop = {"loss_at_stop_ratio_nats": report.loss} if report.size <= self.job.recipe.stop_ratio else {}
        return {"loss_nats": report.loss, **own, "trained_size_ratio": report.size, **at_stop}

    def _sample(self, state: CalibrationState, step: int) -> None:
        """Example masks, going on from what an earlier attempt kept."""
        if self.masks is None:
            kept: dict[str, Any] | None = None
            with suppress(Exception), few_retries():  # whatever keeps files for MLflow raises: a picture is not worth a calibration
                kept = self.run.read_json(FILE)
            self.masks = MaskSamples(**kept) if kept else MaskSamples.of(state.scores)
        self.masks.take(state, step)

    def flush(self) -> None:
        """Metrics to MLflow. While it is down they wait here; the calibration goes on."""
        if sharding.rank() > 0 or time.monotonic() < self.rests_until:
            return
        try:
            with few_retries():
                self._log()
        except MlflowException as error:
            self.logged, self.rests_until = None, time.monotonic() + MLFLOW_REST_S  # it may have got a part
            self.say("stage", text=f"MLflow can't be reached ({type(error).__name__}); {len(self.rows)} steps wait")

    def catch_up(self) -> None:
        """All that waits, at the end, when nothing waits for us: with the minutes of patience that MLflow's client has."""
        if self.rows:
            self._log()

    def _log(self) -> None:
        if self.logged is None:
            self.logged = self.run.last_step("loss_nats")
        self.run.metrics([(step, values) for step, values in self.rows if step > self.logged])
        if self.masks is not None and self.masks.steps[-1:] != self.sent:
            with suppress(Exception):  # as above
                self.run.json(self.masks.to_dict(), FILE)
                self.sent = self.masks.steps[-1:]
        self.logged = max((step for step, _ in self.rows), default=self.logged)
        self.rows = []
