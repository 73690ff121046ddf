"""Codes with the least error at a layer's outputs, for given step sizes.

The error of a coded matrix V is measured in a metric H [N, N], a weighted second moment of the layer's inputs:

    error of row m = (W - V)_m H (W - V)_m^T = mean over inputs x of weight(x) ((W - V)_m x)^2

    1. feedback    columns are rounded one after the other, those with the largest H_nn first; the error of each is compensated by the
                   columns that follow (GPTQ, Frantar et al., 2022, arXiv 2210.17323)
    2. descent     every code is rounded again, given all others; repeated `sweeps` times
    3. refit       the step of a row is set to the one with the least error for its codes

All rows of a matrix are coded at the same time, and do not depend on each other. Numbers are in units of the row's step size.

Legend: M = out features, N = in features.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from acip.calibration.memory_plan import CODED_AT_ONCE, CODED_AT_ONCE_CPU, CODING_BLOCK
from acip.coding.codes import TOP, Codes, stored_steps

DAMPING = 0.01  # share of the mean of diag H that is added to it
BLOCK = CODING_BLOCK  # columns whose updates of the columns behind the block are applied together
REFIT = (0.5, 2.0)  # a refitted step is at least and at most this multiple of the given one


@torch.no_grad()
def code(weight_MN: Tensor, metric_NN: Tensor, steps_M: Tensor, sweeps: int = 1) -> Codes:
    """Return codes of a weight matrix with little error in the metric H.

    `metric_NN` is symmetric and positive definite, for example from `damped`. Weights beyond 127 steps are clipped. The refitted steps
    are close to `steps_M`.
    """
    return next(code_versions(weight_MN, metric_NN, [steps_M], sweeps))[0]


@torch.no_grad()
def code_versions(weight_MN: Tensor, metric_NN: Tensor, steps: Sequence[Tensor], sweeps: int = 1) -> Iterator[tuple[Codes, Tensor]]:
    """Yield, for each of several `steps` [M], the codes of a weight matrix (see `code`) and the error of each row [M] in the metric H.

    The versions are computed together where memory allows.
    """
    M, N = weight_MN.shape
    order_N = torch.argsort(metric_NN.diagonal(), descending=True, stable=True)
    H_NN = metric_NN.float()[order_N][:, order_N]
    U_NN = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H_NN)), upper=True)
    W_NM = weight_MN.float().T[order_N]
    HW_NM = H_NN @ W_NM
    together = CODED_AT_ONCE if weight_MN.is_cuda else CODED_AT_ONCE_CPU
    for some in _parts(steps, max(1, together // (M * N))):
        # the rows of all versions, and their products with H, in units of their steps
        units_NR, moved_NR = (torch.cat([x_NM / steps_M for steps_M in some], dim=1) for x_NM in (W_NM, HW_NM))
        codes_NR = _feedback(units_NR, U_NN)
        products_NR = H_NN @ codes_NR
        for _ in range(sweeps):  # in place, because these matrices take most of the memory
            moved_to_NR = moved_NR / _refit(units_NR, codes_NR, products_NR)
            slope_NR = products_NR.neg_().add_(moved_to_NR)
            _descent(slope_NR, H_NN, codes_NR)
            products_NR = moved_to_NR.sub_(slope_NR)
            del moved_to_NR, slope_NR
        refit_R = _refit(units_NR, codes_NR, products_NR)
        columns = zip(*(x.split(M, dim=-1) for x in (codes_NR, products_NR, units_NR, moved_NR, refit_R)), strict=True)
        for steps_M, (codes_NM, products_NM, units_NM, moved_NM, refit_M) in zip(some, columns, strict=True):
            stored_M = stored_steps(steps_M * refit_M)
            share_M = stored_M / steps_M
            errors_M = ((units_NM - share_M * codes_NM) * (moved_NM - share_M * products_NM)).sum(0) * steps_M.square()
            codes_MN = torch.empty_like(codes_NM.T, memory_format=torch.contiguous_format)
            codes_MN[:, order_N] = codes_NM.T
            yield Codes(codes_MN.to(torch.int8), stored_M), errors_M


def damped(metric_NN: Tensor) -> Tensor:
    """Return H in float32 with a small multiple of the identity added; the identity if H is 0."""
    H_NN = metric_NN.to(torch.float32, copy=True)
    mean = H_NN.diagonal().mean()
    if mean > 0:
        H_NN.diagonal().add_(DAMPING * mean)
        return H_NN
    return torch.eye(len(H_NN), device=H_NN.device)


def row_errors(weight_MN: Tensor, coded_MN: Tensor, metric_NN: Tensor) -> Tensor:
    """Return the error of each row [M] in the metric H."""
    E_MN = weight_MN.float() - coded_MN
    return ((E_MN @ metric_NN) * E_MN).sum(1)


def _feedback(W_NM: Tensor, U_NN: Tensor) -> Tensor:
    """Return codes [N, M] after one pass of rounding with error feedback. U is the upper Cholesky factor of the inverse of H."""
    N = len(U_NN)
    rest_NM = W_NM.clone()  # what the columns have to represent, with the errors of earlier ones
    codes_NM = torch.empty_like(rest_NM)
    for start in range(0, N, BLOCK):
        end = min(start + BLOCK, N)
        errors_NM = torch.empty_like(rest_NM[start:end])
        for n in range(start, end):
            codes_NM[n] = rest_NM[n].round().clamp_(-TOP, TOP)
            errors_NM[n - start] = (rest_NM[n] - codes_NM[n]) / U_NN[n, n]
            rest_NM[n + 1 : end].addr_(U_NN[n, n + 1 : end], errors_NM[n - start], alpha=-1)
        rest_NM[end:].addmm_(U_NN[start:end, end:].T, errors_NM, alpha=-1)
    return codes_NM


def _descent(slope_NM: Tensor, H_NN: Tensor, codes_NM: Tensor) -> None:
    """Round every column of codes [N, M] to its best codes, given the other columns, and update the slope, in place.

    The slope is minus half the gradient of the error, H (weights - codes).
    """
    N = len(H_NN)
    for start in range(0, N, BLOCK):
        end = min(start + BLOCK, N)
        block_NM = slope_NM[start:end].clone()  # of the columns of the block that follow
        changes_NM = torch.empty_like(block_NM)
        for n in range(start, end):
            best_M = (codes_NM[n] + block_NM[n - start] / H_NN[n, n]).round().clamp_(-TOP, TOP)
            changes_NM[n - start] = best_M - codes_NM[n]
            codes_NM[n] = best_M
            block_NM[n + 1 - start :].addr_(H_NN[n, n + 1 : end], changes_NM[n - start], alpha=-1)
        slope_NM.addmm_(H_NN[:, start:end], changes_NM, alpha=-1)


def _refit(W_NM: Tensor, codes_NM: Tensor, products_NM: Tensor) -> Tensor:
    """Return the multiple of each row's step [M] with the least error for these codes; 1 for a row of zeros. Products are H codes."""
    best_M = (products_NM * W_NM).sum(0) / (products_NM * codes_NM).sum(0)
    return torch.where(best_M.isfinite(), best_M, 1.0).clamp(*REFIT)


def _parts(steps: Sequence[Tensor], count: int) -> Iterator[list[Tensor]]:
    """Yield `steps` in lists of at most `count`."""
    rest = iter(steps)
    while some := list(islice(rest, count)):
        yield some
