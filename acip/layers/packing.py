"""Packed copies of weights in oneDNN's layout, which make generation on a CPU faster at the cost of memory.

    1 row     uses the plain weight, which is read once and in order
    2, 3      are padded with rows of zeros: such products take longer than those with 4 rows
    more      use the packed copy: oneDNN would reorder a plain weight for each product, which takes about as long as the product
              (tests/benchmarks/products.py)

Packing is optional. The resident factors of an any-size model are not packed, because a rank is a prefix of them and a packed weight
can't be cut. (Packed in pieces of 64 to 256 directions, they were slower than plain, because each piece is a separate product.)
"""

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.modeling_acip import bias_of, set_module, weight_MN

MKLDNN_LAYOUT = 3  # torch._mkldnn in C
LEAST_ROWS = 4  # of a packed product; 4 to 6 rows take as long as reading the weight


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weight. For inference only: training the weight does not update the copy."""

    def __init__(self, plain: nn.Module, packed: Tensor | None = None) -> None:
        """Replace a linear layer `plain`. `packed` is its weight as `packed_weight` returns it, if it was made before."""
        super().__init__(1, 1, bias=False, device="meta")
        weight, bias = weight_MN(plain), bias_of(plain)
        self.out_features, self.in_features = weight.shape
        self.weight = _parameter(weight)
        self.register_parameter("bias", None if bias is None else _parameter(bias))
        self._packed: Tensor | None = packed_weight(weight) if packed is None else packed

    @property
    def packed_bytes(self) -> int:
        packed = self._packed
        return 0 if packed is None else int(torch.ops.mkldnn._nbytes(packed))

    def unpack(self) -> None:
        """Drop the packed copy. A product that is running in another thread still uses it to its end."""
        self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        packed = self._packed
        rows = x.numel() // x.shape[-1]
        if packed is None or rows == 1 or torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        x_SN = x if rows >= LEAST_ROWS else F.pad(x.reshape(rows, -1), (0, 0, 0, LEAST_ROWS - rows))
        y = _product(x_SN, packed, self.bias)
        return y if rows >= LEAST_ROWS else y[:rows].view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Drop the packed copy when the layer is moved or cast."""
        self.unpack()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed copy out of copies and pickles."""
        return {**self.__dict__, "_packed": None}


def pack(model: nn.Module) -> None:
    """Add packed copies of their weights to the linear layers of `model`, the head included, where this machine supports it.

    The copies take as many bytes as the weights. Use it for models that generate on a CPU: an export or an any-size model.
    """
    for name, module in unpacked(model):
        set_module(model, name, PackedLinear(module))


def unpacked(model: nn.Module) -> list[tuple[str, Any]]:
    """Return (name, layer) of the linear layers of `model` that `pack` replaces."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D") and packable(module.weight)
    ]


def packed_weight(weight_MN: Tensor) -> Tensor:
    """Return a copy of a weight in oneDNN's layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_MN.detach(), None)
    return packed


def as_bytes(packed: Tensor) -> dict[str, Tensor]:
    """Return a packed weight as plain tensors: its `content`, and oneDNN's description of it. `from_bytes` is the inverse."""
    content = ctypes.string_at(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
    description = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    return {"content": torch.frombuffer(bytearray(content), dtype=torch.uint8), "description": description}


def from_bytes(stored: Mapping[str, Tensor], weight_MN: Tensor) -> Tensor:
    """Return the packed weight of `weight_MN` from what `as_bytes` returned on this machine. It shares the memory of its content.

    torch has this in the interface of its compiled models only, in C.
    """
    library, content, description = _library(), stored["content"], stored["description"].numpy().tobytes()
    sizes, no_strides = (ctypes.c_int64 * 2)(*weight_MN.shape), (ctypes.c_int64 * 2)(0, 0)
    dtype = getattr(library, f"aoti_torch_dtype_{str(weight_MN.dtype).removeprefix('torch.')}")()
    handle = ctypes.c_void_p()
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(content.data_ptr()), ctypes.c_int64(2), sizes, no_strides, ctypes.c_int64(0), dtype, 0, 0, ctypes.byref(handle),
        MKLDNN_LAYOUT, description, ctypes.c_int64(len(description)),
    )  # fmt: skip
    if failed:
        raise RuntimeError("torch can't use a packed weight that was made on this machine")
    packed: Any = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule(handle))
    packed.content = content  # keeps the memory until the last product ends
    return packed


@functools.cache
def supports_bytes() -> bool:
    """Return whether `as_bytes` and `from_bytes` work on this machine with this version of torch."""
    weight_MN = torch.linspace(-1, 1, 48 * 32).view(48, 32)
    x_SN = weight_MN[:LEAST_ROWS]
    try:
        packed = packed_weight(weight_MN)
        products = (_product(x_SN, each, None) for each in (packed, from_bytes(as_bytes(packed), weight_MN)))
        return torch.equal(*products)
    except (AttributeError, OSError, RuntimeError):
        return False


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


@functools.cache
def _library() -> Any:
    """Return torch's library of C functions."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _capsule(handle: ctypes.c_void_p) -> Any:
    """Return a pointer as the object in which Python passes it to C."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(handle, None, None)


def _parameter(tensor: Tensor) -> nn.Parameter:
    """Return the tensor as a parameter that shares its memory."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)


def packable(weight: Tensor | nn.Module) -> bool:
    """Return whether oneDNN supports this weight on this machine."""
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
