"""Calibrate every model of a fleet file, each with Ray Train on as many workers as the file sets.

    ray job submit -- python jobs/calibrate_all.py                 the embedded demo fleet, on a running Ray
    python jobs/calibrate_all.py                                   the same, on a Ray that ends with this process
    python jobs/calibrate_all.py --fleet jobs/fleets/paper.yaml    the paper's models: needs GPUs and the hub
    python jobs/calibrate_all.py --fleet FILE --only NAME          one model of a fleet
    python jobs/calibrate_all.py --fleet FILE --dry-run            the plan only: sizes, memory and missing requirements, on any machine
    python jobs/calibrate_all.py --fleet FILE --rehearse           also hours and bytes, from a calibration of a few blocks on a worker

Finished models are skipped (--force calibrates them again), interrupted ones resume from their last checkpoint. Models that another
submission is working on are skipped and reported. A model that fails does not stop the others.

Exit codes: 0 every model is calibrated, or the plan is printed; 1 some models failed; 2 wrong arguments or files; 3 another
submission took over; 130 interrupted.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
import torch
from acip_platform import cli
from acip_platform.cluster import Cluster, connect
from acip_platform.reporting import figures
from acip_platform.reporting.console import Watch, console, duration, example_size, lines, shell, trade_off_table
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.fleet import Fleet, Job
from acip_platform.scheduling.job_queue import Nodes, Outcome, Resources, nodes, resources_of, run_all
from acip_platform.scheduling.leases import Leases
from acip_platform.settings import Settings, masked, this_program
from acip_platform.storage import base_models
from acip_platform.storage.store import Store
from acip_platform.tracking import run_descriptions
from acip_platform.tracking.provenance import commit
from acip_platform.tracking.registry import CHAMPION, ModelVersion, Registry, reached
from acip_platform.tracking.runs import Run, Tracking, models_page
from acip_platform.training.calibration_text import samples_text
from acip_platform.training.rehearsal import Forecast, rehearse
from acip_platform.training.worker import run_job
from ray.exceptions import RayError

from acip.artifact.read_back import read_back
from acip.calibration import memory_check
from acip.calibration.memory_plan import predict
from acip.data import HUB, SELF, documents
from acip.errors import AcipError, one_line
from acip.evaluate.domains import CHAT
from acip.mixture import Mixture

ROOT = Path(__file__).resolve().parents[1]
TAKEN_OVER = 3  # exit code
MISSING = "MISSING: "  # in a dry run, marks a requirement that is not met


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--fleet", default=str(ROOT / "jobs" / "fleets" / "demo.yaml"), help="fleet file (default: the embedded demo)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="calibrate only these models of the fleet")
    parser.add_argument("--force", action="store_true", help="calibrate finished models again")
    cli.add_pool(parser)
    cli.add_dry_run(parser)
    parser.add_argument("--rehearse", action="store_true", help="like --dry-run, and predict hours and bytes on this cluster")
    args = cli.parse(parser, argv)
    return cli.exit_code(lambda: run(args))


@reached()
def run(args: argparse.Namespace) -> int:
    began, out, settings = time.monotonic(), console(), Settings.from_env()
    fleet = Fleet.load(args.fleet)
    cli.check_only(args.only, [job.name for job in fleet.jobs], "fleet")
    jobs = [job for job in fleet.jobs if not args.only or job.name in args.only]

    os.environ.setdefault("ACIP_COMMIT", commit())  # workers may have the code without its git history
    cluster = connect(settings)
    registry, store = Registry(settings), Store.of(settings)
    done = {} if args.force else finished_jobs(jobs, registry, store)

    def available_nodes() -> Nodes:
        return args.pool or nodes()

    if args.dry_run or args.rehearse:
        first_screen(out, settings, fleet, jobs, done, cluster)
        open_jobs = [job for job in jobs if job.name not in done]
        print_plan(open_jobs, available_nodes(), settings, out)
        if args.rehearse:
            print_forecasts(open_jobs, out)
        return 0
    tracking = Tracking(settings, f"acip/{fleet.name}")
    shares = {job.name: resources_of(job, available_nodes()) for job in jobs}
    attempts = {job.name: attempt_of(job, args.force) for job in jobs}
    with Leases(store, settings.lease_s, functools.partial(give_up, out)) as leases:
        open_jobs = [job for job in jobs if job.name not in done]
        taken = claim(leases, {job.name: attempts[job.name] for job in open_jobs}, out)
        if not args.force:  # another submission may have finished them while we waited
            done |= finished_jobs(open_jobs, registry, store)
        open_jobs = [job for job in open_jobs if job.name not in done and job.name not in taken]
        parent = start_fleet(tracking, fleet) if open_jobs and len(fleet.jobs) > 1 else None
        runs = {job.name: start_run(tracking, fleet, job, attempts[job.name], parent) for job in open_jobs}
        first_screen(out, settings, fleet, jobs, done, cluster, taken, shares, runs)
        events = open_event_queue()
        outcomes = [Outcome(job, None, taken[job.name]) for job in jobs if job.name in taken and job.name not in done]

        def calibrate(job: Job) -> dict[str, Any]:
            return run_job(job, shares[job.name], settings, runs[job.name], attempts[job.name], events)

        try:
            with Watch(out, events):
                for outcome in run_all(open_jobs, shares, calibrate, available_nodes):
                    runs[outcome.job.name].finish("FAILED" if outcome.error else "FINISHED")
                    leases.release(attempts[outcome.job.name])
                    outcomes.append(outcome)
        except KeyboardInterrupt:
            ray.shutdown()  # the workers must end before the leases are released
            ended = {outcome.job.name for outcome in outcomes}
            for run in [*(run for name, run in runs.items() if name not in ended), *([parent] if parent else [])]:
                run.finish("KILLED")
            raise
        outcomes.sort(key=lambda outcome: jobs.index(outcome.job))  # in the order of the file
        if parent is not None:
            try:
                finish_fleet(parent, outcomes)
            except Exception as error:  # of MLflow or its file store: the models are registered already
                out.print(f"the end of the fleet's run could not be recorded: {error}")
    return last_screen(out, settings, outcomes, done, time.monotonic() - began, models_page(settings, tracking.experiment_id))


def print_plan(jobs: list[Job], cluster: Nodes, settings: Settings, out: Any) -> None:
    """Print the plan of each job, and its requirements that a cluster of these nodes does not meet."""
    incomplete = 0
    for job in jobs:
        facts = plan(job, cluster, settings)
        incomplete += any(fact.startswith(MISSING) for fact in facts.values())
        out.print()
        out.print(f"[{job.name}]")
        lines(out, facts)
    if incomplete:
        out.print(f"\n{incomplete} of {len(jobs)} models lack something here; see MISSING.")


def plan(job: Job, cluster: Nodes, settings: Settings) -> dict[str, str]:
    """Return the plan of one job: resources, texts, curve, memory and storage locations, or MISSING and the reason."""

    def fact(check: Callable[[], str]) -> str:
        try:
            return check()
        except AcipError as error:
            return f"{MISSING}{error}"

    def resources() -> str:
        part = resources_of(job, cluster)
        return f"{part.workers} x " * (part.workers > 1) + f"{part.gpus:g} GPU, {part.cpus:g} CPU"

    def text(source: str, split: Any, windows: int = 0) -> str:
        if source in HUB:
            return f"{source}, from the hub (not checked)"
        if source == SELF and split == "train":
            return f"{source}, about {windows * job.recipe.seq_len:,} tokens that will be sampled from the base model"
        next(documents(source, split))
        return source

    def texts() -> str:
        counts = Mixture.of(job.data).counts(job.windows)
        shares = [f"{n:,} windows of " if len(counts) > 1 else "" for n in counts.values()]
        return "; ".join(share + text(source, "train", n) for share, (source, n) in zip(shares, counts.items(), strict=True))

    def domains() -> str:
        return ", ".join(source if source == CHAT else text(source, "all") for source in job.domains) or "none"

    def memory() -> str:
        base = base_models.outlined(job.base, job.recipe.dtype, job.trust_remote_code)
        read_back(base, job.recipe)
        on_gpu = job.gpus > 0 or (job.gpus < 0 and any(node.get("GPU", 0) >= 1 for node in cluster))
        device = "cuda" if on_gpu else "cpu"
        arguments = device, job.num_workers, job.eval_context, samples_text(job)
        needed = predict(base.model, job.recipe, *arguments)
        text = f"{needed.peak / 1e9:.2f} GB per worker, peak in {needed.worst.name}"
        least = memory_check.plan(base.model, job.recipe, 0, *arguments)
        if least.peak < needed.peak:
            text += f"; {least.peak / 1e9:.2f} GB where less is free, a block at a time: {', '.join(least.streamed)}"
        return text

    return {
        "resources": fact(resources),
        "text": fact(texts),
        "held-out text": fact(lambda: text(job.heldout.source, "heldout")),
        "domains": fact(domains),
        "curve": f"sizes {', '.join(f'{size:g}' for size in job.sizes if size == 1 or job.recipe.code != 'bits')}, {job.eval_protocol}"
        + (f"; of the bytes {', '.join(f'{size:g}' for size in job.byte_sizes)}" if job.recipe.code != "ranks" else ""),
        "memory": fact(memory),
        "checkpoints": f"{masked(settings.runs)}/{attempt_of(job, force=False)}",
        "artifact": f"{masked(settings.store)}/{job.name}/{attempt_of(job, force=False)}",
    }


def print_forecasts(jobs: Sequence[Job], out: Any) -> None:
    """Rehearse each job on a worker of the cluster, and print its time by phase and the bytes of its artifact."""
    hours = 0.0
    for job in jobs:
        part = resources_of(job, nodes())
        out.print()
        if part.workers > 1:
            out.print(f"[{job.name}] {part.workers} workers share this model; only models of one worker can be rehearsed")
            continue
        task = rehearsed.options(num_cpus=part.cpus, num_gpus=part.gpus)
        try:
            forecast, device = ray.get(task.remote(job.to_dict(), max(1, int(part.cpus))))
        except AcipError as error:
            out.print(f"[{job.name}] can't be rehearsed: {error}")
            continue
        except RayError as error:  # another error of the task, or its worker was killed
            out.print(f"[{job.name}] can't be rehearsed: {one_line(getattr(error, 'cause', None) or error)}")
            continue
        hours += forecast.total_s / 3600
        out.print(f"[{job.name}] {duration(forecast.total_s)} on {device}, predicted from a few blocks with random weights")
        lines(out, {phase: duration(seconds) for phase, seconds in forecast.seconds.items()})
        lines(out, {"artifact": f"{forecast.artifact_bytes / 1e9:.2f} GB"})
    out.print(f"\n{hours:.2f} hours of one worker for all of them, without loading and uploads")


@ray.remote(max_retries=0)
def rehearsed(fields: dict[str, Any], threads: int) -> tuple[Forecast, str]:
    """Return the forecast of a job on this worker, and the name of its device."""
    job = Job.from_dict(fields)
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = base_models.outlined(job.base, job.recipe.dtype, job.trust_remote_code)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} threads of a CPU"
    return rehearse(job, base, device), name


def attempt_of(job: Job, force: bool) -> str:
    """Return the name of the attempt: an equal name resumes, a new one starts over."""
    return f"{job.name}-{job.fingerprint}" + (f"-{secrets.token_hex(4)}" if force else "")


def claim(leases: Leases, attempts: dict[str, str], out: Any) -> dict[str, str]:
    """Claim the attempts. Returns, for each model that another submission is working on, a message that names it."""
    names = {attempt: name for name, attempt in attempts.items()}

    def waiting(attempt: str, owner: str) -> None:
        out.print(f"[{names[attempt]}] {owner} started it; checking for up to {leases.lease_s:g} s whether it is alive")

    alive = leases.claim(list(names), waiting)
    return {names[attempt]: f"{owner} is working on it. Run this command again when that has ended." for attempt, owner in alive.items()}


def give_up(out: Any, attempt: str, owner: str) -> None:
    """End this process and its workers at once, because another submission continues the work."""
    out.print(
        f"error: this process sent no heartbeat for too long, so {owner} took over {attempt}. This process ends, to avoid duplicate work."
    )
    os._exit(TAKEN_OVER)


def finished_jobs(jobs: Sequence[Job], registry: Registry, store: Store) -> dict[str, ModelVersion]:
    """Return the finished versions of `jobs` by name."""
    return {job.name: version for job in jobs if (version := finished(job, registry, store)) is not None}


def finished(job: Job, registry: Registry, store: Store) -> ModelVersion | None:
    """Return the version that this exact job registered: the champion, or the newest. None if its artifact is missing."""
    versions = registry.versions(job.name, {"fingerprint": job.fingerprint})
    judged = (version for version in versions if CHAMPION in version.aliases or "verdict" in version.tags)
    done = [version for version in judged if store.exists(version.uri)]
    return next((version for version in done if CHAMPION in version.aliases), done[0] if done else None)


def start_fleet(tracking: Tracking, fleet: Fleet) -> Run:
    """Start or continue the MLflow run of this fleet, the parent of the runs of its models."""
    identity = hashlib.sha256("".join(job.fingerprint for job in fleet.jobs).encode()).hexdigest()[:12]
    return tracking.start(f"fleet {fleet.name}", f"fleet-{fleet.name}-{identity}", {"fleet": fleet.name})


def finish_fleet(parent: Run, outcomes: list[Outcome]) -> None:
    """Add a figure with all curves and a description with all outcomes to the run of the fleet, and end it."""
    good = {outcome.job.name: outcome.summary["curve"] for outcome in outcomes if outcome.summary is not None}
    for name, rows in good.items():
        if parent.last_step(f"excess_loss_nats/{name}") == 0:
            parent.metrics(run_descriptions.excess(name, rows))
    if good:
        for over, file in (("ranks", "tradeoffs.png"), ("bytes", "tradeoffs_over_bytes.png")):
            if (figure := figures.curves(good, over=over, quantity="excess")) is not None:  # type: ignore[arg-type]
                parent.figure(figure, file)
    parent.describe(run_descriptions.of_fleet(outcomes))
    parent.finish("FINISHED" if len(good) == len(outcomes) else "FAILED")


def start_run(tracking: Tracking, fleet: Fleet, job: Job, attempt: str, parent: Run | None) -> Run:
    """Start or continue the MLflow run of one model."""
    run = tracking.start(job.name, attempt, {"fleet": fleet.name, "model": job.name}, parent)
    run.params(run_descriptions.settings(job))
    run.json(job.to_dict(), "recipe.json")
    return run


def first_screen(
    out: Any,
    settings: Settings,
    fleet: Fleet,
    jobs: list[Job],
    done: Mapping[str, ModelVersion],
    cluster: Cluster,
    taken: Mapping[str, str] = MappingProxyType({}),
    shares: Mapping[str, Resources] = MappingProxyType({}),
    runs: Mapping[str, Run] = MappingProxyType({}),
) -> None:
    """Print the storage locations, and one line per model."""
    context = ray.get_runtime_context()
    out.print(f"acip: fleet {fleet.name}, {len(jobs)} model{'s' * (len(jobs) != 1)}, {len(done)} already done")
    lines(out, {
        "job": context.get_job_id() + (" on a Ray of this process" if cluster.own else ""),
        "dashboard": cluster.dashboard or "none",
        "tracking": masked(settings.tracking_uri),
        "artifacts": settings.store,
        **{f"run {name}": f"{run.run_id} in experiment {run.experiment_id}" for name, run in runs.items()},
    })  # fmt: skip
    for job in jobs:
        if job.name in done:
            version = done[job.name]
            state = f"is the {CHAMPION}" if CHAMPION in version.aliases else f"is not the {CHAMPION} ({version.tags['verdict']})"
            out.print(f"[{job.name}] already done: version {version.version} {state} (--force calibrates again)")
            continue
        if job.name in taken:
            out.print(f"[{job.name}] {taken[job.name]}")
            continue
        r = job.recipe
        part = shares.get(job.name)
        steps = f"{r.total_steps} steps in total" if r.total_steps else f"{r.post_tune_steps} steps of post-tuning"
        facts = [
            *(["codes for any number of bytes"] if r.code != "ranks" else []),
            *([
                f"{r.basis} basis, {r.scores} scores, sizes down to {r.stop_ratio} ({r.convention}), {steps}",
                f"{r.batch_size * r.gradient_accumulation_steps} x {r.seq_len} tokens per step",
            ] if r.code != "bits" else []),
            *([f"{part.gpus:g} GPU, {part.cpus:g} CPU"] if part else []),
        ]  # fmt: skip
        out.print(f"[{job.name}] {job.base} on {job.data}: {'; '.join(facts)}")


def last_screen(out: Any, settings: Settings, outcomes: list[Outcome], done: dict[str, ModelVersion], seconds: float, page: str) -> int:
    """Print the curves, the failures and the next commands. Returns the exit code."""
    for outcome in outcomes:
        if outcome.error is None:
            out.print()
            out.print(trade_off_table(outcome))
            assert outcome.summary is not None
            out.print(f"[{outcome.job.name}] version {outcome.summary['version']}, {outcome.summary['verdict']}")
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    out.print()
    for outcome in failed:
        out.print(f"[{outcome.job.name}] FAILED: {outcome.error}")
    good = [outcome.job.name for outcome in outcomes if outcome.error is None] + list(done)
    out.print(f"{len(good)} of {len(good) + len(failed)} models are calibrated, after {duration(seconds)}.")
    if good:
        run = shell(settings)
        mlflow = this_program("mlflow")
        summaries = {outcome.job.name: outcome.summary for outcome in outcomes if outcome.summary is not None}
        size = example_size(summaries[good[0]]["curve"] if good[0] in summaries else Store.of(settings).open(done[good[0]].uri).curve)
        body = json.dumps({"model": good[0], "size_ratio": size, "prompt": "The capital of France is", "max_tokens": 24, "temperature": 0})
        local = settings.tracking_uri.startswith("sqlite:")
        server = f"{mlflow} server --backend-store-uri {shlex.quote(settings.tracking_uri)} --port 5000 --workers 1"
        out.print("\nNext:")
        lines(out, {
            **({"see the runs": server} if local else {}),
            "table of sizes": page,
            "serve": f"{run} jobs/serve.py",
            "move the slider": "http://127.0.0.1:8000/, when the server is ready",
            f"ask at {size:g}": f"curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
            f"export {size:g}": f"{run} jobs/materialize.py {good[0]} --size {size:g} --out {good[0]}-{round(size * 100)}",
            "report": f"{run} jobs/report.py {good[0]} --out report.html",
        })  # fmt: skip
    return cli.FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
