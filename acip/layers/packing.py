"""Weights in oneDNN's own order beside the plain ones, for the few rows at a time that an answering model multiplies on a CPU.

    1 row     the plain weight: it is read once and in order, which nothing beats
    more      the packed copy: a product sorts a plain weight anew each time, which takes about as long as the multiplying
              (tests/benchmarks/products.py)

The copy is memory for speed, and optional. The resident factors of an any-size model have none: a rank is a prefix of them, and what is
packed can't be cut. (In packed pieces of 64 to 256 directions they were slower than plain, as each piece is a product of its own.)
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.modeling_acip import bias_of, set_module, weight_MN


class PackedLinear(nn.Linear):
    """The linear layer `plain`, with a packed copy of its weight. For answering: a weight that is trained leaves its copy behind."""

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
        """From now on it is a plain layer; a product under way in another thread ends as it began."""
        self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        packed = self._packed
        if packed is None or x.numel() == x.shape[-1] or torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moved or cast, it is a plain layer."""
        self.unpack()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is one, too."""
        return {**self.__dict__, "_packed": None}


def pack(model: nn.Module) -> None:
    """Give the linear layers of `model`, its head too, packed copies of their weights, where this machine multiplies by such.

    They cost those weights' bytes once more. For models that answer on a CPU: an export, or an any-size model.
    """
    for name, module in list(model.named_modules()):
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D") and packable(module.weight):
            set_module(model, name, PackedLinear(module))


def _parameter(tensor: Tensor) -> nn.Parameter:
    """Itself, or what looks at the same numbers."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)


def packable(weight: Tensor | nn.Module) -> bool:
    """Whether oneDNN multiplies such weights here."""
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
