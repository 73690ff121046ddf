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

Bytes are those of the tensors that a materialized model saves, a tied one once:

    target layers' matrices   each row of n numbers: n in the model's dtype; n + 4 in 8 bit (a float32 scale);
                              36 per 64 numbers or part of them in 4 bit (a float32 absmax)
    pivot form                8 M more: the place of each row, int64
    biases, everything else   as they are

So the pivot form at q near K holds more bytes than the dense layer, and bytes may rise where a direction leaves. A cut is the
first size, from the largest, that is within its budget.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from acip.errors import BudgetError
from acip.modeling_acip import QUANT_BLOCK
from acip.recipe import Storage
from acip.sizing.budget import ALL_BITS, MEGA, UNITS, Bits, Budget, Curve, Decoder, as_perplexity, rounded_up

PLACE = 8  # bytes of a row's place in the pivot form


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

    def stored_rank(self, adapter_rows: int, storage: Storage, dense_if_no_saving: bool) -> int:
        """The largest rank of any size: nobody needs more rows."""
        return max(0, self.dense_from(adapter_rows, storage) - 1) if dense_if_no_saving else self.K


@dataclass(frozen=True)
class Cut:
    """A model of one size. `ranks[name]` None = the original dense layer."""

    ranks: Mapping[str, int | None]
    removed: int  # directions removed, of the global order
    asked: float | int
    convention: str  # a ratio's convention, or the budget's kind
    got: float | int  # what `asked` limits
    sizes: Mapping[str, float]  # got, in every convention
    params: int  # every stored number of the model
    bits: Bits | None = None  # what the budget counted the target layers' matrices in
    bytes: int | None = None  # what the model stores in these bits, where the table knows
    predicted: Mapping[str, float] | None = None  # loss (nats per token) and perplexity by the curve, where it was measured

    @property
    def unit(self) -> str:
        return UNITS.get(self.convention, "ratio")


@dataclass(frozen=True)
class Weights:
    """What bytes need to know: bytes per number of each target layer's matrices, and the bytes of everything else, biases too."""

    itemsizes: tuple[int, ...]
    rest: int


def stored_params(M: Tensor, N: Tensor, ranks: Tensor, adapter_rows: int, storage: Storage) -> Tensor:
    """Numbers stored by layers [M, N] at `ranks`, biases aside; elementwise on int64 tensors of any device."""
    if storage == "factors":
        return torch.minimum(M * N, (ranks + adapter_rows) * (M + N))
    q = torch.minimum(ranks + adapter_rows, torch.minimum(M, N))
    return q * (M + N - q)


