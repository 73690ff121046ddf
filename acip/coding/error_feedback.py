"""Codes with the least error at a layer's outputs, by error feedback and coordinate descent.

The error of a coded matrix V is measured in a metric H [N, N], the weighted second moment of the layer's inputs:

    error(V) = tr (W - V) H (W - V)^T = sum over inputs x of weight(x) |(W - V) x|^2

Four steps reduce it:

    1. scales       each group takes the scale of the least error with independent rounding, weighted by the diagonal of H
    2. feedback     columns are rounded one after the other, those with the largest H_nn first; the error of each is compensated by the
                    columns that follow (GPTQ, Frantar et al., 2022, arXiv 2210.17323)
    3. refit        the scales of a row solve the least squares problem of its codes in H
    4. descent      every number is rounded again, given all others, and the scales are refitted; repeated `sweeps` times

All rows of a matrix are coded at the same time. Rows are independent of each other.

Legend: M = out features, N = in features, G = groups of a row.
"""

import torch
from torch import Tensor

from acip.coding.grid import Codes, GroupScales, by_input, groups_of, nearest

DAMPING = 0.01  # share of the mean of diag H that is added to it
BLOCK = 128  # columns whose updates of the columns behind the block are applied together
CANDIDATES = 24  # scales that are tried per group
ROWS = 256  # rows whose scales are refitted at once


@torch.no_grad()
def code(weight_MN: Tensor, metric_NN: Tensor, bits: int, group: int = 64, sweeps: int = 2) -> Codes:
    """Return the codes of a weight matrix in `bits` bits, with little error in the metric H (see the head of this file).

    `metric_NN` is symmetric and positive semidefinite; its scale does not matter. A column that no input uses is coded by itself.
    """
    W_MN, H_NN = weight_MN.float(), _damped(metric_NN)
    order_N = torch.argsort(H_NN.diagonal(), descending=True, stable=True)
    scales_MG = _stored(_searched_scales(W_MN, H_NN.diagonal(), bits, group))
    levels_MN = _feedback(W_MN, H_NN, scales_MG, bits, group, order_N)
    for _ in range(sweeps):
        scales_MG = _stored(_refitted_scales(W_MN, H_NN, levels_MN, scales_MG, group))
        levels_MN = _descent(W_MN, H_NN, levels_MN, scales_MG, bits, group, order_N)
    scales_MG = _refitted_scales(W_MN, H_NN, levels_MN, scales_MG, group)
    codes_MN = (levels_MN + (2**bits - 1) / 2).round().to(torch.uint8)
    return Codes(codes_MN, GroupScales.of(scales_MG), bits, group)


def error(weight_MN: Tensor, coded_MN: Tensor, metric_NN: Tensor) -> Tensor:
    """Return the error of each row [M] in the metric H."""
    E_MN = weight_MN.float() - coded_MN
    return ((E_MN @ metric_NN.float()) * E_MN).sum(1)


def _damped(metric_NN: Tensor) -> Tensor:
    """Return H in float32, with a mean diagonal of 1 and a small multiple of the identity added; the identity if H is 0."""
    H_NN = metric_NN.float()
    mean = H_NN.diagonal().mean()
    one_NN = torch.eye(len(H_NN), device=H_NN.device)
    return H_NN / mean + DAMPING * one_NN if mean > 0 else one_NN


def _stored(scales_MG: Tensor) -> Tensor:
    return GroupScales.of(scales_MG).read()


def _grouped(values: Tensor, group: int) -> Tensor:
    """Return values [..., N] as [..., G, group], padded with zeros."""
    missing = -values.shape[-1] % group
    return torch.nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, group))


def _searched_scales(W_MN: Tensor, h_N: Tensor, bits: int, group: int) -> Tensor:
    """Return the scales [M, G] with the least error among CANDIDATES, with independent rounding."""
    W_MGn, h_Gn = _grouped(W_MN, group), _grouped(h_N, group)
    largest_MG = W_MGn.abs().amax(-1).clamp_min(1e-12) / (2 ** (bits - 1))
    best_MG, least_MG = largest_MG, torch.full_like(largest_MG, torch.inf)
    for share in torch.linspace(0.35, 1.05, CANDIDATES).tolist():
        levels = nearest(W_MGn, share * largest_MG[..., None], bits)
        scale_MG = (h_Gn * W_MGn * levels).sum(-1) / (h_Gn * levels * levels).sum(-1).clamp_min(1e-30)
        scale_MG = torch.where(scale_MG > 0, scale_MG, share * largest_MG)
        error_MG = (h_Gn * (W_MGn - scale_MG[..., None] * levels).square()).sum(-1)
        better = error_MG < least_MG
        best_MG, least_MG = torch.where(better, scale_MG, best_MG), torch.where(better, error_MG, least_MG)
    return best_MG


