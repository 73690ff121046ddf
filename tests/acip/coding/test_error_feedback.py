"""Error feedback lowers the error at a layer's outputs, row by row, for any shape and dtype of weights."""

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from acip.coding import error_feedback
from acip.coding.codes import TOP, stored_steps
from acip.coding.error_feedback import code, code_versions, damped, row_errors
from tests.support.fuzzing import fuzz

SHAPES = [(1, 1), (3, 1), (1, 5), (40, 17), (7, 129), (5, 300)]  # blocks have 128 columns


def weights(M: int, N: int, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(M, N, generator=torch.Generator().manual_seed(seed))


def correlated_metric(N: int, seed: int = 0, samples: int = 4) -> Tensor:
    """Return the damped second moment of inputs with few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(max(1, N // samples), N, generator=generator)
    x_SN = torch.randn(4 * N, len(directions), generator=generator) @ directions + 0.1 * torch.randn(4 * N, N, generator=generator)
    return damped(x_SN.T @ x_SN / len(x_SN))


def steps_of(W_MN: Tensor, share: float) -> Tensor:
    """Return steps that are this share of the root mean square of each row, and keep codes within 8 bits."""
    return (share * W_MN.square().mean(1).sqrt()).maximum(W_MN.abs().amax(1) / 126)


def rounded(W_MN: Tensor, steps_M: Tensor) -> Tensor:
    """Return the weights after independent rounding."""
    return (W_MN / steps_M[:, None]).round().clamp(-TOP, TOP) * steps_M[:, None]


def step_rounding(W_MN: Tensor, metric_NN: Tensor) -> float:
    """Return a bound of the error from the rounding of steps to float16: (2^-10)^2 of the weights' own."""
    return 1e-6 * error(W_MN, torch.zeros_like(W_MN), metric_NN)


def error(W_MN: Tensor, decoded_MN: Tensor, metric_NN: Tensor) -> float:
    return float(row_errors(W_MN, decoded_MN, metric_NN).sum())


@fuzz(st.integers(0, 2**31), st.integers(8, 30), st.integers(1, 40), st.floats(0.05, 4.0), share=0.5)
def test_error_is_never_above_that_of_independent_rounding(seed: int, M: int, N: int, share: float) -> None:
    """This holds for the sum over rows. Both methods are heuristics, so single rows may be worse."""
    W_MN, metric_NN = weights(M, N, seed), correlated_metric(N, seed)
    steps_M = steps_of(W_MN, share)
    independent = error(W_MN, rounded(W_MN, steps_M), metric_NN)
    assert error(W_MN, code(W_MN, metric_NN, steps_M).decode(), metric_NN) <= 1.01 * independent + step_rounding(W_MN, metric_NN)


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0, 2.0])
def test_error_is_a_fraction_of_that_of_independent_rounding_on_correlated_inputs(share: float) -> None:
    W_MN, metric_NN = weights(64, 160), correlated_metric(160)
    steps_M = steps_of(W_MN, share)
    independent = error(W_MN, rounded(W_MN, steps_M), metric_NN)
    assert error(W_MN, code(W_MN, metric_NN, steps_M).decode(), metric_NN) < 0.5 * independent


@fuzz(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 150), st.floats(0.02, 3.0), share=0.3)
def test_descent_never_raises_the_error_of_a_row(seed: int, M: int, N: int, share: float) -> None:
    """The codes at the start are arbitrary, some of them clipped."""
    W_NM, metric_NN = (weights(M, N, seed) / share / 0.05).T, correlated_metric(N, seed)
    generator = torch.Generator().manual_seed(seed)
    noise_NM = torch.randn(N, M, generator=generator) * torch.tensor([0.3, 3.0, 100.0])[seed % 3]
    codes_NM = (W_NM + noise_NM).round().clamp(-TOP, TOP)
    after_NM, slope_NM = codes_NM.clone(), metric_NN @ (W_NM - codes_NM)
    error_feedback._descent(slope_NM, metric_NN, after_NM)
    tolerance = 1e-3 * float(metric_NN.diagonal().mean() * codes_NM.abs().max())
    torch.testing.assert_close(slope_NM, metric_NN @ (W_NM - after_NM), rtol=1e-3, atol=tolerance)
    before_M, after_M = (row_errors(W_NM.T, each.T, metric_NN) for each in (codes_NM, after_NM))
    assert (after_M <= before_M * (1 + 1e-3) + 1e-3 * metric_NN.diagonal().mean()).all()
    assert torch.equal(after_NM, after_NM.round())
    assert after_NM.abs().max() <= TOP