def stored_bytes(M: Tensor, N: Tensor, ranks: Tensor, adapter_rows: int, storage: Storage, itemsize: Tensor, bits: Bits | None) -> Tensor:
    """Bytes stored by layers [M, N] at `ranks`, biases aside, in the form that `ElasticLinear.materialize` takes; elementwise, int64.

    In 8 and 4 bit that is factors (`acip.export.quantization`).
    """

    def matrix(rows: Tensor, columns: Tensor) -> Tensor:
        if bits == 8:
            return rows * (columns + 4)
        if bits == 4:
            return rows * ((columns + QUANT_BLOCK - 1) // QUANT_BLOCK) * (QUANT_BLOCK // 2 + 4)
        return rows * columns * itemsize

    q, dense = ranks + adapter_rows, matrix(M, N)
    if storage == "factors" or bits is not None:
        return torch.where(q * (M + N) >= M * N, dense, matrix(M, q) + matrix(q, N))
    return torch.where(q >= torch.minimum(M, N), dense, matrix(q, N) + matrix(M - q, q) + PLACE * M)


@dataclass(frozen=True)
class CutTable:
    """Everything a cut needs: the layers, the global removal order as layer indices, and what else the model stores.

    `order` [D]: the layer that loses its least important direction, first to leave first. What only some budgets need may be
    missing: they are refused then.
    """

    layers: tuple[LayerShape, ...]
    order: Tensor
    adapter_rows: int
    rest_params: int  # numbers outside the target layers
    storage: Storage = "pivot"
    dense_if_no_saving: bool = True
    weights: Weights | None = None
    decoder: Decoder | None = None
    curve: Curve | None = None
    quantized: Mapping[Bits, Curve] = field(default_factory=dict)  # curves that were measured in these bits
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # running sums, once computed

    def _shape(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.tensor([getattr(layer, key) for layer in self.layers]) for key in ("M", "N", "K"))  # type: ignore[return-value]

    def _departures(self) -> Tensor:
        """[D] rising: i (D + 1) + n for the n-th removal, which takes a direction from layer i."""
        if "departures" not in self._kept:
            by_layer = torch.argsort(self.order, stable=True)
            self._kept["departures"] = by_layer + self.order.long()[by_layer] * (len(self.order) + 1)
        return self._kept["departures"]

    def _lost(self, removed: int) -> Tensor:
        """[L] directions that each layer has lost after `removed` removals."""
        layer = torch.arange(len(self.layers)) * (len(self.order) + 1)
        found = torch.searchsorted(self._departures(), torch.cat([layer, layer + removed]))
        return found[len(layer) :] - found[: len(layer)]

    def _running(self, amounts: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """[D + 1] the sum of `amounts(layer, M, N, rank)` after removing the first n directions, n = 0 ... D."""
        M, N, K = self._shape()
        counts = self._lost(len(self.order))
        layer = torch.repeat_interleave(torch.arange(len(self.layers)), counts)
        nth = torch.arange(len(self.order)) - (counts.cumsum(0) - counts)[layer]
        # the i-th loss of a layer takes it from rank K - i to K - i - 1; the last one stays
        before = K[layer] - nth
        M_D, N_D = M[layer], N[layer]
        saved = amounts(layer, M_D, N_D, before) - amounts(layer, M_D, N_D, (before - 1).clamp_min(1))
        total = torch.empty(len(self.order) + 1, dtype=torch.long)
        total[0] = amounts(torch.arange(len(M)), M, N, K).sum()
        total[1 + self._departures() - layer * (len(self.order) + 1)] = -saved
        return total.cumsum(0)

    def stored(self, adapters: bool = True) -> Tensor:
        """[D + 1] numbers stored by the target layers after removing the first n directions, n = 0 ... D."""
        key = "linear" if adapters else "paper"
        if key not in self._kept:
            R, storage = (self.adapter_rows, self.storage) if adapters else (0, "factors")
            bias = sum(layer.M for layer in self.layers if layer.bias)
            self._kept[key] = self._running(lambda _, M, N, ranks: stored_params(M, N, ranks, R, storage)) + bias
        return self._kept[key]

    def least_bytes(self, bits: Bits | None = None) -> Tensor:
        """[D + 1] the fewest bytes that the target layers' matrices store at any size that lacks at most n directions."""
        key = f"bytes {bits}"
        if key not in self._kept:
            itemsizes = torch.tensor(self._weights.itemsizes)
            self._kept[key] = self._running(
                lambda layer, M, N, ranks: stored_bytes(M, N, ranks, self.adapter_rows, self.storage, itemsizes[layer], bits)
            ).cummin(0).values  # fmt: skip
        return self._kept[key]

    @property
    def _weights(self) -> Weights:
        if self.weights is None:
            raise BudgetError("these layers' bytes are not known before they are saved: ask by ratio or params, or load the artifact.")
        return self.weights

    @property
    def dense_params(self) -> int:
        return sum(layer.dense_params for layer in self.layers)

    def ranks(self, removed: int) -> dict[str, int | None]:
        ranks: dict[str, int | None] = {}
        for layer, lost in zip(self.layers, self._lost(removed).tolist(), strict=True):
            rank = max(1, layer.K - lost)
            ranks[layer.name] = None if self.dense_if_no_saving and rank >= layer.dense_from(self.adapter_rows, self.storage) else rank
        return ranks

    def cut(self, budget: Budget) -> Cut:
        """The largest model within `budget`: got <= asked, and every larger one would exceed it.

        By the curve, the smallest: of those, every smaller one that was measured would exceed it. In the best bits: of the cuts in
        all bits in which a curve was measured, the one that is predicted to lose least; by the curve, that stores the fewest bytes.
        """
        if budget.bits == "best":
            return self._in_best_bits(budget)
        n, got = self._by_curve(budget) if budget.by_curve else self._by_amount(budget)
        linear = int(self.stored()[n])
        params = linear + self.rest_params
        sizes = {
            "linear": linear / self.dense_params,
            "paper": int(self.stored(adapters=False)[n]) / self.dense_params,
            "model": params / (self.dense_params + self.rest_params),
        }
        curve = self._curve(budget.exact_bits)
        loss = curve.loss(sizes["linear"]) if curve else None
        return Cut(
            ranks=self.ranks(n), removed=n, asked=budget.asked, convention=budget.convention if budget.ratio is not None else budget.kind,
            got=got, sizes=sizes, params=params, bits=budget.exact_bits, bytes=self._bytes(n, budget.exact_bits),
            predicted=None if loss is None else {"loss": loss, "perplexity": as_perplexity(loss)},
        )  # fmt: skip

    def _in_best_bits(self, budget: Budget) -> Cut:
        cuts, errors = [], []
        for bits in ALL_BITS:
            if self._curve(bits) is not None:
                try:
                    cuts.append(self.cut(replace(budget, bits=bits)))
                except BudgetError as error:
                    errors.append(error)
        known = [cut for cut in cuts if cut.predicted is not None]
        if not known:
            self._curve_in(budget, None)
            raise errors[-1] if errors else BudgetError(f"within {budget.kind} {budget.asked!r} no curve was measured: give the bits.")
        if budget.by_curve and self._weights:
            return min(known, key=lambda cut: cut.bytes or 0)
        return min(known, key=lambda cut: cut.predicted["loss"] if cut.predicted else 0.0)

    def _curve(self, bits: Bits | None) -> Curve | None:
        return self.curve if bits is None else self.quantized.get(bits)

    def _curve_in(self, budget: Budget, bits: Bits | None) -> Curve:
        if (curve := self._curve(bits)) is None:
            where, measure = ("", "acip.evaluate.trade_off") if bits is None else (f" in {bits} bit", "jobs/evaluate.py --quantize")
            raise BudgetError(f"no curve was measured{where}, so {budget.kind} can't be kept: measure it ({measure}), or ask for a ratio.")
        return curve

    def _bytes(self, removed: int, bits: Bits | None) -> int | None:
        if self.weights is None:
            return None
        M, N, K = self._shape()
        ranks = (K - self._lost(removed)).clamp_min(1)
        itemsizes = torch.tensor(self.weights.itemsizes)
        return int(stored_bytes(M, N, ranks, self.adapter_rows, self.storage, itemsizes, bits).sum()) + self.weights.rest

    def _by_amount(self, budget: Budget) -> tuple[int, float | int]:
        """(directions removed, got) of a budget that limits (a running sum + constant) / scale."""
        sums, constant, scale = self._amount(budget)

        def got(n: int) -> float | int:
            # Division and the parser of decimals both round to the nearest double: 7 / 10 is the double of "0.7".
            # Multiplying what was asked would round once more, and could refuse an exact fit.
            amount = int(sums[n]) + constant
            return amount if scale == 1 else amount / scale

        # `got` never rises with n, so the first n that fits keeps the most directions
        n = bisect_left(range(len(sums)), True, key=lambda n: got(n) <= budget.asked)
        if n == len(sums):
            name = budget.convention if budget.ratio is not None else budget.kind
            least = self._smallest(budget, int(sums[-1]) + constant, scale)
            raise BudgetError(f"size {budget.asked!r} ({name}) can't be reached: the smallest is {least}.")
        return n, got(n)

    def _amount(self, budget: Budget) -> tuple[Tensor, int, int]:
        """(running sums, constant, scale) of what `budget` limits."""
        if budget.params is not None:
            return self.stored(), self.rest_params, 1
        if budget.stored_bytes is not None:
            return self.least_bytes(budget.exact_bits), self._weights.rest, 1
        if budget.memory_mb is not None:
            return self.least_bytes(budget.exact_bits), self._weights.rest + sum(self._beside(budget)), MEGA
        if budget.convention == "model":
            return self.stored(), self.rest_params, self.dense_params + self.rest_params
        return self.stored(adapters=budget.convention != "paper"), 0, self.dense_params

    def _beside(self, budget: Budget) -> tuple[int, int]:
        """(KV cache, overhead) of serving, bytes."""
        if self.decoder is None:
            raise BudgetError("this model's config does not describe a decoder with a KV cache: ask for stored_bytes instead of memory_mb.")
        assert budget.context is not None and budget.batch is not None
        return self.decoder.cache(budget.context, budget.batch), self.decoder.overhead(budget.batch)

    def _smallest(self, budget: Budget, least: int, scale: int) -> str:
        if budget.params is not None:
            return f"{least:,} parameters"
        bits = "" if budget.bits is None else f" in {budget.bits} bit"
        if budget.stored_bytes is not None:
            return f"{least:,} bytes{bits}"
        if budget.memory_mb is not None:
            cache, overhead = self._beside(budget)
            parts = (("weights" + bits, least - cache - overhead), ("KV cache", cache), ("overhead", overhead))
            return f"{-(-least // MEGA):,} MB ({', '.join(f'{name} {part / MEGA:,.1f}' for name, part in parts)})"
        return f"{-(-least * 10**4 // scale) / 10**4:.4f}"

    def _by_curve(self, budget: Budget) -> tuple[int, float]:
        """(directions removed, predicted) of the smallest measured size that the curve says is good enough."""
        linear, dense, curve = self.stored(), self.dense_params, self._curve_in(budget, budget.exact_bits)
        base = self._curve_in(budget, None)  # in its own dtype: what an increase is above
        if budget.max_loss_increase is not None and base.sizes[0] != 1.0:
            raise BudgetError(f"the curve starts at size {base.sizes[0]:.4f}, so the base model's loss is unknown: ask for max_perplexity.")

        def got(n: int) -> float:
            loss = curve.loss(int(linear[n]) / dense)
            assert loss is not None
            return as_perplexity(loss) if budget.max_perplexity is not None else loss - base.losses[0]

        # sizes [first, last) were measured or lie between such; what is predicted never falls with n there
        first = bisect_left(range(len(linear)), True, key=lambda n: int(linear[n]) / dense <= curve.sizes[0])
        last = bisect_left(range(len(linear)), True, key=lambda n: int(linear[n]) / dense < curve.sizes[-1])
        if first >= last:
            raise BudgetError("the curve was measured at sizes that this model does not have: measure it again.")
        n = bisect_right(range(last), budget.asked, lo=first, key=got) - 1
        if n < first:
            whose = "the base model" if curve.sizes[0] == 1.0 else f"the largest measured size, {curve.sizes[0]:.4f},"
            has = f"{whose} has perplexity {rounded_up(as_perplexity(curve.losses[0]), 6)}{f' in {budget.bits} bit' if budget.bits else ''}"
            raise BudgetError(f"{budget.kind} {budget.asked!r} can't be kept: {has}.")
        # of removals that change no size, the first
        n = bisect_left(range(n), True, key=lambda m: int(linear[m]) <= int(linear[n]))
        return n, got(n)
