"""Fast products of 16-bit matrices on a CPU that has no instructions for them.

PyTorch leaves such products to oneDNN if the CPU supports the type: bfloat16 needs AVX-512 on x86, float16 needs AVX512-FP16. On other
CPUs it uses kernels of its own that are fast for a single row only. For 64 rows or more in bfloat16 they take 4 to 36 times
as long as the new ones (tests/benchmarks/CALIBRATION.md).

`speed_up_products` replaces these kernels. The new ones convert the operands to float32, multiply, and round the result. The old ones also
add in float32, so the results differ by rounding only. Products of matrices are converted a tile at a time.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

TILE = 1 << 20  # elements that are converted at once. Larger parts are slower: they do not fit in the CPU's cache.
ROWS = {True: 8, False: 2}  # Products of fewer rows are not converted. True: the columns of the second operand are contiguous.
QUERIES = 16  # Gradients of an attention with fewer queries are not converted.
ATTENTION_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
OPERANDS = 4  # of it, beside the gradient: query, key, value and result


_lock = threading.Lock()
_slow: set[torch.dtype] = set()  # types whose products are computed in float32
_libraries: list[Any] = []  # holds the new kernels


def speed_up_products(dtype: torch.dtype) -> None:
    """Replace PyTorch's kernels for products of `dtype` on this CPU in the present process if they are slow. Loading a model calls it."""
    if is_slow(dtype) and hasattr(torch.library, "get_kernel"):  # older versions of PyTorch can't call a kernel that was replaced
        with _lock:
            _slow.add(dtype)
            if not _libraries:
                _libraries.append(_replace())


def is_slow(dtype: torch.dtype) -> bool:
    """Return whether `dtype` is a 16-bit type that oneDNN does not multiply on this CPU."""
    if dtype not in (torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    kernels = torch.ops.mkldnn
    return not (kernels._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else kernels._is_mkldnn_fp16_supported())


def _replace() -> Any:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # PyTorch says that a kernel is replaced
        library.impl("mm", _mm, "CPU")
        library.impl("addmm", _addmm, "CPU")
        library.impl("bmm", _bmm, "CPU")
        library.impl("baddbmm", _baddbmm, "CPU")
        own = torch.library.get_kernel(f"aten::{ATTENTION_BACKWARD}", "CPU")
        library.impl(ATTENTION_BACKWARD, _attention_backward(own), "CPU", with_keyset=True)
    return library


def _is_faster(a: Tensor, b: Tensor, *others: Tensor) -> bool:
    """Return whether the product `a @ b` is faster in float32, including the conversion. Malformed products are left to PyTorch."""
    return (
        a.dtype in _slow
        and all(other.dtype == a.dtype for other in (b, *others))
        and a.dim() == b.dim() > 1
        and a.shape[-1] == b.shape[-2]
        and a.numel() > 0
        and b.numel() > 0
        and a.shape[-2] >= ROWS[b.stride(-2) == 1]
    )


# PyTorch's own kernels are still behind the variants with `out`.


def _mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    if not _is_faster(a_MK, b_KN):
        return torch.mm(a_MK, b_KN, out=a_MK.new_empty(0))
    return _by_tiles(a_MK, b_KN)


def _addmm(c: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _is_faster(a_MK, b_KN, c):
        return torch.addmm(c, a_MK, b_KN, beta=beta, alpha=alpha, out=c.new_empty(0))
    return _by_tiles(a_MK, b_KN, c.expand(len(a_MK), b_KN.shape[1]), beta, alpha)


def _by_tiles(a_MK: Tensor, b_KN: Tensor, c_MN: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return alpha a b + beta c. A tile has at most TILE elements, or one row or column."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    added = a_MK.new_zeros(()) if c_MN is None or not beta else c_MN  # a factor of zero also removes NaN
    added_MN, beta = added.expand(M, N), beta or 1
    if K > N and K * N > TILE:  # b by rows: its tiles add up
        out_MN = added_MN.float() * beta
        for inner in _slices(K, TILE // N):
            b = b_KN[inner].float()
            for rows in _slices(M, N):
                out_MN[rows].addmm_(a_MK[rows, inner].float(), b, alpha=alpha)
        return out_MN.to(a_MK.dtype)
    out_MN = a_MK.new_empty(M, N)
    for columns in _slices(N, TILE // K):
        b = b_KN[:, columns].float()
        for rows in _slices(M, TILE // K):
            out_MN[rows, columns] = added_MN[rows, columns].float().mul_(beta).addmm_(a_MK[rows].float(), b, alpha=alpha)
    return out_MN


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(at, at + max(1, step)) for at in range(0, length, max(1, step)))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if not _is_faster(a, b):
        return torch.bmm(a, b, out=a.new_empty(0))
    return torch.bmm(a.float(), b.float(), out=a.new_empty(0, dtype=torch.float32)).to(a.dtype)


def _baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _is_faster(a, b, c):
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha, out=c.new_empty(0))
    out = a.new_empty(0, dtype=torch.float32)
    return torch.baddbmm(c.float(), a.float(), b.float(), beta=beta, alpha=alpha, out=out).to(a.dtype)


def _attention_backward(own: Any) -> Callable[..., Any]:
    """Return the kernel of the gradients of an attention. `own` is that of PyTorch."""

    def call(keys: Any, grad: Tensor, *others: Any, **options: Any) -> Any:
        tensors = [value for value in (*others, *options.values()) if isinstance(value, Tensor)]
        half = [tensor for tensor in tensors if tensor.dtype == grad.dtype]  # all but the logsumexp and a boolean mask
        if grad.dtype not in _slow or grad.shape[-2] < QUERIES or len(half) < OPERANDS:
            return own.call_boxed(keys, grad, *others, **options)
        converted = {key: _float32(value) for key, value in options.items()}
        return tuple(each.to(grad.dtype) for each in own.call_boxed(keys, *map(_float32, (grad, *others)), **converted))

    return call


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