@pytest.mark.parametrize("share", [0.1, 0.5, 1.5])
def test_sweeps_lower_the_error(share: float) -> None:
    W_MN, metric_NN = weights(64, 150), correlated_metric(150)
    errors = [error(W_MN, code(W_MN, metric_NN, steps_of(W_MN, share), sweeps).decode(), metric_NN) for sweeps in (0, 1, 3)]
    assert errors[1] < errors[0]
    assert errors[2] <= 1.001 * errors[1]


@pytest.mark.parametrize("share", [0.2, 1.0, 3.0])
def test_refit_never_raises_the_error_of_a_row(share: float) -> None:
    W_NM, metric_NN = (weights(50, 60) / share / 0.05).T, correlated_metric(60)
    codes_NM = W_NM.round()
    factor_M = error_feedback._refit(W_NM, codes_NM, metric_NN @ codes_NM)
    before_M, after_M = (row_errors(W_NM.T, each.T, metric_NN) for each in (codes_NM, factor_M * codes_NM))
    assert (after_M <= before_M * (1 + 1e-3) + 1e-6 * metric_NN.diagonal().mean()).all()
    assert after_M.sum() < before_M.sum()


def test_refitted_steps_are_within_a_factor_of_two() -> None:
    low, high = error_feedback.REFIT
    for share in (0.1, 1.0, 5.0):
        W_MN = weights(40, 30)
        steps_M = steps_of(W_MN, share)
        ratio_M = code(W_MN, correlated_metric(30), steps_M).steps / steps_M
        assert (ratio_M >= 0.999 * low).all()
        assert (ratio_M <= 1.001 * high).all()


def test_rows_do_not_depend_on_the_other_rows() -> None:
    """Other rows are replaced by zeros, by large and by clipped weights."""
    W_MN, metric_NN = weights(30, 140), correlated_metric(140)
    steps_M = steps_of(W_MN, 0.4)
    codes_MN = code(W_MN, metric_NN, steps_M).codes
    kept_M = torch.arange(30) % 3 == 0
    for factor in (0.0, 0.3, 100.0):
        changed_MN = torch.where(kept_M[:, None], W_MN, factor * W_MN)
        assert torch.equal(code(changed_MN, metric_NN, steps_M).codes[kept_M], codes_MN[kept_M])


def test_a_part_of_the_rows_has_the_same_codes() -> None:
    """Matrix products of other shapes round differently, so a few codes near the middle between two integers may differ."""
    W_MN, metric_NN = weights(30, 140), correlated_metric(140)
    steps_M = steps_of(W_MN, 0.4)
    whole, part = code(W_MN, metric_NN, steps_M), code(W_MN[4:11], metric_NN, steps_M[4:11])
    assert (whole.codes[4:11] == part.codes).float().mean() > 0.97
    torch.testing.assert_close(part.steps, whole.steps[4:11], rtol=2e-3, atol=0)


@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_identity_gives_plain_rounding_up_to_the_refit(M: int, N: int) -> None:
    W_MN, identity = weights(M, N), damped(torch.eye(N))
    steps_M = steps_of(W_MN, 0.3)
    unswept = code(W_MN, identity, steps_M, sweeps=0)
    assert torch.equal(unswept.codes, (W_MN / steps_M[:, None]).round().to(torch.int8))
    swept = code(W_MN, identity, steps_M)
    distance_MN = (W_MN / swept.steps[:, None] - swept.codes).abs()
    assert (distance_MN <= 0.51 + 0.1 * swept.codes.abs()).all()  # the steps are refitted again after the last rounding
    assert error(W_MN, swept.decode(), identity) <= 1.001 * error(W_MN, rounded(W_MN, steps_M), identity) + step_rounding(W_MN, identity)


@pytest.mark.parametrize("sweeps", [0, 1])
def test_codes_are_clipped_at_127(sweeps: int) -> None:
    W_MN = weights(6, 40)
    steps_M = W_MN.abs().amax(1) / 1000
    coded = code(W_MN, correlated_metric(40), steps_M, sweeps)
    assert coded.codes.abs().max() == TOP  # int8 would wrap at 128
    assert (coded.codes.sign() == W_MN.sign())[W_MN.abs() > 0.9 * W_MN.abs().amax(1, keepdim=True)].all()
    assert (coded.steps <= 2.01 * steps_M).all()


