"""One number for a trade-off curve: the area under its excess loss.

excess ^            x
       |        x             sum over the pieces between measured sizes (trapezoids), from size 0.4 to 1.0;
       |    x                 nats per token x size; 0 = as good as the base model at every size
       +-x------------> 1.0 -> 0.4
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from acip.errors import BudgetError

SMALLEST = 0.4


def area(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of a curve's rows, with their `got` size and `loss` in nats per token: smaller is better.

    Excess is the loss above that of the row of size 1.0, which must be there. Areas compare where the same sizes were asked:
    a curve that ends above 0.4 counts from there.
    """
    points = sorted((float(row["got"]), float(row["loss"])) for row in rows)
    if not points or points[-1][0] != 1.0:
        raise BudgetError("the area under excess loss is relative to the base model: add 1.0 to sizes.")
    base = points[-1][1]
    total = 0.0
    for (left, loss), (right, right_loss) in pairwise(points):
        start = max(left, min(SMALLEST, right))
        if right > left:
            start_loss = loss + (right_loss - loss) * (start - left) / (right - left)
            total += (right - start) * ((start_loss + right_loss) / 2 - base)
    return total
