"""Many sizes in one forward pass: each row of a batch at the ranks of its own size.

Rows come in runs of one size, sizes falling. Sizes nest, so in every layer the runs that are dense there come first, and the
ranks of the others fall. A layer multiplies

    dense runs              with its dense weight
    a long run (a prompt)   with the prefix of its own rank: no more work than its size needs
    short runs together     with the prefix of the largest rank among them, what is beyond a row's own rank set to zero: a few
                            rows are bound by reading weights, and one product is faster than many

Ranks are multiplied in whole blocks of directions, and what is too much is zeroed as well: every layer and size has a rank of its
own, and on a CPU oneDNN plans each new shape, which takes several times as long as the product (tests/benchmarks/products.py) and
memory for good. Rows are multiplied in `padded` numbers for the same reason: a group takes as many of its neighbors' rows along as
it lacks, and drops what becomes of them.

The result of a row is that of its size alone, but for the rounding of other shapes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from acip.layers.elastic_linear import ElasticLinear, Group

SHORT = 16  # rows
ROW_BLOCK = 32  # directions
PLANS, PLANS_BYTES = 64, 64 << 20  # that are kept; their masks are rows x directions of every layer


def padded(rows: int) -> int:
    """As many rows as are multiplied: one of few numbers."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


@dataclass(frozen=True)
class Size:
    """A size that rows may have: `removed` directions of the global order, and what is left of each layer (None = dense)."""

    removed: int
    ranks: Mapping[str, int | None]


Runs = tuple[tuple[int, int], ...]  # (removed, rows)


class Mixer:
    """Sets the layers of one resident model to the sizes of the next batch, whose number of rows is `padded`."""

    def __init__(self, layers: Mapping[str, ElasticLinear]) -> None:
        self.layers = layers
        self._plans: OrderedDict[Runs, list[tuple[Group, ...]]] = OrderedDict()
        self._bytes: dict[Runs, int] = {}
        self._now: Runs | None = None

    def set(self, runs: Sequence[tuple[Size, int]]) -> None:
        """The next batch has these runs of rows, sizes falling."""
        key = tuple((size.removed, rows) for size, rows in runs)
        if len(key) == 1:  # one size: however many rows
            key = ((key[0][0], -1),)
        if key == self._now:
            return
        if key not in self._plans:
            ranks = [(size.ranks, 1 if len(key) == 1 else rows) for size, rows in runs]  # a mask of one row is every row's
            self._plans[key] = [_groups([(of[name], rows) for of, rows in ranks], layer) for name, layer in self.layers.items()]
            self._bytes[key] = sum(group.mask.nbytes for groups in self._plans[key] for group in groups if group.mask is not None)
            while len(self._plans) > 1 and (len(self._plans) > PLANS or sum(self._bytes.values()) > PLANS_BYTES):
                del self._bytes[self._plans.popitem(last=False)[0]]
        self._plans.move_to_end(key)
        for layer, groups in zip(self.layers.values(), self._plans[key], strict=True):
            layer.groups = groups
        self._now = key

    def clear(self) -> None:
        """Back to one size for all: the caller sets it."""
        for layer in self.layers.values():
            layer.groups = None
        self._now = None


def _groups(runs: Sequence[tuple[int | None, int]], layer: ElasticLinear) -> tuple[Group, ...]:
    """(rank, rows) of one layer -> what is multiplied together."""
    parted: list[list[tuple[int | None, int]]] = []
    for rank, rows in runs:
        last = parted[-1] if parted else None
        together = last is not None and (
            last[-1][0] == rank or (rank is not None and last[-1][0] is not None and rows <= SHORT and all(n <= SHORT for _, n in last))
        )
        if together and last is not None:
            last.append((rank, rows))
        else:
            parted.append([(rank, rows)])
    groups, start = [], 0
    total = sum(rows for part in parted for _, rows in part)
    for part in parted:
        stop = start + sum(rows for _, rows in part)
        taken = min(padded(stop - start), total)
        first = min(start, total - taken)
        kept, mask = None, None
        if (top := part[0][0]) is not None:
            kept = min(-(-(layer.lead + top) // ROW_BLOCK) * ROW_BLOCK, len(layer.right))
            mask = _mask(part, layer, kept) if any(layer.lead + (rank or 0) < kept for rank, _ in part) else None
            if mask is not None and 1 < len(mask) < taken:
                mask = F.pad(mask, (0, 0, start - first, first + taken - stop))
        groups.append(layer.group(slice(first, first + taken), slice(start - first, stop - first), kept, mask))
        start = stop
    return tuple(groups)


def _mask(part: Sequence[tuple[int | None, int]], layer: ElasticLinear, multiplied: int) -> Tensor:
    """[rows, multiplied] 1 where a row keeps a direction; [1, multiplied] where all keep the same."""
    same = len({rank for rank, _ in part}) == 1  # one row says it for all
    ranks = [part[0][0]] if same else [rank for rank, rows in part for _ in range(rows)]
    kept = torch.tensor([layer.lead + (rank or 0) for rank in ranks], device=layer.left.values.device)
    return (torch.arange(multiplied, device=kept.device) < kept[:, None]).to(layer.left.dtype)
