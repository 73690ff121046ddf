"""GPTQ: lower error at the outputs than rounding, on few values per group, in exactly counted bytes."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from acip.baselines.quantized.gptq import gptq

BITS = (2, 3, 4, 5, 6, 8)


def weights(M: int, N: int, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(M, N, generator=torch.Generator().manual_seed(seed))


def covariance(N: int, seed: int = 0) -> Tensor:
    """Return the second moment of inputs with few strong directions and columns of different size."""
    generator = torch.Generator().manual_seed(seed)
    x_SN = torch.randn(4 * N, max(1, N // 4), generator=generator) @ torch.randn(max(1, N // 4), N, generator=generator)
    x_SN = (x_SN + 0.3 * torch.randn(4 * N, N, generator=generator)) * torch.randn(N, generator=generator).exp()
    return x_SN.T @ x_SN / len(x_SN)


def error(weight_MN: Tensor, decoded_MN: Tensor, covariance_NN: Tensor) -> float:
    """Return the mean squared error of the outputs."""
    E_MN = (weight_MN - decoded_MN).double()
    return float(((E_MN @ covariance_NN.double()) * E_MN).sum())


def rounded(weight_MN: Tensor, bits: int) -> Tensor:
    """Return the weights after rounding on the same scales. Uncorrelated inputs leave nothing to compensate."""
    return gptq(weight_MN, torch.eye(weight_MN.shape[1]), bits)[0]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_error_is_below_that_of_rounding_on_the_same_scales(bits: int, act_order: bool) -> None:
    weight_MN, covariance_NN = weights(40, 192), covariance(192)
    decoded_MN = gptq(weight_MN, covariance_NN, bits, act_order=act_order)[0]
    assert error(weight_MN, decoded_MN, covariance_NN) < 0.6 * error(weight_MN, rounded(weight_MN, bits), covariance_NN)


def test_large_inputs_first_lowers_the_error() -> None:
    weight_MN, covariance_NN = weights(60, 192), covariance(192)
    errors = [error(weight_MN, gptq(weight_MN, covariance_NN, 3, act_order=act_order)[0], covariance_NN) for act_order in (True, False)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("bits", BITS)
def test_uncorrelated_inputs_give_plain_rounding(bits: int) -> None:
    """Every weight is within half a step, apart from those at the ends of the grid, where the rounded zero point adds half a step."""
    weight_MN = weights(10, 128)
    groups_MGg = weight_MN.view(10, 2, 64)
    scale_MG = (groups_MGg.amax(2) - groups_MGg.amin(2)) / (2**bits - 1)
    distance_MGg = (weight_MN - rounded(weight_MN, bits)).view(10, 2, 64).abs() / scale_MG[..., None]
    assert distance_MGg.max() < 1.0 + 2**bits * 2.0**-11
    assert distance_MGg.median() < 0.5


@pytest.mark.parametrize("group", [16, 64, 100])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_group_has_at_most_two_to_the_bits_values(bits: int, group: int) -> None:
    decoded_MN = gptq(weights(8, 200), covariance(200), bits, group)[0]
    for part in decoded_MN.split(group, dim=1):
        assert all(len(row.unique()) <= 2**bits for row in part)


@pytest.mark.parametrize("bits", BITS)
def test_values_are_multiples_of_a_float16_scale(bits: int) -> None:
    weight_MN = weights(6, 64)
    decoded_MN = gptq(weight_MN, covariance(64), bits)[0]
    low_M1, high_M1 = weight_MN.amin(1, keepdim=True), weight_MN.amax(1, keepdim=True)
    scale_M1 = ((high_M1 - low_M1) / (2**bits - 1)).half().float()
    codes_MN = decoded_MN / scale_M1
    torch.testing.assert_close(codes_MN, codes_MN.round(), rtol=0, atol=1e-4)
    assert (codes_MN.amax(1) - codes_MN.amin(1)).max() < 2**bits - 0.9


@pytest.mark.parametrize(
    ("M", "N", "bits", "group", "expected"),
    [
        (10, 192, 4, 64, 960 + 2 * 30 + 15),
        (10, 192, 3, 64, 720 + 2 * 30 + 12),
        (10, 192, 8, 192, 1920 + 2 * 10 + 10),
        (3, 7, 3, 64, 8 + 2 * 3 + 2),  # 63 bits take 8 bytes, and 9 bits 2
        (10, 130, 2, 64, 325 + 2 * 30 + 8),  # the last group has 2 values and a scale of its own
    ],
)
def test_bytes_are_codes_scales_and_zero_points(M: int, N: int, bits: int, group: int, expected: int) -> None:
    assert gptq(weights(M, N), covariance(N), bits, group).bytes == expected


@pytest.mark.parametrize(("M", "N"), [(1, 1), (3, 7), (5, 65), (4, 130)])
def test_any_shape_decodes_to_the_weight(M: int, N: int) -> None:
    weight_MN = weights(M, N)
    decoded_MN = gptq(weight_MN, covariance(N), 8)[0]
    assert decoded_MN.shape == (M, N)
    assert decoded_MN.dtype == torch.float32
    assert (decoded_MN - weight_MN).norm() < 0.05 * weight_MN.norm()


def test_more_bits_lower_the_error() -> None:
    weight_MN, covariance_NN = weights(30, 128), covariance(128)
    errors = [error(weight_MN, gptq(weight_MN, covariance_NN, bits)[0], covariance_NN) for bits in BITS]
    assert all(more < 0.7 * fewer for fewer, more in pairwise(errors))


def test_rows_of_zeros_decode_to_zeros() -> None:
    weight_MN = weights(4, 70)
    weight_MN[1] = 0
    decoded_MN = gptq(weight_MN, covariance(70), 4)[0]
    assert not decoded_MN[1].any()
    assert decoded_MN.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_decode_as_their_float32_values(dtype: torch.dtype) -> None:
    weight_MN, covariance_NN = weights(6, 70).to(dtype), covariance(70)
    assert torch.equal(gptq(weight_MN, covariance_NN, 4)[0], gptq(weight_MN.float(), covariance_NN, 4)[0])


def test_arguments_stay_unchanged() -> None:
    weight_MN, covariance_NN = weights(4, 30), covariance(30)
    copies = weight_MN.clone(), covariance_NN.clone()
    gptq(weight_MN, covariance_NN, 3)
    assert torch.equal(weight_MN, copies[0])
    assert torch.equal(covariance_NN, copies[1])
