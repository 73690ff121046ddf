"""Store bfloat16 tensors in about two thirds of their bytes, bit for bit.

A bfloat16 number has 1 bit of sign, 8 of exponent and 7 of mantissa. The exponents of weights take few values: about 2.6 bits of
information. Signs and mantissas have none to spare. A number is therefore rotated to the left by one bit, which splits it into two bytes:

    high    the exponent, as Huffman codes
    low     the mantissa and, as the last bit, the sign, as they are

A chunk of rows is the low bytes of its numbers, followed by the stream of the high bytes (acip.coding.codes). Chunks are decoded
separately, so that ranges of rows can be read. The header of the file has the entry `NAME.bfloat16` in its metadata:
"[shape, bytes of each chunk]"; for other readers, the tensor is uint8 [bytes].

Tensors of other dtypes, and small ones, are stored as they are.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from acip.coding.codes import from_huffman, huffman

ITEMSIZE = 2  # bytes of a bfloat16 number


def encode(numbers: Tensor) -> bytes:
    """Return bfloat16 numbers as one chunk."""
    bits = numbers.contiguous().view(torch.int16).numpy().view(np.uint16).ravel()
    rotated = (bits << 1) | (bits >> 15)
    return rotated.astype(np.uint8).tobytes() + huffman((rotated >> 8).astype(np.uint8).tobytes())


def decode(content: memoryview, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return the bfloat16 numbers of chunks, in one dimension. A chunk has `sizes` bytes and `counts` numbers.

    Raise ValueError if a chunk is damaged, or holds another number of numbers.
    """
    bits = np.empty(sum(counts), np.uint16)
    start = done = 0
    for size, count in zip(sizes, counts, strict=True):
        low = np.frombuffer(content, np.uint8, count, start)
        high = np.frombuffer(from_huffman(content[start + count : start + size], count), np.uint8)
        rotated = (high.astype(np.uint16) << 8) | low
        bits[done : done + count] = (rotated >> 1) | (rotated << 15)
        start, done = start + size, done + count
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def most_bytes(size: int) -> int:
    """Return an upper bound of the bytes of a chunk whose numbers take `size` bytes: deflate stores what it cannot code."""
    return size + size // 64 + 64


def least_bytes(count: int) -> int:
    """Return the fewest bytes of a chunk of `count` numbers: a Huffman code has at least one bit."""
    return count + -(-count // 8)
