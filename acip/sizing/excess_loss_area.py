"""Summarize a trade-off curve in one number: the area under its excess loss.

excess ^            x
       |        x             integral over size of (loss(size) - loss(1.0)), linear between measured sizes;
       |    x                 nats per token x size ratio. Less is better, 0 = as good as the base model
       +-x------------> 1.0 -> smallest

The area is over sizes of ranks. For a model without ranks, it is over the coded sizes in shares of the base model's bytes; the base model
counts as 1.0.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from acip.errors import BudgetError
from acip.sizing.budget import is_coded


def rows_of_area(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows that the area is computed from: those of ranks, or all if ranks have no size below the base model."""
    over_ranks = [row for row in rows if not is_coded(row)]
    return over_ranks if any(row.get("got") != 1.0 for row in over_ranks) else list(rows)


def excess_loss_area(rows: Sequence[Mapping[str, Any]], smallest: float = 0.0) -> float:
    """Return the area for `rows` with `got` (size) and `loss` (nats per token); nan if a loss is nan.

    One row must be the base model's, at size 1.0; else BudgetError is raised. Sizes below `smallest` are not counted. Areas are
    comparable if the same sizes were measured.
    """
    points = sorted((float(row["got"]), float(row["loss"])) for row in rows_of_area(rows))
    if not points or points[-1][0] != 1.0:
        raise BudgetError("the curve has no row at size 1.0, so the base model's loss is unknown. Measure size 1.0 as well.")
    base, pieces = points[-1][1], []
    for (left, loss_left), (right, loss_right) in pairwise(points):
        if right > smallest:
            start = max(left, smallest)
            loss_start = loss_left + (loss_right - loss_left) * (start - left) / (right - left) if right > left else loss_left
            pieces.append((right - start) * ((loss_start + loss_right) / 2 - base))
    return math.fsum(pieces)
