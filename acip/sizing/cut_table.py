"""Convert a size to a rank per layer, exactly and never above the budget (paper 2.2.3, D.3).

Directions are removed in one global order, lowest score first. A size removes a prefix of that order, so sizes nest. The numbers that
are stored after n removals are a running sum, and a cut is one binary search in it.

A layer keeps its r >= 1 best directions. An adapter beside the layer adds its R directions: q = r + R (else q = r). The storage form
sets the number of stored values:

    factors      q (M + N)         two plain factors (the paper)
    pivot        q (M + N - q)     q rows of W, and every other row as a combination of them

If that is not less than M N, the layer is the original dense one, without adapter (the paper's reset rule, D.3). Without the rule, it
is the product as one dense matrix. The pivot form saves numbers at every q < K. Biases are always kept.

    convention   counts                                          relative to
    linear       stored numbers of the target layers             their dense numbers     (default)
    paper        min(MN, r(M + N)), without adapters             their dense numbers     (the paper's tables)
    model        all stored numbers of the model                 the base model's
    bytes        stored bytes of the model                       the base model's bytes in its dtype

If the layers are also stored as codes, budgets of bytes choose versions of codes instead of ranks (`acip.sizing.byte_sizes`).

Bytes of ranks are those of the tensors that a materialized model saves; tied tensors count once:

    target layers' matrices   per row of n numbers: n in the model's dtype; n + 4 in 8 bit (with a float32 scale);
                              36 per block of up to 64 numbers in 4 bit (with a float32 absmax)
    pivot form                8 M more: the place of each row, int64
    biases, everything else   unchanged

Therefore the pivot form with q close to K takes more bytes than the dense layer, and bytes may rise when a direction is removed. A cut
is the largest size that is within its budget.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from acip.errors import BudgetError
from acip.modeling_acip import QUANT_BLOCK
from acip.recipe import Storage
from acip.sizing.budget import ALL_BITS, MEGA, UNITS, Bits, Budget, Convention, Curve, Decoder, as_perplexity, rounded_up
from acip.sizing.byte_sizes import ByteSizes

CODED_BUDGETS = "a ratio in the convention bytes, stored_bytes, memory_mb, max_perplexity, max_loss_increase or max_kl"
PLACE = 8  # bytes of a row's place in the pivot form (int64)


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
        """Return the smallest rank that saves nothing."""
        limit = self.K if storage == "pivot" else -(-self.M * self.N // (self.M + self.N))
        return limit - adapter_rows

    def stored_rank(self, adapter_rows: int, storage: Storage, dense_if_no_saving: bool) -> int:
        """Return the largest rank that any size uses, which is the number of directions to store."""
        return max(0, self.dense_from(adapter_rows, storage) - 1) if dense_if_no_saving else self.K


@dataclass(frozen=True)
class Cut:
    """A model of one size. `ranks[name]` is a layer's rank; None = the original dense layer."""

    ranks: Mapping[str, int | None]
    removed: int  # number of directions removed, in the global order
    asked: float | int
    convention: str  # the convention of a ratio, or the kind of another budget
    got: float | int  # the value of the limited quantity
    sizes: Mapping[str, float]  # the size ratio in every convention
    params: int  # all stored numbers of the model
    bits: Bits | None = None  # bits of the target layers' matrices that the budget counted
    bytes: int | None = None  # stored bytes of the model in these bits; None if the table has no `weights`
    predicted: Mapping[str, float] | None = None  # loss (nats per token), perplexity and KL by the curve, within its sizes
    # the version of the codes of each coded layer, at a size in bytes; its other layers are exact. None = the layers have ranks
    versions: Mapping[str, int] | None = None
    bits_per_weight: float | None = None  # the mean of the layers at a size in bytes

    @property
    def unit(self) -> str:
        return UNITS.get(self.convention, "ratio")

    @property
    def key(self) -> tuple[int, int]:
        """An identifier of the model, equal for budgets with the same result. It rises with falling size, first ranks, then codes."""
        return (0, self.removed) if self.versions is None else (1, -(self.bytes or 0))


