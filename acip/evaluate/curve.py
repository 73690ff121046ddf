"""The trade-off curve of an artifact: one row per size, all measured by one protocol, with further measurements of these sizes.

The rows of coded sizes have the field `bits_per_weight`, and their `got` is a share of the base model's bytes. All other rows are of
ranks, and their `got` is a `linear` ratio. The two kinds of sizes must not be compared by `got`; `bytes` and `flops` are common to both.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acip.calibration.losses import next_token
from acip.calibration.memory_plan import KEPT_LOGITS_BYTES
from acip.errors import BudgetError, EvaluationError
from acip.evaluate.divergence import DivergenceOn, distance
from acip.evaluate.heldout_text import Protocol, Text, content, cut_by, join_ids
from acip.evaluate.measurement import Part, Subject, part_of, size_facts
from acip.evaluate.perplexity import PerplexityOn, lost_windows, mean_and_stderr, mean_loss
from acip.layers.block_chain import BlockChain
from acip.sizing.budget import COMPARABLE_FIELDS, Budget, as_perplexity, is_coded, measured_on
from acip.sizing.cut_table import CutTable
from acip.sizing.domains import DOMAINS, domain_name
from acip.sizing.elastic_model import ElasticModel
from acip.sizing.model_sizes import set_size

Row = dict[str, Any]
Windows = Mapping[str, Sequence[Tensor]]  # token ids [T] of each domain of text


@dataclass(frozen=True)
class CurveSetup:
    """The settings of a curve: its text, the stop ratio of the calibrated model, and the contents of its rows.

    `windows` of `corpus` are token ids, [T] each, cut by `protocol` with `start` (`Text.start`). If `divergence` is given (it names the
    text), rows also contain the divergence from the base model. With `domains`, which may be empty, rows also contain the divergence and
    the perplexities on each domain (acip.sizing.domains), and on the text of the curve as a domain named after `corpus`. It is not
    measured again if it is in `domains`.
    """

    windows: Sequence[Tensor] | Tensor
    corpus: str
    stop_ratio: float
    protocol: Protocol = "packed"
    start: Sequence[int] = ()
    divergence: DivergenceOn | None = None
    domains: Windows | None = None

    @property
    def own(self) -> str:
        """The name of the text of the curve as a domain."""
        return domain_name(self.corpus)

    @property
    def all_windows(self) -> list[tuple[str, Tensor]]:
        """The name of the domain and the token ids [T] of each window."""
        others = ((name, window) for name, each in (self.domains or {}).items() if name != self.own for window in each)
        return [*((self.own, window) for window in self.windows), *others]

    @property
    def compares(self) -> bool:
        """Whether sizes are compared with the base model."""
        return self.divergence is not None or self.domains is not None

    def row(self, any_size: ElasticModel, budget: Budget, outcomes: "OfDomains", base_losses: "OfDomains", first: bool) -> Row:
        """Return the row of the curve of the present size, which `budget` asked for."""
        assert any_size.cut is not None
        text = outcomes[self.own]
        measured = _measured(text.losses, budget, first)
        extrapolated = budget.asked < self.stop_ratio and not any_size.cut.versions
        facts = measured_by(self.windows, self.corpus, self.protocol, self.start)
        row = {**size_facts(any_size), **measured, **facts, "extrapolated": extrapolated}
        if self.domains is not None:
            row[DOMAINS] = {name: outcome.against(base_losses[name]) for name, outcome in outcomes.items()}
        if self.divergence is not None:
            row["evaluation"] = [part_of(self.divergence, self.divergence.outcome(text.distances))]
        return row


@torch.no_grad()
def trade_off(
    any_size: ElasticModel, sizes: Sequence[Budget | float], setup: CurveSetup, on_row: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Measure a model at several sizes. Return one row per size: those of ranks, largest first, then coded ones.

    A number in `sizes` is a `linear` ratio. Sizes that the model does not have are left out, and so are coded sizes with the same codes as
    a smaller one. `on_row(row)` is called after each size, while the model has that size.

    Every window is read at all sizes of ranks before the next one, so that the base model reads it once. Coded sizes follow one after the
    other, because a coded model is slow to load. For them, the logits of the base model are kept up to `KEPT_LOGITS_BYTES`.

    A loss that is not finite becomes nan in the row, with a warning. Raises EvaluationError if this happens at the first size.
    """
    passes = _passes(any_size.table, sizes)
    device = next(any_size.model.parameters()).device
    base = _BaseLogits(Subject(any_size.model, None, any_size), KEPT_LOGITS_BYTES if len(passes) > 1 else 0)
    base_losses: OfDomains = defaultdict(Outcomes)
    rows: list[Row] = []
    for together in passes:
        outcomes: list[OfDomains] = [defaultdict(Outcomes) for _ in together]
        for number, (domain, window) in enumerate(setup.all_windows):
            ids_1T = window[None].long().to(device)
            base_TV = base.read(number, ids_1T) if setup.compares else None
            if base_TV is not None and setup.domains is not None and not rows:
                base_losses[domain].add(base_TV, None, ids_1T[0])
            for budget, outcome in zip(together, outcomes, strict=True):
                any_size.resize(budget)
                outcome[domain].add(next_token.logits(any_size.model, ids_1T)[0], base_TV, ids_1T[0])
        for budget, outcome in zip(together, outcomes, strict=True):
            any_size.resize(budget)
            rows.append(setup.row(any_size, budget, outcome, base_losses, first=not rows))
            on_row(rows[-1])
    return rows


