"""Sweep one model of a fleet over recipes with Ray Tune: bases are computed once, pruning once for all stop ratios.

    ray job submit -- python jobs/sweep.py --fleet jobs/fleets/demo.yaml --space jobs/spaces/demo.yaml
    python jobs/sweep.py ... --only NAME       which model, where the fleet has several
    python jobs/sweep.py ... --dry-run         the trials, and stop

The winner is the finished trial with the least area under excess loss over sizes 0.4 to 1.0 (acip/sizing/excess_loss_area.py). It is
registered as `candidate`. It is chosen by the text that its curve is measured on. The same command after an interruption goes
on, and repeats no finished trial. Exit code 0 = every trial came to its end, 1 = some failed.
"""

import argparse
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray
from acip_platform.cluster import Cluster, connect
from acip_platform.reporting.console import Watch, console, duration, exit_code, lines, shell
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.fleet import Fleet, Job
from acip_platform.scheduling.job_queue import Resources, nodes, pool, resources_of
from acip_platform.settings import Settings, masked
from acip_platform.tracking.registry import check_registers, reached
from acip_platform.tracking.runs import Run, Tracking, runs_page
from acip_platform.training import sweep_report
from acip_platform.training.sweep import Outcome, Sweep, keep, run, winner
from acip_platform.training.sweep_space import Space

