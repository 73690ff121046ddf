"""One number for a whole trade-off curve: the area under its excess loss.

    area = integral over size of (loss(size) - loss(1.0))      nats per token x size ratio; less is better, 0 = nothing is lost

The curve runs straight from one measured size to the next.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from acip.errors import AcipError


def area(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of `rows` with `got` (size) and `loss` (nats per token), one of them the base model's at size 1.0; nan where a loss is."""
    points = sorted((float(row["got"]), float(row["loss"])) for row in rows)
    if not points or points[-1][0] != 1.0:
        raise AcipError("the curve has no row at size 1.0, so the base model's loss is unknown: measure it there too.")
    base = points[-1][1]
    return math.fsum((size_b - size_a) * ((loss_a + loss_b) / 2 - base) for (size_a, loss_a), (size_b, loss_b) in pairwise(points))
