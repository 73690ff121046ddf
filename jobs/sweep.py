"""Try recipes for one model of a fleet with Ray Tune, and register the best result as `candidate`.

    ray job submit -- python jobs/sweep.py --fleet jobs/fleets/demo.yaml --space jobs/spaces/demo.yaml
    python jobs/sweep.py ... --only NAME       the model, if the fleet has several
    python jobs/sweep.py ... --dry-run         print the trials, and stop

The space file lists recipe fields and their values (platform/acip_platform/training/sweep_space.py). Trials share the bases of the
layers, and one pruning serves all stop ratios. The winner is the finished trial with the smallest area under the curve of excess
loss from size 0.4 to 1.0 (acip/sizing/excess_loss_area.py), measured on the held-out text of the curve. The same command resumes an
interrupted sweep and repeats no finished trial.

Exit codes: 0 every trial finished or was ended early by the scheduler, 1 some trials failed, 2 wrong arguments or files,
130 interrupted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray
from acip_platform import cli
from acip_platform.cluster import Cluster, connect
from acip_platform.reporting.console import Watch, console, duration, lines, shell
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.fleet import Fleet, Job
from acip_platform.scheduling.job_queue import Resources, nodes, resources_of
from acip_platform.settings import Settings, masked
from acip_platform.tracking.registry import reached
from acip_platform.tracking.runs import Run, Tracking, runs_page
from acip_platform.training import sweep_report
from acip_platform.training.sweep import Outcome, Sweep, keep, run, winner
from acip_platform.training.sweep_space import Space

from acip.errors import AcipError

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--fleet", default=str(ROOT / "jobs" / "fleets" / "demo.yaml"), help="fleet file (default: the embedded demo)")
    parser.add_argument("--only", metavar="NAME", help="the model of the fleet; required if it has several")
    parser.add_argument("--space", default=str(ROOT / "jobs" / "spaces" / "demo.yaml"), help="space file (default: the embedded demo)")
    cli.add_pool(parser)
    cli.add_dry_run(parser)
    args = cli.parse(parser, argv)
    return cli.exit_code(lambda: sweep_one(args))


@reached()
def sweep_one(args: argparse.Namespace) -> int:
    began, out = time.monotonic(), console()
    settings = Settings.from_env()
    fleet = Fleet.load(args.fleet)
    sweep = Sweep.plan(job_of(fleet, args.only), Space.load(args.space))
    cluster = connect(settings)
    part = resources_of(sweep.job, args.pool or nodes())
    if args.dry_run:
        first_screen(out, settings, fleet, sweep, part, cluster)
        return 0
    tracking = Tracking(settings, f"acip/{fleet.name}")
    parent, runs = start_runs(tracking, fleet, sweep)
    first_screen(out, settings, fleet, sweep, part, cluster, parent)
    ended = dict.fromkeys(runs, "FINISHED")
    with ExitStack() as ends:
        ends.enter_context(parent.ending())
        for name, trial_run in runs.items():
            ends.enter_context(trial_run.ending(partial(ended.__getitem__, name)))
        events = open_event_queue()
        with Watch(out, events):
            outcomes, prunings = run(sweep, part, settings, runs, events)
            summaries = keep(sweep, outcomes, part, settings, runs, events)
        for outcome in outcomes:
            runs[outcome.trial.name].tags({"state": sweep_report.status(outcome)})
            ended[outcome.trial.name] = "FAILED" if outcome.error else "FINISHED" if outcome.finished else "KILLED"
        parent.table(dict(sweep_report.columns(outcomes)), "trials.json")
        parent.figure(sweep_report.curves(outcomes, sweep.job.name), "curves.png")
        best = winner(outcomes)
        seconds = sum(cost.seconds for cost in (*prunings.values(), *(outcome.cost for outcome in outcomes)))
        if best is not None:
            parent.metrics([(0, {"area_under_excess_nats": best.area, "seconds": seconds})])
            parent.tags({"winner": best.trial.name, "winner_run": runs[best.trial.name].run_id})
    took = time.monotonic() - began
    code = last_screen(out, settings, sweep, outcomes, [cost.seconds for cost in prunings.values()], summaries, took)
    lines(out, {"table of runs": runs_page(settings, tracking.experiment_id)})
    return code


def job_of(fleet: Fleet, only: str | None) -> Job:
    """Return the job that is swept: the only one of the fleet, or the one that `--only` names."""
    names = [job.name for job in fleet.jobs]
    if only is None and len(names) > 1:
        raise AcipError(f"a sweep takes one model; choose it with --only: {', '.join(names)}.")
    cli.check_only([only] if only is not None else [], names, "fleet")
    return next(job for job in fleet.jobs if only in (None, job.name))


def start_runs(tracking: Tracking, fleet: Fleet, sweep: Sweep) -> tuple[Run, dict[str, Run]]:
    """Start or continue the MLflow run of the sweep, and below it the runs of its shared prunings and trials, by name."""
    tags = {"fleet": fleet.name, "model": sweep.job.name, "sweep": sweep.space.name}
    parent = tracking.start(f"sweep {sweep.space.name}", sweep.key, tags)
    space = sweep.space
    parent.params({"base": sweep.job.base, "search": space.search, "scheduler": space.scheduler, "keep": space.keep, "set": space.set})
    parent.params({f"space.{field}": values for field, values in space.fields.items()})
    runs = {}
    for name, trials in sweep.shared_prunings.items():
        runs[name] = tracking.start(name, f"{sweep.key}/{name}", {**tags, "trials": ", ".join(trial.name for trial in trials)}, parent)
    for trial in sweep.trials:
        pruning = next((runs[name].run_id for name, trials in sweep.shared_prunings.items() if trial in trials), "")
        run_tags = {**tags, "trunk_run": pruning}  # the stored name of the tag
        runs[trial.name] = tracking.start(f"{trial.name}: {trial.label}", f"{sweep.key}/{trial.name}", run_tags, parent)
        runs[trial.name].params({**trial.job.recipe.to_dict(), "base": trial.job.base, "data": trial.job.data})
    return parent, runs


def first_screen(
    out: Any, settings: Settings, fleet: Fleet, sweep: Sweep, part: Resources, cluster: Cluster, parent: Run | None = None
) -> None:
    """Print the trials and the storage locations."""
    counts = f"{len(sweep.trials)} trials, {len(sweep.shared_prunings)} shared prunings"
    out.print(f"acip: sweep {sweep.space.name} of {sweep.job.name} in fleet {fleet.name}: {counts}")
    lines(out, {
        "job": ray.get_runtime_context().get_job_id() + (" on a Ray of this process" if cluster.own else ""),
        "dashboard": cluster.dashboard or "none",
        "tracking": masked(settings.tracking_uri),
        "artifacts": settings.store,
        "checkpoints": f"{settings.runs}/{sweep.key}",
        "each trial has": f"{part.gpus:g} GPU, {part.cpus:g} CPU",
        **({"run": f"{parent.run_id} in experiment {parent.experiment_id}"} if parent else {}),
    })  # fmt: skip
    for trial in sweep.trials:
        out.print(f"[{trial.name}] {trial.label}")


def last_screen(
    out: Any,
    settings: Settings,
    sweep: Sweep,
    outcomes: list[Outcome],
    pruning_seconds: list[float],
    summaries: dict[str, dict[str, Any]],
    seconds: float,
) -> int:
    """Print the table of trials, the winner and the next command. Returns the exit code."""
    out.print()
    out.print(sweep_report.table(outcomes, pruning_seconds))
    out.print()
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        out.print(f"[{outcome.trial.name}] FAILED ({outcome.trial.label}): {outcome.error}")
    finished = sum(outcome.finished for outcome in outcomes)
    ended = len(outcomes) - finished - len(failed)
    out.print(f"{finished} finished, {ended} ended early, {len(failed)} failed, after {duration(seconds)}.")
    best = winner(outcomes)
    if best is None:
        out.print("No trial finished, so there is no winner.")
        return cli.FAILED
    summary = summaries[best.trial.name]
    out.print(
        f"The winner, by the smallest area under excess loss, is {best.trial.name} ({best.trial.label}): {best.area:.4f}. "
        f"{sweep.job.name} version {summary['version']} is the candidate: {summary['uri']}"
    )
    out.print("\nNext:")
    name = sweep.job.name
    lines(out, {"export 0.6": f"{shell(settings)} jobs/materialize.py {name} --alias candidate --size 0.6 --out {name}-60"})
    return cli.FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
