"""Run the calibrations of a sweep with Ray Tune: first its shared prunings, then its trials.

    shared pruning   one pruning for several trials; it saves a state for each stop ratio (acip.calibration.shared_pruning)
    trial            one recipe: it starts from the state of its shared pruning, if any, post-tunes, and measures its curve
    rung             a point of the post-tuning at which a trial is saved, and under asha measured and compared
    winner           the finished trial with the smallest area under excess loss (acip.sizing.excess_loss_area), which becomes an artifact

Tune starts, retries and resumes both. A sweep with the same name and trials resumes. The trials on a node share the
bases of the layers (BasisCache: one process computes them, all map them).

asha ends a trial at 1/8, 1/4 or 1/2 of its post-tuning if its area under excess loss is worse than the median of the trials that
reached that rung earlier. The winner is chosen by the same area on the same held-out text, so it is comparable between recipes. The
training loss is not: it depends on the sizes, the lambda and the distillation of the recipe. Tune does not keep rungs over a
restart: trials that run after it are compared with each other only.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from acip.calibration import shared_pruning
from acip.data import WINDOWS_VERSION
from acip.errors import AcipError
from acip.sizing.excess_loss_area import excess_loss_area
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Resources, root_cause
from acip_platform.settings import Settings
from acip_platform.tracking.runs import Run
from acip_platform.training.sweep_space import Space, Trial
from acip_platform.training.sweep_worker import RUNGS, SMALLEST, artifact_or_error, file_system, run_shared_pruning, run_trial

RETRIES = 2  # of a trial whose process died
SHARED_PRUNING, SHARED_PRUNINGS = "trunk", "trunks"  # stored names: the prefix of their runs, and their folder
TUNE = {  # environment variables that Ray Tune reads while it runs
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # between snapshots; the default of 10 s or more would repeat trials that finished before a kill
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",  # no warning that snapshots are frequent
    "RAY_AIR_NEW_OUTPUT": "0",  # no tables: jobs/sweep.py prints them
}
os.environ.update({name: value for name, value in TUNE.items() if name not in os.environ})


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
    def shared_prunings(self) -> dict[str, list[Trial]]:
        """The trials of each shared pruning, by its name. A trial that shares with no other is in none, and prunes by itself."""
        groups = (group for group in shared_pruning.shared_prunings([trial.job.recipe for trial in self.trials]) if len(group) > 1)
        return {f"{SHARED_PRUNING}{n}": [self.trials[i] for i in group] for n, group in enumerate(groups)}

    @functools.cached_property
    def key(self) -> str:
        """The name under which the sweep is saved; a sweep with an equal key resumes."""
        content = [self.space.name, self.space.scheduler, [trial.job.by_content() for trial in self.trials], WINDOWS_VERSION]
        return f"{self.job.name}-{self.space.name}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Cost:
    """The time of a trial or a shared pruning, from loading the model to its last report. CPU time is comparable on a busy machine."""

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


def run(sweep: Sweep, share: Resources, settings: Settings, runs: Mapping[str, Run], events: Any) -> tuple[list[Outcome], dict[str, Cost]]:
    """Run or resume a sweep. Returns the outcomes of the trials, and the costs of the shared prunings by name."""
    jobs = {trial.name: trial.job.to_dict() for trial in sweep.trials}
    context = {
        "settings": settings,
        "jobs": jobs,
        "runs": {name: trial_run.run_id for name, trial_run in runs.items()},
        "threads": max(1, int(share.cpus)),
        "events": events,
    }
    sharing = {name: [trial.name for trial in group] for name, group in sweep.shared_prunings.items()}
    pruned: Mapping[str, Any] = {}
    if sharing:
        pruning_context = {**context, "shared_prunings": sharing}
        pruned = _fit(sweep.key, SHARED_PRUNINGS, run_shared_pruning, list(sharing), pruning_context, share, settings)
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
    results = _fit(sweep.key, "trials", run_trial, list(jobs), context, share, settings, scheduler)
    outcomes = []
    for trial in sweep.trials:
        result = results[trial.name]
        metrics = result.metrics or {}
        error = metrics.get("error") or (root_cause(result.error) if result.error else None)
        rows = json.loads(metrics.get("curve", "[]"))
        outcomes.append(Outcome(trial, rows, metrics.get("share", 0), Cost.of(metrics), error, result.checkpoint))
    if not any(result.error for result in (*pruned.values(), *results.values())):  # else the next attempt needs these states
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
                checkpoint_config=tune.CheckpointConfig(num_to_keep=None if name == SHARED_PRUNINGS else 1),
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
    """Make the artifacts that the space file requests, register them with the winner as candidate, and delete the saved states.

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
    task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=RETRIES)(artifact_or_error)

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
            file_system(state).delete_dir(state.path)
