"""The result of every quantizer: a weight matrix that can be read back from a counted number of bytes."""

from typing import NamedTuple

from torch import Tensor


class CodedWeight(NamedTuple):
    """A weight matrix after coding. `bytes` counts everything that is stored to read it back: codes, scales, zeros, tables."""

    weight: Tensor  # the decoded matrix [M, N], in float32
    bytes: int
