"""Tuned step sizes lower the loss of small models, and change nothing else."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from acip.coding.coded_model import CodedModel, code_model
from acip.coding.codes import stored_steps
from acip.coding.statistics import layer_statistics
from acip.coding.step_tuning import MAX_RATE, tune_steps
from acip.errors import CalibrationError, RecipeError
from acip.layers.targets import find_linears, weight_MN
from tests.acip.layers.test_architectures import IDS, random_model
from tests.support.small import GOLDEN

STEPS = 150


@dataclass
class Subject:
    """The trained Llama of golden/, its layers, and their codes before and after tuning."""

    model: Any
    linears: dict[str, nn.Module]
    coded: CodedModel
    tuned: CodedModel
    train: Tensor
    heldout: Tensor

    def limit(self, rate: float) -> int:
        """Return a budget at `rate` mean bits per weight."""
        return int(rate / 8 * sum(weight_MN(layer).numel() for layer in self.linears.values()))

    def kl(self, coded: CodedModel, limit: int) -> float:
        """Return the KL divergence, in nats per token, of the model with at most `limit` bytes of coded layers."""
        base, model = (log_probs(self.model, self.heldout, weights) for weights in ({}, dict(coded.weights(limit))))
        return float((base.exp() * (base - model)).sum(-1).mean())


@torch.no_grad()
def log_probs(model: Any, windows: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    replaced = {f"{name}.weight": weight for name, weight in weights.items()}
    logits: Tensor = torch.func.functional_call(model, replaced, kwargs={"input_ids": windows}).logits
    return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def subject(golden_tokens: Tensor, heldout_tokens: Tensor) -> Subject:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "base", dtype=torch.float32).eval().requires_grad_(False)
    linears, train = find_linears(model), golden_tokens[:256]
    coded = code_model(linears, layer_statistics(model, linears, train[:24]), (1.5, 2.0, 3.0, 4.0, 7.5))
    return Subject(model, linears, coded, tune_steps(model, linears, coded, train, STEPS), train, heldout_tokens[:48])


@pytest.mark.parametrize("rate", [2.6, 2.9])
def test_divergence_falls_on_held_out_text_at_small_sizes(subject: Subject, rate: float) -> None:
    limit = subject.limit(rate)
    assert subject.kl(subject.tuned, limit) < 0.95 * subject.kl(subject.coded, limit)


def test_codes_bytes_and_order_stay_the_same(subject: Subject) -> None:
    assert subject.tuned.order is subject.coded.order
    assert subject.tuned.bytes == subject.coded.bytes
    for name, versions in subject.coded.versions.items():
        for before, after in zip(versions, subject.tuned.versions[name], strict=True):
            assert (after.stream, after.inputs, after.bytes) == (before.stream, before.inputs, before.bytes)


def test_steps_are_rounded_as_they_are_stored(subject: Subject) -> None:
    for versions in subject.tuned.versions.values():
        assert all(torch.equal(each.steps, stored_steps(each.steps)) for each in versions)


def test_only_versions_of_sizes_up_to_the_largest_rate_are_trained(subject: Subject) -> None:
    order = subject.coded.order
    reached = order.at(order.within(subject.limit(MAX_RATE)))
    for name, versions in subject.coded.versions.items():
        changed = [not torch.equal(before.steps, after.steps) for before, after in zip(versions, subject.tuned.versions[name], strict=True)]
        assert any(changed[: reached[name] + 1])  # sizes are drawn, so that some versions may not have been in use
        assert not any(changed[reached[name] + 1 :])


def test_the_finest_model_does_not_get_worse(subject: Subject) -> None:
    finest = subject.coded.order.totals[-1]
    assert subject.kl(subject.tuned, finest) < 1.1 * subject.kl(subject.coded, finest) + 1e-6


def test_the_same_seed_gives_the_same_steps(subject: Subject) -> None:
    first, same, other = (tune_steps(subject.model, subject.linears, subject.coded, subject.train, 3, seed=seed) for seed in (1, 1, 2))
    assert all(
        torch.equal(a.steps, b.steps) for name in first.versions for a, b in zip(first.versions[name], same.versions[name], strict=True)
    )
    assert any(
        not torch.equal(a.steps, b.steps)
        for name in first.versions
        for a, b in zip(first.versions[name], other.versions[name], strict=True)
    )


def test_no_steps_change_nothing(subject: Subject) -> None:
    same = tune_steps(subject.model, subject.linears, subject.coded, subject.train[:0], 0)
    for name, versions in subject.coded.versions.items():
        assert list(same.versions[name]) == list(versions)


def test_the_base_model_is_left_unchanged(subject: Subject) -> None:
    fresh = AutoModelForCausalLM.from_pretrained(GOLDEN / "base", dtype=torch.float32)
    for (name, before), after in zip(fresh.named_parameters(), subject.model.parameters(), strict=True):
        assert torch.equal(before, after), name
        assert after.grad is None
    assert not any("forward" in vars(layer) for layer in subject.linears.values())


def test_a_failure_leaves_the_layers_unchanged(subject: Subject) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_steps(subject.model, subject.linears, subject.coded, subject.train, 2, progress=fail)
    assert not any("forward" in vars(layer) for layer in subject.linears.values())


def test_progress_counts_training_steps(subject: Subject) -> None:
    calls: list[tuple[int, int]] = []
    tune_steps(subject.model, subject.linears, subject.coded, subject.train, 2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_layers_with_biases_and_transposed_weights_are_tuned() -> None:
    """GPT-2's Conv1D stores its weights as [in, out], and has a bias."""
    model = random_model(GPT2Config(**IDS, n_embd=32, n_layer=1, n_head=2, n_positions=32)).requires_grad_(False)
    linears = find_linears(model)
    windows = torch.randint(3, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    coded = code_model(linears, layer_statistics(model, linears, windows), [2.0])
    tuned = tune_steps(model, linears, coded, windows, 40, lr=1e-2)

    def divergence(codes: CodedModel) -> float:
        weights = {name: weight.T for name, weight in codes.weights(codes.order.totals[0])}
        base, coded_model = log_probs(model, windows, {}), log_probs(model, windows, weights)
        return float((base.exp() * (base - coded_model)).sum(-1).mean())

    assert divergence(tuned) < 0.95 * divergence(coded)


@pytest.mark.parametrize(
    ("steps", "lr", "windows"), [(-1, 1e-3, 4), (1, 0.0, 4), (1, -1e-3, 4), (1, math.nan, 4), (1, 1e-3, 0)],
    ids=["negative-steps", "no-rate", "negative-rate", "nan", "no-text"],
)  # fmt: skip
def test_invalid_arguments_raise(subject: Subject, steps: int, lr: float, windows: int) -> None:
    with pytest.raises(RecipeError, match="steps must be at least 0, lr above 0, windows at least 1"):
        tune_steps(subject.model, subject.linears, subject.coded, subject.train[:windows], steps, lr)


def test_a_loss_that_is_not_finite_raises(subject: Subject) -> None:
    broken = AutoModelForCausalLM.from_pretrained(GOLDEN / "base", dtype=torch.float32).eval()
    broken.lm_head.weight.data.fill_(math.inf)
    with pytest.raises(CalibrationError, match=r"the KL divergence at [\d,]+ bytes is nan in training step 0"):
        tune_steps(broken, find_linears(broken), subject.coded, subject.train, 1)
