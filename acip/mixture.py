"""Calibration text from several sources, each with a share of the windows.

    package:wikipedia                                        one source
    [package:wikipedia, chats.jsonl]                         equal shares
    [{source: c4, weight: 3}, {source: self, weight: 1}]     three quarters, and one quarter

A window holds the text of one source. The shares are those of the windows, and so of the tokens, not of the documents.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acip.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """Sources of text (see acip.data) and their weights, as pairs. A source has the share weight / sum of weights."""

    parts: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, data: "str | Mixture | Sequence[Mapping[str, Any]]") -> "Mixture":
        """Return the mixture that `data` describes: one source, a mixture, or `to_json` of one."""
        if isinstance(data, Mixture):
            return data
        if isinstance(data, str):
            return cls(((data, 1.0),))
        return cls(tuple((part["source"], part["weight"]) for part in data))

    @property
    def data(self) -> "str | Mixture":
        """The shortest equal value: the name of the source if there is only one."""
        return self if len(self.parts) > 1 else self.parts[0][0]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(source for source, _ in self.parts)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each source. They sum to 1."""
        total = math.fsum(weight for _, weight in self.parts)
        return tuple(weight / total for _, weight in self.parts)

    def to_json(self) -> str | list[dict[str, Any]]:
        """Return a JSON value, as in a fleet file."""
        return self.parts[0][0] if len(self.parts) == 1 else [{"source": source, "weight": weight} for source, weight in self.parts]

    def __str__(self) -> str:
        """Return a text for people: `package:wikipedia (75 %), self (25 %)`."""
        if len(self.parts) == 1:
            return self.parts[0][0]
        return ", ".join(f"{source} ({100 * share:.3g} %)" for source, share in zip(self.sources, self.shares, strict=True))

    def counts(self, windows: int) -> dict[str, int]:
        """Split a number of windows over the sources by the method of the largest remainder.

        Raises DataError if a source gets no window.
        """
        quotas = [share * windows for share in self.shares]
        counts = [math.floor(quota) for quota in quotas]
        for i in sorted(range(len(counts)), key=lambda i: counts[i] - quotas[i])[: windows - sum(counts)]:
            counts[i] += 1
        if windows and 0 in counts:
            source, weight = self.parts[counts.index(0)]
            raise DataError(f"the weight {weight:g} of {source} is less than one of {windows} windows. Increase it, or remove the source.")
        return dict(zip(self.sources, counts, strict=True))


def interleaved(windows: Sequence[Tensor]) -> Tensor:
    """Return the windows of several sources, [n, T] each, in an order in which every prefix holds about the share of each source.

    In a prefix, the number of windows of a source differs from its share by at most half the number of sources. The windows of one
    source keep their order.
    """
    places = torch.cat([(torch.arange(len(part), dtype=torch.float64) + 0.5) / len(part) for part in windows])
    return torch.cat(list(windows))[places.argsort(stable=True)]
