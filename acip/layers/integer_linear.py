"""A linear layer that multiplies in 8-bit integers: approximate, and two to three times as fast as bfloat16 for a few rows on a CPU.

    y_m = t_m a sum over n of c_mn q_n + b_m        x_n ~ a q_n: the input, rounded to 8 bits with one step size a for all rows

Codes c and their step sizes t are those of `CodedLinear`, or of the weight rounded to 8 bits with one step size per row. Rounding the
input changes the output by about 1 %. This is too much for an answer, and little enough for drafts of tokens that another pass verifies.
The product is FBGEMM's, the fastest kernel in torch for one row (tests/benchmarks/speculative.py).
"""

import warnings

import torch
from torch import Tensor, nn

TOP = 127  # the largest code


class IntegerLinear(nn.Module):
    """A layer with codes int8 [M, N] and step sizes [M], packed for integer products on a CPU. It can't be copied or saved."""

    def __init__(self, codes_MN: Tensor, steps_M: Tensor, bias_M: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes_MN.shape
        zeros_M = torch.zeros(len(steps_M), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # deprecated in torch 2.13, which has no other way to FBGEMM
            weight = torch._make_per_channel_quantized_tensor(codes_MN.contiguous(), steps_M.double(), zeros_M, 0)
        self._packed = torch.ops.quantized.linear_prepack(weight, None if bias_M is None else bias_M.detach().float())

    @property
    def packed_bytes(self) -> int:
        return self.out_features * (self.in_features + 4)  # with the step sizes

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self._packed)
        return y.to(x.dtype)


def supports_integers(device: str | torch.device) -> bool:
    """Return whether `IntegerLinear` can be used on a device with this version of torch."""
    has_kernel = hasattr(torch, "_make_per_channel_quantized_tensor") and "fbgemm" in torch.backends.quantized.supported_engines
    return has_kernel and torch.device(device).type == "cpu"


def rounded(weight_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes [M, N], step sizes [M]) of a weight, rounded to 8 bits."""
    steps_M = (weight_MN.abs().amax(1).float() / TOP).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight_MN / steps_M[:, None]).round_().to(torch.int8), steps_M
