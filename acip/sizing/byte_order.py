"""For any number of bytes, the version of each layer: one order of steps, of which a size is a prefix.

Every layer has versions from coarse to fine, with their bytes and their predicted loss. A step replaces a version by a finer one. The steps
of a layer are those of the lower convex hull of its loss over bytes; all steps are sorted by the loss that they save per byte. After any
number of steps, no other choice of hull versions with as many bytes has a lower sum of losses.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import pairwise

from acip.errors import BudgetError


@dataclass(frozen=True)
class Version:
    """A layer as coded once."""

    bytes: int  # on disk
    loss: float  # predicted, in nats per token


@dataclass(frozen=True)
class Step:
    """Read layer `name` in version `version` instead of a coarser one."""

    name: str
    version: int
    bytes: int  # more than before
    saved: float  # loss


class ByteOrder:
    """The order of all steps of a model."""

    def __init__(self, versions: Mapping[str, Sequence[Version]]) -> None:
        """`versions[name]` are the versions of a layer, from the fewest bytes to the most."""
        self.versions = {name: tuple(each) for name, each in versions.items()}
        hulls = {name: hull(each) for name, each in versions.items()}
        steps = [
            [
                Step(
                    name,
                    finer,
                    versions[name][finer].bytes - versions[name][coarser].bytes,
                    versions[name][coarser].loss - versions[name][finer].loss,
                )
                for coarser, finer in pairwise(kept)
            ]
            for name, kept in hulls.items()
        ]
        self.first = {name: kept[0] for name, kept in hulls.items()}
        # a merge, not a sort: rounding may swap almost equal savings of a layer, whose steps must keep their order
        self.steps = list(merge(*steps, key=lambda step: -step.saved / step.bytes))  # equal steps in the order of the layers
        self.totals = [sum(versions[name][first].bytes for name, first in self.first.items())]  # bytes after 0, 1, ... steps
        self.losses = [sum(versions[name][first].loss for name, first in self.first.items())]
        for step in self.steps:
            self.totals.append(self.totals[-1] + step.bytes)
            self.losses.append(self.losses[-1] - step.saved)

    def within(self, limit: int) -> int:
        """Return the largest number of steps whose total is at most `limit` bytes. Raises BudgetError if even the coarsest is larger."""
        if limit < self.totals[0]:
            raise BudgetError(f"{limit:,} bytes are too few: the coarsest version of all layers takes {self.totals[0]:,} bytes.")
        return bisect_right(self.totals, limit) - 1

    def at(self, count: int) -> dict[str, int]:
        """Return the version of each layer after `count` steps."""
        return self.first | {step.name: step.version for step in self.steps[:count]}


def hull(versions: Sequence[Version]) -> list[int]:
    """Return the indices of the lower convex hull of loss over bytes, from the fewest bytes on, as long as the loss falls."""
    start = min(range(len(versions)), key=lambda i: (versions[i].bytes, versions[i].loss))
    kept = [start]
    while True:
        last = versions[kept[-1]]
        better = [i for i, each in enumerate(versions) if each.bytes > last.bytes and each.loss < last.loss]
        if not better:
            return kept
        kept.append(max(better, key=lambda i: ((last.loss - versions[i].loss) / (versions[i].bytes - last.bytes), -versions[i].bytes)))
