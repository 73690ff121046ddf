"""A cut never exceeds its budget and is less than one direction below it. Smaller sizes are subsets of larger ones."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acip.artifact.artifact import Artifact
from acip.errors import BudgetError
from acip.recipe import Storage
from acip.sizing.budget import Convention
from acip.sizing.cut_table import Budget, CutTable, LayerShape

STORAGES: tuple[Storage, ...] = ("pivot", "factors")


def random_table(seed: int) -> CutTable:
    rng = random.Random(seed)
    shapes = tuple(LayerShape(f"layer{i}", rng.randint(8, 200), rng.randint(8, 200), rng.random() < 0.5) for i in range(rng.randint(1, 12)))
    order = [i for i, shape in enumerate(shapes) for _ in range(shape.K)]
    rng.shuffle(order)
    return CutTable(
        shapes, torch.tensor(order, dtype=torch.int32), rng.choice([0, 0, 2, 4, 16]), rng.randint(0, 50_000), STORAGES[seed % 2]
    )


def stored(table: CutTable, ranks: dict[str, int | None], adapters: bool = True) -> int:
    """Count the stored numbers layer by layer."""
    total = 0
    for layer in table.layers:
        rank = ranks[layer.name]
        full, sides = layer.M * layer.N, layer.M + layer.N
        if rank is not None and adapters:
            q = min(rank + table.adapter_rows, layer.K)
            full = min(full, q * (sides - q) if table.storage == "pivot" else q * sides)
        elif rank is not None:
            full = min(full, rank * sides)
        total += full + layer.M * layer.bias
    return total


def smallest(table: CutTable, adapters: bool = True) -> int:
    """Return the numbers that the target layers store at their lowest rank, 1."""
    return stored(table, {layer.name: 1 for layer in table.layers}, adapters)


@settings(max_examples=1000, deadline=None)
@given(seed=st.integers(0, 40), ratio=st.floats(0.001, 1.0), convention=st.sampled_from(["linear", "model", "paper"]))
def test_a_cut_is_at_most_one_direction_below_its_budget(seed: int, ratio: float, convention: Convention) -> None:
    table = random_table(seed)
    budget, rest = Budget(ratio=ratio, convention=convention), table.rest_params if convention == "model" else 0
    total = table.dense_params + rest
    if ratio < (smallest(table, adapters=convention != "paper") + rest) / total:
        with pytest.raises(BudgetError):
            table.cut(budget)
    else:
        cut = table.cut(budget)
        assert cut.params == stored(table, cut.ranks) + table.rest_params  # type: ignore[arg-type]
        one_direction = max(layer.M + layer.N for layer in table.layers) / total
        assert cut.got <= ratio
        assert ratio - cut.got < one_direction or cut.removed == 0
        assert cut.removed > 0 or all(rank is None for rank in cut.ranks.values())


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 40), params=st.integers(1, 400_000))
def test_a_cut_never_exceeds_a_number_of_parameters(seed: int, params: int) -> None:
    table = random_table(seed)
    if params < smallest(table) + table.rest_params:
        with pytest.raises(BudgetError):
            table.cut(Budget(params=params))
    else:
        cut = table.cut(Budget(params=params))
        assert cut.got == cut.params <= params


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 40), a=st.floats(0.0, 1.0), b=st.floats(0.0, 1.0))
def test_a_smaller_size_has_no_larger_rank(seed: int, a: float, b: float) -> None:
    """`a` and `b` are fractions of the range from the smallest to the largest size."""
    table = random_table(seed)
    least = smallest(table) / table.dense_params
    small, large = (table.cut(Budget(ratio=min(1.0, least + fraction * (1 - least)))) for fraction in sorted((a, b)))
    for layer in table.layers:
        r, R = small.ranks[layer.name], large.ranks[layer.name]
        assert R is None or (r is not None and r <= R)


def test_ratios_are_decimals() -> None:
    """0.7 of 10 numbers is 7, although 0.7 * 10 in binary is not."""
    table = CutTable((LayerShape("a", 10, 10, False),), torch.zeros(10, dtype=torch.int32), 0, 0, "factors")
    assert table.cut(Budget(ratio=0.6)).params == 60
    assert table.cut(Budget(ratio=0.8)).params == 80
    assert table.cut(Budget(ratio=1.0)).ranks == {"a": None}


def test_no_size_of_an_artifact_exceeds_its_ratio(small_artifact: Artifact) -> None:
    table = small_artifact.table()
    rng = random.Random(0)
    least = int(table.stored()[-1]) / table.dense_params
    for _ in range(1000):
        ratio = rng.uniform(least, 1.0)
        cut = table.cut(Budget(ratio=ratio))
        assert cut.got <= ratio
        assert cut.removed == 0 or ratio - cut.got < max(layer.M + layer.N for layer in table.layers) / table.dense_params


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), float("inf"), "0.6", True, None])
def test_bad_ratios_are_refused_with_advice(ratio: object) -> None:
    with pytest.raises(BudgetError, match=r"above 0 and at most 1|exactly one"):
        Budget(ratio=ratio)  # type: ignore[arg-type]


def test_the_refusal_of_an_unreachable_size_names_the_smallest(small_artifact: Artifact) -> None:
    with pytest.raises(BudgetError, match=r"can't be reached: the smallest is 0\.\d+"):
        small_artifact.table().cut(Budget(ratio=0.001, convention="model"))
    with pytest.raises(BudgetError, match=r"parameters"):
        small_artifact.table().cut(Budget(params=10))
