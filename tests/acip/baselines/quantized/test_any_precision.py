"""Codes of Any-Precision are nested, their codebooks are weighted means, and their clusters are optimal."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from acip.baselines.quantized import any_precision
from acip.baselines.quantized.any_precision import NestedCodes, code
from acip.errors import CalibrationError, RecipeError

WIDTHS = range(3, 9)


def weight_and_sensitivity(M: int = 6, N: int = 576) -> tuple[Tensor, Tensor]:
    """Return a weight with heavy tails, and sensitivities that vary by orders of magnitude, between and within columns."""
    generator = torch.Generator().manual_seed(4)
    normal, column, noise = (torch.randn(shape, generator=generator) for shape in ((M, N), (1, N), (M, N)))
    return 0.05 * normal * (1 + normal.abs()), 1e-6 * torch.exp(2 * column) * noise.square()


def weighted_error_M(weight: Tensor, sensitivity: Tensor, codes: NestedCodes, bits: int) -> Tensor:
    return (sensitivity * (codes.decode(bits).weight - weight).square()).sum(1)


def least_error(values: Tensor, masses: Tensor, K: int) -> float:
    """Return the least weighted squared error of a row in K clusters, by dynamic programming over all borders."""
    values, order = values.double().sort()
    masses = masses.double()[order]
    mass, moment = (torch.nn.functional.pad(summand.cumsum(0), (1, 0)) for summand in (masses, masses * values))
    explained = (moment - moment[:, None]).square() / (mass - mass[:, None])  # by the cluster from i to j
    explained[torch.ones_like(explained, dtype=torch.bool).tril()] = -torch.inf
    best = explained[0]
    for _ in range(K - 1):
        best = (best[:, None] + explained).amax(0)
    return float((masses * values.square()).sum() - best[-1])


def test_clusters_of_more_bits_are_parts_of_clusters_of_fewer_bits() -> None:
    codes = code(*weight_and_sensitivity())
    for bits in WIDTHS:
        decoded_MN = codes.decode(bits).weight
        for r, row in enumerate(codes.codes >> (8 - bits)):
            assert all(len(decoded_MN[r][row == cluster].unique()) == 1 for cluster in row.unique())


def test_codes_of_fewer_bits_are_prefixes_of_codes_of_more_bits() -> None:
    weight, sensitivity = weight_and_sensitivity()
    codes = code(weight, sensitivity)
    for bits in WIDTHS:
        fewer = code(weight, sensitivity, bits=bits)
        assert torch.equal(fewer.codes, codes.codes >> (8 - bits))
        assert torch.equal(fewer.decode(bits).weight, codes.decode(bits).weight)


def test_weighted_error_falls_with_each_bit() -> None:
    weight, sensitivity = weight_and_sensitivity()
    codes = code(weight, sensitivity)
    errors = [weighted_error_M(weight, sensitivity, codes, bits) for bits in WIDTHS]
    assert all((more < 0.6 * fewer).all() for fewer, more in pairwise(errors))


def test_codebooks_are_weighted_means() -> None:
    weight, sensitivity = weight_and_sensitivity()
    codes = code(weight, sensitivity)
    for bits in WIDTHS:
        clusters_MNK = torch.nn.functional.one_hot((codes.codes >> (8 - bits)).long(), 2**bits).double()
        mass_MK = (clusters_MNK * sensitivity[..., None]).sum(1)
        mean_MK = (clusters_MNK * (sensitivity * weight)[..., None]).sum(1) / mass_MK
        heavy_MK = mass_MK > 0.01 * sensitivity.mean(1, keepdim=True)  # lighter ones feel the least sensitivity
        torch.testing.assert_close(codes.codebooks[bits].double()[heavy_MK], mean_MK[heavy_MK], rtol=1e-3, atol=1e-4)


def test_seed_is_almost_the_optimum() -> None:
    weight, sensitivity = weight_and_sensitivity(M=4)
    errors_M = weighted_error_M(weight, sensitivity, code(weight, sensitivity, bits=3), 3)
    least_M = torch.tensor([least_error(*row, K=8) for row in zip(weight, sensitivity, strict=True)])
    assert (errors_M <= 1.01 * least_M).all()


def test_splits_are_optimal() -> None:
    weight, sensitivity = weight_and_sensitivity(M=2)
    codes = code(weight, sensitivity, bits=4)
    for w, s, row, decoded in zip(weight, sensitivity, codes.codes, codes.decode(4).weight, strict=True):
        for cluster in range(8):
            members = row >> 1 == cluster
            error = float((s * (decoded - w).square())[members].sum())
            assert error <= 1.01 * least_error(w[members], s[members], K=2) + 1e-5 * float((s * w.square()).sum()) / 16


def test_few_distinct_values_are_exact_and_equal_values_share_a_code() -> None:
    values = torch.tensor([-1.0, -0.25, 0.5, 2.0])
    weight = values[torch.randint(4, (5, 40), generator=torch.Generator().manual_seed(1))]
    weight[4] = 0.5
    for sensitivity in (torch.ones_like(weight), torch.zeros_like(weight)):
        codes = code(weight, sensitivity)
        assert all(torch.equal(codes.decode(bits).weight, weight) for bits in WIDTHS)
        for w, row in zip(weight, codes.codes, strict=True):
            assert all(len(row[w == value].unique()) == 1 for value in w.unique())


def test_rows_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, sensitivity = weight_and_sensitivity()
    codes = code(weight, sensitivity)
    monkeypatch.setattr(any_precision, "CHUNK", 1200)
    chunked = code(weight, sensitivity)
    assert torch.equal(codes.codes, chunked.codes)
    assert all(torch.equal(codes.codebooks[bits], chunked.codebooks[bits]) for bits in WIDTHS)


def test_bytes_are_planes_and_the_codebook_of_the_width() -> None:
    codes = code(*weight_and_sensitivity(M=3, N=37))  # 111 numbers: 14 bytes per plane
    for bits in WIDTHS:
        assert codes.decode(bits).bytes == bits * 14 + 3 * 2**bits * 2


@pytest.mark.parametrize(("seed_bits", "bits"), [(0, 8), (3, 9), (5, 4)])
def test_invalid_widths_are_refused(seed_bits: int, bits: int) -> None:
    with pytest.raises(RecipeError, match="1 <= seed_bits <= bits <= 8"):
        code(*weight_and_sensitivity(), seed_bits, bits)


def test_widths_below_the_seed_and_above_the_codes_are_refused() -> None:
    codes = code(*weight_and_sensitivity(), bits=5)
    for bits in (2, 6):
        with pytest.raises(RecipeError, match="3 to 5 bits"):
            codes.decode(bits)


@pytest.mark.parametrize("wrong", [-1.0, torch.nan, torch.inf])
def test_invalid_sensitivities_are_refused(wrong: float) -> None:
    weight, sensitivity = weight_and_sensitivity()
    sensitivity[1, 2] = wrong
    with pytest.raises(CalibrationError, match="negative or not finite"):
        code(weight, sensitivity)


@pytest.mark.parametrize("seed_bits", [1, 6, 8])
def test_other_seeds(seed_bits: int) -> None:
    weight, sensitivity = weight_and_sensitivity()
    codes = code(weight, sensitivity, seed_bits)
    errors = [float(weighted_error_M(weight, sensitivity, codes, bits).sum()) for bits in range(seed_bits, 9)]
    assert errors == sorted(errors, reverse=True)
    assert min(codes.codebooks) == seed_bits
