"""The layers: one linear layer y = W x + b in the forms it takes on its way from the base model to any size.

    nn.Linear --parametrize--> SVDLinear --sort by score--> ElasticLinear --materialize--> LowRankLinear, PivotLinear
                                                                                           or a plain nn.Linear

Legend: M = out features, N = in features, K = min(M, N) directions, R = adapter rank, r = kept rank.

* `SVDLinear` prunes: y = U diag(g(p)) V x + b with one trainable mask entry per direction (paper 2.2.1, eq. 5).
* `ElasticLinear` holds the same directions sorted by importance, so that rank r is a contiguous prefix of two tensors'
  rows; changing the size of a model is changing an integer per layer.
* `LowRankLinear` and `PivotLinear` are what is left at one size, with the adapters folded in.

Both of the first two carry their adapters, `LoRA` modules by place:

    layer            y + B A x                    beside the layer, R more directions (the paper, eq. 9)
    right, left      V + B A  and  U + B A        on the factors: folded in, they cost no direction (ours)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.layers.directions import DirectionMatrix, FourBitLinear, product
from acip.modeling_acip import LowRankLinear, PivotLinear, accumulation_dtype, plain_linear, widened
from acip.recipe import Quantize, Storage

ALL = slice(None)


class StraightThrough(torch.autograd.Function):
    """The gate over directions: forward 1[p > 0], backward `slope` * 1[p > 0] (paper eq. 6, whose mask scale s = 1 / slope).

    The paper starts masks at s and makes the factors s^-1/2 times larger each. Both are in the slope here, so the factors stay
    orthonormal, and nothing is rounded for it.
    """

    @staticmethod
    def forward(ctx: Any, p_K: Tensor, slope: float, dtype: torch.dtype) -> Tensor:
        alive_K = p_K > 0
        ctx.save_for_backward(alive_K)
        ctx.slope, ctx.mask_dtype = slope, p_K.dtype
        return alive_K.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None, None]:
        (alive_K,) = ctx.saved_tensors
        return grad_K.to(ctx.mask_dtype) * alive_K * ctx.slope, None, None


class LoRA(nn.Module):
    """scale * B A x, with `A` [R, in] and `B` [out, R] in the accumulation dtype of the model's dtype: 16 bits would lose small steps.

    A and B serve all sizes; on the factors, each size takes the directions' part of them that it keeps.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        device: Any = None,
        model_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        place: Any = {"device": device, "dtype": accumulation_dtype(model_dtype)}
        self.A = nn.Parameter(torch.empty(rank, inputs, **place))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(outputs, rank, **place))

    @classmethod
    def of(cls, A_Rn: Tensor, B_mR: Tensor) -> "LoRA":
        """Around given, scaled matrices, for use without training: in their own dtype."""
        lora = cls(1, 1, 1, 1.0, device="meta")
        lora.A, lora.B = (nn.Parameter(matrix, requires_grad=False) for matrix in (A_Rn, B_mR))
        return lora

    def forward(self, x: Tensor, inputs: Tensor | slice = ALL, outputs: Tensor | slice = ALL) -> Tensor:
        """`inputs` and `outputs` choose the columns of A that x holds and the rows of B that are wanted."""
        # a slice of everything would still be copied in the backward pass
        A, B = self.A if inputs is ALL else self.A[:, inputs], self.B if outputs is ALL else self.B[outputs]
        A, B = A.to(x.dtype), B.to(x.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return F.linear(F.linear(x, A) * self.scale, B)

    def product(self) -> Tensor:
        """scale * B A [out, in]."""
        return widened(self.B) @ widened(self.A) * self.scale


class Compressible(nn.Module):
    """What the two trainable forms share: the original layer, which is the exact inverse, the directions, and the adapters.

    `left` [K, M] and `right` [K, N] hold one direction a row: W = left^T right.
    """

    def __init__(self, original: nn.Module, left_KM: DirectionMatrix, right_KN: DirectionMatrix, loras: dict[str, LoRA] | None) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.left, self.right = left_KM, right_KN
        self.loras: dict[str, LoRA] = nn.ModuleDict(loras)  # type: ignore[assignment]
        self.bypass = False  # compute the original layer

    @property
    def bias(self) -> Tensor | None:
        bias = self.original.bias
        return bias if isinstance(bias, Tensor) else None

    def park(self) -> None:
        """What is only kept leaves the accelerator."""
        if isinstance(self.original, FourBitLinear):
            self.original.park()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Compressible":
        """As of every module, but a weight that was not read yet can't be moved or cast: it comes where the rows are."""
        unread = self.original._parameters.get("weight")
        if unread is None or not unread.is_meta:
            return super()._apply(fn, recurse)
        del self.original._parameters["weight"]
        try:
            return super()._apply(fn, recurse)
        finally:
            self.original._parameters["weight"] = unread

    @property
    def exact(self) -> nn.Module:
        """The original layer, at its full precision."""
        return self.original.exact if isinstance(self.original, FourBitLinear) else self.original


class SVDLinear(Compressible):
    """A linear layer with its directions laid open, and a mask over them.

    The mask `p` [K] starts at `mask_scale`, in the accumulation dtype of the model's dtype: bfloat16 would lose a step of 5e-5 at 0.02.
    `U_MK` is orthonormal and spans W's columns. In 4 bit, so is the original layer (see `FourBitLinear`).
    """

    def __init__(
        self,
        original: nn.Module,
        W_MN: Tensor,
        U_MK: Tensor,
        mask_scale: float,
        loras: dict[str, LoRA] | None = None,
        bits: Quantize = "none",
    ) -> None:
        device = W_MN.device
        left_KM = DirectionMatrix.of(U_MK.T.to(W_MN.dtype), bits)
        rounded = bits != "none" or W_MN.dtype.itemsize == 2
        right_KN = DirectionMatrix.of(coordinates(W_MN, left_KM.read(), refine=2 * rounded), bits)
        super().__init__(original if bits == "none" else FourBitLinear(original, W_MN, bits), left_KM, right_KN, loras)
        self.slope = 1 / mask_scale
        self.p = nn.Parameter(torch.full((U_MK.shape[1],), mask_scale, dtype=accumulation_dtype(W_MN.dtype), device=device))
        self.order: Tensor | None = None  # [K] the direction in each row; None = as the basis has them
        self.live: int | None = None  # so many rows are multiplied, the first; None = all

    @property
    def packed(self) -> Tensor | None:
        """[k] the directions that are still multiplied; None = all."""
        return None if self.order is None else self.order[: self.live]

    def forward(self, x_BTN: Tensor) -> Tensor:
        if self.bypass:
            return self.original(x_BTN)
        live, gate_K = ALL if self.packed is None else self.packed, StraightThrough.apply(self.p, self.slope, x_BTN.dtype)
        h_BTk = self.right.project(x_BTN, self.live)
        if "right" in self.loras:
            h_BTk = h_BTk + self.loras["right"](x_BTN, outputs=live)
        h_BTk = h_BTk * (gate_K if live is ALL else gate_K[live])
        y_BTM = self.left.expand(h_BTk, self.live, self.bias)
        if "left" in self.loras:
            y_BTM = y_BTM + self.loras["left"](h_BTk, inputs=live)
        if "layer" in self.loras:
            y_BTM = y_BTM + self.loras["layer"](x_BTN)
        return y_BTM

    def pack(self, directions_k: Tensor) -> None:
        """Multiply only these directions from now on. The others must be pruned: they never return, so nothing changes."""
        dead = torch.ones_like(self.p, dtype=torch.bool)
        dead[directions_k] = False
        self._arrange(torch.cat([directions_k, dead.nonzero().squeeze(1)]))
        self.live = len(directions_k)

    def _arrange(self, order_K: Tensor) -> None:
        """Put direction order[i] into row i."""
        place_K = order_K if self.order is None else torch.argsort(self.order)[order_K]
        self.left.permute(place_K)
        self.right.permute(place_K)
        self.order = order_K

    def sorted(self, importance_K: Tensor) -> "ElasticLinear":
        """The same layer with its directions in the order of `importance_K`, and without masks. This one is used up."""
        self._arrange(importance_K)
        with torch.no_grad():
            if "right" in self.loras:
                self.loras["right"].B.copy_(sort_directions(self.loras["right"].B, "right", "B", importance_K))
                self.loras["left"].A.copy_(sort_directions(self.loras["left"].A, "left", "A", importance_K))
        return ElasticLinear(self.original, self.left, self.right, dict(self.loras.items()))


@dataclass(frozen=True)
class Group:
    """DirectionMatrix of a batch that a layer multiplies together: with a prefix of its directions, None = with its dense weight."""

    rows: slice  # of the batch that are multiplied ...
    wanted: slice  # ... of which these are meant
    factors: tuple[Tensor, Tensor] | None = None  # right [r, N], left [M, r]
    mask: Tensor | None = None  # [rows, r] where rows keep less than that; [1, r] for all rows alike


class ElasticLinear(Compressible):
    """Any rank of a layer from one copy of its directions, most important first: rank r is the prefix [:r] of its rows.

    `rank = None` is the original dense layer, bit for bit. There may be less than K rows: ranks that cost more than W are never wanted.
    `lead` rows come before the directions and are in every rank: an adapter beside the layer, folded in.
    `groups` of rows with ranks of their own overrule `rank` (`acip.layers.mixed_sizes`).
    """

    def __init__(
        self,
        original: nn.Module,
        left: DirectionMatrix | Tensor,
        right: DirectionMatrix | Tensor,
        loras: dict[str, LoRA] | None = None,
        lead: int = 0,
    ) -> None:
        rows = [side if isinstance(side, DirectionMatrix) else DirectionMatrix(side) for side in (left, right)]
        super().__init__(original, rows[0], rows[1], loras)
        self.rank: int | None = None
        self.groups: tuple[Group, ...] | None = None
        self.lead = lead

    @property
    def stored_rank(self) -> int:
        return min(len(self.left), len(self.right)) - self.lead

    @property
    def kept(self) -> int:
        """DirectionMatrix at the present rank."""
        assert self.rank is not None
        return self.lead + self.rank

    def set_rank(self, rank: int | None) -> None:
        assert rank is None or 0 <= rank <= self.stored_rank, f"rank {rank} of {self.stored_rank} stored"
        self.rank = rank

    def forward(self, x_BTN: Tensor) -> Tensor:
        if self.groups is not None:
            if len(self.groups) == 1:
                return self._grouped(x_BTN, self.groups[0])
            x_TN = x_BTN.flatten(0, -2)  # of three dimensions, a slice's product is done as a batch, with copies of the weight
            y_TM = torch.cat([self._grouped(x_TN[group.rows], group)[group.wanted] for group in self.groups])
            return y_TM.unflatten(0, x_BTN.shape[:-1])
        if self.rank is None or self.bypass:
            return self.original(x_BTN)
        h_BTr = self.right.project(x_BTN, self.kept)
        if "right" in self.loras:
            h_BTr = h_BTr + self.loras["right"](x_BTN, outputs=slice(self.kept))
        y_BTM = self.left.expand(h_BTr, self.kept, self.bias)
        if "left" in self.loras:
            y_BTM = y_BTM + self.loras["left"](h_BTr, inputs=slice(self.kept))
        if "layer" in self.loras:
            y_BTM = y_BTM + self.loras["layer"](x_BTN)
        return y_BTM

    def group(self, rows: slice, wanted: slice, kept: int | None, mask: Tensor | None = None) -> Group:
        """DirectionMatrix that are multiplied by the first `kept` of ours. Adapters must be folded in."""
        assert not self.loras
        return Group(rows, wanted) if kept is None else Group(rows, wanted, (self.right.read(kept), self.left.read(kept).T), mask)

    def _grouped(self, x: Tensor, group: Group) -> Tensor:
        if group.factors is None:
            return self.original(x)
        right_rN, left_Mr = group.factors
        h = product(x, right_rN)
        if group.mask is not None:
            h = h * group.mask
        return product(h, left_Mr, self.bias)

    @torch.no_grad()
    def folded(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return (left [q, M], right [q, N]) of the first `rank` directions with the adapters folded in, in the accumulation dtype.

        An adapter beside the layer becomes rows before the directions.
        """
        right, left = widened(self.right.read(self.lead + rank)), widened(self.left.read(self.lead + rank))
        if "right" in self.loras:
            right = right + self.loras["right"].product()[:rank]
            left = left + self.loras["left"].product()[:, :rank].T
        if "layer" in self.loras:
            beside = self.loras["layer"]
            left, right = torch.cat([widened(beside.B).T * beside.scale, left]), torch.cat([widened(beside.A), right])
        return left, right

    def materialize(self, storage: Storage) -> nn.Module:
        """The layer at its present rank in its smallest form, as a plain module. It may share weights with this one."""
        if self.rank is None:
            return self.original
        left_qM, right_qN = self.folded(self.rank)
        left_Mq = left_qM.T
        (M, q), N, dtype = left_Mq.shape, right_qN.shape[1], self.left.dtype
        if q >= min(M, N) or (storage == "factors" and q * (M + N) >= M * N):
            return plain_linear((left_Mq @ right_qN).to(dtype), self.bias)
        if storage == "factors":
            return LowRankLinear(left_Mq.to(dtype).contiguous(), right_qN.to(dtype).contiguous(), self.bias)
        return PivotLinear.of(left_Mq, right_qN, self.bias, dtype)


@torch.no_grad()
def coordinates(W_MN: Tensor, left_KM: Tensor, refine: int) -> Tensor:
    """right_KN with left^T right = W. Where left was rounded, `refine` steps of iteration make up for what it lost in orthonormality."""
    if not refine:
        return (left_KM.double() @ W_MN.double()).to(W_MN.dtype)
    left, W = widened(left_KM), widened(W_MN)
    right = left @ W
    for _ in range(refine):
        right += left @ (W - left.T @ right)
    return right.to(W_MN.dtype)


def sort_directions(values: Tensor, place: str, part: str, importance_K: Tensor) -> Tensor:
    """An adapter's matrix `part` at `place`, or its optimizer's moments, with the layer's directions in another order."""
    dim = {("right", "B"): 0, ("left", "A"): 1}.get((place, part))
    return values if dim is None else values.index_select(dim, importance_K)
