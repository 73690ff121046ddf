"""Weights in the types of llama.cpp, with the least error at a layer's outputs.

A type stores the numbers of a row in blocks of 32 or 256. A number is one of a few levels, with a scale and an offset:

    w = scale x level(code) + offset        scale and offset are those of a block, or of a part of it

llama.cpp quantizes each block alone. Here its scales and offsets are kept, and the codes are chosen anew, with the error in the metric H
of acip.coding in mind:

    1. feedback    columns are coded one after the other, and the error of each is compensated by the columns that follow (GPTQ). A block's
                   scales are chosen by llama.cpp when its first column is reached
    2. descent     every code is chosen again, given all others; repeated `sweeps` times

Types whose numbers come from a table of vectors (IQ2, IQ3) are left out: quantized by llama.cpp, they have more error than Q2_K and
Q3_K here.

Legend: M = out features, N = in features, B = numbers of a block.
"""

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from acip.coding.error_feedback import BLOCK
from acip.errors import ArtifactError

EXACT = {torch.float32: GGMLType.F32, torch.float16: GGMLType.F16, torch.bfloat16: GGMLType.BF16}
# the bytes of a block that hold codes; the others hold scales and offsets
CODES = {
    GGMLType.IQ4_NL: slice(2, 18),
    GGMLType.Q5_0: slice(2, 22),
    GGMLType.Q5_1: slice(4, 24),
    GGMLType.Q8_0: slice(2, 34),
    GGMLType.Q2_K: slice(16, 80),
    GGMLType.Q3_K: slice(0, 96),
    GGMLType.IQ4_XS: slice(8, 136),
    GGMLType.Q4_K: slice(16, 144),
    GGMLType.Q5_K: slice(16, 176),
    GGMLType.Q6_K: slice(0, 192),
}
TYPES = {  # by the numbers that rows are a multiple of
    256: tuple(GGMLType[name] for name in ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")),
    32: tuple(GGMLType[name] for name in ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")),
}
SWEEPS = 1
AT_ONCE = 2**25  # numbers of a matrix that are quantized together
Array = np.ndarray[Any, Any]
INSTALL = "pip install 'acip[gguf]' (it compiles llama.cpp, which needs a C++ compiler)"


def load_llama_cpp() -> Any:
    """Return the package llama_cpp. Raise ArtifactError with the command that installs it if it is missing."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ArtifactError(f"GGUF files need llama.cpp: {INSTALL}.") from error
    return llama_cpp


def stored_bytes(ggml_type: GGMLType, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor in a type."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    return int(np.prod(shape)) // block * block_bytes


def padded(size: int) -> int:
    """Return the bytes that a tensor of `size` bytes takes in a file."""
    return gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT)


def exactly(weight: Tensor) -> Array:
    """Return a tensor as it is stored in the type of its dtype (EXACT)."""
    weight = weight.detach().cpu().contiguous()
    return weight.view(torch.uint8).numpy() if weight.dtype == torch.bfloat16 else weight.numpy()


@torch.no_grad()
def quantized(weight_MN: Tensor, metric_NN: Tensor, ggml_type: GGMLType, sweeps: int = SWEEPS) -> Array:
    """Return a weight matrix in a type, as uint8 [M, bytes of a row], with little error in the metric H.

    `metric_NN` is symmetric and positive definite (`acip.coding.error_feedback.damped`).
    """
    U_NN = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(metric_NN)), upper=True)
    parts = weight_MN.split(max(1, AT_ONCE // len(U_NN)))
    return np.concatenate([_quantized(part_MN, metric_NN, U_NN, ggml_type, sweeps) for part_MN in parts])


def _quantized(weight_MN: Tensor, metric_NN: Tensor, U_NN: Tensor, ggml_type: GGMLType, sweeps: int) -> Array:
    """Return rows of a weight matrix in a type."""
    B, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    M, N = weight_MN.shape
    layout = Layout.of(ggml_type)
    rest_NM = weight_MN.float().T.contiguous()  # what the columns have to represent, with the errors of earlier ones
    V_NM, scale_NM, offset_NM = (torch.empty_like(rest_NM) for _ in range(3))
    stored = np.empty((M, N // B, block_bytes), np.uint8)
    for i, start in enumerate(range(0, N, B)):
        here, behind = slice(start, start + B), slice(start + B, N)
        U_BB = U_NN[here, here]
        # with later columns to compensate, the error of the block counts in the metric (U^T U)^-1
        stored[:, i] = quantized_alone(rest_NM[here].T, torch.cholesky_inverse(U_BB.mT).diagonal(), ggml_type)
        scale_NM[here], offset_NM[here] = layout.scales(stored[:, i])
        errors_BM = torch.empty_like(rest_NM[here])
        for n in range(start, start + B):
            V_NM[n] = layout.nearest(rest_NM[n], scale_NM[n], offset_NM[n])
            errors_BM[n - start] = (rest_NM[n] - V_NM[n]) / U_NN[n, n]
            rest_NM[n + 1 : start + B].addr_(U_NN[n, n + 1 : start + B], errors_BM[n - start], alpha=-1)
        rest_NM[behind].addmm_(U_NN[here, behind].T, errors_BM, alpha=-1)
    for _ in range(sweeps):
        _descent(weight_MN.float().T, metric_NN, V_NM, scale_NM, offset_NM, layout)
    return layout.with_values(stored, *(each.T.reshape(M, N // B, B) for each in (V_NM, scale_NM, offset_NM))).reshape(M, -1)


def _descent(W_NM: Tensor, H_NN: Tensor, V_NM: Tensor, scale_NM: Tensor, offset_NM: Tensor, layout: "Layout") -> None:
    """Choose every number of V again, in place, given the other columns."""
    N = len(H_NN)
    slope_NM = H_NN @ (W_NM - V_NM)  # minus half the gradient of the error
    for start in range(0, N, BLOCK):
        end = min(start + BLOCK, N)
        changes_BM = torch.empty_like(slope_NM[start:end])
        for n in range(start, end):
            best_M = layout.nearest(V_NM[n] + slope_NM[n] / H_NN[n, n], scale_NM[n], offset_NM[n])
            changes_BM[n - start] = best_M - V_NM[n]
            V_NM[n] = best_M
            slope_NM[n + 1 : end].addr_(H_NN[n, n + 1 : end], changes_BM[n - start], alpha=-1)
        slope_NM[end:].addmm_(H_NN[end:, start:end], changes_BM, alpha=-1)


@dataclass(frozen=True)
class Layout:
    """The positions of the bits of a type's codes, and the levels that the codes stand for. Changing single bits of a block finds them."""

    ggml_type: GGMLType
    levels: Tensor  # [codes], rising
    codes: Tensor  # int64 [codes]: the code of each level
    element: Array  # [bits of a block's codes]: the number that a bit belongs to
    bit: Array  # [bits of a block's codes]: which bit of its code it is

    @classmethod
    @cache
    def of(cls, ggml_type: GGMLType) -> "Layout":
        """Return the layout of a type."""
        B, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        here = CODES[ggml_type]
        positions = 8 * (here.stop - here.start)
        bits = positions // B
        levels = torch.arange(2.0**bits)
        if ggml_type in (GGMLType.IQ4_NL, GGMLType.IQ4_XS):
            levels = torch.tensor(gguf.quants.IQ4_NL.kvalues, dtype=torch.float32)
        elif ggml_type == GGMLType.Q8_0:
            levels = levels.where(levels < 128, levels - 256)
        blocks = np.full((positions + 1, block_bytes), 0x11, np.uint8)  # any scales but 0
        blocks[:, here] = 0
        blocks[1:, here] = np.packbits(np.eye(positions, dtype=np.uint8), axis=1, bitorder="little")
        values = dequantized(blocks, ggml_type)
        change = values[1:] - values[0]
        element = change.abs().argmax(1)
        blocks[0, here] = 0xFF
        whole = dequantized(blocks[:1], ggml_type)[0] - values[0]  # all bits of each number
        shares = (levels[2 ** torch.arange(bits)] - levels[0]) / (levels[-1] - levels[0])
        share = change.gather(1, element[:, None]) / whole[element][:, None]
        bit = (share - shares).abs().argmin(1)
        kept = levels.sort()
        lowest = 1 if ggml_type == GGMLType.Q8_0 else 0  # kernels do not expect -128
        return cls(ggml_type, kept.values[lowest:], kept.indices[lowest:], element.numpy(), bit.numpy())

    def scales(self, stored: Array) -> tuple[Tensor, Tensor]:
        """Return scale and offset of every number [B, M] of stored blocks [M, bytes]."""
        ends = []
        for byte in (0x00, 0xFF):
            stored = stored.copy()
            stored[:, CODES[self.ggml_type]] = byte
            ends.append(dequantized(stored, self.ggml_type).T)
        first_level, last_level = self.levels[self.codes.argmin()], self.levels[self.codes.argmax()]
        scale_BM = (ends[1] - ends[0]) / (last_level - first_level)
        return scale_BM, ends[0] - scale_BM * first_level

    def nearest(self, wanted: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """Return the numbers of the type that are nearest to `wanted`."""
        return scale * self.levels[self._index(wanted, scale, offset)] + offset

    def with_values(self, stored: Array, values: Tensor, scale: Tensor, offset: Tensor) -> Array:
        """Return stored blocks [..., bytes] with the codes of numbers [..., B] of the type."""
        codes = self.codes.to(torch.uint8)[self._index(values, scale, offset)].numpy()
        stored = stored.copy()
        bits = codes[..., self.element] >> self.bit.astype(np.uint8) & 1
        stored[..., CODES[self.ggml_type]] = np.packbits(bits, axis=-1, bitorder="little")
        return stored

    def _index(self, wanted: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.bucketize(((wanted - offset) / scale).nan_to_num().contiguous(), middles)


def dequantized(stored: Array, ggml_type: GGMLType) -> Tensor:
    """Return the numbers of stored rows in float32."""
    return torch.from_numpy(gguf.quants.dequantize(np.ascontiguousarray(stored), ggml_type))


def quantized_alone(weight_MN: Tensor, importance_N: Tensor, ggml_type: GGMLType) -> Array:
    """Return rows in a type as uint8 [M, bytes of a row], by llama.cpp's quantizer: each block alone, weighted by `importance_N`."""
    rows = np.ascontiguousarray(weight_MN.numpy(), np.float32)
    importance = np.ascontiguousarray(importance_N.numpy(), np.float32)
    M, N = rows.shape
    stored = np.empty((M, stored_bytes(ggml_type, (N,))), np.uint8)
    threads = torch.get_num_threads()

    def quantize(part: range) -> None:
        _quantizer()(ggml_type, rows[part.start :].ctypes, stored[part.start :].ctypes, 0, len(part), N, importance.ctypes)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(quantize, _parts(M, threads)))
    return stored


def _parts(rows: int, count: int) -> Iterator[range]:
    """Yield `rows` in at most `count` ranges."""
    size = -(-rows // count)
    for start in range(0, rows, size):
        yield range(start, min(start + size, rows))


@cache
def _quantizer() -> Any:
    """Return llama.cpp's function that quantizes rows."""
    load_llama_cpp()
    from llama_cpp._ggml import libggml

    function = libggml.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function
