"""The product of a layer whose parts have different forms and ranks, such as query, key and value.

All matrices that multiply x are stacked, so that one product computes what the parts begin with. Then each part of factors or pivots
multiplies by its second matrix. If there are pivots, one gather puts the rows of all parts in their places. Example: query dense, key as
factors and value as pivots:

    [h_q, h_k, h_v] = [W_q; R_k; P_v] x         y = [h_q, L_k h_k, h_v, C_v h_v][place]

Coded parts are stacked in the same way; they are computed with their integer codes.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.modeling_acip import integer_product
from acip_vllm.shards import Piece

BLOCK = 32  # ranks are padded to multiples of it: layers of almost equal ranks share a plan of oneDNN, and odd ranks have slow kernels


class Matrix(nn.Module):
    """A weight [M, N] in a module of its own, because vLLM's linear methods keep what they prepare for a weight in its module."""

    def __init__(self, weight_MN: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_MN.contiguous(), requires_grad=False)


def plain_product(matrix: nn.Module, x: Tensor) -> Tensor:
    """Return x W^T."""
    weight = matrix.weight
    assert isinstance(weight, Tensor)
    return F.linear(x, weight)


class FusedProduct(nn.Module):
    """y = [y_1, y_2, ...]: the outputs of the pieces of a fused layer, one after another."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device | None = None) -> None:
        super().__init__()
        pieces = [_in_blocks(piece) for piece in pieces]
        plain = [piece for piece in pieces if piece.steps is None]
        coded = [piece for piece in pieces if piece.steps is not None]
        self.coded = [piece.steps is not None for piece in pieces]
        self.sizes = [len(piece.first) for piece in plain]  # of the first products
        self.coded_sizes = [len(piece.first) for piece in coded]
        self.pivots = [piece.place is not None for piece in pieces]
        self.rows = [len(piece.first if piece.second is None else piece.second) for piece in pieces]
        self.first = Matrix(torch.cat([piece.first for piece in plain]).to(device)) if sum(self.sizes) else None
        self.second = nn.ModuleList(
            nn.Identity() if piece.second is None or not piece.second.numel() else Matrix(piece.second.to(device)) for piece in pieces
        )
        self.has_second = [piece.second is not None for piece in pieces]
        self.is_plain = not any(self.has_second) and not coded
        self.codes: Tensor | None
        self.steps: Tensor | None
        self.place: Tensor | None
        self.register_buffer("codes", torch.cat([piece.first for piece in coded]).to(device) if coded else None)
        self.register_buffer("steps", torch.cat([piece.steps for piece in coded if piece.steps is not None]).to(device) if coded else None)
        self.register_buffer("place", _places(pieces).to(device) if any(self.pivots) else None)

    def matrices(self) -> list[nn.Module]:
        """Return the modules with a plain weight, which `multiply` is called with."""
        return [module for module in self.modules() if isinstance(module, Matrix)]

    def forward(self, x: Tensor, multiply: Callable[[nn.Module, Tensor], Tensor] = plain_product) -> Tensor:
        """Return y [..., sum of m] for x [..., n]. `multiply` computes x W^T for the weight of a module."""
        first = x.new_empty(*x.shape[:-1], 0) if self.first is None else multiply(self.first, x)
        if self.is_plain:
            return first
        plain = iter(first.split_with_sizes(self.sizes, -1))
        coded: Iterator[Tensor] = iter(())
        if self.codes is not None and self.steps is not None:
            coded = iter((integer_product(x, self.codes) * self.steps).to(x.dtype).split_with_sizes(self.coded_sizes, -1))
        outputs = []
        for i, second in enumerate(self.second):
            h = next(coded if self.coded[i] else plain)
            if self.pivots[i] or not self.has_second[i]:
                outputs.append(h)
            if self.has_second[i]:
                outputs.append(multiply(second, h) if isinstance(second, Matrix) else h.new_zeros(*h.shape[:-1], self.rows[i]))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if self.place is None else y.index_select(-1, self.place)


def _in_blocks(piece: Piece) -> Piece:
    """Return a piece of factors or pivots with zeros up to a whole block of directions, and of rows that a gather leaves out."""
    rank = len(piece.first)
    missing = -rank % BLOCK
    if piece.second is None or not piece.second.numel():
        return piece
    place = None if piece.place is None else torch.where(piece.place < rank, piece.place, piece.place + missing)
    rows = 0 if place is None else -len(piece.second) % BLOCK
    return Piece(F.pad(piece.first, (0, 0, 0, missing)), F.pad(piece.second, (0, missing, 0, rows)), place)


def _places(pieces: Sequence[Piece]) -> Tensor:
    """Return the position of each row of y among all outputs of a `FusedProduct`."""
    counts = [len(piece.first) + len(piece.second) if piece.place is not None and piece.second is not None else
              len(piece.first if piece.second is None else piece.second) for piece in pieces]  # fmt: skip
    firsts = torch.tensor([0, *counts]).cumsum(0).tolist()
    return torch.cat([
        first + (torch.arange(last - first) if piece.place is None else piece.place)
        for piece, (first, last) in zip(pieces, pairwise(firsts), strict=True)
    ])  # fmt: skip
