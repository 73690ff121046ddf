"""A linear layer during calibration: y = U diag(g(p)) V x + b, with one trainable mask entry per direction (paper 2.2.1, eq. 5)."""

from typing import Any

import torch
from torch import Tensor, nn

from acip.layers.adapters import ALL, LoRA, sort_directions
from acip.layers.compressible import Compressible
from acip.layers.directions import DirectionMatrix, FourBitLinear
from acip.layers.elastic_linear import ElasticLinear
from acip.modeling_acip import accumulation_dtype, widened
from acip.recipe import Quantize

INVERTIBLE = 1e-10  # added to the diagonal of a Gram matrix of unit rows


class StraightThrough(torch.autograd.Function):
    """The gate over directions: forward 1[p > 0], backward `slope` * 1[p > 0] (paper eq. 6, with mask scale s = 1 / slope).

    The paper starts masks at s and multiplies each factor by s^-1/2. Here the slope includes both, so that the factors stay
    orthonormal and are not rounded again.
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


class SVDLinear(Compressible):
    """A linear layer that is split into directions, with a trainable mask over them.

    `U_MK` has unit columns, which span the columns of W. Without `orthonormal`, they need not be orthogonal. The mask `p` [K] starts at
    `mask_scale`. Its dtype is the accumulation dtype of the model's dtype, because bfloat16 would lose a step of 5e-5 at 0.02. With
    `bits`, the directions and the original layer are in 4 bit (see `FourBitLinear`).
    """

    def __init__(
        self,
        original: nn.Module,
        W_MN: Tensor,
        U_MK: Tensor,
        mask_scale: float,
        loras: dict[str, LoRA] | None = None,
        bits: Quantize = "none",
        orthonormal: bool = True,
    ) -> None:
        device = W_MN.device
        left_KM = DirectionMatrix.of(U_MK.T.to(W_MN.dtype), bits)
        rounded = bits != "none" or W_MN.dtype.itemsize == 2
        right_KN = DirectionMatrix.of(coordinates(W_MN, left_KM.read(), 2 * rounded, orthonormal), bits)
        super().__init__(original if bits == "none" else FourBitLinear(original, W_MN, bits), left_KM, right_KN, loras)
        self.slope = 1 / mask_scale
        self.p = nn.Parameter(torch.full((U_MK.shape[1],), mask_scale, dtype=accumulation_dtype(W_MN.dtype), device=device))
        self.order: Tensor | None = None  # [K] the direction in each row; None = the order of the basis
        self.live: int | None = None  # number of leading rows that are multiplied; None = all

    @property
    def packed(self) -> Tensor | None:
        """The directions [k] that are still multiplied; None = all."""
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
        """Multiply only these directions from now on.

        All other directions must be pruned. A pruned direction never returns, so the output does not change.
        """
        dead = torch.ones_like(self.p, dtype=torch.bool)
        dead[directions_k] = False
        self._arrange(torch.cat([directions_k, dead.nonzero().squeeze(1)]))
        self.live = len(directions_k)

    def _arrange(self, order_K: Tensor) -> None:
        """Put direction order[i] into row i."""
        row_K = order_K if self.order is None else torch.argsort(self.order)[order_K]
        self.left.permute(row_K)
        self.right.permute(row_K)
        self.order = order_K

    def sorted(self, importance_K: Tensor) -> "ElasticLinear":
        """Return the layer without masks, its directions in the order of `importance_K`. This layer must not be used afterwards."""
        self._arrange(importance_K)
        with torch.no_grad():
            if "right" in self.loras:
                self.loras["right"].B.copy_(sort_directions(self.loras["right"].B, "right", "B", importance_K))
                self.loras["left"].A.copy_(sort_directions(self.loras["left"].A, "left", "A", importance_K))
        return ElasticLinear(self.original, self.left, self.right, dict(self.loras.items()))


@torch.no_grad()
def coordinates(W_MN: Tensor, left_KM: Tensor, refine: int, orthonormal: bool = True) -> Tensor:
    """Return right [K, N] with left^T right = W.

    If the rows of `left` are orthonormal except for rounding, `refine` iterations correct for it. Other rows need a linear system.
    """
    if not orthonormal:
        left, W = left_KM.double(), W_MN.double()
        gram_KK = left @ left.T
        gram_KK.diagonal().add_(INVERTIBLE)  # a row may be zero
        return torch.cholesky_solve(left @ W, torch.linalg.cholesky(gram_KK)).to(W_MN.dtype)
    if not refine:
        return (left_KM.double() @ W_MN.double()).to(W_MN.dtype)
    left, W = widened(left_KM), widened(W_MN)
    right = left @ W
    for _ in range(refine):
        right += left @ (W - left.T @ right)
    return right.to(W_MN.dtype)