def _feedback(W_MN: Tensor, H_NN: Tensor, scales_MG: Tensor, bits: int, group: int, order_N: Tensor) -> Tensor:
    """Return the levels [M, N] after one pass of rounding with error feedback, in the order `order_N` of columns."""
    N = len(order_N)
    inverse_NN = torch.cholesky_inverse(torch.linalg.cholesky(H_NN[order_N][:, order_N]))
    U_NN = torch.linalg.cholesky(inverse_NN, upper=True)
    rest_NM = W_MN.T[order_N].contiguous()  # what the columns have to represent, with the errors of earlier ones
    scales_NM = by_input(scales_MG, group, N).T[order_N].contiguous()
    levels_NM = torch.empty_like(rest_NM)
    for start in range(0, N, BLOCK):
        end = min(start + BLOCK, N)
        errors_NM = torch.empty_like(rest_NM[start:end])
        for n in range(start, end):
            levels_NM[n] = nearest(rest_NM[n], scales_NM[n], bits)
            errors_NM[n - start] = (rest_NM[n] - levels_NM[n] * scales_NM[n]) / U_NN[n, n]
            rest_NM[n + 1 : end].addr_(U_NN[n, n + 1 : end], errors_NM[n - start], alpha=-1)
        rest_NM[end:].addmm_(U_NN[start:end, end:].T, errors_NM, alpha=-1)
    return _back(levels_NM, order_N)


def _descent(W_MN: Tensor, H_NN: Tensor, levels_MN: Tensor, scales_MG: Tensor, bits: int, group: int, order_N: Tensor) -> Tensor:
    """Return the levels [M, N] after every column was rounded to its best levels, given the other columns."""
    N = len(order_N)
    H_NN = H_NN[order_N][:, order_N].contiguous()
    scales_NM = by_input(scales_MG, group, N).T[order_N].contiguous()
    levels_NM = levels_MN.T[order_N].contiguous()
    slope_NM = H_NN @ (W_MN.T[order_N] - levels_NM * scales_NM)  # minus half the gradient of the error
    for start in range(0, N, BLOCK):
        end = min(start + BLOCK, N)
        changes_NM = torch.empty_like(slope_NM[start:end])
        for n in range(start, end):
            before_M = levels_NM[n] * scales_NM[n]
            levels_NM[n] = nearest(before_M + slope_NM[n] / H_NN[n, n], scales_NM[n], bits)
            changes_NM[n - start] = levels_NM[n] * scales_NM[n] - before_M
            slope_NM[n + 1 : end].addr_(H_NN[n, n + 1 : end], changes_NM[n - start], alpha=-1)
        slope_NM[end:].addmm_(H_NN[end:, start:end], changes_NM, alpha=-1)
    return _back(levels_NM, order_N)


def _refitted_scales(W_MN: Tensor, H_NN: Tensor, levels_MN: Tensor, scales_MG: Tensor, group: int) -> Tensor:
    """Return the scales [M, G] that minimize the error of these levels. A scale that would fall below 0.3 of its value keeps it."""
    M, N = W_MN.shape
    G = groups_of(N, group)
    best_MG = torch.empty_like(scales_MG)
    owner_GN = by_input(torch.eye(G, device=W_MN.device), group, N)
    for rows in torch.arange(M).split(ROWS):
        basis_RGN = levels_MN[rows, None] * owner_GN  # row = the levels of one group, and zeros
        moved_RGN = basis_RGN @ H_NN
        A_RGG = moved_RGN @ basis_RGN.mT
        b_RG = (moved_RGN @ W_MN[rows, :, None]).squeeze(-1)
        A_RGG.diagonal(dim1=1, dim2=2).add_(1e-6 * A_RGG.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True))
        best_MG[rows] = torch.linalg.solve(A_RGG, b_RG)
    return torch.where(best_MG > 0.3 * scales_MG, best_MG, scales_MG)


def _back(levels_NM: Tensor, order_N: Tensor) -> Tensor:
    """Return columns in their original order: [M, N]."""
    levels_MN = torch.empty_like(levels_NM.T)
    levels_MN[:, order_N] = levels_NM.T
    return levels_MN
