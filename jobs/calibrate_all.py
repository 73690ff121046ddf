"""Calibrate every model of a fleet, one Ray Train worker each or as many as the fleet file says.

    ray job submit -- python jobs/calibrate_all.py                 the embedded demo fleet, on a running Ray
    python jobs/calibrate_all.py                                   the same, on a Ray of its own
    python jobs/calibrate_all.py --fleet jobs/fleets/paper.yaml    the paper's models; needs GPUs and the hub

What is done already is not done again (--force does); what was interrupted goes on; what another submission is doing is left to it.
Exit code 0 = every model is there.
"""

import argparse
import functools
import hashlib
import json
import os
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import ray
from acip_platform.cluster import Cluster, connect
from acip_platform.reporting import figures
from acip_platform.reporting.console import Watch, console, duration, exit_code, lines, shell, trade_off_table
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.fleet import Fleet, Job
from acip_platform.scheduling.job_queue import Outcome, Resources, nodes, pool, resources_of, run_all
from acip_platform.scheduling.leases import Leases
from acip_platform.settings import Settings, masked, this_program
from acip_platform.storage.store import Store
from acip_platform.tracking import run_descriptions
from acip_platform.tracking.provenance import commit
from acip_platform.tracking.registry import CHAMPION, ModelVersion, Registry, check_registers, reached
from acip_platform.tracking.runs import Run, Tracking, runs_page
from acip_platform.training.worker import run_job

