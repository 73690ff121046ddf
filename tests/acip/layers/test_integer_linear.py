"""Integer layers compute products with the decoded weights: approximately, or as precisely as bfloat16."""

import copy

import pytest
import torch
from torch import Tensor

from acip.layers.integer_linear import IntegerLinear, PreciseIntegerLinear, rounded, supports_integers, supports_precise_integers

CPU = torch.device("cpu")
SHAPES = [(96, 160), (64, 64), (7, 5), (65, 64), (1, 1)]

pytestmark = pytest.mark.skipif(not supports_integers(CPU), reason="torch has no integer products on this CPU")
precise = pytest.mark.skipif(not supports_precise_integers(CPU, torch.bfloat16), reason="this CPU has no VNNI")


def layer_and_weight(kind: type[IntegerLinear], M: int, N: int, bias: bool = True) -> tuple[IntegerLinear, Tensor, Tensor]:
    """Return (layer, decoded weight in float64, bias in float64)."""
    codes_MN, steps_M = rounded(torch.randn(M, N))
    bias_M = torch.randn(M) if bias else None
    return (
        kind(codes_MN, steps_M, bias_M),
        codes_MN * steps_M.double()[:, None],
        torch.zeros(M).double() if bias_M is None else bias_M.double(),
    )


def inputs(*shape: int) -> Tensor:
    """Return inputs of which one coordinate is a thousand times as large as the others, as in language models."""
    x = torch.randn(*shape)
    x[..., shape[-1] // 2] *= 1000
    return x.bfloat16()


@precise
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [(1,), (4,), (2, 9), (0,)])
def test_precise_products_are_as_exact_as_bfloat16(shape: tuple[int, int], rows: tuple[int, ...]) -> None:
    layer, weight_MN, bias_M = layer_and_weight(PreciseIntegerLinear, *shape, bias=rows != (4,))
    x = inputs(*rows, shape[1])
    y, exact = layer(x), x.double() @ weight_MN.T + bias_M
    assert (y.dtype, y.shape) == (torch.bfloat16, exact.shape)
    assert (y.double() - exact).norm() <= 2**-8 * exact.norm()


@precise
def test_a_precise_row_does_not_depend_on_the_other_rows() -> None:
    layer, *_ = layer_and_weight(PreciseIntegerLinear, 96, 160)
    x = torch.cat([inputs(3, 160), 1e4 * inputs(3, 160)])
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@precise
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_gives_no_finite_output(bad: float) -> None:
    layer, *_ = layer_and_weight(PreciseIntegerLinear, 8, 16)
    x = torch.randn(2, 16).bfloat16()
    x[1, 3] = bad
    assert layer(x)[0].isfinite().all() and not layer(x)[1].isfinite().any()


@precise
def test_zeros_give_the_bias() -> None:
    layer, _, bias_M = layer_and_weight(PreciseIntegerLinear, 8, 16)
    assert torch.equal(layer(torch.zeros(2, 16))[1], bias_M.float())


def test_products_for_drafts_are_close() -> None:
    """Without VNNI, sums may overflow. Drafts are checked, so that this costs speed alone."""
    layer, weight_MN, bias_M = layer_and_weight(IntegerLinear, 48, 80)
    x = torch.randn(2, 3, 80)
    exact = x.double() @ weight_MN.T + bias_M
    assert (layer(x) - exact).norm() < (0.02 if torch.cpu._is_vnni_supported() else 0.2) * exact.norm()


def test_weights_are_rounded_to_eight_bits() -> None:
    weight_MN = torch.randn(48, 80)
    codes_MN, steps_M = rounded(weight_MN)
    assert codes_MN.abs().max() == 127 and rounded(torch.zeros(2, 4))[0].eq(0).all()
    assert ((codes_MN * steps_M[:, None] - weight_MN).abs() <= 0.51 * steps_M[:, None]).all()


def test_a_copy_has_the_same_weights_in_any_dtype() -> None:
    layer, weight_MN, bias_M = layer_and_weight(IntegerLinear, 8, 16)
    x = torch.randn(3, 16).double()
    copied = copy.deepcopy(torch.nn.Sequential(layer)).double()
    torch.testing.assert_close(copied(x), x @ weight_MN.T + bias_M, rtol=1e-6, atol=1e-6)
