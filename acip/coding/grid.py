"""Codes of a weight matrix on uniform grids, one grid per group of consecutive inputs.

    w = s (c - (2^b - 1) / 2),   c = 0 ... 2^b - 1

The 2^b levels are symmetric around 0 and do not contain it. The scale s of a group is stored as a byte k, relative to the largest scale
of its row, which is a float16 t:

    s = t 2^(-k / 32),   k = 0 ... 255

so that scales cost 8 bits per group and 16 per row, with a relative error of at most 1.1 %. Codes are stored as b planes of single bits.

Legend: M = out features, N = in features, G = groups of a row, b = bits.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STEPS_PER_OCTAVE = 32  # of stored scales
LEAST_SCALE = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True)
class GroupScales:
    """The scales of a matrix as they are stored."""

    steps: Tensor  # uint8 [M, G]: k
    rows: Tensor  # float16 [M]: t

    @classmethod
    def of(cls, scales_MG: Tensor) -> "GroupScales":
        """Return the stored scales next to `scales_MG`, in the logarithm. Scales below 1/250 of the row's largest are raised to that."""
        rows_M = scales_MG.amax(1).clamp(LEAST_SCALE, torch.finfo(torch.float16).max).half()
        ratio_MG = scales_MG.float() / rows_M.float()[:, None]
        steps_MG = (-STEPS_PER_OCTAVE * ratio_MG.clamp_min(LEAST_SCALE).log2()).round().clamp(0, 255)
        return cls(steps_MG.to(torch.uint8), rows_M)

    def read(self) -> Tensor:
        """Return the scales [M, G] in float32."""
        return self.rows.float()[:, None] * torch.exp2(self.steps.float() / -STEPS_PER_OCTAVE)

    @property
    def bytes(self) -> int:
        return self.steps.numel() + 2 * self.rows.numel()


@dataclass(frozen=True)
class Codes:
    """A matrix [M, N] in `bits` bits per number. `group` is the number of inputs that share a scale; the last group may be smaller."""

    codes: Tensor  # uint8 [M, N]
    scales: GroupScales
    bits: int
    group: int

    def decode(self) -> Tensor:
        """Return the matrix in float32."""
        return levels_of(self.codes, self.bits) * by_input(self.scales.read(), self.group, self.codes.shape[1])

    @property
    def bytes(self) -> int:
        """The bytes of the packed codes and of the scales."""
        return packed_bytes(self.codes.numel(), self.bits) + self.scales.bytes


def groups_of(N: int, group: int) -> int:
    """Return G, the number of groups of a row."""
    return -(-N // group)


def by_input(values_MG: Tensor, group: int, N: int) -> Tensor:
    """Repeat one value per group [M, G] for every input [M, N]."""
    return values_MG.repeat_interleave(group, 1)[:, :N]


def levels_of(codes: Tensor, bits: int) -> Tensor:
    """Return the levels of codes, in units of the scale: (1 - 2^b) / 2 ... (2^b - 1) / 2."""
    return codes.float() - (2**bits - 1) / 2


def nearest(weights: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the levels nearest to `weights`, in units of the scale; elementwise."""
    top = (2**bits - 1) / 2
    return (torch.floor(weights / scales) + 0.5).clamp_(-top, top)


def packed_bytes(numbers: int, bits: int) -> int:
    """Return the bytes of `numbers` codes in `bits` planes of single bits."""
    return bits * math.ceil(numbers / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes as planes of single bits, most significant first: uint8 [bits, numbers / 8, rounded up]."""
    flat = codes.reshape(-1).numpy()
    planes = [np.packbits((flat >> bit) & 1) for bit in reversed(range(bits))]
    return torch.from_numpy(np.stack(planes))


def unpack(planes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the codes of `pack`, uint8 in `shape`."""
    numbers = math.prod(shape)
    codes = np.zeros(numbers, dtype=np.uint8)
    for plane in planes.numpy():
        codes = (codes << 1) | np.unpackbits(plane, count=numbers)
    return torch.from_numpy(codes).reshape(shape)
