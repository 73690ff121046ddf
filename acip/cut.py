"""A size -> a rank per layer, exactly and never above what was asked (paper 2.2.3, D.3).

Directions leave in one global order, lowest score first; a size is a prefix of that order removed, so sizes nest. What
is stored after removing n directions is a running sum, and a cut is one binary search in it.

A layer keeps its r >= 1 best directions, and where its adapter sits beside it, the adapter's R too: q = r + R (else q = r).
What it stores depends on its form:

    factors      q (M + N)         two plain factors (the paper)
    pivot        q (M + N - q)     q of its rows, and every other row as a combination of them

Where that would not be smaller than M N, it is the original dense layer, without adapter (the paper's reset rule, D.3;
without it, one dense matrix of the product). The pivot form saves something at every q < K. Biases are always kept.

    convention   counts                                          of
    linear       stored numbers of the target layers             their dense numbers     (default)
    paper        min(MN, r(M + N)), without adapters             their dense numbers     (the paper's tables)
    model        every stored number of the model                the base model's
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, get_args

import torch
from torch import Tensor

from acip.errors import BudgetError
from acip.recipe import Convention, Storage


@dataclass(frozen=True)
class LayerShape:
    """A target layer: y_M = W_MN x_N + b."""

    name: str
    M: int
    N: int
    bias: bool

    @property
    def K(self) -> int:
        return min(self.M, self.N)

    @property
    def dense_params(self) -> int:
        return self.M * self.N + self.M * self.bias

    def dense_from(self, adapter_rows: int, storage: Storage) -> int:
        """The smallest rank that saves nothing."""
        limit = self.K if storage == "pivot" else -(-self.M * self.N // (self.M + self.N))
        return limit - adapter_rows

    def stored_rank(self, adapter_rows: int, storage: Storage, reset: bool) -> int:
        """The largest rank of any size: nobody needs more rows."""
        return max(0, self.dense_from(adapter_rows, storage) - 1) if reset else self.K


@dataclass(frozen=True)
class Cut:
    """A model of one size. `ranks[name]` None = the original dense layer."""

    ranks: Mapping[str, int | None]
    removed: int  # directions removed, of the global order
    asked: float | int
    convention: str
    sizes: Mapping[str, float]  # got, in every convention
    params: int  # every stored number of the model

    @property
    def got(self) -> float | int:
        return self.params if self.convention == "params" else self.sizes[self.convention]


@dataclass(frozen=True)
class Budget:
    """How large a model may be: a ratio in one of the conventions, or an absolute number of parameters."""

    ratio: float | None = None
    convention: Convention = "linear"
    params: int | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.params is None):
            raise BudgetError("a budget is either a size ratio or a number of parameters; give exactly one of them.")
        if self.convention not in get_args(Convention):
            raise BudgetError(f"unknown convention {self.convention!r}; allowed: {', '.join(get_args(Convention))}.")
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise BudgetError(f"size ratio is {self.ratio!r}; it must be a number above 0 and up to 1 (1.0 = the base model).")
        if self.params is not None and (isinstance(self.params, bool) or not isinstance(self.params, int) or self.params < 1):
            raise BudgetError(f"params is {self.params!r}; it must be a whole number of parameters, at least 1.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def stored_params(M: Tensor, N: Tensor, ranks: Tensor, adapter_rows: int, storage: Storage) -> Tensor:
    """Numbers stored by layers [M, N] at `ranks`, biases aside; elementwise on int64 tensors of any device."""
    if storage == "factors":
        return torch.minimum(M * N, (ranks + adapter_rows) * (M + N))
    q = torch.minimum(ranks + adapter_rows, torch.minimum(M, N))
    return q * (M + N - q)


@dataclass(frozen=True)
class CutTable:
    """Everything a cut needs: the layers, the global removal order as layer indices, and what else the model stores.

    `order` [D]: the layer that loses its least important direction, first to leave first.
    """

    layers: tuple[LayerShape, ...]
    order: Tensor
    adapter_rows: int
    rest_params: int  # numbers outside the target layers
    storage: Storage = "pivot"
    reset: bool = True
    _sums: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def _shape(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.tensor([getattr(layer, key) for layer in self.layers]) for key in ("M", "N", "K"))  # type: ignore[return-value]

    def stored(self, adapters: bool = True) -> Tensor:
        """[D + 1] numbers stored by the target layers after removing the first n directions, n = 0 ... D."""
        key = "linear" if adapters else "paper"
        if key not in self._sums:
            M, N, K = self._shape()
            R, storage = (self.adapter_rows, self.storage) if adapters else (0, "factors")
            order = self.order.long()
            # the i-th loss of a layer takes it from rank K - i to K - i - 1
            by_layer = torch.argsort(order, stable=True)
            counts = torch.bincount(order, minlength=len(self.layers))
            starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            nth = torch.empty_like(order)
            nth[by_layer] = torch.arange(len(order)) - starts
            before = K[order] - nth
            after = (before - 1).clamp_min(1)  # the last one stays
            saved = stored_params(M[order], N[order], before, R, storage) - stored_params(M[order], N[order], after, R, storage)
            bias = sum(layer.M for layer in self.layers if layer.bias)
            full = int(stored_params(M, N, K, R, storage).sum()) + bias
            self._sums[key] = torch.cat([torch.tensor([full]), full - saved.cumsum(0)])
        return self._sums[key]

    @property
    def dense_params(self) -> int:
        return sum(layer.dense_params for layer in self.layers)

    def ranks(self, removed: int) -> dict[str, int | None]:
        counts = torch.bincount(self.order[:removed].long(), minlength=len(self.layers)).tolist()
        ranks: dict[str, int | None] = {}
        for layer, lost in zip(self.layers, counts, strict=True):
            rank = max(1, layer.K - lost)
            ranks[layer.name] = None if self.reset and rank >= layer.dense_from(self.adapter_rows, self.storage) else rank
        return ranks

    def cut(self, budget: Budget) -> Cut:
        """The largest model within `budget`: got <= asked, and the next larger one would exceed it."""
        linear = self.stored()
        table = self.stored(adapters=False) if budget.convention == "paper" else linear
        asked: float | int
        convention: str
        if budget.params is not None:
            asked, convention = budget.params, "params"
            allowed = budget.params - self.rest_params
        else:
            assert budget.ratio is not None
            asked, convention = budget.ratio, budget.convention
            # the decimal that was written, not its nearest double: 0.7 of 10 is 7
            exact = Fraction(repr(float(budget.ratio)))
            if convention == "model":
                allowed = int(exact * (self.dense_params + self.rest_params)) - self.rest_params
            else:
                allowed = int(exact * self.dense_params)
        # stored amounts never rise with n: the first n that fits keeps the most directions
        n = int(torch.searchsorted(-table, -allowed))
        if n == len(table):
            raise BudgetError(f"size {asked!r} ({convention}) can't be reached: the smallest is {self._smallest(convention)}.")
        params = int(linear[n]) + self.rest_params
        sizes = {
            "linear": int(linear[n]) / self.dense_params,
            "paper": int(self.stored(adapters=False)[n]) / self.dense_params,
            "model": params / (self.dense_params + self.rest_params),
        }
        return Cut(self.ranks(n), n, asked, convention, sizes, params)

    def _smallest(self, convention: str) -> str:
        least = int(self.stored(adapters=convention != "paper")[-1])
        if convention == "params":
            return f"{least + self.rest_params:,} parameters"
        extra = self.rest_params if convention == "model" else 0
        return f"{(least + extra) / (self.dense_params + extra):.4f}"
