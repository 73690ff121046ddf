"""A linear layer that computes with its codes.

    y_m = t_m sum over n of c_mn x_n + b_m

In memory, a layer takes M N bytes of codes and 4 M bytes of step sizes. Codes are exact in every floating point dtype. Where no kernel
reads 8-bit weights, a product converts the codes of its layer to the dtype of the input, and frees them afterwards.

Legend: M = out features, N = in features, S = rows of the input.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8  # up to which the kernel of torch is faster than a conversion with oneDNN's product, measured on one core with AVX-512
KERNEL_SIDE = 64  # torch's kernel reads beyond the ends of weights whose sides are not multiples of its blocks, and may crash


class CodedLinear(nn.Module):
    """y = diag(t) C x + b with integer codes C."""

    def __init__(self, codes_MN: Tensor, steps_M: Tensor, bias_M: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes_MN.shape
        self.register_buffer("codes", codes_MN)
        self.register_buffer("steps", steps_M.float())
        self.codes: Tensor  # int8 [M, N]
        self.steps: Tensor  # float32 [M]
        self.bias = None if bias_M is None else nn.Parameter(bias_M.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = integer_product(x, self.codes) * self.steps
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "CodedLinear":
        """Move or cast the layer. Step sizes are moved, but stay in float32."""
        steps_M = self.steps
        super()._apply(fn, recurse)
        self.steps = steps_M.to(self.codes.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def integer_product(x: Tensor, codes_MN: Tensor) -> Tensor:
    """Return x C^T [..., M] in the dtype of `x`; in float32 for float16, whose range is too small for the product."""
    if _has_kernel(x, codes_MN):
        x_SN = x.reshape(-1, x.shape[-1]).contiguous()
        return torch._weight_int8pack_mm(x_SN, codes_MN, x.new_ones(len(codes_MN))).view(*x.shape[:-1], len(codes_MN))
    x = x.float() if x.dtype == torch.float16 else x
    return F.linear(x, codes_MN.to(x.dtype))


def _has_kernel(x: Tensor, codes_MN: Tensor) -> bool:
    """Return whether torch's kernel for 8-bit weights computes this product, and is faster."""
    return (
        hasattr(torch, "_weight_int8pack_mm")
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and not any(side % KERNEL_SIDE for side in codes_MN.shape)
        and codes_MN.is_contiguous()
        and not (torch.is_grad_enabled() and x.requires_grad)  # the kernel has no derivative
        and not torch.compiler.is_compiling()
    )
