"""Measure matrix products with few rows on a CPU, by kernel and shape.

The results are the reason that `acip.layers.mixed_sizes` pads rows and ranks, that `acip.layers.packing` packs dense weights, that codes
are multiplied in integers, and that `acip.modeling_acip.onednn` selects kernels.

    python tests/benchmarks/products.py [--quick] [--check]

bfloat16, one thread; the weights do not fit in the CPU cache. Each line compares one of our choices with its alternative. --check exits
with 1 if a choice is slower on average. The last line is the result: the smallest mean speedup.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import replica_environment

if __name__ == "__main__":
    replica_environment.enter()

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {
    "SmolLM2-135M": [(576, 576), (1536, 576), (576, 1536)],
    "Llama 1B": [(2048, 2048), (5632, 2048), (2048, 5632)],
    "Llama 7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
}
WEIGHTS_BYTES = 64 << 20  # total weights of a measurement, more than the CPU cache holds
GAIN = 1.0


def seconds(run: Callable[[Any], object], weights: Sequence[Any], repeats: int) -> float:
    """Return the time of one product: the best mean of `repeats` passes over all weights."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for weight in weights:
            run(weight)
        best = min(best, (time.perf_counter() - start) / len(weights))
    return best


def _through(x: Tensor, layer: Callable[[Tensor], object]) -> object:
    return layer(x)


def gains(M: int, N: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Return (seconds of the alternative, seconds of our choice) by name of the choice."""
    from acip.layers.directions import product
    from acip.layers.integer_linear import PreciseIntegerLinear, rounded, supports_precise_integers
    from acip.layers.packing import PackedLinear
    from acip.modeling_acip import CodedLinear, onednn, plain_linear

    count = max(2, WEIGHTS_BYTES // (2 * M * N))
    dense = [torch.randn(M, N).bfloat16() for _ in range(count)]
    one = torch.randn(1, N).bfloat16()
    result = {}

    def measure(name: str, before: tuple[Callable[[Tensor], object], bool], chosen: tuple[Callable[[Tensor], object], bool]) -> None:
        times = []
        for run, by_onednn in (before, chosen):
            with onednn(by_onednn):
                times.append(seconds(run, dense, repeats))
        result[name] = (times[0], times[1])

    measure(
        "1 row: PyTorch's kernel, not oneDNN's", (lambda weight: F.linear(one, weight), True), (lambda weight: F.linear(one, weight), False)
    )
    h = torch.randn(1, M).bfloat16()
    measure(
        "1 row, transposed: a weighted sum of rows, not PyTorch's vector kernel",
        (lambda weight: torch.mv(weight.T, h[0]), False),
        (lambda weight: product(h, weight.T), False),
    )
    packed = [PackedLinear(plain_linear(weight, None)) for weight in dense]
    for x in (torch.randn(rows, N).bfloat16() for rows in (2, 8, 32)):
        plain_s = seconds(functools.partial(F.linear, x), dense, repeats)
        result[f"{len(x)} rows: packed, not plain"] = (plain_s, seconds(functools.partial(_through, x), packed, repeats))
    two = torch.randn(2, N).bfloat16()
    unpadded_s = seconds(lambda layer: torch.ops.mkldnn._linear_pointwise(two, layer._packed, None, "none", [], ""), packed, repeats)
    result["2 rows: padded to 4"] = (unpadded_s, seconds(functools.partial(_through, two), packed, repeats))
    if supports_precise_integers("cpu", torch.bfloat16):
        codes = [rounded(weight) for weight in dense]
        coded = [CodedLinear(codes_MN, steps_M, None) for codes_MN, steps_M in codes]
        integer = [PreciseIntegerLinear(codes_MN, steps_M, None) for codes_MN, steps_M in codes]
        for x in (torch.randn(rows, N).bfloat16() for rows in (1, 8, 32)):
            weights_s = seconds(functools.partial(_through, x), coded, repeats)
            result[f"{len(x)} rows: codes in integers"] = (weights_s, seconds(functools.partial(_through, x), integer, repeats))
    eight = torch.randn(8, N).bfloat16()
    prefixes = [dense[0][:rank] for rank in range(33, min(M, N), 8)]
    first = seconds(lambda weight: F.linear(eight, weight), prefixes, 1)
    result["8 rows: a known shape, not a new one"] = (first, seconds(lambda weight: F.linear(eight, weight), prefixes, repeats))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model's shapes only")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a choice is slower on average")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ratios: dict[str, list[float]] = {}
    with torch.inference_mode():
        for model, shapes in list(SHAPES.items())[: 1 if args.quick else None]:
            for M, N in shapes:
                for name, (before, chosen) in gains(M, N, 5 if args.quick else 15).items():
                    print(f"{model:<14}{M:>6} x {N:<6}{name:<58}{1e6 * before:>9.0f} us {1e6 * chosen:>9.0f} us  {before / chosen:.2f}x")
                    ratios.setdefault(name, []).append(before / chosen)
    means = {name: sum(values) / len(values) for name, values in ratios.items()}
    smallest = min(means, key=lambda name: means[name])
    print(f"smallest mean speedup: {means[smallest]:.2f}x ({smallest})")
    return int(args.check and means[smallest] < GAIN)


if __name__ == "__main__":
    sys.exit(main())
