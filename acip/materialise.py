"""A cut -> a model of that size: resident and switchable in place, or plain and on its own (paper 2.2.3).

`AnySize` holds one copy of every layer's sorted factors, its dense weight, and the adapters at their knots. Changing its
size sets one integer per layer and writes B(size) into the adapter's rows; `materialise` makes a plain transformers
model that shares nothing with it.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from acip.cut import Budget, Cut, CutTable
from acip.linear import ElasticLinear, knot_place
from acip.parametrise import set_module


@dataclass
class AnySize:
    """A resident model of every size. Not thread-safe: whoever generates holds it, and a size lasts until `resize`."""

    model: PreTrainedModel  # with an ElasticLinear in the slot of every target
    table: CutTable
    knots: tuple[float, ...]  # sizes of the stored Bs; () = one B for all sizes
    convention: str  # the knots' sizes count this
    Bs: Mapping[str, Tensor]  # per layer [max(1, knots), R, M], scaled; empty without adapters
    cut: Cut | None = None

    @property
    def layers(self) -> dict[str, ElasticLinear]:
        return {layer.name: self.model.get_submodule(layer.name) for layer in self.table.layers}  # type: ignore[misc]

    def resize(self, budget: Budget | float) -> Cut:
        """Take the largest size within `budget` (a number is a `linear` size ratio). No weights are copied but B's rows."""
        cut = self.table.cut(budget if isinstance(budget, Budget) else Budget(ratio=budget))
        if self.cut is not None and cut.removed == self.cut.removed:
            self.cut = cut
            return cut
        low, high, share = knot_place(cut.sizes[self.convention], self.knots) if self.knots else (0, 0, 0.0)
        for name, layer in self.layers.items():
            rank = cut.ranks[name]
            layer.set_rank(rank)
            if rank is not None and name in self.Bs:
                B = self.Bs[name]
                layer.left[: layer.adapter_rows] = B[low] if share == 0.0 else torch.lerp(B[low], B[high], share)
        self.cut = cut
        return cut

    def materialise(self) -> PreTrainedModel:
        """The present size as a plain model: two plain linear layers, or the dense one, per target."""
        assert self.cut is not None, "resize first"
        skip = {id(layer): layer for layer in self.layers.values()}
        plain: Any = copy.deepcopy(self.model, memo=dict(skip))
        for name, layer in self.layers.items():
            set_module(plain, name, copy.deepcopy(layer.materialise()))
        return plain
