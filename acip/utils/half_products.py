"""Fast products of 16-bit matrices on a CPU that has no instructions for them.

PyTorch leaves such products to oneDNN if the CPU supports the type: bfloat16 needs AVX-512 on x86, float16 needs AVX512-FP16. On other
CPUs, kernels that are made for single rows compute them. For many rows they take 5 to 30 times as long as the same product in float32
(tests/benchmarks/half_products.py), so that a calibration of an hour would take days.

`speed_up_products` replaces these kernels: operands are converted to float32, a tile at a time, and the results are rounded. Sums are
in float32 in both cases, so results differ by rounding only.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

TILE = 1 << 20  # elements of a matrix that are converted at once; larger ones take three times as long, in new pages of memory
QUERIES = 16  # of an attention from which a conversion is faster
ROWS = {True: 8, False: 2}  # from which a conversion is faster; True if the columns of the second operand are contiguous

_lock = threading.Lock()
_slow: set[torch.dtype] = set()  # types whose products are computed in float32
_libraries: list[Any] = []  # holds the new kernels


def speed_up_products(dtype: torch.dtype) -> None:
    """Replace PyTorch's kernels for products of `dtype` on this CPU in the present process if they are slow. Loading a model calls it."""
    if is_slow(dtype) and hasattr(torch.library, "get_kernel"):  # older versions of PyTorch can't call the kernels that were replaced
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
        for name, new in KERNELS.items():
            library.impl(name, _kernel(name, new), "CPU", with_keyset=True)
    return library


def _kernel(name: str, new: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `new` for operands of a slow type, and PyTorch's kernel for others, or if `new` returns None.

    The first argument of `new` is a function that converts its arguments to float32, and calls PyTorch's kernel.
    """
    own = torch.library.get_kernel(f"aten::{name}", "CPU")

    def call(keys: Any, *args: Any, **options: Any) -> Any:
        def in_float32(*operands: Any) -> Any:
            return own.call_boxed(keys, *map(_float32, operands), **{key: _float32(value) for key, value in options.items()})

        found = new(in_float32, *args, **options) if args[0].dtype in _slow else None
        return own.call_boxed(keys, *args, **options) if found is None else found

    return call


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_large(a: Tensor, b: Tensor) -> bool:
    """Return whether the product `a @ b` is faster in float32, including the conversion."""
    return a.numel() > 0 and b.numel() > 0 and a.shape[-2] >= ROWS[b.stride(-2) == 1]


def _mm(_: Any, a_MK: Tensor, b_KN: Tensor) -> Tensor | None:
    return _by_tiles(a_MK, b_KN) if _is_large(a_MK, b_KN) else None


def _addmm(_: Any, c: Tensor, a_MK: Tensor, b_KN: Tensor, beta: float = 1, alpha: float = 1) -> Tensor | None:
    if not _is_large(a_MK, b_KN):
        return None
    added = c if beta else c.new_zeros(())  # a factor of zero also removes NaN
    return _by_tiles(a_MK, b_KN, added.expand(len(a_MK), b_KN.shape[1]), beta, alpha)


def _by_tiles(a_MK: Tensor, b_KN: Tensor, c_MN: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return alpha a b + beta c, computed in tiles, so that converted operands stay in the cache of the CPU and take little memory."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    if K > N and K * N > TILE:  # sums over tiles
        sums_MN = a_MK.new_zeros(M, N, dtype=torch.float32) if c_MN is None else c_MN.float() * beta
        for inner in _slices(K, TILE // N):
            sums_MN.addmm_(a_MK[:, inner].float(), b_KN[inner].float(), alpha=alpha)
        return sums_MN.to(a_MK.dtype)
    out_MN = a_MK.new_empty(M, N)
    for columns in _slices(N, TILE // K):
        b = b_KN[:, columns].float()
        for rows in _slices(M, TILE // K):
            a = a_MK[rows].float()
            out_MN[rows, columns] = a @ b if c_MN is None else torch.addmm(c_MN[rows, columns].float(), a, b, beta=beta, alpha=alpha)
    return out_MN


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(at, at + max(1, step)) for at in range(0, length, max(1, step)))


def _bmm(in_float32: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor | None:
    return in_float32(a, b).to(a.dtype) if _is_large(a, b) else None


def _baddbmm(in_float32: Callable[..., Tensor], c: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor | None:
    return in_float32(c, a, b).to(a.dtype) if _is_large(a, b) else None


def _attention(in_float32: Callable[..., Any], query: Tensor, *others: Any, **_: Any) -> tuple[Tensor, Tensor] | None:
    if query.shape[-2] < QUERIES:
        return None
    out, logsumexp = in_float32(query, *others)
    return out.to(query.dtype), logsumexp  # which has the type of the sums in any case


def _attention_backward(in_float32: Callable[..., Any], grad: Tensor, *others: Any, **_: Any) -> tuple[Tensor, ...] | None:
    if grad.shape[-2] < QUERIES:
        return None
    return tuple(each.to(grad.dtype) for each in in_float32(grad, *others))


KERNELS: dict[str, Callable[..., Any]] = {
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