from acip.errors import AcipError

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", default=str(ROOT / "jobs" / "fleets" / "demo.yaml"), help="fleet file (default: the embedded demo)")
    parser.add_argument("--only", metavar="NAME", help="this model of the fleet; not needed where it has one")
    parser.add_argument("--space", default=str(ROOT / "jobs" / "spaces" / "demo.yaml"), help="space file (default: the embedded demo)")
    parser.add_argument("--pool", metavar="8xGPU:1,CPU:14", help="nodes that an autoscaler may start (default: the nodes there are)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    args = parser.parse_args()
    out = console()
    return exit_code(out, lambda: sweep_one(args, out))


@reached()
def sweep_one(args: argparse.Namespace, out: Any) -> int:
    began = time.monotonic()
    settings = Settings.from_env()
    check_registers(settings)
    fleet = Fleet.load(args.fleet)
    sweep = Sweep.plan(chosen(fleet, args.only), Space.load(args.space))
    there = pool(args.pool) if args.pool else []
    cluster = connect(settings)
    part = resources_of(sweep.job, there or nodes())
    if args.dry_run:
        first_screen(out, settings, fleet, sweep, part, cluster)
        return 0
    tracking = Tracking(settings, f"acip/{fleet.name}")
    parent, runs = start_runs(tracking, fleet, sweep)
    first_screen(out, settings, fleet, sweep, part, cluster, parent)
    ended = dict.fromkeys(runs, "FINISHED")
    with ExitStack() as ends:
        ends.enter_context(parent.ending())
        for name, one in runs.items():
            ends.enter_context(one.ending(partial(ended.__getitem__, name)))
        inbox = open_event_queue()
        with Watch(out, inbox):
            outcomes, trunks = run(sweep, part, settings, runs, inbox)
            summaries = keep(sweep, outcomes, part, settings, runs, inbox)
        for outcome in outcomes:
            runs[outcome.trial.name].tags({"state": sweep_report.status(outcome)})
            ended[outcome.trial.name] = "FAILED" if outcome.error else "FINISHED" if outcome.finished else "KILLED"
        parent.table(dict(sweep_report.columns(outcomes)), "trials.json")
        parent.figure(sweep_report.curves(outcomes, sweep.job.name), "curves.png")
        best = winner(outcomes)
        seconds = sum(cost.seconds for cost in (*trunks.values(), *(outcome.cost for outcome in outcomes)))
        if best is not None:
            parent.metrics([(0, {"area_under_excess_nats": best.area, "seconds": seconds})])
            parent.tags({"winner": best.trial.name, "winner_run": runs[best.trial.name].run_id})
    took = time.monotonic() - began
    code = last_screen(out, settings, sweep, outcomes, [cost.seconds for cost in trunks.values()], summaries, took)
    lines(out, {"the runs' table": runs_page(settings, tracking.experiment_id)})
    return code


def chosen(fleet: Fleet, only: str | None) -> Job:
    names = [job.name for job in fleet.jobs]
    if only is None and len(names) > 1:
        raise AcipError(f"a sweep is of one model; say which by --only: {', '.join(names)}.")
    if only is not None and only not in names:
        raise AcipError(f"--only names {only}; the fleet has {', '.join(names)}.")
    return next(job for job in fleet.jobs if only in (None, job.name))


def start_runs(tracking: Tracking, fleet: Fleet, sweep: Sweep) -> tuple[Run, dict[str, Run]]:
    """The sweep's MLflow run, and those of its trunks and trials under it; an interrupted sweep's own."""
    tags = {"fleet": fleet.name, "model": sweep.job.name, "sweep": sweep.space.name}
    parent = tracking.start(f"sweep {sweep.space.name}", sweep.key, tags)
    space = sweep.space
    parent.params({"base": sweep.job.base, "search": space.search, "scheduler": space.scheduler, "keep": space.keep, "set": space.set})
    parent.params({f"space.{field}": values for field, values in space.fields.items()})
    runs = {}
    for name, trials in sweep.trunks.items():
        runs[name] = tracking.start(name, f"{sweep.key}/{name}", {**tags, "trials": ", ".join(trial.name for trial in trials)}, parent)
    for trial in sweep.trials:
        trunk = next((runs[name].run_id for name, trials in sweep.trunks.items() if trial in trials), "")
        runs[trial.name] = tracking.start(f"{trial.name}: {trial.label}", f"{sweep.key}/{trial.name}", {**tags, "trunk_run": trunk}, parent)
        runs[trial.name].params({**trial.job.recipe.to_dict(), "base": trial.job.base, "data": trial.job.data})
    return parent, runs


def first_screen(
    out: Any, settings: Settings, fleet: Fleet, sweep: Sweep, part: Resources, cluster: Cluster, parent: Run | None = None
) -> None:
    trials, trunks = len(sweep.trials), len(sweep.trunks)
    out.print(f"acip: sweep {sweep.space.name} of {sweep.job.name} in fleet {fleet.name}: {trials} trials on {trunks} trunks", markup=False)
    lines(out, {
        "job": ray.get_runtime_context().get_job_id() + (" on a Ray of its own" if cluster.own else ""),
        "dashboard": cluster.dashboard or "none",
        "tracking": masked(settings.tracking_uri),
        "artifacts": settings.store,
        "states": f"{settings.runs}/{sweep.key}",
        "each trial has": f"{part.gpus:g} GPU, {part.cpus:g} CPU",
        **({"run": f"{parent.run_id} in experiment {parent.experiment_id}"} if parent else {}),
    })  # fmt: skip
    for trial in sweep.trials:
        out.print(f"[{trial.name}] {trial.label}", markup=False)


def last_screen(
    out: Any,
    settings: Settings,
    sweep: Sweep,
    outcomes: list[Outcome],
    trunk_seconds: list[float],
    summaries: dict[str, dict[str, Any]],
    seconds: float,
) -> int:
    out.print()
    out.print(sweep_report.table(outcomes, trunk_seconds))
    out.print()
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        out.print(f"[{outcome.trial.name}] FAILED ({outcome.trial.label}): {outcome.error}", markup=False)
    finished = sum(outcome.finished for outcome in outcomes)
    ended = len(outcomes) - finished - len(failed)
    out.print(f"{finished} finished, {ended} ended early, {len(failed)} failed, after {duration(seconds)}.", markup=False)
    best = winner(outcomes)
    if best is None:
        out.print("No trial was finished, so there is no winner.", markup=False)
        return 1
    summary = summaries[best.trial.name]
    out.print(
        f"The winner by the least area under excess loss is {best.trial.name} ({best.trial.label}): {best.area:.4f}. "
        f"{sweep.job.name} version {summary['version']} is the candidate: {summary['uri']}",
        markup=False,
    )
    out.print("\nNext:", markup=False)
    name = sweep.job.name
    lines(out, {"keep 0.6": f"{shell(settings)} jobs/materialize.py {name} --alias candidate --size 0.6 --out {name}-60"})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