@torch.no_grad()
def streamed_trade_off(
    any_size: ElasticModel,
    sizes: Sequence[Budget | float],
    setup: CurveSetup,
    hidden_bytes: float = 2**30,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Return the rows of `trade_off`, with the weights of one block in memory at a time. `any_size` is that of `Artifact.unloaded`.

    A block is loaded in all sizes, one after the other, for as many windows as have at most `hidden_bytes` of hidden states. `progress`
    counts blocks. Raises BaseModelError if the model can't be run a block at a time.
    """
    chain, table = BlockChain(any_size.model), any_size.table
    device = next(chain.outside()).device
    budgets = [budget for together in _passes(table, sizes) for budget in together]
    cuts = [table.base, *map(table.cut, budgets)]  # the base model, then every size
    base_losses: OfDomains = defaultdict(Outcomes)
    outcomes: list[OfDomains] = [defaultdict(Outcomes) for _ in budgets]
    read = [(domain, window[None].long().to(device)) for domain, window in setup.all_windows]
    longest = max((ids_1T for _, ids_1T in read), key=Tensor.numel, default=None)
    parts = _in_parts(read, 1 if longest is None else int(hidden_bytes / (len(cuts) * chain.embed(longest).nbytes)))
    for done, part in enumerate(parts):
        ids = [ids_1T for _, ids_1T in part]
        hidden = [[chain.embed(ids_1T) for ids_1T in ids] for _ in cuts]
        for i, layers in enumerate(chain.parts(any_size.layers)):
            for k, cut in enumerate(cuts):
                any_size.load_missing(layers, cut)  # type: ignore[misc]
                set_size(layers, cut)
                hidden[k] = [chain.block(i, *each) for each in zip(ids, hidden[k], strict=True)]
                for layer in layers.values():
                    layer.forget_versions()
            for layer in layers.values():
                layer.unload()
            progress(done * len(chain) + i + 1, len(parts) * len(chain))
        for (domain, ids_1T), *each in zip(part, *hidden, strict=True):
            base_TV = chain.logits(ids_1T, each[0])[0] if setup.compares else None
            if base_TV is not None and setup.domains is not None:
                base_losses[domain].add(base_TV, None, ids_1T[0])
            for outcome, hidden_1TD in zip(outcomes, each[1:], strict=True):
                outcome[domain].add(chain.logits(ids_1T, hidden_1TD)[0], base_TV, ids_1T[0])
    rows: list[Row] = []
    for budget, cut, outcome in zip(budgets, cuts[1:], outcomes, strict=True):
        any_size.cut = cut
        rows.append(setup.row(any_size, budget, outcome, base_losses, first=not rows))
    return rows


def _in_parts(read: list[tuple[str, Tensor]], count: int) -> list[list[tuple[str, Tensor]]]:
    """Return `read` in lists of `count`, or of one."""
    count = max(1, count)
    return [read[i : i + count] for i in range(0, len(read), count)]


class Outcomes:
    """The losses of a size on each window of a text, and its distances from the base model."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.distances: list[tuple[float, float]] = []
        self.tokens: list[int] = []

    def add(self, logits_TV: Tensor, base_TV: Tensor | None, ids_T: Tensor) -> None:
        """Add a window from the logits of the size and of the base model (None = no distance)."""
        self.losses.append(mean_loss(logits_TV, ids_T))
        self.tokens.append(len(ids_T))
        if base_TV is not None:
            self.distances.append(distance(logits_TV, base_TV))

    @property
    def perplexity(self) -> float:
        """The perplexity. Every token has the same weight, since windows of a domain may differ in length."""
        return as_perplexity(float(np.average(self.losses, weights=[tokens - 1 for tokens in self.tokens])))

    def against(self, base: "Outcomes") -> Row:
        """Return the entry of a domain in a row (acip.sizing.domains). `base` holds the losses of the base model."""
        kl, same = map(float, np.average(self.distances, axis=0, weights=self.tokens))
        perplexities = {"ppl": self.perplexity, "base_ppl": base.perplexity}
        return {"kl_nats": kl, "same_top_share": same, **perplexities, "windows": len(self.tokens), "tokens": sum(self.tokens)}


OfDomains = defaultdict[str, Outcomes]  # by the name of the domain


def measured_by(windows: Sequence[Tensor] | Tensor, corpus: str, protocol: Protocol, start: Sequence[int]) -> Row:
    """Return the fields of a row that state how it was measured."""
    about = {"corpus": corpus, "protocol": protocol, "context": max(map(len, windows), default=0), "windows": len(windows)}
    return about | ({"start": join_ids(start)} if start else {})


def _passes(table: CutTable, sizes: Sequence[Budget | float]) -> list[list[Budget]]:
    """Return the sizes that the model has in the groups in which they are measured: all sizes of ranks, then every coded size alone."""
    ranks: list[Budget] = []
    coded: dict[tuple[int, int], Budget] = {}
    budgets = (size if isinstance(size, Budget) else Budget(ratio=size) for size in sizes)
    for budget in sorted(budgets, key=lambda budget: -budget.asked):
        try:
            cut = table.cut(budget)
        except BudgetError:
            continue
        if cut.versions is not None:
            coded[cut.key] = budget
        elif table.byte_sizes is None or not budget.in_bytes:  # else the base model, which a ratio of 1.0 asks for
            ranks.append(budget)
    return [group for group in (ranks, *([budget] for budget in coded.values())) if group]


class _BaseLogits:
    """The logits of the base model on each window, of which the first `keep_bytes` are kept."""

    def __init__(self, subject: Subject, keep_bytes: int) -> None:
        self.subject, self.free_bytes = subject, keep_bytes
        self.kept: dict[int, Tensor] = {}

    def read(self, number: int, ids_1T: Tensor) -> Tensor:
        """Return the logits [T, V] on window `number`."""
        if number in self.kept:
            return self.kept[number]
        with self.subject.base() as base:
            logits_TV = next_token.logits(base, ids_1T)[0]
        if logits_TV.nbytes <= self.free_bytes:
            self.kept[number] = logits_TV
            self.free_bytes -= logits_TV.nbytes
        return logits_TV


def _measured(losses: list[float], budget: Budget, first: bool) -> Row:
    """Return loss, standard error and perplexity of the losses of all windows."""
    if lost := lost_windows(losses):
        if first:
            raise EvaluationError(f"the curve cannot be measured: at size {budget.asked:g}, {lost}. Load the base model in a wider dtype.")
        warnings.warn(f"size {budget.asked:g} has no perplexity: {lost}.", stacklevel=3)
        return {"loss": math.nan, "stderr": math.nan, "perplexity": math.nan}
    loss, stderr = mean_and_stderr(losses)
    return {"loss": loss, "stderr": stderr, "perplexity": as_perplexity(loss)}


def extended(curve: Sequence[Row], rows: Sequence[Row], stop_ratio: float) -> tuple[list[Row], list[float]]:
    """Add `rows` of `evaluate` to a curve. Return (the new curve, the sizes that could not be added).

    Parts and domains of a size that the curve has are added to its row; new parts replace old ones with the same key, and new domains
    those with the same name. Another size becomes a row if its perplexity was measured like that of the curve, since losses on other text
    are not comparable. An empty curve takes the first perplexity of the first row as its measure.
    """
    known = {place_of(row): dict(row) for row in curve}
    left_out = []
    for row in sorted(rows, key=lambda row: -row["asked"]):
        if place_of(row) not in known:
            common = next((measured_on(known_row) for known_row in known.values()), None)
            measure = _measure(row["evaluation"], common)
            if measure is None:
                left_out.append(row["asked"])
                continue
            facts = {key: value for key, value in row.items() if key != "evaluation"}
            known[place_of(row)] = {**facts, **measure, "extrapolated": row["asked"] < stop_ratio and not is_coded(row)}
        place = known[place_of(row)]
        parts = {part["key"]: part for part in (*place.get("evaluation", []), *row["evaluation"])}
        place["evaluation"] = list(parts.values())
        if found := {name: each for part in row["evaluation"] for name, each in part.get(DOMAINS, {}).items()}:
            place[DOMAINS] = place.get(DOMAINS, {}) | found
    return sorted(known.values(), key=place_of), left_out


def place_of(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Return what identifies the size of a row in its curve. In the order of these places, sizes of ranks come first, the largest first."""
    return is_coded(row), -row["got"]


def divergence_of(row: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the divergence from the base model in a row of a curve, measured on the text of the row; {} if there is none."""
    parts = (part for part in row.get("evaluation", ()) if part["kind"] == DivergenceOn.kind and measured_on(part) == measured_on(row))
    return next((part["values"] for part in parts), {})


def recorded(row: Mapping[str, Any]) -> dict[str, Part]:
    """Return the parts of a row of a curve by key, including its perplexity in the form that `evaluate` returns."""
    parts = {part["key"]: part for part in row.get("evaluation", ())}
    start = tuple(map(int, row.get("start", "").split()))
    text = Text(row["corpus"], row.get("protocol", "packed"), row["context"], row["windows"], row.get("split", "heldout"), start)
    if not content(text.source):  # not for a local file: its text may have changed
        on = PerplexityOn(text)
        values = {"perplexity": row["perplexity"], "loss_nats": row["loss"], "loss_stderr_nats": row["stderr"]}
        parts.setdefault(on.key, part_of(on, {**on.facts(row["windows"]), "values": values, "seconds": 0.0}))
    return parts


def improbable(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a warning per text on which a size has a lower loss than a larger size, by more than its standard error.

    `rows` are rows of a curve or of `evaluate`. If this holds for several pairs of sizes, the warning names the largest difference.
    """
    curves: dict[tuple[str, str], list[tuple[float, float, float]]] = {}  # (text, kind of size) -> (size, loss, standard error)
    for row in rows:
        parts = [part for part in row.get("evaluation", ()) if part["kind"] == PerplexityOn.kind]
        numbers = {_text_of(part): (part["values"]["loss_nats"], part["values"]["loss_stderr_nats"]) for part in parts}
        if "loss" in row:
            numbers[_text_of(row)] = (row["loss"], row["stderr"])
        for text, (loss, stderr) in numbers.items():
            kind = " of the bytes" if is_coded(row) else ""
            curves.setdefault((text, kind), []).append((row.get("got", row["asked"]), loss, stderr))
    found = []
    for (text, kind), curve in curves.items():
        pairs = [(large, small) for large in curve for small in curve if small[0] < large[0] and large[1] - small[1] > small[2]]
        if pairs:
            large, small = max(pairs, key=lambda pair: pair[0][1] - pair[1][1])
            larger_perplexity, perplexity = as_perplexity(large[1]), as_perplexity(small[1])
            found.append(
                f"Warning: size {small[0]:.2f}{kind} has perplexity {perplexity:.2f}, below the {larger_perplexity:.2f} of the larger size "
                f"{large[0]:.2f}{kind} by more than its standard error ({perplexity * small[2]:.2f}), on {text}. A smaller size should not "
                "be better. Check the start token, the dtype and the text; fine-tuning at the smaller size may also cause this."
            )
    return found


def _text_of(row: Mapping[str, Any]) -> str:
    """Describe the text and the protocol of a row or a part."""
    whole = "held out" if row.get("split", "heldout") == "heldout" else "all documents"
    return f"{row['corpus']}, {whole}, {row['windows']} x {row['context']} tokens, {cut_by(row)}"


def _measure(parts: Sequence[Mapping[str, Any]], common: Mapping[str, Any] | None) -> Row | None:
    """Return the fields of a curve's row from the first perplexity part that was measured like `common` (None = any), or None."""
    for part in parts:
        if part["kind"] == "perplexity" and common in (None, measured_on(part)):
            values = part["values"]
            numbers = {"loss": values["loss_nats"], "stderr": values["loss_stderr_nats"], "perplexity": values["perplexity"]}
            return {**numbers, **{key: part[key] for key in COMPARABLE_FIELDS if key in part}}
    return None
