"""In a batch of several sizes, each row has the result of its own size."""

from itertools import takewhile
from operator import is_

import pytest
import torch
from torch import nn

from acip.layers import mixed_sizes
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.mixed_sizes import ROW_BLOCK, SHORT, Group, Mixer, Size
from acip.sizing.budget import Budget
from acip.sizing.elastic_model import ElasticModel
from tests.conftest import logits


def sizes(any_size: ElasticModel, *ratios: float) -> list[Size]:
    cuts = [any_size.table.cut(Budget(ratio=ratio)) for ratio in ratios]
    return [Size(cut.key, cut.ranks, cut.versions) for cut in cuts]


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 1, 20, 2), (40, 1, 1, 1), (SHORT, SHORT + 1, 1, 30), (2, 64, 64, 3)])
def test_rows_of_a_batch_are_computed_at_their_own_size(any_size: ElasticModel, counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    runs = list(zip(sizes(any_size, 1.0, 0.8, 0.55, 0.3), counts, strict=True))
    mixer = Mixer(any_size.layers)
    for name, layer in any_size.layers.items():
        x = torch.randn(1, sum(counts), layer.right.values.shape[1])
        alone, start = [], 0
        layer.groups = None
        for size, count in runs:
            layer.set_rank(size.ranks[name])
            alone.append(layer(x[:, start : start + count]))
            start += count
        mixer.set(runs)
        assert torch.allclose(layer(x), torch.cat(alone, 1), atol=1e-5)
        layer.set_rank(None)
        mixer.clear()


def test_a_batch_of_one_size_equals_resize(any_size: ElasticModel, heldout_tokens: torch.Tensor) -> None:
    tokens, mixer = heldout_tokens[:2, :32], Mixer(any_size.layers)
    for ratio in (1.0, 0.7, 0.35):
        mixer.set([(size, 64) for size in sizes(any_size, ratio)])
        mixed = logits(any_size.model, tokens)
        mixer.clear()
        any_size.resize(ratio)
        assert torch.allclose(mixed, logits(any_size.model, tokens), atol=1e-4)


@pytest.mark.parametrize(("bias", "lead"), [(True, 0), (False, 3), (True, 3)])
def test_mixed_sizes_support_biases_and_adapters_beside_the_layer(bias: bool, lead: int) -> None:
    torch.manual_seed(1)
    layer = ElasticLinear(nn.Linear(48, 80, bias=bias), torch.randn(45 + lead, 80), torch.randn(45 + lead, 48), lead=lead)
    ranks = (None, 40, ROW_BLOCK - lead, 7, 1)
    runs = [(Size((0, removed), {"layer": rank}), 2) for removed, rank in enumerate(ranks)]
    x = torch.randn(10, 48)
    alone = []
    for i, rank in enumerate(ranks):
        layer.set_rank(rank)
        alone.append(layer(x[2 * i : 2 * i + 2]))
    Mixer({"layer": layer}).set(runs)
    assert torch.allclose(layer(x), torch.cat(alone), atol=1e-4)


def test_weights_are_not_copied(any_size: ElasticModel) -> None:
    mixer = Mixer(any_size.layers)
    small, smaller = sizes(any_size, 0.6, 0.4)
    for runs in ([(small, 4)], [(small, 2), (smaller, 30)]):
        mixer.set(runs)
        for layer in any_size.layers.values():
            assert layer.groups is not None
            for group in layer.groups:
                if group.factors is not None:
                    assert [part.untyped_storage().data_ptr() for part in group.factors] == [
                        side.values.untyped_storage().data_ptr() for side in (layer.right, layer.left)
                    ]
    mixer.clear()


def kept_plans(any_size: ElasticModel) -> list[int]:
    """Set 39 mixes of two sizes, then the same mixes again, newest first. Return the mask bytes of each plan that is still cached."""
    pair, mixer = sizes(any_size, 0.8, 0.5), Mixer(any_size.layers)

    def plan(rows: int) -> list[tuple[Group, ...]]:
        mixer.set([(pair[0], rows), (pair[1], 1)])
        return [layer.groups for layer in any_size.layers.values() if layer.groups is not None]

    plans = {rows: plan(rows) for rows in range(1, 40)}
    kept = list(takewhile(lambda rows: all(map(is_, plan(rows), plans[rows])), reversed(plans)))
    mixer.clear()
    return [sum(group.mask.nbytes for groups in plans[rows] for group in groups if group.mask is not None) for rows in kept]


def test_the_number_and_memory_of_plans_are_limited(any_size: ElasticModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_bytes = kept_plans(any_size)
    assert len(plan_bytes) == 39
    monkeypatch.setattr(mixed_sizes, "PLANS", 20)
    assert kept_plans(any_size) == plan_bytes[:20]
    for plans in (1, 3, 19):
        monkeypatch.setattr(mixed_sizes, "PLANS_BYTES", sum(plan_bytes[:plans]))
        assert kept_plans(any_size) == plan_bytes[:plans]
    monkeypatch.setattr(mixed_sizes, "PLANS_BYTES", 0)
    assert len(kept_plans(any_size)) == 1, "the current plan is always kept"
