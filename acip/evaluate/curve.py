"""The trade-off curve of an artifact: one row per size, all measured alike; and what else was measured at a size."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from acip.budget import SAME
from acip.cut import Budget
from acip.errors import BudgetError
from acip.evaluate.perplexity import perplexity
from acip.evaluate.rows import size_facts
from acip.evaluate.text import Protocol
from acip.materialise import AnySize

Row = dict[str, Any]


def trade_off(
    any_size: AnySize, windows: Tensor, corpus: str, sizes: tuple[float, ...], stop_ratio: float, protocol: Protocol = "packed"
) -> Iterator[Row]:
    """One row per size, largest first, of a model calibrated down to `stop_ratio`. A size that can't be reached is left out."""
    for asked in sorted(sizes, reverse=True):
        try:
            any_size.resize(Budget(ratio=asked))
        except BudgetError:
            continue
        found = perplexity(any_size.model, windows)
        yield {
            **size_facts(any_size),
            "loss": found.loss,
            "stderr": found.stderr,
            "perplexity": found.perplexity,
            "corpus": corpus,
            "protocol": protocol,
            "context": found.context,
            "windows": found.windows,
            "extrapolated": asked < stop_ratio,
        }


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
            common = next(({key: found.get(key, "packed") for key in SAME} for found in known.values()), None)
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


def _measure(parts: Sequence[Mapping[str, Any]], common: Mapping[str, Any] | None) -> Row | None:
    """What a row of a curve says of its perplexity, from the part that was measured as all of them."""
    for part in parts:
        if part["kind"] == "perplexity" and (common is None or all(part[key] == common[key] for key in SAME)):
            values = part["values"]
            numbers = {"loss": values["loss_nats"], "stderr": values["loss_stderr_nats"], "perplexity": values["perplexity"]}
            return {**numbers, **{key: part[key] for key in SAME}}
    return None
