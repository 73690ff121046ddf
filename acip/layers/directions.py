"""The directions of a layer: frozen rows at full precision or in 4 bit. Products use any prefix of the rows."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.errors import RecipeError
from acip.layers.sharding import read, settle, write
from acip.modeling_acip import QUANT_BLOCK, one_row, onednn
from acip.recipe import Quantize


def product(x: Tensor, W_MN: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """Return W x + b [..., M] for x [..., N], computed by the fastest kernel."""
    if not one_row(x):
        return F.linear(x, W_MN, bias_M)
    with onednn(False):
        if W_MN.is_contiguous():
            return F.linear(x, W_MN, bias_M)
    N = x.shape[-1]  # the weight is transposed. A weighted sum of its columns is faster than products of a matrix and a vector
    y = F.embedding_bag(torch.arange(N)[None], W_MN.T, mode="sum", per_sample_weights=x.view(1, N)).view(*x.shape[:-1], len(W_MN))
    return y if bias_M is None else y + bias_M


class DirectionMatrix(nn.Module):
    """A frozen matrix [n, width] of directions. Products use a prefix of its rows."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)

    @staticmethod
    def of(values: Tensor, bits: Quantize) -> "DirectionMatrix":
        """Return a direction matrix for `values` [n, width], in 4 bit if `bits` is not "none"."""
        return DirectionMatrix(values.contiguous()) if bits == "none" else FourBitDirectionMatrix(values, bits)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def read(self, count: int | None = None) -> Tensor:
        """Return the first `count` rows (None = all)."""
        return self.values[:count]

    def project(self, x: Tensor, count: int | None = None) -> Tensor:
        """Return the coordinates [..., count] of x [..., width] along the first `count` rows."""
        return self(x, count, False, None)

    def expand(self, h: Tensor, count: int | None = None, bias: Tensor | None = None) -> Tensor:
        """Return the sum [..., width] of the first `count` rows, weighted by h [..., count], plus a bias."""
        return self(h, count, True, bias)

    def forward(self, x: Tensor, count: int | None, expand: bool, bias: Tensor | None) -> Tensor:
        W = self.read(count)
        return product(x, W.T if expand else W, bias)

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Move row order[i] to row i."""
        settle(self)
        for values in self.parameters():
            write(values, read(values).index_select(0, order))


def _bitsandbytes() -> Any:
    """Return bitsandbytes' 4-bit kernels. They are imported on first use, because only 4 bit needs the package."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise RecipeError(
            f"4 bit (nf4, fp4) needs the package bitsandbytes, which can't be imported ({error}). "
            "Install it (pip install bitsandbytes), or omit quantize."
        ) from error
    return bitsandbytes.functional


def four_bit(values: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a matrix [n, width] to a 4-bit format of bitsandbytes, in blocks of 64 numbers of a row.

    Returns codes [n, bytes], scales [n, blocks] and the 16 levels.
    """
    padded = F.pad(values.float(), (0, -values.shape[1] % QUANT_BLOCK))
    codes, state = _bitsandbytes().quantize_4bit(padded.flatten(), blocksize=QUANT_BLOCK, quant_type=kind)
    return codes.view(len(values), -1), state.absmax.view(len(values), -1), state.code


class FourBitDirectionMatrix(DirectionMatrix):
    """A direction matrix in 4 bit. Products dequantize it first (paper 3.4, W4A16)."""

    def __init__(self, values: Tensor, kind: Literal["nf4", "fp4"]) -> None:
        self.width, self.kind, self._dtype = values.shape[1], kind, values.dtype
        codes, absmax, levels = four_bit(values, kind)
        super().__init__(codes)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.register_buffer("code", levels, persistent=False)
        self.code: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def read(self, count: int | None = None) -> Tensor:
        bnb, codes, absmax = _bitsandbytes(), self.values[:count], self.absmax[:count]
        n = absmax.numel() * QUANT_BLOCK
        state = bnb.QuantState(absmax.flatten(), torch.Size([n]), self.code, QUANT_BLOCK, self.kind, torch.float32)
        # flattened: on a CPU, bitsandbytes dequantizes matrices wrongly unless their sides are multiples of 64
        return bnb.dequantize_4bit(codes.flatten()[:, None], state).view(len(codes), -1)[:, : self.width].to(self._dtype)

    def forward(self, x: Tensor, count: int | None, expand: bool, bias: Tensor | None) -> Tensor:
        y: Tensor = _DequantizedLinear.apply(x, self, count, expand)
        return y if bias is None else y + bias


class _DequantizedLinear(torch.autograd.Function):
    """x W^T or x W with a 4-bit W, which is dequantized in the forward and again in the backward pass, and never stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: FourBitDirectionMatrix, count: int | None, expand: bool) -> Tensor:
        ctx.rows, ctx.count, ctx.expand = rows, count, expand
        W = rows.read(count)
        return x @ (W if expand else W.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        W = ctx.rows.read(ctx.count)
        return grad @ (W.T if ctx.expand else W), None, None, None


class FourBitLinear(nn.Module):
    """A linear layer computed in 4 bit. The exact layer is kept on the host, for `restore` and the artifact."""

    def __init__(self, exact: nn.Module, W_MN: Tensor, kind: Literal["nf4", "fp4"]) -> None:
        super().__init__()
        self.rows = FourBitDirectionMatrix(W_MN, kind)
        bias = exact.bias
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False) if isinstance(bias, Tensor) else None
        self._exact = (exact,)  # in a tuple, which hides it from `model.to` and `parameters`

    @property
    def exact(self) -> nn.Module:
        return self._exact[0]

    def park(self) -> None:
        """Move the exact layer to the host."""
        self.exact.to("cpu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.rows.project(x)
        return y if self.bias is None else y + self.bias
