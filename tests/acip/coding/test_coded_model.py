"""A coded model stays within its budget, and its predictions approach those of the base model as the bytes grow."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from acip.coding.coded_model import CodedModel, code_model
from acip.coding.error_feedback import damped, row_errors
from acip.coding.statistics import LayerStatistics, layer_statistics
from acip.errors import BudgetError, RecipeError
from acip.layers.targets import find_linears, weight_MN
from tests.acip.layers.test_architectures import IDS, random_model
from tests.support.small import GOLDEN

RATES = (1.5, 2.5, 3.5, 5.0, 7.5)


@dataclass
class Subject:
    """The trained Llama of golden/, its layers, and their codes."""

    model: Any
    linears: dict[str, Any]
    statistics: dict[str, LayerStatistics]
    coded: CodedModel
    windows: Tensor  # held-out
    log_probs: Tensor  # of the base model

    @torch.no_grad()
    def kl(self, limit: int) -> float:
        """Return the KL divergence, in nats per token, of the model with at most `limit` bytes of coded layers."""
        before = {name: layer.weight.clone() for name, layer in self.linears.items()}
        for name, weight in self.coded.weights(limit):
            self.linears[name].weight.copy_(weight)
        log_probs = self.model(input_ids=self.windows).logits.log_softmax(-1)
        for name, weight in before.items():
            self.linears[name].weight.copy_(weight)
        return float((self.log_probs.exp() * (self.log_probs - log_probs)).sum(-1).mean())

    def limits(self, count: int) -> list[int]:
        """Return budgets from the coarsest to the finest model."""
        totals = self.coded.order.totals
        return [round(totals[0] + (totals[-1] - totals[0]) * i / (count - 1)) for i in range(count)]


@pytest.fixture(scope="module")
def subject(golden_tokens: Tensor, heldout_tokens: Tensor) -> Subject:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "base", dtype=torch.float32).eval().requires_grad_(False)
    linears = find_linears(model)
    statistics = layer_statistics(model, linears, golden_tokens[:24])
    coded = code_model(linears, statistics, RATES)
    windows = heldout_tokens[:24]
    with torch.no_grad():
        log_probs = model(input_ids=windows).logits.log_softmax(-1)
    return Subject(model, linears, statistics, coded, windows, log_probs)


def chosen_bytes(coded: CodedModel, limit: int) -> dict[str, int]:
    return {name: coded.versions[name][version].bytes for name, version in coded.order.at(coded.order.within(limit)).items()}


def test_weights_take_at_most_the_limit(subject: Subject) -> None:
    """The largest step of the order bounds the bytes that are left."""
    largest = max(step.bytes for step in subject.coded.order.steps)
    for limit in subject.limits(20):
        used = sum(chosen_bytes(subject.coded, limit).values())
        assert limit - largest < used <= limit
        assert used == subject.coded.order.totals[subject.coded.order.within(limit)]


def test_weights_are_those_of_the_chosen_versions(subject: Subject) -> None:
    limit = subject.limits(3)[1]
    choice = subject.coded.order.at(subject.coded.order.within(limit))
    weights = dict(subject.coded.weights(limit))
    assert list(weights) == list(subject.linears)
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert weight.shape == weight_MN(subject.linears[name]).shape
        assert torch.equal(weight, subject.coded.versions[name][choice[name]].unpack().decode())


def test_budgets_below_the_coarsest_model_raise(subject: Subject) -> None:
    with pytest.raises(BudgetError, match="the coarsest version of all layers takes"):
        list(subject.coded.weights(subject.coded.order.totals[0] - 1))


def test_bytes_are_those_of_all_versions(subject: Subject) -> None:
    expected = sum(len(each.stream) + 2 * len(each.steps) + 4 for layer in subject.coded.versions.values() for each in layer)
    assert subject.coded.bytes == expected


def test_every_layer_has_a_version_per_rate_from_coarse_to_fine(subject: Subject) -> None:
    assert subject.coded.versions.keys() == subject.linears.keys()
    for layer in subject.coded.versions.values():
        assert len(layer) == len(RATES)
        assert all(coarse.bytes < fine.bytes for coarse, fine in pairwise(layer))


def test_mean_rates_are_near_the_given_rates(subject: Subject) -> None:
    """The versions take more than the rate: it leaves out the steps and the excess of Huffman codes, and error feedback widens codes."""
    weights = sum(weight_MN(layer).numel() for layer in subject.linears.values())
    for i, rate in enumerate(RATES[:-1]):  # the last one is limited by 8 bits
        assert rate < 8 * sum(layer[i].bytes for layer in subject.coded.versions.values()) / weights < rate + 1


def test_kl_falls_as_bytes_grow(subject: Subject) -> None:
    divergences = [subject.kl(limit) for limit in subject.limits(8)]
    assert all(larger < 1.05 * smaller + 1e-5 for smaller, larger in pairwise(divergences))
    assert divergences[-1] < 0.01 * divergences[0]


def test_finest_model_is_close_to_the_base(subject: Subject) -> None:
    assert subject.kl(subject.coded.order.totals[-1]) < 1e-3
    for name, weight in subject.coded.weights(subject.coded.order.totals[-1]):
        original = weight_MN(subject.linears[name])
        assert (weight - original).norm() < 0.03 * original.norm()


def test_predicted_losses_are_near_the_measured_divergences(subject: Subject) -> None:
    """The prediction is of second order, so it holds for fine codes."""
    order = subject.coded.order
    for limit in subject.limits(6)[2:]:
        ratio = subject.kl(limit) / order.losses[order.within(limit)]
        assert 0.4 < ratio < 2.5


def test_losses_of_the_order_are_those_of_the_codes(subject: Subject) -> None:
    """The reference is computed from the decoded weights and the damped metric."""
    order = subject.coded.order
    for limit in subject.limits(3):
        expected = 0.0
        for name, weight in subject.coded.weights(limit):
            each = subject.statistics[name]
            expected += 0.5 * float(each.importance @ row_errors(weight_MN(subject.linears[name]), weight, damped(each.metric)))
        assert order.losses[order.within(limit)] == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_sizes_nest(subject: Subject) -> None:
    for smaller, larger in pairwise(chosen_bytes(subject.coded, limit) for limit in subject.limits(30)):
        assert all(smaller[name] <= larger[name] for name in smaller)


def test_base_weights_stay_unchanged(subject: Subject) -> None:
    copies = {name: layer.weight.clone() for name, layer in subject.linears.items()}
    code_model(subject.linears, subject.statistics, [2.0])
    assert all(torch.equal(subject.linears[name].weight, copy) for name, copy in copies.items())


@pytest.mark.parametrize(
    "rates",
    [[], [0.0], [-1.0, 2.0], [2.0, 8.5], [3.0, 2.0], [2.0, 2.0], [math.nan], [2.0, math.inf]],
    ids=["none", "zero", "negative", "above-8", "falling", "equal", "nan", "infinite"],
)
def test_invalid_rates_raise(rates: list[float]) -> None:
    with pytest.raises(RecipeError, match="rising, above 0 and at most 8 bits per weight"):
        code_model({}, {}, rates)


def test_progress_counts_layers(subject: Subject) -> None:
    calls: list[tuple[int, int]] = []
    names = list(subject.linears)[:3]
    code_model({name: subject.linears[name] for name in names}, subject.statistics, [2.0], lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_one_rate_gives_one_size(subject: Subject) -> None:
    names = list(subject.linears)[:2]
    coded = code_model({name: subject.linears[name] for name in names}, subject.statistics, [3.0])
    assert coded.order.steps == []
    assert len(list(coded.weights(coded.order.totals[0]))) == 2


def test_transposed_weights_decode_to_their_own_shape() -> None:
    """GPT-2's Conv1D stores its weights as [in, out]; the codes are [out, in]."""
    model = random_model(GPT2Config(**IDS, n_embd=32, n_layer=1, n_head=2, n_positions=32)).requires_grad_(False)
    linears = find_linears(model)
    windows = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    coded = code_model(linears, layer_statistics(model, linears, windows), [8.0])
    for name, weight in coded.weights(coded.order.totals[0]):
        assert (weight - weight_MN(linears[name])).norm() < 0.05 * weight.norm()


def test_layers_of_zeros_are_coded_as_zeros(subject: Subject) -> None:
    name, other = list(subject.linears)[:2]
    M, N = weight_MN(subject.linears[name]).shape
    empty = nn.Linear(N, M, bias=False)
    nn.init.zeros_(empty.weight)
    coded = code_model({name: empty, other: subject.linears[other]}, subject.statistics, [2.0, 4.0])
    for limit in coded.order.totals:
        assert not dict(coded.weights(limit))[name].any()
    assert coded.order.at(len(coded.order.steps))[name] == coded.order.at(0)[name]
    assert coded.order.losses[-1] < coded.order.losses[0]
