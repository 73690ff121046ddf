"""Packed copies of weights in oneDNN's layout, which make generation on a CPU faster at the cost of memory.

    1 row     uses the plain weight, which is read once and in order
    2, 3      are padded with rows of zeros: such products take longer than those with 4 rows
    more      use the packed copy: oneDNN would reorder a plain weight for each product, which takes about as long as the product
              (tests/benchmarks/products.py)

Packing is optional. The resident factors of an any-size model are not packed, because a rank is a prefix of them and a packed weight
can't be cut. (Packed in pieces of 64 to 256 directions, they were slower than plain, because each piece is a separate product.)
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.modeling_acip import bias_of, set_module, weight_MN

LEAST_ROWS = 4  # of a packed product; 4 to 6 rows take as long as reading the weight


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weight. For inference only: training the weight does not update the copy."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        weight, bias = weight_MN(plain), bias_of(plain)
        self.out_features, self.in_features = weight.shape
        self.weight = _parameter(weight)
        self.register_parameter("bias", None if bias is None else _parameter(bias))
        self._packed: Tensor | None = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

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
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x_SN, packed, self.bias, "none", [], "")
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


def _parameter(tensor: Tensor) -> nn.Parameter:
    """Return the tensor as a parameter that shares its memory."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)


def packable(weight: Tensor | nn.Module) -> bool:
    """Return whether oneDNN supports this weight on this machine."""
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
