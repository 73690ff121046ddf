"""The trade-off curve of an artifact: one row per size, all measured by one protocol, with further measurements of these sizes."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from acip.calibration.losses import next_token
from acip.errors import BudgetError, EvaluationError
from acip.evaluate.divergence import DivergenceOn, distance
from acip.evaluate.heldout_text import Protocol, Text, content, cut_by, join_ids
from acip.evaluate.measurement import Part, Subject, part_of, size_facts
from acip.evaluate.perplexity import PerplexityOn, lost_windows, mean_and_stderr
from acip.sizing.budget import COMPARABLE_FIELDS, as_perplexity, measured_on
from acip.sizing.cut_table import Budget
from acip.sizing.elastic_model import ElasticModel

Row = dict[str, Any]


@torch.no_grad()
def trade_off(
    any_size: ElasticModel,
    windows: Iterable[Tensor],
    corpus: str,
    sizes: tuple[float, ...],
    stop_ratio: float,
    protocol: Protocol = "packed",
    divergence: DivergenceOn | None = None,
    progress: Callable[[int], None] = lambda windows: None,
    start: Sequence[int] = (),
) -> list[Row]:
    """Measure a model that was calibrated down to `stop_ratio`. Return one row per size, largest first, without unreachable sizes.

    `windows` are [T] token ids each. If `divergence` is given (it names the text), rows also contain the divergence from the base model.
    Every window is read at all sizes before the next one, so that the logits of the base model are computed once per window.
    `progress(windows)` is called after each window. `start` (`Text.start`) is recorded in the rows.

    A loss that is not finite becomes nan in the row, with a warning. Raises EvaluationError if this happens at the largest size.
    """
    facts: dict[float, Row] = {}
    for asked in sorted(sizes, reverse=True):
        try:
            any_size.resize(Budget(ratio=asked))
        except BudgetError:
            continue
        facts[asked] = size_facts(any_size)
    subject, device = Subject(any_size.model, None, any_size), next(any_size.model.parameters()).device
    losses: dict[float, list[float]] = {asked: [] for asked in facts}
    distances: dict[float, list[tuple[float, float]]] = {asked: [] for asked in facts}
    context = done = 0
    for done, window in enumerate(windows, 1):
        ids_1T = window[None].long().to(device)
        context = max(context, ids_1T.shape[1])
        base_TV = None
        if divergence is not None:
            with subject.base() as base:
                base_TV = next_token.logits(base, ids_1T)[0]
        for asked in facts:
            any_size.resize(Budget(ratio=asked))
            logits_1TV = next_token.logits(any_size.model, ids_1T)
            losses[asked].append(float(next_token.loss(logits_1TV, ids_1T)))
            if base_TV is not None:
                distances[asked].append(distance(logits_1TV[0], base_TV))
        progress(done)
    rows = []
    for asked, size in facts.items():
        if lost := lost_windows(losses[asked]):
            if asked == max(facts):
                raise EvaluationError(f"the curve cannot be measured: at size {asked:g}, {lost}. Load the base model in a wider dtype.")
            warnings.warn(f"size {asked:g} has no perplexity: {lost}.", stacklevel=2)
        loss, stderr = (math.nan, math.nan) if lost else mean_and_stderr(losses[asked])
        measured = {"loss": loss, "stderr": stderr, "perplexity": as_perplexity(loss)}
        about = {"corpus": corpus, "protocol": protocol, "context": context, "windows": done, "extrapolated": asked < stop_ratio}
        about |= {"start": join_ids(start)} if start else {}
        parts = {} if divergence is None else {"evaluation": [part_of(divergence, divergence.outcome(distances[asked]))]}
        rows.append({**size, **measured, **about, **parts})
    return rows


def extended(curve: Sequence[Row], rows: Sequence[Row], stop_ratio: float) -> tuple[list[Row], list[float]]:
    """Add `rows` of `evaluate` to a curve. Return (the new curve, the sizes that could not be added).

    Parts of a size that the curve has are added to its row; new parts replace old ones with the same key. Another size becomes a row if its
    perplexity was measured like that of the curve, since losses on other text are not comparable. An empty curve takes the first
    perplexity of the first row as its measure.
    """
    known = {row["got"]: dict(row) for row in curve}
    left_out = []
    for row in sorted(rows, key=lambda row: -row["asked"]):
        if row["got"] not in known:
            common = next((measured_on(known_row) for known_row in known.values()), None)
            measure = _measure(row["evaluation"], common)
            if measure is None:
                left_out.append(row["asked"])
                continue
            facts = {key: value for key, value in row.items() if key != "evaluation"}
            known[row["got"]] = {**facts, **measure, "extrapolated": row["asked"] < stop_ratio}
        place = known[row["got"]]
        parts = {part["key"]: part for part in (*place.get("evaluation", []), *row["evaluation"])}
        place["evaluation"] = list(parts.values())
    return sorted(known.values(), key=lambda row: -row["got"]), left_out


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
    curves: dict[str, list[tuple[float, float, float]]] = {}  # text -> (size, loss, standard error)
    for row in rows:
        parts = [part for part in row.get("evaluation", ()) if part["kind"] == PerplexityOn.kind]
        numbers = {_text_of(part): (part["values"]["loss_nats"], part["values"]["loss_stderr_nats"]) for part in parts}
        if "loss" in row:
            numbers[_text_of(row)] = (row["loss"], row["stderr"])
        for text, (loss, stderr) in numbers.items():
            curves.setdefault(text, []).append((row.get("got", row["asked"]), loss, stderr))
    warnings = []
    for text, curve in curves.items():
        pairs = [(large, small) for large in curve for small in curve if small[0] < large[0] and large[1] - small[1] > small[2]]
        if pairs:
            large, small = max(pairs, key=lambda pair: pair[0][1] - pair[1][1])
            larger_perplexity, perplexity = as_perplexity(large[1]), as_perplexity(small[1])
            warnings.append(
                f"Warning: size {small[0]:.2f} has perplexity {perplexity:.2f}, below the {larger_perplexity:.2f} of the larger size "
                f"{large[0]:.2f} by more than its standard error ({perplexity * small[2]:.2f}), on {text}. A smaller size should not "
                "be better. Check the start token, the dtype and the text; fine-tuning at the smaller size may also cause this."
            )
    return warnings


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
