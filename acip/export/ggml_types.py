"""Weights in the types of llama.cpp: blocks of 32 or 256 numbers of a row, each with its own scales.

llama.cpp quantizes each block alone. Here the error of a block is compensated by the blocks that follow, so that the error at the layer's
outputs is small in the metric H of acip.coding: error feedback as in GPTQ, with llama.cpp's quantizer of a block instead of rounding.

    H^-1 = U^T U                       U upper triangular
    E    = W_b - quantized W_b         of block b, whose weights are weighted by the diagonal of (U_bb^T U_bb)^-1
    W_r <- W_r - E U_bb^-1 U_br        for the columns r behind the block

Legend: M = out features, N = in features.
"""

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from acip.errors import ArtifactError

# of 32 numbers, for rows that are not a multiple of 256; and of 256
TYPES = tuple(GGMLType[name] for name in ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"))
EXACT = {torch.float32: GGMLType.F32, torch.float16: GGMLType.F16, torch.bfloat16: GGMLType.BF16}
INSTALL = "pip install llama-cpp-python (it compiles llama.cpp: cmake and a C++ compiler are needed)"


def llama_cpp() -> Any:
    """Return the package llama_cpp. Raise ArtifactError with the command that installs it if it is missing."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ArtifactError(f"GGUF files need llama.cpp's quantizer: {INSTALL}.") from error
    return llama_cpp


def fits(ggml_type: GGMLType, columns: int) -> bool:
    """Return whether rows of this many numbers can be stored in a type."""
    return columns % gguf.GGML_QUANT_SIZES[ggml_type][0] == 0


def stored_bytes(ggml_type: GGMLType, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor in a type."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    return int(np.prod(shape)) // block * block_bytes


def exactly(weight: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as it is stored in the type of its dtype (EXACT)."""
    weight = weight.detach().cpu().contiguous()
    return weight.view(torch.uint8).numpy() if weight.dtype == torch.bfloat16 else weight.numpy()


def quantized(weight_MN: Tensor, metric_NN: Tensor, ggml_type: GGMLType) -> np.ndarray[Any, Any]:
    """Return a weight matrix in a type, as uint8 [M, bytes of a row], with little error in the metric H.

    `metric_NN` is symmetric and positive definite (`acip.coding.error_feedback.damped`).
    """
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    M, N = weight_MN.shape
    U_NN = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(metric_NN)), upper=True)
    rest_MN = weight_MN.float().clone()
    stored = np.empty((M, N // block, block_bytes), np.uint8)
    for i, start in enumerate(range(0, N, block)):
        here, behind = slice(start, start + block), slice(start + block, N)
        U_bb = U_NN[here, here]
        importance_b = torch.cholesky_inverse(U_bb.mT).diagonal()
        stored[:, i] = _quantized_rows(rest_MN[:, here], importance_b, ggml_type)
        E_Mb = rest_MN[:, here] - dequantized(stored[:, i], ggml_type)
        rest_MN[:, behind] -= torch.linalg.solve_triangular(U_bb, E_Mb, upper=True, left=False) @ U_NN[here, behind]
    return stored.reshape(M, -1)


def dequantized(stored: np.ndarray[Any, Any], ggml_type: GGMLType) -> Tensor:
    """Return the numbers of stored rows in float32."""
    return torch.from_numpy(gguf.quants.dequantize(np.ascontiguousarray(stored), ggml_type))


def _quantized_rows(weight_MN: Tensor, importance_N: Tensor, ggml_type: GGMLType) -> np.ndarray[Any, Any]:
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
    llama_cpp()
    from llama_cpp._ggml import libggml

    function = libggml.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function
