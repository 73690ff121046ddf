"""Compare the predictions of acip.calibration.memory_plan with the memory of real calibrations on this machine.

    python tests/benchmarks/memory.py                     a Llama of 58M parameters, 10 recipes, CPU: 10 to 20 minutes on 2 cores
    python tests/benchmarks/memory.py --quick             5 recipes
    python tests/benchmarks/memory.py --predict           the predictions in MEMORY.md and infra/HARDWARE.md, without a calibration

Each calibration runs in a process of its own that returns freed memory to the system at once (malloc's thresholds). The measured value is
the peak resident memory minus the resident memory before the model was created. It includes memory that is not predicted: late
imports, thread pools, and weights that oneDNN repacks. `--check` exits with 1 if a ratio of predicted to measured is outside 0.9 .. 1.5.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LOW, HIGH = 0.9, 1.5
SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}
CASES: dict[str, dict[str, Any]] = {  # --quick runs the first QUICK cases
    "float32": {},
    "float32, gradient checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, gradient checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "nf4": {"dtype": "bfloat16", "quantize": "nf4"},
    "float32, 512 tokens": {"seq_len": 512},
    "float32, dropout": {"adapter_dropout": 0.05},
    "float32, pruning": {"scores": "order", "max_prune_steps": 4, "stop_ratio": 0.98, "lr": 5e-2, "distill_weight": 0.5},
    "float32, rank 128": {"adapter_rank": 128},
    "nf4, gradient checkpointing": {"dtype": "bfloat16", "quantize": "nf4", "gradient_checkpointing": True},
}
QUICK = 5
LLAMAS = {  # vocabulary, hidden, intermediate, layers, heads, key-value heads
    "LLaMA-7B": (32000, 4096, 11008, 32, 32, 32),
    "LLaMA-13B": (32000, 5120, 13824, 40, 40, 40),
    "Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8),
    "34B": (32000, 8192, 22016, 48, 64, 8),
    "70B": (128256, 8192, 28672, 80, 64, 8),
}
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "dropout 0.05": {"adapter_dropout": 0.05},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "nf4": {"quantize": "nf4"},
    "nf4 and gradient checkpointing": {"gradient_checkpointing": True, "quantize": "nf4"},
}


def run(name: str) -> tuple[float, float]:
    """Run one calibration in this process. Return its predicted and its measured memory in GB."""
    import psutil
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from acip.calibration.loop import calibrate, trial_step
    from acip.calibration.memory_plan import predict
    from acip.calibration.parametrize import parametrize
    from acip.recipe import Recipe

    recipe = replace(
        Recipe(
            sample_windows=8, adapter_rank=16, adapter_dropout=0.0, dtype="float32", batch_size=4, seq_len=256, post_tune_steps=6
        ),
        **CASES[name],
    )  # fmt: skip
    warm_up(recipe)
    process, highest, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    torch.manual_seed(0)
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, recipe.dtype))
    model = empty.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    predicted = predict(model, recipe)
    print(predicted)
    windows = torch.randint(0, SHAPE["vocab_size"], (8, recipe.seq_len))

    class Batches:
        def __getitem__(self, i: int, /) -> torch.Tensor:
            return windows[: recipe.batch_size]

    marks = []
    parametrize(model, recipe, windows)
    marks.append(("parametrize", highest))
    trial_step(model, Batches(), recipe)
    marks.append(("trial step", highest))
    calibrate(model, Batches(), recipe)
    marks.append(("calibrate", highest))
    done.set()
    watcher.join()
    print("highest so far:", ", ".join(f"{phase} {(bytes_ - before) / 1e9:.2f}" for phase, bytes_ in marks))
    return predicted.peak / 1e9, (highest - before) / 1e9


def warm_up(recipe: Any) -> None:
    """Load the code that a calibration loads late: kernels, LAPACK, the optimizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from acip.calibration.loop import calibrate
    from acip.calibration.parametrize import parametrize

    small = {**SHAPE, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**small)).to(getattr(torch, recipe.dtype)).eval()
    windows = torch.randint(0, 64, (8, 16))
    recipe = replace(recipe, batch_size=8, seq_len=16, scores="fisher", post_tune_steps=2)
    parametrize(model, recipe, windows)
    calibrate(model, [windows] * 4, recipe)


def ratio_of(name: str) -> float:
    """Run a case in a new process and print its row. Return the ratio of predicted to measured memory."""
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    start = time.time()
    child = subprocess.run(
        [sys.executable, __file__, "--case", name], env=os.environ | malloc, capture_output=True, text=True, check=False
    )  # fmt: skip
    if child.returncode:
        raise RuntimeError(f"{name}: {child.stderr[-2000:]}")
    predicted, measured_gb = (float(number) for number in child.stdout.split()[-2:])
    print(f"{name:<34}{predicted:>12.2f}{measured_gb:>12.2f}{predicted / measured_gb:>12.2f}{time.time() - start:>8.0f} s", flush=True)
    return predicted / measured_gb


def predictions() -> None:
    """Print the predictions in MEMORY.md (the default recipe and codes on one accelerator) and infra/HARDWARE.md (several)."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from acip.calibration.memory_plan import predict, predict_streamed
    from acip.recipe import Recipe

    def models() -> Iterator[tuple[str, Any]]:
        for name, (vocabulary, hidden, intermediate, layers, heads, kv_heads) in LLAMAS.items():
            config = LlamaConfig(
                vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
            )  # fmt: skip
            with torch.device("meta"):
                yield name, AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    def table(title: str, columns: dict[str, tuple[Recipe, int]]) -> None:
        print(f"| {title} | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
        for name, model in models():
            memories = [predict(model, recipe, workers=workers) for recipe, workers in columns.values()]
            print(f"| {name} | " + " | ".join(f"{memory.peak / 1e9:.0f} ({memory.worst.name})" for memory in memories) + " |")

    table("predicted GB", {name: (replace(Recipe(), **change), 1) for name, change in CHANGES.items()})
    print()
    sharded = {f"{n} workers": (replace(Recipe(), gradient_checkpointing=True, batch_size=max(4, n)), n) for n in (1, 2, 4, 8)}
    table("predicted GB per worker, gradient checkpointing", sharded)
    print("\n| predicted GB, a block at a time | code | parametrize | scores | measure |\n|---|---|---|---|---|")
    for name, model in models():
        phases = predict_streamed(model, replace(Recipe(), code="both", code_tune_steps=0, post_tune_steps=0, adapter_rank=0), context=2048)
        print(f"| {name} | " + " | ".join(f"{phase.total / 1e9:.0f}" for phase in phases.values()) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only the first {QUICK} recipes")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a ratio is outside the limits")
    parser.add_argument("--predict", action="store_true", help="print predictions for large models and exit")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.predict:
        predictions()
        return 0
    if args.case:
        print(*run(args.case))
        return 0
    print(f"{'GB':<34}{'predicted':>12}{'measured':>12}{'ratio':>12}")
    ratios = [ratio_of(name) for name in list(CASES)[: QUICK if args.quick else None]]
    worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
    print(f"worst ratio of predicted to measured: {worst:.2f} (allowed: {LOW} .. {HIGH})")
    return int(args.check and not LOW <= min(ratios) <= max(ratios) <= HIGH)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
