"""Compare the cost of a sweep (3 lambda schedules x 5 stop ratios) with 3 single calibrations, on the small Llama.

    python tests/benchmarks/sweep.py             pruning and post-tuning at quality.py's scale
    python tests/benchmarks/sweep.py --quick     smaller batches, fewer steps: under 5 minutes
    python tests/benchmarks/sweep.py --check     exit with 1 if the goal is missed

All sides run the code of jobs/sweep.py on one Ray, two trials at a time, and start with an empty cache of bases. A single calibration runs
one of the three schedules to the smallest stop ratio, with full post-tuning and a measured curve. Costs are the CPU seconds of trials
and shared prunings, from loading the model to the measured curve. CPU seconds are comparable on a busy machine. The sweep is
measured twice:

    asha    as in jobs/spaces/demo.yaml: trials worse than the median at 1/8, 1/4 or 1/2 of their post-tuning are ended there
    full    all 15 trials are post-tuned to the end; they equal 15 single calibrations bit for bit

The goal refers to the first. The second costs at least (pruning + 5 x post-tuning) / (pruning + post-tuning).
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one trial per core
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ADDRESS", "local")

import ray
import torch
from acip_platform.cluster import connect
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import nodes, resources_of
from acip_platform.settings import Settings
from acip_platform.tracking.runs import Run, Tracking
from acip_platform.training.sweep import Outcome, Sweep, run, winner
from acip_platform.training.sweep_space import Space

from acip.base import load_base
from acip.calibration.basis_cache import BasisCache
from acip.calibration.parametrize import parametrize
from acip.data import documents, token_windows
from acip.recipe import Recipe
from tests.conftest import GOLDEN, byte_tokenizer

GOAL = 1.6  # cost of the asha sweep, in units of the 3 single calibrations
SCHEDULES = (1.05, 1.1, 1.2)
STOPS = (0.8, 0.7, 0.6, 0.5, 0.4)


def recipe(quick: bool) -> Recipe:
    """Return a recipe at the scale of quality.py. Pruning takes 100 to 260 steps (in the paper, 500 to 1500 and 1000 of post-tuning)."""
    scale = {"batch_size": 4, "seq_len": 64, "post_tune_steps": 100} if quick else {"batch_size": 8, "seq_len": 128, "post_tune_steps": 300}
    fixed = {"scores": "order", "dtype": "float32", "lr": 5e-4, "adapter_rank": 8, "stop_ratio": min(STOPS)}
    return Recipe.from_dict(fixed | scale)


def side(folder: Path, name: str, base: str, job: Recipe, space: str) -> tuple[list[Outcome], list[float], float]:
    """Run one side in an ACIP_HOME of its own. Return the outcomes, the CPU seconds of the shared prunings, and the wall time."""
    home = folder / name
    settings = Settings(home, str(home / "artifacts"), str(home / "runs"), f"sqlite:///{home}/mlflow.db")
    (folder / f"{name}.yaml").write_text(space)
    small = Job("small", base, job, "package:austen", eval_context=job.seq_len, eval_windows=16, cpus=1)
    sweep = Sweep.plan(small, Space.load(folder / f"{name}.yaml"))
    tracking = Tracking(settings, name)
    names = [*sweep.shared_prunings, *(trial.name for trial in sweep.trials)]
    runs: dict[str, Run] = {name: tracking.start(name, name, {}) for name in names}
    start = time.perf_counter()
    outcomes, prunings = run(sweep, resources_of(small, nodes()), settings, runs, open_event_queue())
    errors = [outcome.error for outcome in outcomes if outcome.error]
    assert not errors, errors[0]
    return outcomes, [cost.cpu_seconds for cost in prunings.values()], time.perf_counter() - start


def basis_seconds(folder: Path, base: str, job: Recipe) -> list[float]:
    """Return the seconds of a parametrization with an empty cache of bases, and of another one that reads from the cache."""
    seconds = []
    windows = token_windows(documents("package:austen", "train"), byte_tokenizer(), job.seq_len, job.sample_windows)
    for _ in range(2):
        model: Any = load_base(base, job.dtype).model
        start = time.perf_counter()
        parametrize(model, job, windows, cache=BasisCache(folder / "bases"))
        seconds.append(time.perf_counter() - start)
    return seconds


def print_row(label: str, outcomes: list[Outcome], prunings: list[float], wall: float, singles: float) -> float:
    trials = sum(outcome.cost.cpu_seconds for outcome in outcomes)
    best = winner(outcomes)
    assert best is not None
    ended = sum(not outcome.finished for outcome in outcomes)
    ratio = (trials + sum(prunings)) / singles
    print(
        f"| {label} | {len(outcomes)} | {ended} | {sum(prunings):.0f} | {trials:.0f} | {wall:.0f} | {ratio:.2f} | "
        f"{best.trial.label or 'stop_ratio 0.4'} | {best.area:.4f} |",
        flush=True,
    )
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller batches, fewer steps: under 5 minutes")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the goal is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    job = recipe(args.quick)
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    try:
        base = str(shutil.copytree(GOLDEN / "base", folder / "base"))
        byte_tokenizer().save_pretrained(base)
        computed, cached = basis_seconds(folder, base, job)
        print(f"bases: {computed:.2f} s computed, {cached:.2f} s from the node's cache\n")
        connect(Settings(folder, "", "", ""))
        fields = f"lambda_factor: {list(SCHEDULES)}"
        stops = f"stop_ratio: {list(STOPS)}"
        singles, _, wall = side(folder, "singles", base, job, f"space: {{{fields}}}")
        cost = sum(outcome.cost.cpu_seconds for outcome in singles)
        print(f"post-tuning: {job.post_tune_steps} steps of {job.batch_size} x {job.seq_len} tokens\n")
        print("| side | trials | ended early | shared prunings, CPU s | trials, CPU s | wall, s | x 3 singles | winner | its area |")
        print("|---|---|---|---|---|---|---|---|---|")
        print_row("3 single calibrations", singles, [], wall, cost)
        ratios = {}
        for name, more in (("asha", "\nscheduler: asha"), ("full", "")):
            outcomes, prunings, wall = side(folder, name, base, job, f"space: {{{fields}, {stops}}}{more}")
            ratios[name] = print_row(f"sweep, {name}", outcomes, prunings, wall, cost)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    met = ratios["asha"] <= GOAL
    print(
        f"3 x 5 trials cost {ratios['asha']:.2f} x as much as 3 single calibrations if the worse trials are ended early "
        f"(goal: {GOAL}, {'met' if met else 'missed'}), and {ratios['full']:.2f} x if all are post-tuned to the end"
    )
    return 1 if args.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
