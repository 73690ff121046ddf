"""Measure products of 16-bit matrices before and after `acip.utils.half_products` replaces PyTorch's kernels.

    python tests/benchmarks/half_products.py [--quick] [--check]

One thread. On a CPU that has instructions for a type, nothing is replaced, and the type is left out. Each line has the time of PyTorch's
kernel and that of the new one. --check exits with 1 if a product became slower by more than a tenth. The last line is the result: the
smallest speedup, and the geometric mean.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from acip.utils.half_products import QUERIES, is_slow, speed_up_products

SHAPES = {"SmolLM2-135M": (1536, 576), "Llama 1B": (5632, 2048)}
ROWS = (8, 64, 512)
HEADS, HEAD_SIZE = 9, 64
GAIN = 0.9


def products(M: int, N: int, rows: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the products of a linear layer M x N for some rows, forward and backward, and the attention of as many tokens."""
    x, weight, grad = (torch.randn(*shape).to(dtype) for shape in ((rows, N), (M, N), (rows, M)))
    query, key, value = torch.randn(3, 1, HEADS, rows, HEAD_SIZE).to(dtype).requires_grad_()

    def attention() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    runs: dict[str, Callable[[], object]] = {
        "y = x W'": lambda: x @ weight.T,
        "dx = dy W": lambda: grad @ weight,
        "dW = dy' x": lambda: grad.T @ x,
    }
    if rows >= QUERIES:
        runs["attention, forward and backward"] = lambda: attention().sum().backward()
    return runs


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the shortest time of some runs, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model's shape only")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a product became slower by more than a tenth")
    args = parser.parse_args()
    torch.set_num_threads(1)
    repeats, speedups = 3 if args.quick else 5, []
    for dtype in filter(is_slow, (torch.bfloat16, torch.float16)):
        shapes = list(SHAPES.items())[: 1 if args.quick else None]
        runs = {
            f"{str(dtype).removeprefix('torch.'):<9} {model:<13} {rows:>4} rows: {name}": run
            for model, (M, N) in shapes
            for rows in ROWS
            for name, run in products(M, N, rows, dtype).items()
        }
        before = {name: seconds(run, repeats) for name, run in runs.items()}
        speed_up_products(dtype)
        for name, run in runs.items():
            after = seconds(run, repeats)
            speedups.append(before[name] / after)
            print(f"{name:<70}{1e3 * before[name]:>10.2f} ms {1e3 * after:>10.2f} ms  {speedups[-1]:.2f}x")
    if not speedups:
        print("speedup: 1.00x, because this CPU has instructions for bfloat16 and float16, and nothing is replaced")
        return 0
    mean = math.exp(sum(map(math.log, speedups)) / len(speedups))
    print(f"smallest speedup: {min(speedups):.2f}x, geometric mean {mean:.1f}x")
    return int(args.check and min(speedups) < GAIN)


if __name__ == "__main__":
    sys.exit(main())
