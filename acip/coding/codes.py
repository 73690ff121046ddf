"""Integer codes of a weight matrix with one step size per row.

    w_mn = t_m c_mn,    c = -127 ... 127

On disk, the codes of a matrix are one stream of Huffman codes (raw deflate without matches, one symbol per code). For normally
distributed weights it takes 0.03 to 0.06 bits per code more than their entropy from 2.3 bits on. At 1.5 bits it takes 0.17 bits more,
because every code has at least one bit. With entropy coding, a uniform grid is close to optimal at every rate: it needs 0.25 bits more
than any quantizer of the same error, where fixed-length codes need 0.3 to 0.6 bits more than that for normally distributed weights. It
needs no scales of groups, because rare large weights get long codes.

In memory, a code takes 8 bits. This is the layout of int8 kernels with one scale per row.

Legend: M = out features, N = in features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from acip.errors import ArtifactError
from acip.modeling_acip import as_shares, from_huffman, from_shares, huffman

TOP = 127  # the largest code
STEP_BYTES = 2  # of a row's step size, stored as a float16
UNIT_BYTES = 4  # of the largest step size of the matrix, stored as a float32


@dataclass(frozen=True)
class Codes:
    """A coded matrix in memory."""

    codes: Tensor  # int8 [M, N]
    steps: Tensor  # float32 [M]: t, rounded as it is stored (`stored_steps`)

    def decode(self) -> Tensor:
        """Return the matrix [M, N] in float32."""
        return self.codes.float() * self.steps[:, None]

    def pack(self) -> "PackedCodes":
        """Return the matrix as it is stored."""
        return PackedCodes(compress(self.codes), self.steps.cpu(), self.codes.shape[1])


@dataclass(frozen=True)
class PackedCodes:
    """A coded matrix as it is stored."""

    stream: bytes | memoryview  # Huffman codes
    steps: Tensor  # float32 [M]
    inputs: int  # N

    @property
    def bytes(self) -> int:
        """The bytes on disk: the stream and the step sizes."""
        return len(self.stream) + STEP_BYTES * len(self.steps) + UNIT_BYTES

    def unpack(self) -> Codes:
        """Return the matrix in memory. Raises ArtifactError if the stream is damaged."""
        return Codes(decompress(self.stream, (len(self.steps), self.inputs)), self.steps)


def stored_steps(steps_M: Tensor) -> Tensor:
    """Return step sizes as they are read back: the largest as a float32, the others as float16 shares of it."""
    unit, shares_M = as_shares(steps_M)
    return from_shares(unit, shares_M)


def compress(codes: Tensor) -> bytes:
    """Return int8 codes as a stream of Huffman codes."""
    return huffman(codes.cpu().contiguous().numpy().tobytes())


def decompress(stream: bytes | memoryview, shape: tuple[int, int]) -> Tensor:
    """Return the int8 codes [M, N] of a stream. Raises ArtifactError if it is damaged or holds another number of codes."""
    try:
        codes = from_huffman(stream, shape[0] * shape[1])
    except ValueError as error:
        raise ArtifactError(f"a stream of codes {error}. Fetch the artifact again.") from error
    return torch.frombuffer(bytearray(codes), dtype=torch.int8).reshape(shape)
