"""GPTQ (Frantar et al., 2022, arXiv 2210.17323): round column by column, and compensate each error by the columns that follow.

Symmetric grids with one float16 scale per group of inputs, from the largest weight of the group. With `act_order` the columns with the
largest input energy are rounded first ("static groups": scales are those of the unchanged weights).

Legend: M = out features, N = in features.
"""

import math

import torch
from torch import Tensor

from acip.coding.coded_weight import CodedWeight


@torch.no_grad()
def gptq(
    weight_MN: Tensor, covariance_NN: Tensor, bits: int, group: int = 64, act_order: bool = True, damping: float = 0.01
) -> CodedWeight:
    """Return the matrix in `bits` bits, 2 to 8, for the second moment of the layer's inputs [N, N]."""
    M, N = weight_MN.shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    H_NN = covariance_NN.float() + damping * covariance_NN.float().diagonal().mean() * torch.eye(N)
    order_N = torch.argsort(H_NN.diagonal(), descending=True, stable=True) if act_order else torch.arange(N)
    U_NN = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H_NN[order_N][:, order_N])), upper=True)
    largest_MG = torch.stack([part.abs().amax(1) for part in weight_MN.float().split(group, dim=1)], dim=1)
    scales_MG = (largest_MG / high if bits > 2 else largest_MG / -low).clamp_min(1e-12).half().float().clamp_min(2.0**-24)
    scales_NM = scales_MG.repeat_interleave(group, 1)[:, :N].T[order_N]
    rest_NM = weight_MN.float().T[order_N].contiguous()
    decoded_NM = torch.empty_like(rest_NM)
    for n in range(N):
        decoded_NM[n] = (rest_NM[n] / scales_NM[n]).round().clamp(low, high) * scales_NM[n]
        error_M = (rest_NM[n] - decoded_NM[n]) / U_NN[n, n]
        rest_NM[n + 1 :].addr_(U_NN[n, n + 1 :], error_M, alpha=-1)
    weight = torch.empty(M, N)
    weight[:, order_N] = decoded_NM.T
    return CodedWeight(weight, math.ceil(M * N * bits / 8) + 2 * scales_MG.numel())
