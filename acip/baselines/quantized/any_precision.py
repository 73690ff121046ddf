"""Any-Precision LLM: nested codes of 3 to 8 bit, one codebook per row and bit width.

Source: Park et al., ICML 2024, arXiv 2402.10517. The seed model is that of SqueezeLLM, Kim et al., ICML 2024, arXiv 2306.07629.

    seed        each row of W has 2^3 clusters, by k-means weighted with the sensitivities F (the diagonal Fisher information):
                    minimize sum_n F_n (w_n - c[q_n])^2
    upscaling   each cluster splits in two, by weighted 2-means, until there are 2^8:      q' = 2 q + (0 or 1)

The values of a row are numbers on a line, so that a cluster is an interval. Child clusters are numbered in ascending order, and the code of
b bits is the top b bits of the code of 8 bits. One set of bit planes holds all widths. The width b reads b planes and the 2^b values
of its codebook, in float16: the weighted means of its clusters.

Rows are sorted once. Prefix sums of F and F w then give the mass and the mean of any interval, so that a step of Lloyd's algorithm moves
2^3 - 1 borders instead of N values, and one pass over the row finds the best split of every cluster.

Two differences from the authors' code: each split is the exact optimum (theirs is a local one), and the k-means of the seed starts close to
its optimum, by dynamic programming (theirs starts at random, by k-means++).

Legend: M = out features, N = in features, R = rows coded at a time, K = clusters, P = N + 1 and Q = K + 1 (prefix sums and borders,
with both ends).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from acip.baselines.quantized.coded_weight import CodedWeight
from acip.errors import CalibrationError, RecipeError

CHUNK = 2**18  # numbers coded at a time: the temporaries fit in a CPU's cache
LLOYD_STEPS = 50
FINE_BITS = 6  # the seed starts from unions of 2^6 intervals of a row
LEAST_SENSITIVITY = 1e-6  # of a row's mean: it gives every value a mass, and rows without gradients plain k-means
CODEBOOK_BYTES = 2  # float16


class NestedCodes(NamedTuple):
    """A weight matrix in codes of several bit widths. The code of b bits is the top b bits of the code of `bits` bits."""

    codes: Tensor  # [M, N], uint8, of `bits` bits
    bits: int
    codebooks: dict[int, Tensor]  # bit width: [M, 2^width], float16

    def decode(self, bits: int) -> CodedWeight:
        """Return the weight at a bit width. The bytes are those of a model of this width: its planes and its codebooks."""
        if bits not in self.codebooks:
            raise RecipeError(f"bits is {bits}; these codes have {min(self.codebooks)} to {self.bits} bits.")
        codes_MN = (self.codes >> (self.bits - bits)).long()
        plane_bytes = math.ceil(codes_MN.numel() / 8)
        codebook = self.codebooks[bits]
        return CodedWeight(codebook.gather(1, codes_MN).float(), bits * plane_bytes + CODEBOOK_BYTES * codebook.numel())


@torch.no_grad()
def code(weight_MN: Tensor, sensitivity_MN: Tensor, seed_bits: int = 3, bits: int = 8) -> NestedCodes:
    """Return the codes of `seed_bits` to `bits` bits. `sensitivity_MN` is the mean squared gradient of the loss at each weight.

    Raises RecipeError for invalid bit widths, and CalibrationError for sensitivities that are negative or not finite.
    """
    if not 1 <= seed_bits <= bits <= 8:
        raise RecipeError(f"seed_bits is {seed_bits} and bits is {bits}; they must satisfy 1 <= seed_bits <= bits <= 8.")
    assert weight_MN.shape == sensitivity_MN.shape
    if not (sensitivity_MN.isfinite().all() and (sensitivity_MN >= 0).all()):
        raise CalibrationError("some sensitivities are negative or not finite. Compute them as means of squared gradients.")
    R = max(1, CHUNK // weight_MN.shape[1])
    chunks = [code_rows(*rows, seed_bits, bits) for rows in zip(weight_MN.split(R), sensitivity_MN.split(R), strict=True)]
    codebooks = {width: torch.cat([chunk.codebooks[width] for chunk in chunks]) for width in range(seed_bits, bits + 1)}
    return NestedCodes(torch.cat([chunk.codes for chunk in chunks]), bits, codebooks)


def code_rows(weight_RN: Tensor, sensitivity_RN: Tensor, seed_bits: int, bits: int) -> NestedCodes:
    """Return the codes of a few rows."""
    rows, order_RN = sorted_rows(weight_RN, sensitivity_RN)
    borders_RQ, means_RK = seed(rows, seed_bits)
    codebooks = {seed_bits: means_RK.half()}
    for width in range(seed_bits + 1, bits + 1):
        borders_RQ = split(rows, borders_RQ)
        means_RK = rows.means(borders_RQ, means_RK.repeat_interleave(2, dim=1))
        codebooks[width] = means_RK.half()
    codes_RN = clusters_of(borders_RQ).view_as(order_RN) % 2**bits
    return NestedCodes(torch.empty_like(order_RN).scatter_(1, order_RN, codes_RN).to(torch.uint8), bits, codebooks)


class SortedRows(NamedTuple):
    """Rows in ascending order, with the prefix sums that give the mass and the mean of any interval. All in float64."""

    values: Tensor  # [R, N]
    mass: Tensor  # [R, P], the sum of F over the values before a position
    moment: Tensor  # [R, P], that of F w

    def means(self, borders_RQ: Tensor, empty_RK: Tensor) -> Tensor:
        """Return the weighted mean of each cluster [R, K]; for empty clusters, the value in `empty_RK`."""
        mass_RK, moment_RK = (sums_RP.gather(1, borders_RQ).diff(dim=1) for sums_RP in (self.mass, self.moment))
        return torch.where(borders_RQ.diff(dim=1) > 0, moment_RK / mass_RK, empty_RK)


def sorted_rows(weight_RN: Tensor, sensitivity_RN: Tensor) -> tuple[SortedRows, Tensor]:
    """Return the sorted rows, and the place of each of their values in the weight."""
    value_RN, order_RN = weight_RN.double().sort(1)
    mass_RN = sensitivity_RN.double().gather(1, order_RN)
    mass_RN = mass_RN / mass_RN.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) + LEAST_SENSITIVITY
    mass_RP, moment_RP = (torch.nn.functional.pad(summand.cumsum(1), (1, 0)) for summand in (mass_RN, mass_RN * value_RN))
    return SortedRows(value_RN, mass_RP, moment_RP), order_RN


def seed(rows: SortedRows, bits: int) -> tuple[Tensor, Tensor]:
    """Return the borders [R, Q] and means [R, K] of 2^bits clusters.

    Splits give each row 2^FINE_BITS intervals, dynamic programming joins them into clusters, and Lloyd's algorithm moves the borders.
    """
    R, N = rows.values.shape
    fine_RQ = torch.tensor([0, N], device=rows.values.device).expand(R, 2)
    for _ in range(max(bits, FINE_BITS)):
        fine_RQ = split(rows, fine_RQ)
    return lloyd(rows, joined(rows, fine_RQ, 2**bits) if bits < FINE_BITS else fine_RQ)


def joined(rows: SortedRows, fine_RQ: Tensor, K: int) -> Tensor:
    """Return the K clusters [R, K + 1] with the least weighted squared error among those that are unions of the intervals given.

    The means of the clusters explain the sum of moment^2 / mass over the clusters. With e(i, j) that of the cluster from border i to
    border j, the best k clusters up to border j explain best_k(j) = max over i of best_{k-1}(i) + e(i, j).
    """
    mass_RQ, moment_RQ = rows.mass.gather(1, fine_RQ), rows.moment.gather(1, fine_RQ)
    mass_RQQ, moment_RQQ = (sums_RQ[:, None, :] - sums_RQ[:, :, None] for sums_RQ in (mass_RQ, moment_RQ))
    explained_RQQ = torch.where(mass_RQQ > 0, moment_RQQ.square() / mass_RQQ, torch.where(mass_RQQ < 0, -torch.inf, 0.0))
    best_RQ, previous = explained_RQQ[:, 0], []
    for _ in range(K - 1):
        best_RQ, previous_RQ = (best_RQ[:, :, None] + explained_RQQ).max(1)
        previous.append(previous_RQ)
    last_R1 = torch.full_like(fine_RQ[:, :1], fine_RQ.shape[1] - 1)
    ends = [last_R1]
    for previous_RQ in reversed(previous):
        ends.append(previous_RQ.gather(1, ends[-1]))
    return fine_RQ.gather(1, torch.cat([torch.zeros_like(last_R1), *reversed(ends)], dim=1))


def lloyd(rows: SortedRows, borders_RQ: Tensor) -> tuple[Tensor, Tensor]:
    """Return the borders [R, Q] and means [R, K] at which Lloyd's algorithm ends."""
    N, K = rows.values.shape[1], borders_RQ.shape[1] - 1
    means_RK = rows.means(borders_RQ, rows.values.gather(1, borders_RQ[:, :K].clamp_max(N - 1)))
    for _ in range(LLOYD_STEPS):
        middles = (means_RK[:, 1:] + means_RK[:, :-1]) / 2
        moved_RQ = torch.cat([borders_RQ[:, :1], torch.searchsorted(rows.values, middles), borders_RQ[:, -1:]], dim=1)
        if torch.equal(moved_RQ, borders_RQ):
            break
        borders_RQ, means_RK = moved_RQ, rows.means(moved_RQ, means_RK)
    return borders_RQ, means_RK


