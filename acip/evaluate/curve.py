"""The trade-off curve of an artifact: one row per size, all measured alike; and what else was measured at a size."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from acip.calibration.losses import next_token
from acip.errors import BudgetError, EvaluationError
from acip.evaluate.divergence import DivergenceOn, distance
from acip.evaluate.heldout_text import Protocol, Text, content, cut_by, said
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
    told: Callable[[int], None] = lambda windows: None,
    start: Sequence[int] = (),
) -> list[Row]:
    """One row per size, largest first, of a model calibrated down to `stop_ratio`. A size that can't be reached is left out.
    A loss that is not finite is a row's nan, with a warning; of the largest size, it is an EvaluationError.

    `windows` [T] each. A row's evaluation holds the distance from the base model, where `divergence`, which names the text, asks for
    it: its logits are computed once for all sizes, so a window is read by all of them before the next one. `told` hears how many were.
    `start` is what each window begins with (`Text.start`), to be said in the rows.
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
        theirs_TV = None
        if divergence is not None:
            with subject.base() as base:
                theirs_TV = next_token.logits(base, ids_1T)[0]
        for asked in facts:
            any_size.resize(Budget(ratio=asked))
            ours_1TV = next_token.logits(any_size.model, ids_1T)
            losses[asked].append(float(next_token.loss(ours_1TV, ids_1T)))
            if theirs_TV is not None:
                distances[asked].append(distance(ours_1TV[0], theirs_TV))
        told(done)
    rows = []
    for asked, size in facts.items():
        if lost := lost_windows(losses[asked]):
            if asked == max(facts):
                raise EvaluationError(f"there is no curve: at size {asked:g} {lost}. Load the base model in a wider dtype.")
            warnings.warn(f"size {asked:g} has no perplexity: {lost}.", stacklevel=2)
        loss, stderr = (math.nan, math.nan) if lost else mean_and_stderr(losses[asked])
        measured = {"loss": loss, "stderr": stderr, "perplexity": as_perplexity(loss)}
        about = {"corpus": corpus, "protocol": protocol, "context": context, "windows": done, "extrapolated": asked < stop_ratio}
        about |= {"start": said(start)} if start else {}
        parts = {} if divergence is None else {"evaluation": [part_of(divergence, divergence.outcome(distances[asked]))]}
        rows.append({**size, **measured, **about, **parts})
    return rows


def extended(curve: Sequence[Row], rows: Sequence[Row], stop_ratio: float) -> tuple[list[Row], list[float]]:
    """(the curve with what `rows` of `evaluate` measured, the sizes that it has no place for).

    What is measured at a size of the curve goes beside it, newer parts in the place of older ones. Another size becomes a row if its
    perplexity was measured as the curve's: losses of other text would make the curve lie. Where there is no curve yet, the first
    row's first perplexity founds it.
    """
    known = {row["got"]: dict(row) for row in curve}
    left_out = []
    for row in sorted(rows, key=lambda row: -row["asked"]):
        if row["got"] not in known:
            common = next((measured_on(found) for found in known.values()), None)
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
    """The parts that a row of a curve holds, by key; its perplexity, too, as if `evaluate` had measured it."""
    parts = {part["key"]: part for part in row.get("evaluation", ())}
    start = tuple(map(int, row.get("start", "").split()))
    text = Text(row["corpus"], row.get("protocol", "packed"), row["context"], row["windows"], row.get("split", "heldout"), start)
    if not content(text.source):  # the text of a local file may be another by now
        on = PerplexityOn(text)
        values = {"perplexity": row["perplexity"], "loss_nats": row["loss"], "loss_stderr_nats": row["stderr"]}
        parts.setdefault(on.key, part_of(on, {**on.facts(row["windows"]), "values": values, "seconds": 0.0}))
    return parts


def improbable(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A warning for each text on which a size has a lower loss than a larger one, by more than its standard error.

    `rows` are those of a curve or of `evaluate`. Of several sizes it names the one with the largest difference.
    """
    found: dict[str, list[tuple[float, float, float]]] = {}  # by the text: (size, loss, standard error)
    for row in rows:
        parts = [part for part in row.get("evaluation", ()) if part["kind"] == PerplexityOn.kind]
        numbers = {_words(part): (part["values"]["loss_nats"], part["values"]["loss_stderr_nats"]) for part in parts}
        if "loss" in row:
            numbers[_words(row)] = (row["loss"], row["stderr"])
        for text, (loss, stderr) in numbers.items():
            found.setdefault(text, []).append((row.get("got", row["asked"]), loss, stderr))
    warnings = []
    for text, curve in found.items():
        pairs = [(large, small) for large in curve for small in curve if small[0] < large[0] and large[1] - small[1] > small[2]]
        if pairs:
            large, small = max(pairs, key=lambda pair: pair[0][1] - pair[1][1])
            theirs, ours = as_perplexity(large[1]), as_perplexity(small[1])
            warnings.append(
                f"Warning: size {small[0]:.2f} has perplexity {ours:.2f}, below the {theirs:.2f} of the larger size {large[0]:.2f} by more "
                f"than its standard error ({ours * small[2]:.2f}), on {text}. A smaller size should not be better: the model may be fed "
                "other than it is used (its start token, its dtype, this text), or it was fine-tuned at the smaller size."
            )
    return warnings


def _words(row: Mapping[str, Any]) -> str:
    whole = "held out" if row.get("split", "heldout") == "heldout" else "all of it"
    return f"{row['corpus']}, {whole}, {row['windows']} x {row['context']} tokens, {cut_by(row)}"


def _measure(parts: Sequence[Mapping[str, Any]], common: Mapping[str, Any] | None) -> Row | None:
    """What a row of a curve says of its perplexity, from the part that was measured as all of them."""
    for part in parts:
        if part["kind"] == "perplexity" and common in (None, measured_on(part)):
            values = part["values"]
            numbers = {"loss": values["loss_nats"], "stderr": values["loss_stderr_nats"], "perplexity": values["perplexity"]}
            return {**numbers, **{key: part[key] for key in COMPARABLE_FIELDS if key in part}}
    return None
