"""The layers: one linear layer y = W x + b in the forms it takes on its way from the base model to any size.

    nn.Linear --parametrise--> SVDLinear --sort by score--> ElasticLinear --materialise--> LowRankLinear, or nn.Linear

Legend: M = out features, N = in features, K = min(M, N) directions, R = adapter rank, r = kept rank.

* `SVDLinear` prunes: y = U diag(g(p)) V x + b with one trainable mask entry per direction (paper 2.2.1, eq. 5).
* `ElasticLinear` holds the same directions as rows sorted by importance, so that rank r is a contiguous prefix of two
  tensors; changing the size of a model is changing an integer per layer.
* `LowRankLinear` is what is left at one size: two plain linear layers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StraightThrough(torch.autograd.Function):
    """The gate g(p): forward `level` * 1[p > 0], backward `slope` * 1[p > 0], the slope of relu(p) (paper eq. 6)."""

    @staticmethod
    def forward(ctx: Any, p_K: Tensor, level: float, slope: float, dtype: torch.dtype) -> Tensor:
        alive_K = p_K > 0
        ctx.save_for_backward(alive_K)
        ctx.slope = slope
        return (alive_K * level).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None, None, None]:
        (alive_K,) = ctx.saved_tensors
        return grad_K.float() * alive_K * ctx.slope, None, None, None


class SVDLinear(nn.Module):
    """A linear layer with its directions laid open, and a mask over them. Holds the original layer: the exact inverse.

    Masks start at `mask_scale` = s instead of 1, which `U` [M, K] and `V` [K, N] make up for: U = c U0 and V = U^T W
    with U0 orthonormal and the gate's level 1 / c^2, so that the layer is unchanged. The paper's c is s^-1/2; in 16 bit
    it is the nearest power of two, which scales without rounding, and the gate's slope keeps the paper's gradient.

    The mask `p` [K] is float32 whatever the model's dtype: a step of 5e-5 at 0.02 is lost in bfloat16.
    """

    def __init__(self, original: nn.Module, W_MN: Tensor, U0_MK: Tensor, mask_scale: float) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        exact = W_MN.dtype == torch.float32
        self.c = mask_scale**-0.5 if exact else 2.0 ** round(math.log2(mask_scale**-0.5))
        self.level = mask_scale if exact else self.c**-2
        self.slope = self.level / mask_scale
        U_MK = U0_MK * self.c
        self.register_buffer("U", U_MK.to(W_MN.dtype).contiguous(), persistent=False)
        self.register_buffer("V", (U_MK.T @ W_MN.to(U_MK.dtype)).to(W_MN.dtype).contiguous(), persistent=False)
        self.U: Tensor
        self.V: Tensor
        self.p = nn.Parameter(torch.full((U_MK.shape[1],), mask_scale, dtype=torch.float32, device=W_MN.device))
        self.packed: Tensor | None = None  # [k] directions that are still multiplied; None = all

    @property
    def bias(self) -> Tensor | None:
        bias = self.original.bias
        return bias if isinstance(bias, Tensor) else None

    def forward(self, x_BTN: Tensor) -> Tensor:
        gate_k = StraightThrough.apply(self.p, self.level, self.slope, x_BTN.dtype)
        if self.packed is None:
            return F.linear(F.linear(x_BTN, self.V) * gate_k, self.U, self.bias)
        return F.linear(F.linear(x_BTN, self._V) * gate_k[self.packed], self._U, self.bias)

    def pack(self, directions_k: Tensor) -> None:
        """Multiply only these directions from now on. The others must be pruned: they never return, so nothing changes."""
        self.packed = directions_k
        self._U, self._V = self.U[:, directions_k].contiguous(), self.V[directions_k].contiguous()

    def sorted(self, importance_K: Tensor) -> "ElasticLinear":
        """The same layer with its directions as rows, in the order of `importance_K`, and without masks."""
        return ElasticLinear(self.original, self.U.T[importance_K] / self.c, self.V[importance_K] / self.c)


class ElasticLinear(nn.Module):
    """Any rank of a layer from one copy of its factors.

    `left` [A + S, M] and `right` [A + S, N] hold one direction a row: first A rows of the folded adapter (always
    kept), then S stored directions, most important first. Rank r is the prefix [: A + r] of both; `rank = None` is the
    original dense layer, bit for bit. S may be less than K: ranks that cost more than W are never wanted.
    """

    def __init__(self, original: nn.Module, left: Tensor, right: Tensor, adapter_rows: int = 0) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.left: Tensor
        self.right: Tensor
        self.adapter_rows = adapter_rows
        self.rank: int | None = None

    @property
    def bias(self) -> Tensor | None:
        bias = self.original.bias
        return bias if isinstance(bias, Tensor) else None

    @property
    def stored_rank(self) -> int:
        return self.left.shape[0] - self.adapter_rows

    def set_rank(self, rank: int | None) -> None:
        assert rank is None or 0 <= rank <= self.stored_rank, f"rank {rank} of {self.stored_rank} stored"
        self.rank = rank

    def forward(self, x_BTN: Tensor) -> Tensor:
        if self.rank is None:
            return self.original(x_BTN)
        rows = self.adapter_rows + self.rank
        h_BTr = F.linear(x_BTN, self.right[:rows])
        return F.linear(h_BTr, self.left[:rows].T, self.bias)

    def materialise(self) -> nn.Module:
        """The layer at its present rank, as a plain module that shares nothing with this one."""
        if self.rank is None:
            return self.original
        rows = self.adapter_rows + self.rank
        return LowRankLinear(self.left[:rows].T.contiguous(), self.right[:rows].clone(), self.bias)


class LowRankLinear(nn.Module):
    """y = L (R x) + b: a compressed layer as two plain linear layers (paper eq. 9, 10; adapters folded in)."""

    def __init__(self, left_Mr: Tensor, right_rN: Tensor, bias_M: Tensor | None) -> None:
        super().__init__()
        (self.out_features, self.rank), self.in_features = left_Mr.shape, right_rN.shape[1]
        self.right = plain_linear(right_rN, None)
        self.left = plain_linear(left_Mr, bias_M)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


def plain_linear(weight_MN: Tensor, bias_M: Tensor | None) -> nn.Linear:
    """An nn.Linear around given tensors, without allocating or initialising others."""
    layer = nn.Linear(1, 1, bias=bias_M is not None, device="meta")
    layer.out_features, layer.in_features = weight_MN.shape
    layer.weight = nn.Parameter(weight_MN, requires_grad=False)
    if bias_M is not None:
        layer.bias = nn.Parameter(bias_M.detach().clone(), requires_grad=False)
    return layer


class MasterLinear(nn.Linear):
    """An adapter's A or B: float32 weights, so that small steps count, multiplied in the input's dtype."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "MasterLinear":
        layer = cls(1, 1, bias=False, device="meta")
        layer.out_features, layer.in_features = linear.weight.shape
        layer.weight = nn.Parameter(linear.weight.detach().float())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class KnotLinear(nn.Module):
    """The adapter's B as a function of size: B(size) is linear between matrices stored at `knots` (ours).

    One B for all sizes makes the sizes fight; a B for each size would not be any-size. Takes the place of PEFT's
    `lora_B`, whose weight every knot starts from. `place` is set with the size: (lower knot, upper knot, share of upper).
    """

    def __init__(self, start_MR: Tensor, knots: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(start_MR.detach().clone()) for _ in range(knots)])
        self.place: tuple[int, int, float] = (0, 0, 0.0)

    @property
    def weight(self) -> Tensor:
        low, high, share = self.place
        if share == 0.0:
            return self.weights[low]
        return torch.lerp(self.weights[low], self.weights[high], share)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def knot_place(size: float, knots: tuple[float, ...]) -> tuple[int, int, float]:
    """Where `size` lies among the rising `knots`: (lower index, upper index, share of the upper). Clamped at the ends."""
    if size <= knots[0]:
        return 0, 0, 0.0
    for high in range(1, len(knots)):
        if size <= knots[high]:
            return high - 1, high, (size - knots[high - 1]) / (knots[high] - knots[high - 1])
    return len(knots) - 1, len(knots) - 1, 0.0
