"""A cut -> a model of that size: resident and switchable in place, or plain and on its own (paper 2.2.3).

`AnySize` holds one copy of every layer's sorted factors, its dense weight, and the adapters at their knots. Changing its
size sets one integer per layer and the adapters' place between their knots; `materialise` makes a plain transformers
model that shares nothing with it.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from acip.cut import Budget, Cut, CutTable
from acip.layers import set_module
from acip.linear import ElasticLinear
from acip.recipe import Recipe
from acip.sizes import set_size


@dataclass
class AnySize:
    """A resident model of every size. Not thread-safe: whoever generates holds it, and a size lasts until `resize`."""

    model: PreTrainedModel  # with an ElasticLinear in the slot of every target
    table: CutTable
    recipe: Recipe
    cut: Cut | None = None

    @property
    def layers(self) -> dict[str, ElasticLinear]:
        return {layer.name: self.model.get_submodule(layer.name) for layer in self.table.layers}  # type: ignore[misc]

    def resize(self, budget: Budget | float) -> Cut:
        """Take the largest size within `budget` (a number is a `linear` size ratio). No weights are copied.

        Bytes and memory are those of the plain model that `materialise` makes; this one always holds every size. BudgetError
        where nothing is within the budget.
        """
        cut = self.table.cut(budget if isinstance(budget, Budget) else Budget(ratio=budget))
        if self.cut is None or cut.removed != self.cut.removed:
            set_size(self.layers, cut, self.recipe)
        self.cut = cut
        return cut

    def materialise(self) -> PreTrainedModel:
        """The present size as a plain model: every target in its smallest form, adapters folded in.

        In the model's own dtype: a cut in 8 or 4 bit counted what a quantiser has yet to make of it.
        """
        assert self.cut is not None, "resize first"
        skip = {id(layer): layer for layer in self.layers.values()}
        plain: Any = copy.deepcopy(self.model, memo=dict(skip))
        for name, layer in self.layers.items():
            set_module(plain, name, copy.deepcopy(layer.materialise(self.table.storage)))
        return plain

    def save_peft(self, folder: str | Path, base: str) -> None:
        """What the adapters add at the present size, in PEFT's own format (alpha / R = 1: the scale is folded in)."""
        tensors: dict[str, Tensor] = {}
        names = [name for name, layer in self.layers.items() if layer.rank is not None]
        for name in names:
            B, A = self.layers[name].correction()
            tensors[f"base_model.model.{name}.lora_A.weight"] = A.to(self.model.dtype).cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = B.to(self.model.dtype).cpu().contiguous()
        q = self.recipe.adapter_rank * (2 if self.recipe.adapter == "factors" else 1)
        config = LoraConfig(r=q, lora_alpha=q, target_modules=names, base_model_name_or_path=base, inference_mode=True)
        config.save_pretrained(str(folder))
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
