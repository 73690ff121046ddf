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

Two differences from the authors' code: each split is the exact optimum (theirs is a local one), and the seed is the better one of two
deterministic starts (theirs is one random start of k-means++).

Legend: M = out features, N = in features, R = rows coded at a time, K = clusters, P = N + 1 and Q = K + 1 (prefix sums and borders,
with both ends).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from acip.coding.coded_weight import CodedWeight
from acip.errors import CalibrationError, RecipeError

CHUNK = 2**18  # numbers coded at a time: the temporaries fit in a CPU's cache
LLOYD_STEPS = 50
LEAST_SENSITIVITY = 1e-6  # of a row's mean: it gives every value a mass, and rows without gradients plain k-means
CODEBOOK_BYTES = 2  # float16


class NestedCodes(NamedTuple):
    """A weight matrix in codes of several bit widths. The code of b bits is the top b bits of the code of `bits` bits."""

    codes_MN: Tensor  # uint8, of `bits` bits
    bits: int
    codebooks: dict[int, Tensor]  # bit width: [M, 2^width], float16

    def decode(self, bits: int) -> CodedWeight:
        """Return the weight at a bit width. The bytes are those of a model of this width: its planes and its codebooks."""
        if bits not in self.codebooks:
            raise RecipeError(f"bits is {bits}; these codes have {min(self.codebooks)} to {self.bits} bits.")
        codes_MN = (self.codes_MN >> (self.bits - bits)).long()
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
    return NestedCodes(torch.cat([chunk.codes_MN for chunk in chunks]), bits, codebooks)


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

    value_RN: Tensor
    mass_RP: Tensor  # sum of F over the values before a position
    moment_RP: Tensor  # sum of F w

    def masses(self, borders_RQ: Tensor) -> Tensor:
        """Return the mass of each cluster [R, K]."""
        return self.mass_RP.gather(1, borders_RQ).diff(dim=1)

    def means(self, borders_RQ: Tensor, empty_RK: Tensor) -> Tensor:
        """Return the weighted mean of each cluster [R, K]; for empty clusters, the value in `empty_RK`."""
        moments_RK = self.moment_RP.gather(1, borders_RQ).diff(dim=1)
        return torch.where(borders_RQ.diff(dim=1) > 0, moments_RK / self.masses(borders_RQ), empty_RK)


def sorted_rows(weight_RN: Tensor, sensitivity_RN: Tensor) -> tuple[SortedRows, Tensor]:
    """Return the sorted rows, and the place of each of their values in the weight."""
    value_RN, order_RN = weight_RN.double().sort(1)
    mass_RN = sensitivity_RN.double().gather(1, order_RN)
    mass_RN = mass_RN / mass_RN.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) + LEAST_SENSITIVITY
    mass_RP, moment_RP = (torch.nn.functional.pad(summand.cumsum(1), (1, 0)) for summand in (mass_RN, mass_RN * value_RN))
    return SortedRows(value_RN, mass_RP, moment_RP), order_RN


def seed(rows: SortedRows, bits: int) -> tuple[Tensor, Tensor]:
    """Return the borders [R, Q] and means [R, K] of 2^bits clusters, by Lloyd's algorithm from two starts.

    One start splits the row `bits` times. The other one has clusters of equal numbers of values.
    """
    R, N = rows.value_RN.shape
    K = 2**bits
    halved_RQ = torch.tensor([0, N], device=rows.value_RN.device).expand(R, 2)
    for _ in range(bits):
        halved_RQ = split(rows, halved_RQ)
    equal_RQ = (torch.arange(K + 1, device=rows.value_RN.device) * N // K).expand(R, K + 1)
    (borders_RQ, means_RK, gain_R), other = (lloyd(rows, start_RQ) for start_RQ in (halved_RQ, equal_RQ))
    better_R1 = (other[2] > gain_R)[:, None]
    return torch.where(better_R1, other[0], borders_RQ), torch.where(better_R1, other[1], means_RK)


def lloyd(rows: SortedRows, borders_RQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the borders and means at which Lloyd's algorithm ends, and the weighted sum of squares that the means explain [R]."""
    N, K = rows.value_RN.shape[1], borders_RQ.shape[1] - 1
    means_RK = rows.means(borders_RQ, rows.value_RN.gather(1, borders_RQ[:, :K].clamp_max(N - 1)))
    for _ in range(LLOYD_STEPS):
        middles = (means_RK[:, 1:] + means_RK[:, :-1]) / 2
        moved_RQ = torch.cat([borders_RQ[:, :1], torch.searchsorted(rows.value_RN, middles), borders_RQ[:, -1:]], dim=1)
        if torch.equal(moved_RQ, borders_RQ):
            break
        borders_RQ, means_RK = moved_RQ, rows.means(moved_RQ, means_RK)
    return borders_RQ, means_RK, (rows.masses(borders_RQ) * means_RK.square()).sum(1)


def split(rows: SortedRows, borders_RQ: Tensor) -> Tensor:
    """Return the borders [R, 2 K + 1] after each cluster has split in two, where this reduces the weighted squared error most.

    With m and d the mass and the centered moment of the values before a cut, and m' the mass after it, a cut reduces the error by

        d^2 (m + m') / (m m')

    Equal values stay together. A cluster of one value gets an empty second half.
    """
    (R, N), K = rows.value_RN.shape, borders_RQ.shape[1] - 1
    cluster_RN = clusters_of(borders_RQ).view(R, N)

    def of_cluster(number_RK: Tensor) -> Tensor:
        return number_RK.flatten()[cluster_RN]

    starts_RK, total_RK = borders_RQ[:, :K], rows.masses(borders_RQ)
    before_RN = rows.mass_RP[:, :N] - of_cluster(rows.mass_RP.gather(1, starts_RK))
    moment_RN = rows.moment_RP[:, :N] - of_cluster(rows.moment_RP.gather(1, starts_RK))
    mean_RK = rows.means(borders_RQ, torch.zeros_like(total_RK))
    total_RN = of_cluster(total_RK)
    reduction_RN = (moment_RN - before_RN * of_cluster(mean_RK)).square() * total_RN / (before_RN * (total_RN - before_RN))

    position_RN = torch.arange(N, device=borders_RQ.device).expand(R, N)
    larger_RN = torch.nn.functional.pad(rows.value_RN.diff(dim=1) > 0, (1, 0))
    allowed_RN = larger_RN & (position_RN > of_cluster(starts_RK))
    reduction_RN = torch.where(allowed_RN, reduction_RN, -1.0)
    best = reduction_RN.new_full((R * K,), -1.0).scatter_reduce_(0, cluster_RN.flatten(), reduction_RN.flatten(), "amax")
    found_RN = allowed_RN & (reduction_RN == best[cluster_RN])
    cuts = borders_RQ[:, 1:].flatten().scatter_reduce(0, cluster_RN[found_RN], position_RN[found_RN], "amin")
    return torch.cat([torch.stack([starts_RK, cuts.view(R, K)], dim=2).flatten(1), borders_RQ[:, K:]], dim=1)


def clusters_of(borders_RQ: Tensor) -> Tensor:
    """Return the cluster of each position [R N]. Row r has the clusters r K to r K + K - 1."""
    lengths = borders_RQ.diff(dim=1).flatten()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
