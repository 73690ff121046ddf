"""Linear layers that multiply in 8-bit integers on a CPU: two to three times as fast as bfloat16 for a few rows.

    y_m = t_m a sum over n of c_mn q_n + b_m        x_n ~ a q_n: the input, rounded to 8 bits with a step size a

Codes c and their step sizes t are those of `CodedLinear`, or of the weight rounded to 8 bits with one step size per row.

    IntegerLinear            rounds its input once, with one step size for all rows. This changes the output by about 1 %: too much for an
                             answer, and little enough for drafts of tokens that another pass verifies
    PreciseIntegerLinear     multiplies x = a (q + r / 254): the rounded input q, and the remainder r, rounded to 8 bits, too. The error is
                             smaller than that of rounding the output to bfloat16

The product is FBGEMM's, the fastest kernel in torch for few rows (tests/benchmarks/speculative.py).
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from acip.modeling_acip import CodedLinear

TOP = 127  # the largest code
ZERO = 128  # the integer of an input of 0, which FBGEMM stores without sign
SMALLEST = 1e-30  # of the largest input of a row, so that a row of zeros is not divided by zero


class IntegerLinear(nn.Module):
    """A layer with codes int8 [M, N] and step sizes [M], packed for integer products on a CPU. A copy is a `CodedLinear`."""

    def __init__(self, codes_MN: Tensor, steps_M: Tensor, bias_M: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes_MN.shape
        self.bias = None if bias_M is None else bias_M.detach().float()
        zeros_M = torch.zeros(len(steps_M), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # deprecated in torch 2.13, which has no other way to FBGEMM
            weight = torch._make_per_channel_quantized_tensor(codes_MN.contiguous(), steps_M.double(), zeros_M, 0)
        self._packed = torch.ops.quantized.linear_prepack(weight, None)

    @property
    def packed_bytes(self) -> int:
        return self.out_features * (self.in_features + 4)  # with the step sizes

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self._packed)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> CodedLinear:
        """Return the layer in the form that can be moved, cast and saved."""
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        return CodedLinear(weight.int_repr(), weight.q_per_channel_scales().float(), self.bias)


class PreciseIntegerLinear(IntegerLinear):
    """An integer layer whose products are as precise as those in bfloat16. It takes two rows of integers for each row of the input."""

    def forward(self, x: Tensor) -> Tensor:
        x_SN = x.reshape(-1, x.shape[-1]).float()
        largest_S1 = torch.linalg.vector_norm(x_SN, torch.inf, -1, keepdim=True).clamp_min_(SMALLEST)
        x_SN = x_SN / largest_S1
        rounded_SN = torch.fake_quantize_per_tensor_affine(x_SN, 1 / TOP, ZERO, ZERO - TOP, ZERO + TOP)
        rest_SN = (x_SN - rounded_SN).mul_(2 * TOP)
        rows = torch.cat([rounded_SN, rest_SN])
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rows, 1 / TOP, ZERO, self._packed)
        y_SM = y[: len(x_SN)].add_(y[len(x_SN) :], alpha=0.5 / TOP).mul_(largest_S1)
        return (y_SM if self.bias is None else y_SM + self.bias).to(x.dtype).view(*x.shape[:-1], self.out_features)


def supports_integers(device: str | torch.device) -> bool:
    """Return whether `IntegerLinear` can be used on a device with this version of torch."""
    has_kernel = hasattr(torch, "_make_per_channel_quantized_tensor") and "fbgemm" in torch.backends.quantized.supported_engines
    return has_kernel and torch.device(device).type == "cpu"


def supports_precise_integers(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Return whether `PreciseIntegerLinear` can be used on a device, and is precise enough for a model in `dtype`.

    On a CPU without instructions for sums of 8-bit products (VNNI), FBGEMM's sums may overflow.
    """
    return supports_integers(device) and dtype == torch.bfloat16 and torch.cpu._is_vnni_supported()


def rounded(weight_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes [M, N], step sizes [M]) of a weight, rounded to 8 bits."""
    steps_M = (weight_MN.abs().amax(1).float() / TOP).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight_MN / steps_M[:, None]).round_().to(torch.int8), steps_M