def test_rows_of_zeros_decode_to_zeros() -> None:
    W_MN = weights(6, 50)
    W_MN[2] = W_MN[5] = 0
    coded = code(W_MN, correlated_metric(50), torch.full((6,), 0.01))
    assert not coded.codes[[2, 5]].any()
    assert not coded.decode()[[2, 5]].any()
    assert coded.decode().isfinite().all()
    torch.testing.assert_close(coded.steps[[2, 5]], stored_steps(torch.cat([coded.steps, torch.tensor([0.01])]))[[6, 6]], rtol=1e-3, atol=0)


def test_steps_far_above_the_weights_give_zeros_or_finite_weights() -> None:
    decoded_MN = code(weights(4, 20), correlated_metric(20), torch.full((4,), 1e6)).decode()
    assert not decoded_MN.any()


@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_codes_of_any_shape_decode_to_the_weight(M: int, N: int) -> None:
    W_MN = weights(M, N)
    steps_M = steps_of(W_MN, 0.1)
    coded = code(W_MN, correlated_metric(N), steps_M)
    assert coded.codes.shape == (M, N)
    assert coded.codes.dtype == torch.int8
    assert coded.codes.is_contiguous()
    assert coded.steps.shape == (M,)
    assert error(W_MN, coded.decode(), torch.eye(N)) < M * N * float(steps_M.max()) ** 2


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_block_size_changes_few_codes(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks change only the order of additions."""
    W_MN, metric_NN = weights(20, 130), correlated_metric(130)
    steps_M = steps_of(W_MN, 0.5)
    codes_MN = code(W_MN, metric_NN, steps_M).codes
    monkeypatch.setattr(error_feedback, "BLOCK", block)
    assert (code(W_MN, metric_NN, steps_M).codes == codes_MN).float().mean() > 0.97


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_have_the_codes_of_their_float32_values(dtype: torch.dtype) -> None:
    W_MN, metric_NN = weights(10, 70).to(dtype), correlated_metric(70)
    steps_M = steps_of(W_MN.float(), 0.3)
    coded = code(W_MN, metric_NN, steps_M)
    assert torch.equal(coded.codes, code(W_MN.float(), metric_NN, steps_M).codes)
    assert coded.decode().dtype == torch.float32
    assert torch.equal(row_errors(W_MN, coded.decode(), metric_NN), row_errors(W_MN.float(), coded.decode(), metric_NN))


def test_arguments_stay_unchanged() -> None:
    W_MN, metric_NN = weights(5, 30), correlated_metric(30)
    steps_M = steps_of(W_MN, 0.3)
    copies = W_MN.clone(), metric_NN.clone(), steps_M.clone()
    code(W_MN, metric_NN, steps_M)
    assert all(torch.equal(each, copy) for each, copy in zip((W_MN, metric_NN, steps_M), copies, strict=True))


def test_parameters_can_be_coded() -> None:
    W_MN = torch.nn.Parameter(weights(4, 12))
    assert not code(W_MN, correlated_metric(12), steps_of(W_MN.detach(), 0.3)).decode().requires_grad


# ---- the metric


@fuzz(st.integers(0, 2**31), st.integers(1, 40), st.floats(1e-12, 1e12))
def test_damped_metrics_are_positive_definite(seed: int, N: int, scale: float) -> None:
    """The undamped metric has rank 1."""
    x_N = torch.randn(N, generator=torch.Generator().manual_seed(seed))
    metric_NN = scale * torch.outer(x_N, x_N)
    result_NN = damped(metric_NN)
    mean = metric_NN.diagonal().mean()
    torch.testing.assert_close(result_NN - metric_NN, 0.01 * mean * torch.eye(N), rtol=1e-2, atol=1e-4 * float(mean))
    torch.linalg.cholesky(result_NN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_damped_metric_of_zeros_is_the_identity(dtype: torch.dtype) -> None:
    assert torch.equal(damped(torch.zeros(3, 3, dtype=dtype)), torch.eye(3))


def test_errors_of_the_versions_are_those_of_the_decoded_weights() -> None:
    W_MN, metric_NN = weights(20, 150), correlated_metric(150)
    for codes, errors_M in code_versions(W_MN, metric_NN, [steps_of(W_MN, share) for share in (0.1, 0.4, 2.0)]):
        torch.testing.assert_close(errors_M, row_errors(W_MN, codes.decode(), metric_NN), rtol=1e-2, atol=0.0)


def test_row_errors_are_the_mean_squared_errors_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x_SN, W_MN, V_MN = (torch.randn(rows, 20, generator=generator) for rows in (500, 6, 6))
    expected_M = ((x_SN @ (W_MN - V_MN).T).square()).mean(0)
    torch.testing.assert_close(row_errors(W_MN, V_MN, x_SN.T @ x_SN / 500), expected_M, rtol=1e-4, atol=1e-5)