@dataclass(frozen=True)
class Weights:
    """Byte counts: bytes per number of each target layer's matrices, and the bytes of everything else, biases included."""

    itemsizes: tuple[int, ...]
    rest: int


def stored_params(M: Tensor, N: Tensor, ranks: Tensor, adapter_rows: int, storage: Storage) -> Tensor:
    """Return the numbers that layers [M, N] store at `ranks`, without biases; elementwise on int64 tensors of any device."""
    if storage == "factors":
        return torch.minimum(M * N, (ranks + adapter_rows) * (M + N))
    q = torch.minimum(ranks + adapter_rows, torch.minimum(M, N))
    return q * (M + N - q)


def stored_bytes(M: Tensor, N: Tensor, ranks: Tensor, adapter_rows: int, storage: Storage, itemsize: Tensor, bits: Bits | None) -> Tensor:
    """Return the bytes that layers [M, N] store at `ranks`, without biases, in the form of `ElasticLinear.materialize`; elementwise, int64.

    In 8 and 4 bit, layers are stored as factors (`acip.export.quantization`).
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
    """The data for cuts: the layers, the global removal order, and the storage of the rest of the model.

    `order` [D] lists layer indices: the n-th removal takes the least important direction of layer order[n]. `weights`, `decoder` and
    the curves are optional; budgets that need a missing one raise BudgetError.
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
    kl: Curve | None = None  # measured KL divergences from the base model
    quantized: Mapping[Bits, Curve] = field(default_factory=dict)  # measured curves by bits
    byte_sizes: ByteSizes | None = None  # if the layers are also stored as codes
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # cache of running sums

    def _shape(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.tensor([getattr(layer, key) for layer in self.layers]) for key in ("M", "N", "K"))  # type: ignore[return-value]

    def _departures(self) -> Tensor:
        """Return [D], rising: i (D + 1) + n for the n-th removal, which takes a direction from layer i."""
        if "departures" not in self._kept:
            by_layer = torch.argsort(self.order, stable=True)
            self._kept["departures"] = by_layer + self.order.long()[by_layer] * (len(self.order) + 1)
        return self._kept["departures"]

    def _lost(self, removed: int) -> Tensor:
        """Return [L]: the number of directions that each layer has lost after `removed` removals."""
        layer = torch.arange(len(self.layers)) * (len(self.order) + 1)
        ends = torch.searchsorted(self._departures(), torch.cat([layer, layer + removed]))
        return ends[len(layer) :] - ends[: len(layer)]

    def _running(self, amounts: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return [D + 1]: the sum of `amounts(layer, M, N, rank)` over layers after n removals, n = 0 ... D."""
        M, N, K = self._shape()
        counts = self._lost(len(self.order))
        layer = torch.repeat_interleave(torch.arange(len(self.layers)), counts)
        nth = torch.arange(len(self.order)) - (counts.cumsum(0) - counts)[layer]
        # the i-th removal in a layer takes it from rank K - i to K - i - 1; its last direction is never removed
        before = K[layer] - nth
        M_D, N_D = M[layer], N[layer]
        saved = amounts(layer, M_D, N_D, before) - amounts(layer, M_D, N_D, (before - 1).clamp_min(1))
        total = torch.empty(len(self.order) + 1, dtype=torch.long)
        total[0] = amounts(torch.arange(len(M)), M, N, K).sum()
        total[1 + self._departures() - layer * (len(self.order) + 1)] = -saved
        return total.cumsum(0)

    def stored(self, adapters: bool = True) -> Tensor:
        """Return [D + 1]: the numbers stored by the target layers after n removals, n = 0 ... D."""
        key = "linear" if adapters else "paper"
        if key not in self._kept:
            R, storage = (self.adapter_rows, self.storage) if adapters else (0, "factors")
            self._kept[key] = self._running(lambda _, M, N, ranks: stored_params(M, N, ranks, R, storage)) + self._biases
        return self._kept[key]

    def least_bytes(self, bits: Bits | None = None) -> Tensor:
        """Return [D + 1]: the fewest bytes of the target layers' matrices after at most n removals, n = 0 ... D."""
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
            raise BudgetError(
                "the bytes of these layers are not known before the artifact is saved. Use a ratio or params, or load the saved artifact."
            )
        return self.weights

    @property
    def dense_params(self) -> int:
        return sum(layer.dense_params for layer in self.layers)

    @property
    def base_bytes(self) -> int:
        """The bytes of the base model's tensors in its dtype."""
        weights = self._weights
        return weights.rest + sum(layer.M * layer.N * size for layer, size in zip(self.layers, weights.itemsizes, strict=True))

    @property
    def convention(self) -> Convention:
        """The convention in which sizes of this model are shown, and asked for where none is named."""
        return "linear" if self.byte_sizes is None else "bytes"

    def budget(self, size: Budget | float | str, convention: Convention | None = None) -> Budget:
        """Return `size` as a budget. A number, or a text such as "60%", is a ratio; None = in the convention of this model.

        Raises BudgetError for other values.
        """
        if isinstance(size, Budget):
            return size
        convention = convention or self.convention
        return Budget.parse(size, convention) if isinstance(size, str) else Budget(size, convention)

    def flops(self, removed: int) -> int:
        """Return the floating-point operations per token of the linear layers and the output head, without attention, after removals."""
        if self.decoder is None:
            raise BudgetError("max_flops needs a config that describes a decoder; this model's does not. Use params instead.")
        return 2 * (int(self.stored()[removed]) - self._biases + self.decoder.head_params)

    @property
    def _biases(self) -> int:
        return sum(layer.M for layer in self.layers if layer.bias)

    def ranks(self, removed: int) -> dict[str, int | None]:
        ranks: dict[str, int | None] = {}
        for layer, lost in zip(self.layers, self._lost(removed).tolist(), strict=True):
            rank = max(1, layer.K - lost)
            ranks[layer.name] = None if self.dense_if_no_saving and rank >= layer.dense_from(self.adapter_rows, self.storage) else rank
        return ranks

    def cut(self, budget: Budget) -> Cut:
        """Return the largest model within `budget`: got <= asked, and every larger model exceeds the budget.

        For a budget that limits perplexity or loss, return the smallest model that meets it: every smaller size on the curve fails.
        For bits "best", compare the cuts in all bits that have a curve: return the one with the smallest predicted loss, or, for a
        budget that limits a loss, with the fewest bytes. Raises BudgetError if the budget can't be met.
        """
        coded = self.byte_sizes
        if coded is not None and budget.in_bytes and not (budget.by_curve and coded.curve(budget) is None):
            return self._coded(budget, coded)
        if budget.bits == "best":
            return self._in_best_bits(budget)
        n, got = self._by_curve(budget) if budget.by_curve else self._by_amount(budget)
        return self._of_ranks(n, budget, got)

    @property
    def base(self) -> Cut:
        """The base model: every layer is dense, also where size 1.0 is the product of all directions (`dense_if_no_saving`)."""
        return self._base(Budget(ratio=1.0), 1.0)

    def _base(self, budget: Budget, got: float) -> Cut:
        cut = self._of_ranks(0, budget, got)
        return replace(cut, ranks=dict.fromkeys(cut.ranks))

    def _of_ranks(self, n: int, budget: Budget, got: float) -> Cut:
        """Return the size after n removals."""
        linear = int(self.stored()[n])
        params = linear + self.rest_params
        size_bytes = self._bytes(n, budget.exact_bits)
        sizes = {
            "linear": linear / self.dense_params,
            "paper": int(self.stored(adapters=False)[n]) / self.dense_params,
            "model": params / (self.dense_params + self.rest_params),
        } | ({} if size_bytes is None else {"bytes": size_bytes / self.base_bytes})
        curve = self._curve(budget.exact_bits)
        predicted = {}
        if (loss := curve.loss(sizes["linear"]) if curve else None) is not None:
            predicted = {"loss": loss, "perplexity": as_perplexity(loss)}
        if (kl := self.kl.loss(sizes["linear"]) if self.kl and budget.bits is None else None) is not None:
            predicted["kl"] = kl
        return Cut(
            ranks=self.ranks(n), removed=n, asked=budget.asked, convention=budget.convention if budget.ratio is not None else budget.kind,
            got=got, sizes=sizes, params=params, bits=budget.exact_bits, bytes=size_bytes, predicted=predicted or None,
        )  # fmt: skip

    def _coded(self, budget: Budget, byte_sizes: ByteSizes) -> Cut:
        """Return the best size in bytes: coded layers, or the base model."""
        steps, got = byte_sizes.choose(budget, sum(self._beside(budget)) if budget.memory_mb is not None else 0)
        base, share, predicted = self._base(budget, got), byte_sizes.share(steps), byte_sizes.predicted(steps)
        base = replace(base, bytes=byte_sizes.bytes(steps), sizes={**base.sizes, "bytes": share})
        if steps is None:
            return replace(base, predicted=predicted or base.predicted)
        return replace(
            base, predicted=predicted, versions=byte_sizes.versions(steps), bits_per_weight=byte_sizes.bits_per_weight(steps)
        )  # fmt: skip

    def _in_best_bits(self, budget: Budget) -> Cut:
        cuts, errors = [], []
        for bits in ALL_BITS:
            if self._curve(bits) is not None:
                try:
                    cuts.append(self.cut(replace(budget, bits=bits)))
                except BudgetError as error:
                    errors.append(error)
        predicted = [cut for cut in cuts if cut.predicted is not None]
        if not predicted:
            self._curve_in(budget, None)
            if errors:
                raise errors[-1]
            raise BudgetError(
                f"no measured curve includes {budget.kind} {budget.asked!r}, so the bits can't be chosen. Set bits to 8, 4 or None."
            )
        if budget.by_curve and self._weights:
            return min(predicted, key=lambda cut: cut.bytes or 0)
        return min(predicted, key=lambda cut: cut.predicted["loss"] if cut.predicted else 0.0)

    def _curve(self, bits: Bits | None) -> Curve | None:
        return self.curve if bits is None else self.quantized.get(bits)

    def _curve_in(self, budget: Budget, bits: Bits | None) -> Curve:
        if (curve := self.kl if budget.max_kl is not None else self._curve(bits)) is None:
            where, measure = ("", "acip.evaluate.trade_off") if bits is None else (f" in {bits} bit", "jobs/evaluate.py --quantize")
            raise BudgetError(f"no curve was measured{where}, so {budget.kind} can't be used. Measure it ({measure}), or use a ratio.")
        return curve

    def _bytes(self, removed: int, bits: Bits | None) -> int | None:
        if self.weights is None:
            return None
        M, N, K = self._shape()
        ranks = (K - self._lost(removed)).clamp_min(1)
        itemsizes = torch.tensor(self.weights.itemsizes)
        return int(stored_bytes(M, N, ranks, self.adapter_rows, self.storage, itemsizes, bits).sum()) + self.weights.rest

    def _by_amount(self, budget: Budget) -> tuple[int, float | int]:
        """Return (directions removed, got) for a budget that limits (a running sum + constant) / scale."""
        sums, constant, scale = self._amount(budget)

        def got(n: int) -> float | int:
            # Division and the decimal parser both round to the nearest double, so 7 / 10 equals float("0.7").
            # Multiplying the budget would round once more and could reject an exact fit.
            amount = int(sums[n]) + constant
            return amount if scale == 1 else amount / scale

        # `got` never rises with n, so the first n that fits keeps the most directions
        n = bisect_left(range(len(sums)), True, key=lambda n: got(n) <= budget.asked)
        if n == len(sums):
            name = budget.convention if budget.ratio is not None else budget.kind
            least = self._smallest(budget, int(sums[-1]) + constant, scale)
            bits = "" if budget.bits is None else ", without bits (--quantize)"
            only = "" if len(self.order) else f" This artifact holds codes only: give {CODED_BUDGETS}{bits}."
            raise BudgetError(f"size {budget.asked!r} ({name}) can't be reached: the smallest is {least}.{only}")
        return n, got(n)

    def _amount(self, budget: Budget) -> tuple[Tensor, int, int]:
        """Return (running sums, constant, scale) of the quantity that `budget` limits."""
        if budget.params is not None:
            return self.stored(), self.rest_params, 1
        if budget.stored_bytes is not None:
            return self.least_bytes(budget.exact_bits), self._weights.rest, 1
        if budget.memory_mb is not None:
            return self.least_bytes(budget.exact_bits), self._weights.rest + sum(self._beside(budget)), MEGA
        if budget.max_flops is not None:
            return 2 * self.stored(), self.flops(0) - 2 * int(self.stored()[0]), 1
        if budget.convention == "bytes":
            return self.least_bytes(budget.exact_bits), self._weights.rest, self.base_bytes
        if budget.convention == "model":
            return self.stored(), self.rest_params, self.dense_params + self.rest_params
        return self.stored(adapters=budget.convention != "paper"), 0, self.dense_params

    def _beside(self, budget: Budget) -> tuple[int, int]:
        """Return the bytes of (KV cache, overhead) while serving."""
        if self.decoder is None:
            raise BudgetError(
                "memory_mb needs a config that describes a decoder with a KV cache; this model's does not. Use stored_bytes instead."
            )
        assert budget.context is not None and budget.batch is not None
        return self.decoder.cache(budget.context, budget.batch), self.decoder.overhead(budget.batch)

    def _smallest(self, budget: Budget, least: int, scale: int) -> str:
        if budget.params is not None:
            return f"{least:,} parameters"
        if budget.max_flops is not None:
            return f"{least:,} FLOPs per token"
        bits = "" if budget.bits is None else f" in {budget.bits} bit"
        if budget.stored_bytes is not None:
            return f"{least:,} bytes{bits}"
        if budget.memory_mb is not None:
            cache, overhead = self._beside(budget)
            parts = (("weights" + bits, least - cache - overhead), ("KV cache", cache), ("overhead", overhead))
            return f"{-(-least // MEGA):,} MB ({', '.join(f'{name} {part / MEGA:,.1f}' for name, part in parts)})"
        return f"{-(-least * 10**4 // scale) / 10**4:.4f}"

    def _by_curve(self, budget: Budget) -> tuple[int, float]:
        """Return (directions removed, predicted value) of the smallest size on the curve that meets the budget."""
        linear, dense, curve = self.stored(), self.dense_params, self._curve_in(budget, budget.exact_bits)
        base = curve if budget.max_kl is not None else self._curve_in(budget, None)  # in the model's dtype: the reference of an increase
        if budget.max_loss_increase is not None and base.sizes[0] != 1.0:
            raise BudgetError(f"the curve starts at size {base.sizes[0]:.4f}, so the base model's loss is unknown. Use max_perplexity.")

        def value(loss: float) -> float:
            if budget.max_kl is not None:
                return loss
            return as_perplexity(loss) if budget.max_perplexity is not None else loss - base.losses[0]

        def got(n: int) -> float:
            loss = curve.loss(int(linear[n]) / dense)
            assert loss is not None
            return value(loss)

        # removals [first, last) are on the curve, where predictions never fall with n
        first = bisect_left(range(len(linear)), True, key=lambda n: int(linear[n]) / dense <= curve.sizes[0])
        last = bisect_left(range(len(linear)), True, key=lambda n: int(linear[n]) / dense < curve.sizes[-1])
        if first >= last:
            raise BudgetError("the curve was measured at sizes that this model does not have. Measure it again.")
        n = bisect_right(range(last), budget.asked, lo=first, key=got) - 1
        if n < first:
            best = "the base model" if curve.sizes[0] == 1.0 else f"the largest measured size, {curve.sizes[0]:.4f},"
            quantity, least = ("KL", curve.losses[0]) if budget.max_kl is not None else ("perplexity", as_perplexity(curve.losses[0]))
            limit = f"{best} has {quantity} {rounded_up(least, 6)}{f' in {budget.bits} bit' if budget.bits else ''}"
            raise BudgetError(f"{budget.kind} {budget.asked!r} can't be reached: {limit}.")
        # the first of several removals with the same size
        n = bisect_left(range(n), True, key=lambda m: int(linear[m]) <= int(linear[n]))
        return n, got(n)