from acip.artifact.read_back import read_back
from acip.base import outline
from acip.calibration.memory_plan import predict
from acip.data import HUB, documents
from acip.errors import AcipError

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", default=str(ROOT / "jobs" / "fleets" / "demo.yaml"), help="fleet file (default: the embedded demo)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models of the fleet")
    parser.add_argument("--force", action="store_true", help="calibrate again what is done already")
    parser.add_argument("--pool", metavar="8xGPU:1,CPU:14", help="nodes that an autoscaler may start (default: the nodes there are)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    args = parser.parse_args()
    out = console()
    return exit_code(out, lambda: run(args, out))


@reached()
def run(args: argparse.Namespace, out: Any) -> int:
    began = time.monotonic()
    settings = Settings.from_env()
    check_registers(settings)
    fleet = Fleet.load(args.fleet)
    unknown = set(args.only or ()) - {job.name for job in fleet.jobs}
    if unknown:
        raise AcipError(f"--only names {', '.join(sorted(unknown))}; the fleet has {', '.join(job.name for job in fleet.jobs)}.")
    jobs = [job for job in fleet.jobs if not args.only or job.name in args.only]

    os.environ.setdefault("ACIP_COMMIT", commit())  # workers may have the code without its history
    cluster = connect(settings)
    there = functools.partial(pool, args.pool) if args.pool else nodes
    shares = {job.name: resources_of(job, there()) for job in jobs}
    tracking, registry, store = Tracking(settings, f"acip/{fleet.name}"), Registry(settings), Store.of(settings)
    attempts = {job.name: attempt_of(job, args.force) for job in jobs}
    done = {} if args.force else {job.name: version for job in jobs if (version := finished(job, registry, store)) is not None}
    with Leases(store, settings.lease_s, functools.partial(give_up, out)) as leases:
        open_jobs = [job for job in jobs if job.name not in done]
        taken = {} if args.dry_run else claim(leases, {job.name: attempts[job.name] for job in open_jobs}, out)
        if not args.force:  # they may have been finished while we waited
            done |= {job.name: version for job in open_jobs if (version := finished(job, registry, store)) is not None}
        open_jobs = [job for job in open_jobs if job.name not in done and job.name not in taken]
        parent = start_fleet(tracking, fleet) if open_jobs and len(fleet.jobs) > 1 and not args.dry_run else None
        runs = {} if args.dry_run else {job.name: start_run(tracking, fleet, job, attempts[job.name], parent) for job in open_jobs}
        first_screen(out, settings, fleet, jobs, done, taken, shares, cluster, runs)
        if args.dry_run:
            return plan([job for job in jobs if job.name not in done], shares, settings, out)

        inbox = open_event_queue()
        outcomes = [Outcome(job, None, taken[job.name]) for job in jobs if job.name in taken and job.name not in done]

        def calibrate(job: Job) -> dict[str, Any]:
            return run_job(job, shares[job.name], settings, runs[job.name], attempts[job.name], inbox)

        try:
            with Watch(out, inbox):
                for outcome in run_all(open_jobs, shares, calibrate, there):
                    runs[outcome.job.name].finish("FAILED" if outcome.error else "FINISHED")
                    leases.release(attempts[outcome.job.name])
                    outcomes.append(outcome)
        except KeyboardInterrupt:
            ray.shutdown()  # the workers end before their work is free for others
            ended = {outcome.job.name for outcome in outcomes}
            for run in [*(run for name, run in runs.items() if name not in ended), *([parent] if parent else [])]:
                run.finish("KILLED")
            raise
        outcomes.sort(key=lambda outcome: jobs.index(outcome.job))  # as in the file
        if parent is not None:
            try:
                finish_fleet(parent, outcomes)
            except Exception as error:  # MLflow's, or that of whatever keeps its files: the models are there
                out.print(f"the end of the fleet's run isn't recorded: {error}", markup=False)
    return last_screen(out, settings, outcomes, done, time.monotonic() - began, runs_page(settings, tracking.experiment_id))


def plan(jobs: list[Job], shares: dict[str, Resources], settings: Settings, out: Any) -> int:
    """What a dry run says besides the first screen: the curve, memory, places; 1 where something is not there."""
    code = 0
    for job in jobs:
        about = {
            "curve": f"sizes {', '.join(f'{size:g}' for size in job.sizes)} on {job.heldout.source}, held out, {job.eval_protocol}",
            "checkpoints": f"{masked(settings.runs)}/{attempt_of(job, force=False)}",
            "artifact": f"{masked(settings.store)}/{job.name}/{attempt_of(job, force=False)}",
        }
        try:
            for source, split in ((job.data, "train"), (job.heldout.source, "heldout")):
                if source not in HUB:
                    next(documents(source, split))  # type: ignore[arg-type]
            base = outline(job.base, job.recipe.dtype, job.trust_remote_code)
            read_back(base, job.recipe)
            needed = predict(base.model, job.recipe, "cuda" if shares[job.name].gpus else "cpu", job.num_workers)
            about["memory"] = f"{needed.peak / 1e9:.2f} GB for each worker, most in {needed.worst.name}"
        except AcipError as error:
            about["CAN'T RUN"], code = str(error), 1
        out.print()
        out.print(f"[{job.name}]", markup=False)
        lines(out, about)
    return code


def attempt_of(job: Job, force: bool) -> str:
    """The same name goes on where it stopped, a new one starts afresh."""
    return f"{job.name}-{job.fingerprint}" + (f"-{secrets.token_hex(4)}" if force else "")


def claim(leases: Leases, attempts: dict[str, str], out: Any) -> dict[str, str]:
    """What another submission is working on, by model, with who that is."""
    names = {attempt: name for name, attempt in attempts.items()}

    def waiting(attempt: str, owner: str) -> None:
        out.print(f"[{names[attempt]}] {owner} began it; looking for up to {leases.lease_s:g} s whether that is still alive", markup=False)

    alive = leases.claim(list(names), waiting)
    return {
        names[attempt]: f"{owner} is working on it. It isn't done twice; run this again when that has ended."
        for attempt, owner in alive.items()
    }


def give_up(out: Any, attempt: str, owner: str) -> None:
    """End at once, and with this process its workers: the work goes on elsewhere."""
    out.print(
        f"error: this process was silent for so long that {owner} took over {attempt}; ending, so that it isn't done twice.", markup=False
    )
    os._exit(3)


def finished(job: Job, registry: Registry, store: Store) -> ModelVersion | None:
    """This very job's version, if it was judged and its artifact is there: the champion, or the newest of those that are not."""
    there = registry.versions(job.name, {"fingerprint": job.fingerprint})
    judged = (version for version in there if CHAMPION in version.aliases or "verdict" in version.tags)
    done = [version for version in judged if store.exists(version.uri)]
    return next((version for version in done if CHAMPION in version.aliases), done[0] if done else None)


def start_fleet(tracking: Tracking, fleet: Fleet) -> Run:
    """The MLflow run of this very fleet, around those of its models."""
    identity = hashlib.sha256("".join(job.fingerprint for job in fleet.jobs).encode()).hexdigest()[:12]
    return tracking.start(f"fleet {fleet.name}", f"fleet-{fleet.name}-{identity}", {"fleet": fleet.name})


def finish_fleet(parent: Run, outcomes: list[Outcome]) -> None:
    """All curves over each other, and each model's outcome in the fleet run's description."""
    good = {outcome.job.name: outcome.summary["curve"] for outcome in outcomes if outcome.summary is not None}
    for name, rows in good.items():
        if parent.last_step(f"excess_loss_nats/{name}") == 0:
            parent.metrics(run_descriptions.excess(name, rows))
    if good:
        parent.figure(figures.curves(good, excess=True), "tradeoffs.png")
    parent.describe(run_descriptions.of_fleet(outcomes))
    parent.finish("FINISHED" if len(good) == len(outcomes) else "FAILED")


def start_run(tracking: Tracking, fleet: Fleet, job: Job, attempt: str, parent: Run | None) -> Run:
    run = tracking.start(job.name, attempt, {"fleet": fleet.name, "model": job.name}, parent)
    run.params(run_descriptions.settings(job))
    run.json(job.to_dict(), "recipe.json")
    return run


def first_screen(
    out: Any,
    settings: Settings,
    fleet: Fleet,
    jobs: list[Job],
    done: dict[str, ModelVersion],
    taken: dict[str, str],
    shares: dict[str, Resources],
    cluster: Cluster,
    runs: dict[str, Run],
) -> None:
    context = ray.get_runtime_context()
    out.print(f"acip: fleet {fleet.name}, {len(jobs)} model{'s' * (len(jobs) != 1)}, {len(done)} done already", markup=False)
    lines(out, {
        "job": context.get_job_id() + (" on a Ray of its own" if cluster.own else ""),
        "dashboard": cluster.dashboard or "none",
        "tracking": masked(settings.tracking_uri),
        "artifacts": settings.store,
        **{f"run {name}": f"{run.run_id} in experiment {run.experiment_id}" for name, run in runs.items()},
    })  # fmt: skip
    for job in jobs:
        if job.name in done:
            version = done[job.name]
            what = f"is the {CHAMPION}" if CHAMPION in version.aliases else f"is no {CHAMPION} (judged {version.tags['verdict']})"
            out.print(f"[{job.name}] done already: version {version.version} {what} (--force calibrates again)", markup=False)
            continue
        if job.name in taken:
            out.print(f"[{job.name}] {taken[job.name]}", markup=False)
            continue
        r = job.recipe
        part = shares[job.name]
        steps = f"{r.total_steps} steps in all" if r.total_steps else f"{r.post_tune_steps} steps of post-tuning"
        text = (
            f"[{job.name}] {job.base} on {job.data}: {r.basis} basis, {r.scores} scores, "
            f"sizes down to {r.stop_ratio} ({r.convention}), {steps}; "
            f"{r.batch_size * r.gradient_accumulation_steps} x {r.seq_len} tokens a step; {part.gpus:g} GPU, {part.cpus:g} CPU"
        )
        out.print(text, markup=False)


def last_screen(out: Any, settings: Settings, outcomes: list[Outcome], done: dict[str, ModelVersion], seconds: float, page: str) -> int:
    for outcome in outcomes:
        if outcome.error is None:
            out.print()
            out.print(trade_off_table(outcome))
            assert outcome.summary is not None
            out.print(f"[{outcome.job.name}] version {outcome.summary['version']}, {outcome.summary['verdict']}", markup=False)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    out.print()
    for outcome in failed:
        out.print(f"[{outcome.job.name}] FAILED: {outcome.error}", markup=False)
    good = [outcome.job.name for outcome in outcomes if outcome.error is None] + list(done)
    out.print(f"{len(good)} of {len(good) + len(failed)} models are there, after {duration(seconds)}.", markup=False)
    if good:
        run = shell(settings)
        mlflow = this_program("mlflow")
        body = json.dumps({"model": good[0], "size_ratio": 0.6, "prompt": "The capital of France is", "max_tokens": 24, "temperature": 0})
        local = settings.tracking_uri.startswith("sqlite:")
        server = f"{mlflow} server --backend-store-uri {shlex.quote(settings.tracking_uri)} --port 5000 --workers 1"
        out.print("\nNext:", markup=False)
        lines(out, {
            **({"see the runs": server} if local else {}),
            "the runs' table": page,
            "serve": f"{run} jobs/serve.py",
            "move the slider": "http://127.0.0.1:8000/, once it serves",
            "ask at 0.6": f"curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
            "keep 0.6": f"{run} jobs/materialize.py {good[0]} --size 0.6 --out {good[0]}-60",
            "report": f"{run} jobs/report.py {good[0]} --out report.html",
        })  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
