"""Measure products of few rows on a CPU, by kernel and shape.

The results are why `acip.layers.mixed_sizes` pads rows and ranks, `acip.layers.packing` packs dense weights, and `onednn` chooses kernels.

    python tests/benchmarks/products.py [--quick] [--check]

bfloat16, one thread, each weight out of the cache. Every line is a choice of ours against what it replaces; --check fails where a
choice that is made costs more than it saves. The last line is the figure: the least of the gains.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {"SmolLM2-135M": [(576, 576), (1536, 576), (576, 1536)], "Llama 7B": [(4096, 4096), (11008, 4096), (4096, 11008)]}
WEIGHTS_BYTES = 64 << 20  # that a measurement goes through, so that none is in the cache
GAIN = 1.0


def seconds(run: Callable[[Any], object], weights: Sequence[Any], repeats: int) -> float:
    """Of one product, the least of some rounds over all weights."""
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
    """claim -> (seconds as it was, seconds as chosen)."""
    from acip.layers.packing import PackedLinear
    from acip.modeling_acip import onednn, plain_linear

    count = max(2, WEIGHTS_BYTES // (2 * M * N))
    dense = [torch.randn(M, N).bfloat16() for _ in range(count)]
    one = torch.randn(1, N).bfloat16()
    found = {}

    def measure(what: str, before: tuple[Callable[[Tensor], object], bool], chosen: tuple[Callable[[Tensor], object], bool]) -> None:
        taken = []
        for run, by_onednn in (before, chosen):
            with onednn(by_onednn):
                taken.append(seconds(run, dense, repeats))
        found[what] = (taken[0], taken[1])

    measure(
        "1 row: PyTorch's kernel for oneDNN's", (lambda weight: F.linear(one, weight), True), (lambda weight: F.linear(one, weight), False)
    )
    h = torch.randn(1, M).bfloat16()
    measure(
        "1 row, transposed: PyTorch's with a vector for oneDNN's",
        (lambda weight: F.linear(h, weight.T), True),
        (lambda weight: torch.mv(weight.T, h[0]), False),
    )
    packed = [PackedLinear(plain_linear(weight, None)) for weight in dense]
    for x in (torch.randn(rows, N).bfloat16() for rows in (2, 8, 32)):
        plain_s = seconds(functools.partial(F.linear, x), dense, repeats)
        found[f"{len(x)} rows: packed for plain"] = (plain_s, seconds(functools.partial(_through, x), packed, repeats))
    eight = torch.randn(8, N).bfloat16()
    prefixes = [dense[0][:rank] for rank in range(33, min(M, N), 8)]
    first = seconds(lambda weight: F.linear(eight, weight), prefixes, 1)
    found["8 rows: a shape of before for a new one"] = (first, seconds(lambda weight: F.linear(eight, weight), prefixes, repeats))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model's shapes only")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ratios: dict[str, list[float]] = {}
    with torch.inference_mode():
        for model, shapes in list(SHAPES.items())[: 1 if args.quick else None]:
            for M, N in shapes:
                for what, (before, chosen) in gains(M, N, 5 if args.quick else 15).items():
                    print(f"{model:<14}{M:>6} x {N:<6}{what:<56}{1e6 * before:>9.0f} us {1e6 * chosen:>9.0f} us  {before / chosen:.2f}x")
                    ratios.setdefault(what, []).append(before / chosen)
    means = {what: sum(found) / len(found) for what, found in ratios.items()}
    least = min(means, key=lambda what: means[what])
    print(f"least of the mean gains: {means[least]:.2f}x ({least})")
    return int(args.check and means[least] < GAIN)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
