"""A model that changes its size in place, and plain models of one size (paper 2.2.3).

`ElasticModel` holds one copy of every layer's dense weight and sorted factors, with the adapters folded in. Changing the size sets one
integer per layer. Of coded layers, it holds the versions of the present size; another size reads the versions that differ.
`materialize` returns a plain transformers model that shares no memory with it.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from acip.layers.elastic_linear import ElasticLinear
from acip.modeling_acip import set_module
from acip.sizing.budget import Budget
from acip.sizing.cut_table import Cut, CutTable
from acip.sizing.model_sizes import set_size


@dataclass
class ElasticModel:
    """A resident model of every size. It is not thread-safe: hold a lock while generating. A size lasts until the next `resize`."""

    model: PreTrainedModel  # with an ElasticLinear in the place of every target layer
    table: CutTable
    load_missing: Callable[[Mapping[str, ElasticLinear], Cut], None] | None = None  # loads what a size needs
    cut: Cut | None = None

    @property
    def layers(self) -> dict[str, ElasticLinear]:
        return {layer.name: self.model.get_submodule(layer.name) for layer in self.table.layers}  # type: ignore[misc]

    def resize(self, budget: Budget | float | str) -> Cut:
        """Set the largest size within `budget`. A ratio counts bytes if the model has codes, else numbers (`CutTable.budget`).

        No weights are copied. Weights that the size needs and that are not loaded yet are loaded. Budgets of bytes and memory refer
        to the plain model that `materialize` returns; this model keeps the factors and dense weights that it has loaded, and the codes
        of the present size. Raises BudgetError if no size is within the budget.
        """
        cut = self.table.cut(self.table.budget(budget))
        if self.load_missing is not None:
            self.load_missing(self.layers, cut)
        if self.cut is None or (cut.ranks, cut.versions) != (self.cut.ranks, self.cut.versions):
            set_size(self.layers, cut)
            for layer in self.layers.values():
                layer.forget_versions()
        self.cut = cut
        return cut

    def load_base(self) -> None:
        """Load the dense weights that are not loaded yet. The size does not change."""
        if self.load_missing is not None:
            self.load_missing(self.layers, self.table.base)

    def materialize(self) -> PreTrainedModel:
        """Return the current size as a plain model: every target layer in its smallest form, with adapters folded in, or coded.

        The result is in the model's dtype, even if the cut counted 8 or 4 bit; quantization is a separate step.
        """
        assert self.cut is not None, "resize first"
        skip: dict[int, Any] = {id(layer): layer for layer in self.layers.values()}
        skip[id(self)] = None  # a reference from the model to this object becomes None in the copy
        plain: Any = copy.deepcopy(self.model, memo=skip)
        for name, layer in self.layers.items():
            set_module(plain, name, copy.deepcopy(layer.materialize(self.table.storage)))
        return plain
