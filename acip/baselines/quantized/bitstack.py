"""BitStack: each layer as a stack of residual blocks of about one bit per weight, and one order over the blocks of all layers.

Source: Wang et al., ICLR 2025, arXiv 2410.23918.

    R_1 = W diag(d)                         d = L2 norm of each input feature over the tokens of a window, mean over windows, + 1e-3
    B_i = sign(R_i) * (L_i P_i)             L_i P_i = the best approximation of |R_i| of rank k
    R_i+1 = R_i - B_i
    W ~ (B_1 + ... + B_l) diag(d)^-1        the layer at level l

A block stores the signs, 1 bit each, and the factors L_i and P_i in 16 bit: 1 + 16 k (M + N) / (M N) bits per weight. The authors use
16 blocks per layer and k = 16.

Order: for every level l, set all layers to level l - 1 and measure the perplexity on calibration text with one layer at a time at
level l. The blocks of level l are sorted by this perplexity, lowest first, after all blocks of lower levels. Thus the levels of any two
layers differ by at most 1, and every layer has at least one block. The authors use 32 windows of 2048 tokens for this. A model of a
byte budget is a prefix of the order.

d costs no bytes if the preceding layer absorbs it: the authors divide the norm before q, k, v, gate and up by d, the rows of up for
down, and the rows of v for o; they do not scale o if query heads share key heads. If d is stored, it adds 2 N bytes per layer in
16 bit; no block counts it.

Two differences from the authors' code. A residual contains the rounding errors of the factors to 16 bit, since R_i+1 is computed from
the stored block. The factors are computed from the eigenvectors of |R| |R|^T instead of an SVD, which is 4 times as fast for
576 x 1536; the error of the approximation is equal to six digits.

Legend: M = out features, N = in features, k = rank of the magnitudes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from acip.errors import BudgetError

ITERATIONS = 16
RANK = 16


@dataclass(frozen=True)
class Block:
    """One residual block, sign * (left right), as it is stored."""

    signs: Tensor  # uint8 [ceil(M N / 8)], row by row, the first sign in the highest bit; 1 = positive
    left: Tensor  # float16 [M, k]
    right: Tensor  # float16 [k, N]

    @property
    def bytes(self) -> int:
        """The stored bytes."""
        return self.signs.nbytes + self.left.nbytes + self.right.nbytes

    def matrix_MN(self) -> Tensor:
        """Return the block as a float32 matrix."""
        magnitude_MN = self.left.float() @ self.right.float()
        return magnitude_MN.mul_(unpacked_signs(self.signs, magnitude_MN.numel()).view_as(magnitude_MN))


class Entry(NamedTuple):
    """A block in the order of all blocks: the one that raises `layer` to `level`. The first level is 1."""

    layer: str
    level: int


# ---- decomposition


def input_scale(inputs_BTN: Tensor) -> Tensor:
    """Return d [N] for the inputs of a layer, B windows of T tokens."""
    return inputs_BTN.float().norm(dim=1).mean(0) + 1e-3


@torch.no_grad()
def decompose(weight_MN: Tensor, scale_N: Tensor, iterations: int = ITERATIONS, k: int = RANK) -> list[Block]:
    """Return the blocks of a layer. Its level l consists of the first l blocks; `scale_N` is d, positive."""
    residual_MN = weight_MN.float() * scale_N.float()
    blocks = []
    for _ in range(iterations):
        left_Mk, right_kN = rank_approximation(residual_MN.abs(), k)
        blocks.append(Block(packed_signs(residual_MN), left_Mk.half(), right_kN.half()))
        residual_MN -= blocks[-1].matrix_MN()
    return blocks


@torch.no_grad()
def weight(blocks: Sequence[Block], scale_N: Tensor) -> Tensor:
    """Return the weight [M, N] in float32 at the level of the given blocks, at least one."""
    total_MN = blocks[0].matrix_MN()
    for block in blocks[1:]:
        total_MN += block.matrix_MN()
    return total_MN / scale_N.float()


def rank_approximation(matrix_MN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return left [M, k] and right [k, N], the best approximation of rank k (at most M and N).

    Each factor contains the square roots of the singular values, so that both fit the range of float16.
    """
    if matrix_MN.shape[0] > matrix_MN.shape[1]:
        right_kM, left_Nk = (factor.T for factor in rank_approximation(matrix_MN.T, k))
        return left_Nk.contiguous(), right_kM.contiguous()
    U_Mk = torch.linalg.eigh(matrix_MN @ matrix_MN.T).eigenvectors.flip(1)[:, :k]
    right_kN = U_Mk.T @ matrix_MN
    root_k = right_kN.norm(dim=1).sqrt()
    return U_Mk * root_k, right_kN / root_k.clamp_min(1e-30)[:, None]


def packed_signs(matrix: Tensor) -> Tensor:
    """Return the signs of a matrix, 8 per byte. The sign of 0 is positive. Unused bits of the last byte are 0."""
    positive = (matrix >= 0).flatten().to(torch.uint8)
    bits_n8 = F.pad(positive, (0, -len(positive) % 8)).view(-1, 8)
    return (bits_n8 << shifts(matrix.device)).sum(1, dtype=torch.uint8)


def unpacked_signs(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` signs as int8, 1 or -1."""
    bits_n8 = (packed[:, None] >> shifts(packed.device)) & 1
    return bits_n8.flatten()[:count].to(torch.int8) * 2 - 1


def shifts(device: torch.device) -> Tensor:
    """Return the position of each of the 8 signs of a byte."""
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


# ---- order


def sort(layers: Sequence[str], loss: Callable[[str, int], float], iterations: int = ITERATIONS) -> list[Entry]:
    """Return the blocks of all layers, most important first.

    `loss(layer, level)` is the loss or perplexity of the model with `layer` at `level` and all other layers at `level` - 1, for levels
    from 2 on: (iterations - 1) x layers measurements, level by level. The blocks of level 1 keep the order of `layers`. Losses that
    are not finite are sorted last, by the loss of the same layer at the next level.
    """
    levels = range(2, iterations + 1)
    losses = [{layer: finite_or_inf(loss(layer, level)) for layer in layers} for level in levels]

    def key(entry: Entry) -> tuple[int, list[float]]:
        return entry.level, [at_level[entry.layer] for at_level in losses[entry.level - 2 :]]

    return [Entry(layer, 1) for layer in layers] + sorted((Entry(layer, level) for level in levels for layer in layers), key=key)


def finite_or_inf(value: float) -> float:
    """Return `value`, or infinity if it is not finite."""
    return value if math.isfinite(value) else math.inf


def levels_within(order: Sequence[Entry], block_bytes: Mapping[str, int], budget_bytes: int) -> dict[str, int]:
    """Return the level of each layer for the longest prefix of `order` within `budget_bytes`.

    `block_bytes` are the bytes of one block of each layer; they are equal for all levels. Raises BudgetError if the budget cannot hold
    the first block of every layer.
    """
    if (least := sum(block_bytes.values())) > budget_bytes:
        raise BudgetError(f"{budget_bytes} bytes cannot hold the first block of every layer; the smallest size is {least} bytes.")
    levels = dict.fromkeys(block_bytes, 0)
    used = 0
    for layer, level in order:
        used += block_bytes[layer]
        if used > budget_bytes:
            break
        levels[layer] = level
    return levels
