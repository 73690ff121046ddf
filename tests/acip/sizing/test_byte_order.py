"""The order of versions never exceeds its budget, its sizes nest, and no other choice of versions is better at its totals."""

from itertools import pairwise, product

import pytest
from hypothesis import assume, example
from hypothesis import strategies as st

from acip.errors import BudgetError
from acip.sizing.byte_order import ByteOrder, Version, hull
from tests.support.fuzzing import fuzz

Versions = dict[str, list[Version]]

SIZES = st.integers(1, 12) | st.integers(1, 10**12)
LOSSES = st.sampled_from([i / 10 for i in range(8)]) | st.floats(0, 1e6) | st.floats(0, 1e-6)
VERSIONS = st.lists(st.builds(Version, SIZES, LOSSES), min_size=1, max_size=5).map(lambda each: sorted(each, key=lambda v: v.bytes))
# equal savings per byte, up to rounding: in floating point, the second step saves more per byte than the first
COLLINEAR = [Version(29, 3.6666666666666665), Version(31, 3.0), Version(34, 2.0), Version(36, 1.3333333333333333)]


def layers(least: int = 1, most: int = 4) -> st.SearchStrategy[Versions]:
    return st.lists(VERSIONS, min_size=least, max_size=most).map(lambda all_versions: {f"layer{i}": v for i, v in enumerate(all_versions)})


def total(versions: Versions, choice: dict[str, int]) -> int:
    return sum(versions[name][version].bytes for name, version in choice.items())


def loss(versions: Versions, choice: dict[str, int]) -> float:
    return sum(versions[name][version].loss for name, version in choice.items())


def rounding(versions: Versions) -> float:
    """Return a bound of the rounding errors of sums of losses."""
    return 1e-12 * sum(each.loss for layer in versions.values() for each in layer) + 1e-300


@fuzz(layers())
@example({"layer0": COLLINEAR, "layer1": COLLINEAR})
def test_totals_rise_and_losses_fall(versions: Versions) -> None:
    order = ByteOrder(versions)
    assert len(order.totals) == len(order.losses) == len(order.steps) + 1
    assert all(less < more for less, more in pairwise(order.totals))
    assert all(lower <= higher for higher, lower in pairwise(order.losses))
    assert all(step.bytes > 0 and step.saved > 0 for step in order.steps)


@fuzz(layers())
@example({"layer0": COLLINEAR, "layer1": COLLINEAR})
def test_totals_and_losses_are_those_of_the_versions(versions: Versions) -> None:
    order = ByteOrder(versions)
    for count in range(len(order.totals)):
        choice = order.at(count)
        assert choice.keys() == versions.keys()
        assert total(versions, choice) == order.totals[count]
        assert loss(versions, choice) == pytest.approx(order.losses[count], abs=rounding(versions))


@fuzz(layers(), st.integers(0, 60) | st.integers(0, 10**13))
def test_the_largest_total_within_the_budget_is_taken(versions: Versions, limit: int) -> None:
    order = ByteOrder(versions)
    if limit < order.totals[0]:
        with pytest.raises(BudgetError, match="are too few"):
            order.within(limit)
        return
    count = order.within(limit)
    assert total(versions, order.at(count)) <= limit
    assert count == len(order.steps) or order.totals[count + 1] > limit


@fuzz(layers())
def test_budgets_around_a_total_are_exact(versions: Versions) -> None:
    order = ByteOrder(versions)
    for count, size in enumerate(order.totals):
        assert order.within(size) == count
        if count:
            assert order.within(size - 1) == count - 1


@fuzz(layers())
def test_budgets_below_the_coarsest_versions_raise(versions: Versions) -> None:
    order = ByteOrder(versions)
    least = sum(min(each.bytes for each in layer) for layer in versions.values())
    assert order.totals[0] == least
    for limit in (least - 1, 0, -1):
        with pytest.raises(BudgetError, match=f"{limit:,} bytes are too few: .* takes {least:,} bytes"):
            order.within(limit)


@fuzz(layers())
@example({"layer0": COLLINEAR, "layer1": COLLINEAR})
def test_sizes_nest(versions: Versions) -> None:
    """The bytes of each layer never fall with the number of steps, and its loss never rises."""
    order = ByteOrder(versions)
    for smaller, larger in pairwise(order.at(count) for count in range(len(order.totals))):
        assert sum(smaller[name] != larger[name] for name in versions) == 1
        for name, layer in versions.items():
            assert layer[smaller[name]].bytes <= layer[larger[name]].bytes
            assert layer[smaller[name]].loss >= layer[larger[name]].loss


@fuzz(st.lists(st.lists(st.builds(Version, SIZES, LOSSES), min_size=3, max_size=3), min_size=3, max_size=3))
def test_no_other_choice_is_better_at_a_total(all_versions: list[list[Version]]) -> None:
    """The reference is a search over all 27 choices of 3 versions of 3 layers."""
    versions = {f"layer{i}": each for i, each in enumerate(all_versions)}
    order = ByteOrder(versions)
    choices = [dict(zip(versions, choice, strict=True)) for choice in product(range(3), repeat=3)]
    for size, least in zip(order.totals, order.losses, strict=True):
        best = min(loss(versions, choice) for choice in choices if total(versions, choice) <= size)
        assert least <= best + rounding(versions)


@fuzz(VERSIONS, st.data())
def test_worse_and_larger_versions_are_never_used(layer: list[Version], data: st.DataObject) -> None:
    better = data.draw(st.sampled_from(layer))
    worse = Version(better.bytes + data.draw(st.integers(1, 10)), better.loss + data.draw(st.floats(0, 1)))
    order = ByteOrder({"layer": [*layer, worse]})
    assert all(order.at(count)["layer"] != len(layer) for count in range(len(order.totals)))


@fuzz(VERSIONS)
def test_hull_begins_with_the_fewest_bytes_and_ends_with_the_least_loss(layer: list[Version]) -> None:
    kept = [layer[i] for i in hull(layer)]
    assert kept[0].bytes == min(each.bytes for each in layer)
    assert kept[-1].loss <= min(each.loss for each in layer) + rounding({"layer": layer})


@fuzz(layers(least=2))
def test_steps_are_sorted_by_the_loss_saved_per_byte(versions: Versions) -> None:
    order = ByteOrder(versions)
    savings = [step.saved / step.bytes for step in order.steps]
    assume(len(savings) > 1)
    bound = rounding(versions)
    assert all(later <= earlier * (1 + 1e-9) + bound for earlier, later in pairwise(savings))


def test_versions_above_the_hull_are_skipped() -> None:
    """The middle version saves less per byte than the last one, so one step leads to the last."""
    order = ByteOrder({"layer": [Version(10, 1.0), Version(20, 0.9), Version(30, 0.0)]})
    assert [step.version for step in order.steps] == [2]
    assert order.totals == [10, 30]


def test_layers_with_one_version_have_no_steps() -> None:
    order = ByteOrder({"first": [Version(7, 0.5)], "second": [Version(5, 0.25)]})
    assert order.steps == []
    assert order.within(12) == 0
    assert order.at(0) == {"first": 0, "second": 0}


def test_equal_savings_follow_the_order_of_the_layers() -> None:
    layer = [Version(1, 1.0), Version(2, 0.5)]
    assert [step.name for step in ByteOrder({"b": layer, "a": layer, "c": layer}).steps] == ["b", "a", "c"]
