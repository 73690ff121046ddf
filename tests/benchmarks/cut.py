"""Measure the time of a cut for every kind of budget: 224 layers, a million directions, one thread. Prints milliseconds.

    python tests/benchmarks/cut.py [--quick] [--check]

The first cut of a kind computes cumulative sums, and later cuts search them. --check exits with 1 if the median of the later cuts of any
kind exceeds LIMIT. The last line is the result.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

LIMIT = 10.0  # ms
SHAPES = [(4464, 4464)] * 4 + [(11904, 4464)] * 2 + [(4466, 11904)]  # of a block; slightly larger than Llama 2 7B, so that D = 1,000,000


def main() -> int:
    from acip.sizing.budget import Budget, Curve, Decoder
    from acip.sizing.cut_table import CutTable, LayerShape, Weights

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    layers = tuple(LayerShape(f"{block}.{i}", M, N, False) for block in range(32) for i, (M, N) in enumerate(SHAPES))
    layer_of_direction = torch.repeat_interleave(torch.arange(len(layers), dtype=torch.int32), torch.tensor([layer.K for layer in layers]))
    order = layer_of_direction[torch.randperm(len(layer_of_direction), generator=torch.Generator().manual_seed(0))]
    weights = Weights((2,) * len(layers), 500_000_000)
    table = CutTable(
        layers, order, 0, 262_000_000, weights=weights, decoder=Decoder(32, 32, 128, 32000, 4096, 2),
        curve=Curve((1.0, 0.8, 0.6, 0.4), (1.7, 1.72, 1.8, 2.2)),
    )  # fmt: skip
    kinds = {
        "ratio": Budget(0.61),
        "ratio (paper)": Budget(0.61, "paper"),
        "ratio (model)": Budget(0.61, "model"),
        "params": Budget(params=4_500_000_000),
        "stored_bytes": Budget(stored_bytes=8_000_000_000),
        "stored_bytes, 8 bit": Budget(stored_bytes=5_000_000_000, bits=8),
        "stored_bytes, 4 bit": Budget(stored_bytes=3_000_000_000, bits=4),
        "memory_mb": Budget(memory_mb=13_000, context=4096, batch=1),
        "max_perplexity": Budget(max_perplexity=6.0),
        "max_loss_increase": Budget(max_loss_increase=0.1),
    }
    print(f"{len(layers)} layers, {len(order):,} directions")
    print(f"{'ms':<24}{'first':>10}{'later':>10}")
    worst = 0.0
    for name, budget in kinds.items():
        times_ms = []
        for _ in range(6 if args.quick else 21):
            start = time.perf_counter()
            table.cut(budget)
            times_ms.append(1e3 * (time.perf_counter() - start))
        later = sorted(times_ms[1:])[len(times_ms) // 2 - 1]
        worst = max(worst, later)
        print(f"{name:<24}{times_ms[0]:>10.1f}{later:>10.2f}")
    print(f"worst median of the later cuts: {worst:.2f} ms (allowed: {LIMIT:.0f})")
    return int(args.check and worst > LIMIT)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
