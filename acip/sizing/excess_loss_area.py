"""One number for a trade-off curve: the area under its excess loss.

excess ^            x
       |        x             integral over size of (loss(size) - loss(1.0)), the curve running straight from one measured size
       |    x                 to the next; nats per token x size ratio. Less is better, 0 = as good as the base model
       +-x------------> 1.0 -> smallest
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from acip.errors import BudgetError


def excess_loss_area(rows: Sequence[Mapping[str, Any]], smallest: float = 0.0) -> float:
    """Of `rows` with `got` (size) and `loss` (nats per token), one of them the base model's at size 1.0; nan where a loss is.

    Sizes below `smallest` don't count. Areas compare where the same sizes were measured.
    """
    points = sorted((float(row["got"]), float(row["loss"])) for row in rows)
    if not points or points[-1][0] != 1.0:
        raise BudgetError("the curve has no row at size 1.0, so the base model's loss is unknown: measure it there too.")
    base, pieces = points[-1][1], []
    for (left, loss_left), (right, loss_right) in pairwise(points):
        if right > smallest:
            start = max(left, smallest)
            loss_start = loss_left + (loss_right - loss_left) * (start - left) / (right - left) if right > left else loss_left
            pieces.append((right - start) * ((loss_start + loss_right) / 2 - base))
    return math.fsum(pieces)
