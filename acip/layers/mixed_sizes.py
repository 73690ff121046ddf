"""Compute several sizes in one forward pass, each row of a batch at the ranks of its own size.

The rows of a batch form runs of one size, in order of falling size, ranks before codes. Ranks nest. Therefore, in every layer, the
dense runs come first and the ranks of the following runs fall. A layer multiplies

    dense runs              by its dense weight
    runs of codes           by their version of its codes; neighboring runs of the same version together
    a long run (a prompt)   by the prefix of its own rank, so that it costs no more than its size needs
    short runs together     by the prefix of the largest rank among them, with the directions beyond each row's own rank set to zero:
                            with few rows, reading the weights takes most of the time, and one product is faster than many

Ranks are rounded up to whole blocks of directions, and the excess is set to zero as well. Every layer and size has a different rank,
and on a CPU oneDNN plans each new shape, which takes several times as long as the product (tests/benchmarks/products.py) and
allocates memory permanently. For the same reason the number of rows is rounded up to `padded`: a group includes rows of its
neighbors and discards their results.

Each row's result equals that of its size alone, except for rounding differences between shapes.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from acip.layers.elastic_linear import ElasticLinear, Group

SHORT = 16  # rows of a short run, at most
ROW_BLOCK = 32  # directions; ranks are rounded up to multiples of it
PLANS, PLANS_BYTES = 64, 64 << 20  # limits of the cache of plans; a plan has a mask [rows, directions] per layer


def padded(rows: int) -> int:
    """Return `rows` rounded up to one of a few numbers."""
    if rows == 1:
        return 1
    step = 2 if rows <= 8 else 8 if rows <= 64 else 32
    return -(-rows // step) * step


@dataclass(frozen=True)
class Size:
    """A size: its `key`, which rises with falling size (`Cut.key`), and the form of each layer.

    This is the version of its codes if it is in `versions`, else its rank. None, or no entry, is dense.
    """

    key: tuple[int, int]
    ranks: Mapping[str, int | None]
    versions: Mapping[str, int] | None = None

    def form(self, name: str) -> "Form":
        """Return the form of a layer."""
        return (self.versions or {}).get(name), self.ranks.get(name)


Form = tuple[int | None, int | None]  # version of the codes or None, rank or None
Runs = tuple[tuple[tuple[int, int], int], ...]  # (key of the size, rows)


class Mixer:
    """Set the layers of one resident model to the sizes of the next batch. The number of rows of a batch is a `padded` one."""

    def __init__(self, layers: Mapping[str, ElasticLinear]) -> None:
        self.layers = layers
        self._plans: OrderedDict[Runs, list[tuple[Group, ...]]] = OrderedDict()
        self._bytes: dict[Runs, int] = {}
        self._now: Runs | None = None
        self._lock = threading.Lock()  # `keep` is called from other threads

    def set(self, runs: Sequence[tuple[Size, int]]) -> None:
        """Prepare the layers for a batch with these runs of rows, in order of falling size."""
        key = tuple((size.key, rows) for size, rows in runs)
        if len(key) == 1:  # one size: the number of rows does not matter
            key = ((key[0][0], -1),)
        with self._lock:
            if key != self._now:
                self._set(key, runs)

    def _set(self, key: Runs, runs: Sequence[tuple[Size, int]]) -> None:
        if key not in self._plans:
            sizes = [(size, 1 if len(key) == 1 else rows) for size, rows in runs]  # one row of a mask is broadcast to all rows
            self._plans[key] = [_groups([(size.form(name), rows) for size, rows in sizes], layer) for name, layer in self.layers.items()]
            self._bytes[key] = sum(group.mask.nbytes for groups in self._plans[key] for group in groups if group.mask is not None)
            while len(self._plans) > 1 and (len(self._plans) > PLANS or sum(self._bytes.values()) > PLANS_BYTES):
                del self._bytes[self._plans.popitem(last=False)[0]]
        self._plans.move_to_end(key)
        for layer, groups in zip(self.layers.values(), self._plans[key], strict=True):
            layer.groups = groups
        self._now = key

    def keep(self, sizes: Collection[tuple[int, int]]) -> None:
        """Drop the plans of all other sizes, given by their keys: plans hold weights in memory. No batch may be running with others."""
        with self._lock:
            for runs in [runs for runs in self._plans if any(key not in sizes for key, _ in runs)]:
                del self._plans[runs], self._bytes[runs]
            if self._now is not None and any(key not in sizes for key, _ in self._now):
                self._clear()

    def clear(self) -> None:
        """Return to one size for all rows. The caller must set it afterwards."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        for layer in self.layers.values():
            layer.groups = None
        self._now = None


def _groups(runs: Sequence[tuple[Form, int]], layer: ElasticLinear) -> tuple[Group, ...]:
    """Return the groups of one layer for runs of (form, rows)."""
    parts: list[list[tuple[Form, int]]] = []
    for form, rows in runs:
        last = parts[-1] if parts else None
        together = last is not None and (
            last[-1][0] == form or (_is_rank(form) and _is_rank(last[-1][0]) and rows <= SHORT and all(n <= SHORT for _, n in last))
        )
        if together and last is not None:
            last.append((form, rows))
        else:
            parts.append([(form, rows)])
    groups, start = [], 0
    total = sum(rows for part in parts for _, rows in part)
    for part in parts:
        stop = start + sum(rows for _, rows in part)
        taken = min(padded(stop - start), total)
        first = min(start, total - taken)
        kept, mask = None, None
        version, top = part[0][0]
        if version is None and top is not None:
            kept = min(-(-(layer.lead + top) // ROW_BLOCK) * ROW_BLOCK, len(layer.right))
            ranks = [(rank or 0, rows) for (_, rank), rows in part]
            mask = _mask(ranks, layer, kept) if any(layer.lead + rank < kept for rank, _ in ranks) else None
            if mask is not None and 1 < len(mask) < taken:
                mask = F.pad(mask, (0, 0, start - first, first + taken - stop))
        groups.append(layer.group(slice(first, first + taken), slice(start - first, stop - first), kept, mask, version))
        start = stop
    return tuple(groups)


def _is_rank(form: Form) -> bool:
    """Return whether a layer of this form is multiplied by a prefix of its directions."""
    version, rank = form
    return version is None and rank is not None


def _mask(part: Sequence[tuple[int, int]], layer: ElasticLinear, multiplied: int) -> Tensor:
    """Return [rows, multiplied], 1 where a row keeps a direction; [1, multiplied] if all rows keep the same. `part` has (rank, rows)."""
    same = len({rank for rank, _ in part}) == 1  # one row of the mask suffices
    ranks = [part[0][0]] if same else [rank for rank, rows in part for _ in range(rows)]
    kept = torch.tensor([layer.lead + rank for rank in ranks], device=layer.left.values.device)
    return (torch.arange(multiplied, device=kept.device) < kept[:, None]).to(layer.left.dtype)
