"""Step sizes meet a rate, follow the importance of rows, and keep codes within 8 bits."""

from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from acip.coding.codes import TOP, Codes, compress
from acip.coding.error_feedback import code, damped
from acip.coding.step_sizes import LEAST_IMPORTANCE, RowScales, scale_for
from tests.support.fuzzing import fuzz


def layer(M: int, N: int, seed: int = 0, size: float = 0.05) -> RowScales:
    """Return the scales of normally distributed weights with correlated inputs and rows of different importance."""
    return RowScales.of(*inputs(M, N, seed, size))


def inputs(M: int, N: int, seed: int = 0, size: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W_MN, x_SN, importance_M = (torch.randn(shape, generator=generator) for shape in ((M, N), (2 * N, N), (M,)))
    x_SN += torch.randn(2 * N, 1, generator=generator)
    return size * W_MN, damped(x_SN.T @ x_SN / len(x_SN)), importance_M.exp()


def layers() -> dict[str, RowScales]:
    return {"wide": layer(40, 96), "narrow": layer(60, 20, seed=1, size=0.5), "small": layer(10, 64, seed=2, size=1e-3)}


def mean_rate(rows: dict[str, RowScales], scale: float) -> float:
    return sum(each.rate(scale) for each in rows.values()) / sum(len(each.steps) * each.inputs for each in rows.values())


def test_rate_falls_with_the_scale() -> None:
    rows = layer(30, 40)
    rates = [rows.rate(2.0**exponent) for exponent in range(-20, 20)]
    assert all(finer >= coarser for finer, coarser in pairwise(rates))
    assert rates[0] > rates[-1] == 0


def test_half_the_scale_costs_one_bit_per_weight() -> None:
    """No row is at 0 bits, and none is at its smallest step."""
    W_MN, metric_NN, _ = inputs(40, 96)
    rows = {"layer": RowScales.of(W_MN, metric_NN, torch.ones(40))}
    scale = scale_for(rows, 3.0)
    assert mean_rate(rows, scale / 2) == pytest.approx(4.0, abs=1e-3)


@fuzz(st.floats(0.1, 6.0))
def test_scale_meets_the_rate(bits: float) -> None:
    rows = layers()
    assert mean_rate(rows, scale_for(rows, bits)) == pytest.approx(bits, rel=0.01)


@fuzz(st.floats(0.1, 8.0), st.floats(0.1, 8.0))
def test_scale_falls_with_the_rate(bits: float, other: float) -> None:
    rows = layers()
    lower, higher = sorted((bits, other))
    assert scale_for(rows, lower) >= scale_for(rows, higher)


def test_rates_beyond_8_bits_give_the_finest_steps() -> None:
    rows = layers()
    scale = scale_for(rows, 20.0)
    assert all(torch.equal(each.at(scale), each.largest / (TOP - 1)) for each in rows.values())


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0, 5.0, 6.0])
def test_predicted_rate_is_that_of_the_codes(bits: float) -> None:
    """The codes take up to half a bit more: error feedback widens their distribution, and Huffman codes are above the entropy."""
    W_MN, metric_NN, importance_M = inputs(100, 200)
    rows = RowScales.of(W_MN, metric_NN, importance_M)
    coded = code(W_MN, metric_NN, rows.at(scale_for({"layer": rows}, bits)))
    assert bits < 8 * len(compress(coded.codes)) / W_MN.numel() < bits + 0.5


def test_rows_four_times_as_important_have_half_the_step() -> None:
    W_MN, metric_NN, _ = inputs(6, 30)
    steps_M = RowScales.of(W_MN, metric_NN, torch.tensor([1.0, 4.0, 16.0, 1.0, 4.0, 1.0])).steps
    torch.testing.assert_close(steps_M / steps_M[0], torch.tensor([1.0, 0.5, 0.25, 1.0, 0.5, 1.0]))


def test_layers_with_four_times_the_metric_have_half_the_step() -> None:
    W_MN, metric_NN, importance_M = inputs(6, 30)
    single, fourfold = (RowScales.of(W_MN, factor * metric_NN, importance_M).steps for factor in (1, 4))
    torch.testing.assert_close(fourfold, single / 2)


def test_steps_are_one_over_the_root_of_importance_and_determinant() -> None:
    W_MN, metric_NN, importance_M = inputs(6, 30)
    importance_M = importance_M.clamp(0.5, 2)  # above the least importance
    D = torch.linalg.det(metric_NN.double()) ** (1 / 30)
    expected_M = 1 / (importance_M.double() * D).sqrt()
    torch.testing.assert_close(RowScales.of(W_MN, metric_NN, importance_M).steps.double(), expected_M, rtol=1e-4, atol=0)


def test_rows_have_a_least_importance() -> None:
    W_MN, metric_NN, _ = inputs(4, 30)
    importance_M = torch.tensor([1.0, 0.0, 1e-9, 1.0])
    expected_M = torch.tensor([1.0, LEAST_IMPORTANCE / 2, LEAST_IMPORTANCE / 2, 1.0])
    steps_M = RowScales.of(W_MN, metric_NN, importance_M).steps
    torch.testing.assert_close((steps_M[0] / steps_M).square(), expected_M, rtol=1e-4, atol=0)


@fuzz(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 20), st.floats(-60, 60), st.floats(-8, 8))
def test_codes_never_exceed_127(seed: int, M: int, N: int, exponent: float, size: float) -> None:
    W_MN, metric_NN, importance_M = inputs(M, N, seed, 10**size)
    steps_M = RowScales.of(W_MN, metric_NN, importance_M).at(2.0**exponent)
    assert (steps_M > 0).all()
    assert (W_MN / steps_M[:, None]).round().abs().max() <= TOP


@pytest.mark.parametrize("scale", [2.0**-60, 1.0, 2.0**60])
def test_rows_of_zeros_and_layers_without_importance_have_finite_steps(scale: float) -> None:
    W_MN, metric_NN, _ = inputs(5, 12)
    W_MN[1] = 0
    for weight_MN, importance_M in ((W_MN, torch.zeros(5)), (torch.zeros(5, 12), torch.ones(5)), (torch.zeros(5, 12), torch.zeros(5))):
        rows = RowScales.of(weight_MN, metric_NN, importance_M)
        steps_M = rows.at(scale)
        assert steps_M.isfinite().all()
        assert (steps_M > 0).all()
        assert 0 <= rows.rate(scale) < 9 * 60
        coded = code(weight_MN, metric_NN, steps_M)
        assert isinstance(coded, Codes)
        assert coded.decode().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_have_the_steps_of_their_float32_values(dtype: torch.dtype) -> None:
    W_MN, metric_NN, importance_M = inputs(6, 30)
    rows, same = (RowScales.of(weight, metric_NN, importance_M) for weight in (W_MN.to(dtype), W_MN.to(dtype).float()))
    assert rows.at(1.0).dtype == torch.float32
    torch.testing.assert_close(rows.at(1e-3), same.at(1e-3))
