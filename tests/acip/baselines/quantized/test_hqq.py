"""HQQ: lower lp error than rounding to nearest, on few values per group, in exactly counted bytes."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from acip.baselines.quantized import hqq
from acip.errors import RecipeError


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Return values with outliers, of the size of weights."""
    torch.manual_seed(seed)
    return 0.05 * torch.distributions.StudentT(4.0).sample(shape)


@pytest.mark.parametrize("bits", hqq.BITS)
def test_lp_error_is_below_that_of_rounding_to_nearest_on_the_same_scale(bits: int) -> None:
    values_Gg = heavy_tailed(300, 64)
    nearest, solved = (hqq.quantized(values_Gg, bits, iterations) for iterations in (1, hqq.ITERATIONS))
    assert torch.equal(nearest.scale, solved.scale)
    errors = [hqq.lp_error(values_Gg - groups.decoded_Gg()) for groups in (nearest, solved)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("bits", hqq.BITS)
def test_rounding_to_nearest_covers_the_range_of_each_group(bits: int) -> None:
    values_Gg = heavy_tailed(50, 64)
    groups = hqq.quantized(values_Gg, bits, iterations=1)
    errors_Gg = (values_Gg - groups.decoded_Gg()).abs() / groups.scale.float()
    assert errors_Gg.max() < 0.5 + 2**bits * 2.0**-11  # half a step, and the rounding of scale and zero point to float16
    assert (groups.codes.amin(1) == 0).all() and (groups.codes.amax(1) == 2**bits - 1).all()


@pytest.mark.parametrize("error", [-0.5, -0.02, 0.0, 0.18, 3.0])
def test_shrunk_is_the_proximal_step(error: float) -> None:
    """The result is sign(e) max(|e| - |e|^(p - 1) / beta, 0), which is 0 for small errors."""
    expected = max(abs(error) - abs(error) ** (hqq.NORM - 1) / 10, 0.0) if error else 0.0
    assert hqq.shrunk(torch.tensor([error]), 10.0).abs().item() == pytest.approx(expected, abs=1e-6)
    assert hqq.shrunk(torch.tensor([error]), 10.0).item() * error >= 0


@pytest.mark.parametrize("bits", hqq.BITS)
def test_scale_and_zero_are_stored_in_16_bit(bits: int) -> None:
    groups = hqq.quantized(heavy_tailed(5, 64), bits)
    assert groups.codes.dtype == torch.uint8 and int(groups.codes.max()) < 2**bits
    assert groups.scale.dtype == groups.zero.dtype == torch.float16
    assert groups.scale.shape == groups.zero.shape == (5, 1)


@pytest.mark.parametrize(
    ("bits", "expected"), [(2, 10 * 3 * (16 + 4)), (3, 10 * 3 * (24 + 4)), (4, 10 * 3 * (32 + 4)), (8, 10 * 3 * (64 + 4))]
)
def test_bytes_are_codes_scales_and_zeros(bits: int, expected: int) -> None:
    assert hqq.hqq(heavy_tailed(10, 192), bits).bytes == expected


def test_padding_of_the_last_group_is_stored_but_not_returned() -> None:
    weight_MN = heavy_tailed(10, 130)
    coded = hqq.hqq(weight_MN, 4)
    assert coded.weight.shape == (10, 130)
    assert coded.bytes == 10 * 3 * (32 + 4)
    torch.testing.assert_close(coded.weight[:, 128:], weight_MN[:, 128:], atol=5e-3, rtol=0)  # the padding does not widen the range


@pytest.mark.parametrize("bits", hqq.BITS)
def test_a_group_has_at_most_two_to_the_bits_values(bits: int) -> None:
    coded = hqq.hqq(heavy_tailed(8, 256), bits, group=128)
    assert all(len(group.unique()) <= 2**bits for group in coded.weight.reshape(-1, 128))


def test_groups_lie_along_the_input_dimension() -> None:
    """A large value changes only its own group."""
    weight_MN = heavy_tailed(4, 192)
    changed_MN = weight_MN.clone()
    changed_MN[2, 70] = 5.0
    differs_MN = hqq.hqq(weight_MN, 4).weight != hqq.hqq(changed_MN, 4).weight
    assert differs_MN[2, 64:128].any()
    differs_MN[2, 64:128] = False
    assert not differs_MN.any()


def test_more_bits_lower_the_error() -> None:
    weight_MN = heavy_tailed(32, 128)
    errors = [(hqq.hqq(weight_MN, bits).weight - weight_MN).norm() for bits in hqq.BITS]
    assert all(more < fewer for fewer, more in pairwise(errors))


@pytest.mark.parametrize("value", [0.0, 1e-7, -0.3, 1000.0, -1000.0])
def test_constant_groups_are_finite_and_close(value: float) -> None:
    weight_MN = torch.full((2, 64), value)
    torch.testing.assert_close(hqq.hqq(weight_MN, 2).weight, weight_MN, rtol=2e-3, atol=hqq.MIN_SCALE)


def test_weights_in_16_bit_give_float32() -> None:
    assert hqq.hqq(heavy_tailed(4, 64).bfloat16(), 4).weight.dtype == torch.float32


@pytest.mark.parametrize(("bits", "group"), [(7, 64), (0, 64), (4, 0)])
def test_invalid_options_raise(bits: int, group: int) -> None:
    with pytest.raises(RecipeError, match="bits must be one of 2, 3, 4, 5, 6, 8"):
        hqq.hqq(torch.ones(2, 64), bits, group)
