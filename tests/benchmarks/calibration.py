"""Measure the speed of a whole calibration, ours and a literal implementation of the paper's algorithm (literal.py), in one run.

    python tests/benchmarks/calibration.py --quick              SmolLM2-135M, the two sides of the goals: under 5 minutes on 2 cores
    python tests/benchmarks/calibration.py                      all sides, three times the steps and twice the tokens
    python tests/benchmarks/calibration.py --gpu                a random model of Llama-7B's shape, bfloat16, 4 x 1024 tokens
    python tests/benchmarks/calibration.py --gpu --side same --folder numbers   one side at a time, if time is short
    python tests/benchmarks/calibration.py --gpu --shape 13b --side ours        the literal side of 13B does not fit
    python tests/benchmarks/calibration.py --gpu --shape tiny                   the code of the GPU mode, also on a CPU

All sides get the same weights, batches, stop ratio and number of post-tuning steps, and each runs in a process of its own.
Our implementation has three columns:

    same algorithm      recipe `paper`: prunes the same directions in the same order as the literal side, only faster
    same post-tuning    scores from a few backward passes instead of pruning; then the paper's steps at the stop size
    default recipe      the same scores; then distillation from the base model at all sizes

`--quick` leaves out the first and the last. The goals refer to *same post-tuning*: all phases up to a model at the stop ratio. `--check`
exits with 1 if a goal is missed. The exit code is 2 if the two sides of the same algorithm prune different directions.

FLOPs count the linear layers and the output head only: 2 x tokens x weights for the forward pass, the same for the gradients of the inputs,
and the same for the gradients of the adapters. The peak rate is measured with a large matmul in the same dtype on this machine.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.benchmarks.sides import GPU, LONG, QUICK, SHAPES, SIDES, alone, matmul_peak, run_side

CURVE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def whole(result: dict[str, Any]) -> float:
    return float(sum(result["seconds"].values()))


def peak_memory(result: dict[str, Any]) -> int:
    return int(max(result["peak"].values()))


def same_directions(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float, float, float]:
    """Compare the pruned directions of two sides.

    Returns the shares of directions that were pruned in the same step, and within one step of each other; then the mean and the
    largest difference of a layer's live directions, as a share of all its directions.
    """
    pairs = [(torch.tensor(steps), torch.tensor(theirs["pruned_at"][name])) for name, steps in ours["pruned_at"].items()]
    a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
    near = (a == b) | (((a - b).abs() == 1) & (a > 0) & (b > 0))
    differences = [abs(int((a == 0).sum()) - int((b == 0).sum())) / len(a) for a, b in pairs]
    return (a == b).float().mean().item(), near.float().mean().item(), mean(differences), max(differences)


def curve(result: dict[str, Any]) -> list[tuple[float, float] | None]:
    """Return (seconds per step, multiplied weights as a share of the first step's) at each size of CURVE, and in post-tuning."""
    n, sizes = result["pruned"], [1.0, *result["size"]]
    points: list[tuple[float, float] | None] = []
    for at in (*CURVE, 0.0):
        steps = [i for i in range(n) if abs(sizes[i] - at) <= 0.05] if at else list(range(n, len(result["size"])))
        full = result["multiplied"][0]
        points.append(
            (median(result["step_seconds"][i] for i in steps), median(result["multiplied"][i] for i in steps) / full) if steps else None
        )
    return points


def row(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def show(results: dict[str, dict[str, Any]], peak: float) -> None:
    columns = list(results.values())
    print("\n" + row("", [SIDES[side] for side in results]) + "\n|---|" + "---|" * len(columns))
    print(row("parametrize, s", [f"{r['seconds']['parametrize']:.1f}" for r in columns]))
    for phase, name in (("scores", "prune (default: Fisher scores)"), ("post-tune", "post-tune")):
        print(row(f"{name}, s", [f"{r['seconds'][phase]:.1f} ({r['passes'][phase]} passes)" for r in columns]))
    print(row("whole, s", [f"{whole(r):.1f}" for r in columns]))
    for phase in ("scores", "post-tune"):
        print(row(f"{phase}, tokens/s", [f"{r['tokens'] * r['passes'][phase] / r['seconds'][phase]:.0f}" for r in columns]))
        rates = [r["flop"][phase] / r["seconds"][phase] for r in columns]
        print(row(f"{phase}, GFLOP/s (share of {peak / 1e9:.0f})", [f"{rate / 1e9:.0f} ({rate / peak:.0%})" for rate in rates]))
    for phase in ("parametrize", "calibrate"):
        print(row(f"peak memory, {phase}, GiB", [f"{r['peak'][phase] / 2**30:.2f}" for r in columns]))

    print("\nmilliseconds per step by size while pruning (multiplied weights of the target layers, 1 = all directions)\n")
    print(row("size", [*(f"{at:.1f}" for at in CURVE), "post-tune"]) + "\n|---|" + "---|" * (len(CURVE) + 1))
    for side, result in results.items():
        cells = [f"{point[0] * 1000:.0f} ({point[1]:.2f})" if point else "" for point in curve(result)]
        print(row(SIDES[side], cells))


def agreement(same: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Print how far the two sides of the same algorithm agree. Return True if their times can be compared."""
    exact, near, difference, largest = same_directions(same, theirs)
    agree = difference <= 0.01 or same["setting"]["dtype"] != "float32"
    losses = max(abs(a - b) / abs(b) for a, b in zip(same["loss"][: same["pruned"]], theirs["loss"], strict=False))
    print(
        f"\nthe same algorithm: {exact:.2%} of the directions are pruned in the same step on both sides ({near:.2%} within one step); "
        f"pruning stops after {same['pruned']} and {theirs['pruned']} steps at {same['size'][-1]:.4f} and {theirs['size'][-1]:.4f}; live "
        f"directions of a layer differ by {difference:.2%} ({largest:.2%} at most), losses while pruning by {losses:.1e} at most"
    )
    return agree


def compare(results: dict[str, dict[str, Any]], gpu: bool) -> list[str]:
    """Print the ratios. Return the missed goals."""
    ours, theirs = results["ours"], results["literal"]
    print("\n" + row("literal / ours", [SIDES[side] for side in results if side != "literal"]) + "\n|---|" + "---|" * (len(results) - 1))
    rows: dict[str, Callable[[dict[str, Any]], float]] = {
        "whole calibration": lambda r: whole(theirs) / whole(r),
        "prune, or scores": lambda r: theirs["seconds"]["scores"] / r["seconds"]["scores"],
        "post-tune": lambda r: theirs["seconds"]["post-tune"] / r["seconds"]["post-tune"],
        "parametrize": lambda r: theirs["seconds"]["parametrize"] / r["seconds"]["parametrize"],
        "peak memory, ours / literal": lambda r: peak_memory(r) / peak_memory(theirs),
    }
    for label, ratio in rows.items():
        print(row(label, [f"{ratio(r):.2f}" for side, r in results.items() if side != "literal"]))
    goals = {"whole calibration": 2.5, "post-tune": 3.0, "parametrize": 5.0} if gpu else {"whole calibration": 2.0, "parametrize": 3.0}
    missed = [f"{label} {rows[label](ours):.2f} < {goal}" for label, goal in goals.items() if rows[label](ours) < goal]
    if gpu and rows["peak memory, ours / literal"](ours) > 0.65:
        missed.append(f"peak memory {rows['peak memory, ours / literal'](ours):.2f} > 0.65")
    seconds = [point[0] for point in curve(results["same"]) if point] if "same" in results else [1.0, 0.5]
    if any(later > 1.1 * earlier for earlier, later in pairwise(seconds)) or seconds[-1] > 0.75 * seconds[0]:
        missed.append("the time of a step does not fall with the size")
    return missed


def figure(results: dict[str, dict[str, Any]]) -> str:
    theirs = results["literal"]
    speedups = [f"{whole(theirs) / whole(result):.2f}x ({SIDES[side]})" for side, result in results.items() if side != "literal"]
    parametrization = theirs["seconds"]["parametrize"] / results["ours"]["seconds"]["parametrize"]
    memory = peak_memory(results["ours"]) / peak_memory(theirs)
    return f"whole calibration: {', '.join(speedups)} as fast; parametrization: {parametrization:.2f}x; peak memory: {memory:.2f}x"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short steps, under 5 minutes on 2 cores")
    parser.add_argument("--gpu", action="store_true", help="random weights of a large Llama's shape, on a GPU")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b", help="with --gpu")
    parser.add_argument("--side", choices=[*SIDES], action="append", help="run only this side (repeatable)")
    parser.add_argument("--folder", type=Path, help="keep the numbers of each side here, and compare with sides that ran earlier")
    parser.add_argument("--busy", action="store_true", help="count the CPU time of one thread, for a machine with other load")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    args = parser.parse_args()
    if args.busy:
        os.environ |= {"BUSY": "1", "OMP_NUM_THREADS": "1"}  # the sides' processes inherit it
    setting = QUICK if args.quick else LONG
    if args.gpu:
        if args.shape != "tiny" and not torch.cuda.is_available():
            parser.error("--gpu needs a GPU; --shape tiny runs the same code without one.")
        setting = replace(GPU, shape=args.shape)
        if args.shape == "tiny":
            setting = replace(setting, seq_len=128)
    selected = set(args.side or (["ours", "literal"] if args.quick else SIDES))
    sides = [side for side in SIDES if side in selected]

    print(f"{setting}\n{os.environ['OMP_NUM_THREADS']} threads, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}", flush=True)
    peak = alone(matmul_peak, setting.dtype, setting.device)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for side in sides:
            result = alone(run_side, side, setting, folder / "adapters.safetensors")
            (folder / f"{side}.json").write_text(json.dumps(result))
            print(f"{SIDES[side]}: {whole(result):.1f} s, {result['pruned']} pruning steps", flush=True)
        for side in SIDES:
            if (folder / f"{side}.json").exists():
                results[side] = json.loads((folder / f"{side}.json").read_text())
    show(results, peak)
    if args.json:
        numbers = [{key: value for key, value in result.items() if key != "pruned_at"} for result in results.values()]
        args.json.write_text(json.dumps({"matmul_peak": peak, "sides": numbers}))
    if not {"ours", "literal"} <= results.keys():
        return 0
    agree = "same" not in results or agreement(results["same"], results["literal"])
    missed = compare(results, args.gpu)
    if missed:
        print(f"\ngoals missed: {', '.join(missed)}")
    if not agree:
        print("\nthe two sides of the same algorithm prune different directions, so their times cannot be compared")
    print(f"\n{figure(results)}")
    return 2 if not agree else 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