def split(rows: SortedRows, borders_RQ: Tensor) -> Tensor:
    """Return the borders [R, 2 K + 1] after each cluster has split in two, where this reduces the weighted squared error most.

    With m and d the mass and the centered moment of the values before a cut, and m' the mass after it, a cut reduces the error by

        d^2 (m + m') / (m m')

    m + m' is the same for all cuts of a cluster. Equal values stay together. A cluster of one value gets an empty second half.
    """
    (R, N), K = rows.values.shape, borders_RQ.shape[1] - 1
    cluster = clusters_of(borders_RQ)

    def of_cluster(number_RK: Tensor) -> Tensor:
        return number_RK.flatten()[cluster].view(R, N)

    starts_RK = borders_RQ[:, :K]
    mass_RQ, moment_RQ = rows.mass.gather(1, borders_RQ), rows.moment.gather(1, borders_RQ)
    mean_RK = rows.means(borders_RQ, torch.zeros_like(mass_RQ[:, :K]))
    mass_RN, moment_RN = rows.mass[:, :N], rows.moment[:, :N]
    d_RN = moment_RN - mass_RN * of_cluster(mean_RK) - of_cluster(moment_RQ[:, :K] - mass_RQ[:, :K] * mean_RK)
    reduction_RN = d_RN.square() / ((mass_RN - of_cluster(mass_RQ[:, :K])) * (of_cluster(mass_RQ[:, 1:]) - mass_RN))

    larger_RP = torch.nn.functional.pad(rows.values.diff(dim=1) > 0, (1, 1))  # than the value before
    allowed = larger_RP.scatter(1, starts_RK, False)[:, :N].flatten()
    reduction = reduction_RN.flatten().masked_fill(~allowed, -1.0)
    best = torch.full((R * K,), -1.0, dtype=reduction.dtype, device=reduction.device).scatter_reduce(0, cluster, reduction, "amax")
    found = (allowed & (reduction == best[cluster])).nonzero().flatten()
    cuts = borders_RQ[:, 1:].flatten().scatter_reduce(0, cluster[found], found % N, "amin")
    return torch.cat([torch.stack([starts_RK, cuts.view(R, K)], dim=2).flatten(1), borders_RQ[:, K:]], dim=1)


def clusters_of(borders_RQ: Tensor) -> Tensor:
    """Return the cluster of each position [R N]. Row r has the clusters r K to r K + K - 1."""
    lengths = borders_RQ.diff(dim=1).flatten()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
