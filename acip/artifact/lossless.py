"""Store bfloat16 tensors in about two thirds of their bytes, bit for bit.

A bfloat16 number has 1 bit of sign, 8 of exponent and 7 of mantissa. The exponents of weights take few values: about 2.6 bits of
information. Signs and mantissas have none to spare. A number is therefore rotated to the left by one bit, which splits it into two bytes:

    high    the exponent, as Huffman codes
    low     the mantissa and, as the last bit, the sign, as they are

A chunk of rows is the low bytes of its numbers, followed by the stream of the high bytes (acip/modeling_acip.py). Chunks are decoded
separately, so that ranges of rows can be read. The header of the file has the entry `NAME.bfloat16` in its metadata:
"[shape, bytes of each chunk]"; for other readers, the tensor is uint8 [bytes].

Tensors of other dtypes, and small ones, are stored as they are.
"""

from acip.modeling_acip import decode_bfloat16 as decode
from acip.modeling_acip import encode_bfloat16 as encode

__all__ = ["ITEMSIZE", "decode", "encode", "least_bytes", "most_bytes"]

ITEMSIZE = 2  # bytes of a bfloat16 number


def most_bytes(size: int) -> int:
    """Return an upper bound of the bytes of a chunk whose numbers take `size` bytes: deflate stores what it cannot code."""
    return size + size // 64 + 64


def least_bytes(count: int) -> int:
    """Return the fewest bytes of a chunk of `count` numbers: a Huffman code has at least one bit."""
    return count + -(-count // 8)
