"""A cut -> a model of that size: resident and switchable in place, or plain and on its own (paper 2.2.3).

`ElasticModel` holds one copy of every layer's sorted factors, with the adapters folded in, and its dense weight. Changing its
size sets one integer per layer; `materialize` makes a plain transformers model that shares nothing with it.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from acip.layers.linear import ElasticLinear
from acip.modeling_acip import set_module
from acip.sizing.cut_table import Budget, Cut, CutTable
from acip.sizing.model_sizes import set_size


@dataclass
class ElasticModel:
    """A resident model of every size. Not thread-safe: whoever generates holds it, and a size lasts until `resize`."""

    model: PreTrainedModel  # with an ElasticLinear in the slot of every target
    table: CutTable
    load_missing: Callable[[Mapping[str, ElasticLinear], Mapping[str, int | None]], None] | None = None  # fetches what a size lacks
    cut: Cut | None = None

    @property
    def layers(self) -> dict[str, ElasticLinear]:
        return {layer.name: self.model.get_submodule(layer.name) for layer in self.table.layers}  # type: ignore[misc]

    def resize(self, budget: Budget | float) -> Cut:
        """Take the largest size within `budget` (a number is a `linear` size ratio). No weights are copied;
        what the size needs and is not there yet is fetched.

        Bytes and memory are those of the plain model that `materialize` makes; this one holds what was read. BudgetError
        where nothing is within the budget.
        """
        cut = self.table.cut(budget if isinstance(budget, Budget) else Budget(ratio=budget))
        if self.load_missing is not None:
            self.load_missing(self.layers, cut.ranks)
        if self.cut is None or cut.removed != self.cut.removed:
            set_size(self.layers, cut)
        self.cut = cut
        return cut

    def materialize(self) -> PreTrainedModel:
        """The present size as a plain model: every target in its smallest form, adapters folded in.

        In the model's own dtype: a cut in 8 or 4 bit counted what a quantizer has yet to make of it.
        """
        assert self.cut is not None, "resize first"
        skip: dict[int, Any] = {id(layer): layer for layer in self.layers.values()}
        plain: Any = copy.deepcopy(self.model, memo={**skip, id(self): None})  # a model that knows its AnySize has none in the copy
        for name, layer in self.layers.items():
            set_module(plain, name, copy.deepcopy(layer.materialize(self.table.storage)))
        return plain
