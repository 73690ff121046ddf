"""BitStack: blocks of signs times a rank-k magnitude, in exactly counted bytes, and their order over all layers."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from acip.baselines.quantized import bitstack
from acip.baselines.quantized.bitstack import Entry
from acip.errors import BudgetError


@pytest.fixture(params=[(48, 80), (80, 48), (13, 7)], ids=str)
def layer(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """The weight of a layer and the scale of its inputs, some of which are much larger than others."""
    torch.manual_seed(0)
    M, N = request.param
    return 0.05 * torch.randn(M, N), torch.rand(N).mul(4).exp()


def test_each_block_lowers_the_weighted_error(layer: tuple[Tensor, Tensor]) -> None:
    weight_MN, scale_N = layer
    blocks = bitstack.decompose(weight_MN, scale_N, iterations=8, k=2)
    errors = [((bitstack.weight(blocks[:level], scale_N) - weight_MN) * scale_N).norm() for level in range(1, 9)]
    assert errors[0] < (weight_MN * scale_N).norm()
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] < 0.1 * errors[0]


def test_a_block_is_signs_times_the_best_magnitude_of_rank_k(layer: tuple[Tensor, Tensor]) -> None:
    weight_MN, scale_N = layer
    first, second = bitstack.decompose(weight_MN, scale_N, iterations=2, k=3)
    scaled_MN = weight_MN * scale_N
    for block, residual_MN in ((first, scaled_MN), (second, scaled_MN - first.matrix_MN())):
        signs_MN = torch.where(residual_MN >= 0, 1.0, -1.0)
        magnitude_MN = block.matrix_MN() * signs_MN
        assert torch.equal(bitstack.unpacked_signs(block.signs, signs_MN.numel()).view_as(signs_MN).float(), signs_MN)
        assert torch.linalg.matrix_rank(magnitude_MN, rtol=1e-5) == 3
        best = torch.linalg.svdvals(residual_MN.abs())[3:].norm()
        torch.testing.assert_close((residual_MN.abs() - magnitude_MN).norm(), best, rtol=1e-3, atol=0)


def test_scale_favors_inputs_of_large_magnitude() -> None:
    torch.manual_seed(0)
    weight_MN = torch.randn(64, 64)
    scale_N = torch.ones(64)
    scale_N[:8] = 30.0

    def error(scale_N: Tensor) -> Tensor:
        """Return the error of the columns with large inputs."""
        return (bitstack.weight(bitstack.decompose(weight_MN, scale_N, 2, 8), scale_N) - weight_MN)[:, :8].norm()

    assert error(scale_N) < 0.5 * error(torch.ones(64))


def test_input_scale_is_the_mean_norm_over_windows() -> None:
    inputs_BTN = torch.tensor([[[3.0, 0.0], [4.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(bitstack.input_scale(inputs_BTN), torch.tensor([3.001, 0.001]))


def test_bytes_are_those_of_the_packed_tensors(layer: tuple[Tensor, Tensor]) -> None:
    M, N = layer[0].shape
    for block in bitstack.decompose(*layer, iterations=3, k=5):
        assert block.signs.dtype == torch.uint8 and block.left.dtype == block.right.dtype == torch.float16
        assert block.bytes == math.ceil(M * N / 8) + 2 * 5 * (M + N)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_signs_survive_packing(count: int) -> None:
    values = torch.randn(count)
    values[0] = 0.0
    packed = bitstack.packed_signs(values)
    assert len(packed) == math.ceil(count / 8)
    assert bitstack.unpacked_signs(packed, count).tolist() == [1 if value >= 0 else -1 for value in values.tolist()]


def test_zero_weights_stay_zero() -> None:
    blocks = bitstack.decompose(torch.zeros(6, 9), torch.ones(9), iterations=2, k=2)
    assert torch.equal(bitstack.weight(blocks, torch.ones(9)), torch.zeros(6, 9))


# ---- order

LOSSES = {("a", 2): 5.0, ("b", 2): 4.0, ("c", 2): 6.0, ("a", 3): 2.0, ("b", 3): 3.0, ("c", 3): 1.0}


def test_blocks_are_sorted_by_loss_within_a_level() -> None:
    calls = []

    def loss(layer: str, level: int) -> float:
        calls.append((layer, level))
        return LOSSES[layer, level]

    order = bitstack.sort(["a", "b", "c"], loss, iterations=3)
    assert order == [*((layer, 1) for layer in "abc"), *((layer, 2) for layer in "bac"), *((layer, 3) for layer in "cab")]
    assert calls == list(LOSSES)  # level by level, each once


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_sorted_last_by_the_next_level(broken: float) -> None:
    losses = LOSSES | {("a", 2): broken, ("b", 2): broken}
    order = bitstack.sort(["b", "a", "c"], lambda *entry: losses[entry], iterations=3)
    assert [layer for layer, level in order if level == 2] == ["c", "a", "b"]


def test_blocks_of_a_layer_are_in_order_and_levels_differ_by_at_most_one() -> None:
    torch.manual_seed(0)
    layers = [f"layer{i}" for i in range(7)]
    order = bitstack.sort(layers, lambda *_: torch.rand(()).item(), iterations=5)
    levels = dict.fromkeys(layers, 0)
    for layer, level in order:
        assert level == levels[layer] + 1
        levels[layer] = level
        assert max(levels.values()) - min(levels.values()) <= 1
    assert set(levels.values()) == {5}


def test_levels_are_the_longest_prefix_within_the_budget() -> None:
    torch.manual_seed(0)
    block_bytes = {"small": 10, "large": 25, "other": 17}
    order = bitstack.sort(list(block_bytes), lambda *_: torch.rand(()).item(), iterations=4)
    for budget in range(52, 4 * 52 + 10):
        levels = bitstack.levels_within(order, block_bytes, budget)
        used = sum(level * block_bytes[layer] for layer, level in levels.items())
        assert used <= budget
        held = sum(levels.values())
        assert {Entry(layer, level) for layer in levels for level in range(1, levels[layer] + 1)} == set(order[:held])
        assert held == len(order) or used + block_bytes[order[held].layer] > budget


def test_a_budget_below_the_first_level_raises() -> None:
    order = bitstack.sort(["a", "b"], lambda *_: 1.0, iterations=2)
    with pytest.raises(BudgetError, match="the smallest size is 30 bytes"):
        bitstack.levels_within(order, {"a": 10, "b": 20}, 29)
