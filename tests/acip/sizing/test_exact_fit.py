"""A budget that equals a size exactly is never refused, whether in bytes, MB, GB, as a ratio, or as the minimum that an error names."""

import math
import re
from decimal import Decimal
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from acip.calibration.memory_check import _gigabytes
from acip.errors import BudgetError
from acip.sizing.budget import GIGA, MEGA, Budget, Curve, Decoder, in_bytes
from acip.sizing.cut_table import CutTable, LayerShape, Weights

many = settings(max_examples=500, deadline=None)
whole_bytes = st.integers(1, 10**15)  # up to 1000 TB


def decimal(amount: int, unit: int) -> str:
    """Return `amount` in `unit` as an exact decimal."""
    return f"{Decimal(amount) / unit:f}"


@cache
def table() -> CutTable:
    layers = (LayerShape("a", 70, 90, True), LayerShape("b", 61, 37, False), LayerShape("c", 83, 83, False))
    order = torch.tensor([i for i, layer in enumerate(layers) for _ in range(layer.K)], dtype=torch.int32)
    mixed = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    curve = Curve((1.0, 0.5), (2.0123456, 2.9))
    return CutTable(layers, mixed, 0, 4321, "factors", True, Weights((4, 2, 4), 999), Decoder(3, 2, 16, 100, 64, 2), curve)


@many
@given(amount=whole_bytes)
@example(amount=2_300_000_000)  # 2.3 * 1e9 is 2299999999.9999995
def test_amounts_in_units_are_exact_decimals(amount: int) -> None:
    for unit, name in ((MEGA, "MB"), (GIGA, "GB")):
        assert Budget.parse(f"{decimal(amount, unit)}{name}").stored_bytes == amount
        assert in_bytes(float(decimal(amount, unit)), unit) == amount
        assert in_bytes(amount / unit, unit) == amount


@many
@given(removed=st.integers(0, 190), context=st.integers(1, 10**6), batch=st.integers(1, 64))
def test_exactly_enough_memory_is_accepted(removed: int, context: int, batch: int) -> None:
    t = table()
    other_bytes = 2 * 3 * 2 * 16 * context * batch * 2 + Decoder(3, 2, 16, 100, 64, 2).overhead(batch)
    needed = int(t.least_bytes()[removed]) + 999 + other_bytes
    for memory_mb in (needed / MEGA, float(decimal(needed, MEGA)), in_bytes(needed / GIGA, GIGA) / MEGA):
        cut = t.cut(Budget(memory_mb=memory_mb, context=context, batch=batch))
        assert cut.bytes is not None and cut.bytes + other_bytes == needed
    if removed == 190:
        with pytest.raises(BudgetError, match="can't be reached"):
            t.cut(Budget(memory_mb=(needed - 1) / MEGA, context=context, batch=batch))


@pytest.mark.parametrize("convention", ["linear", "model", "paper"])
def test_the_ratio_of_a_size_selects_that_size(convention: str) -> None:
    """A budget of the reported ratio of a size gives the same size."""
    t, start = table(), Budget(1.0, convention)  # type: ignore[arg-type]
    cut, count = t.cut(start), 0
    while cut.removed < len(t.order):
        again = t.cut(Budget(cut.got, convention))  # type: ignore[arg-type]
        assert (again.removed, again.got) == (cut.removed, cut.got)
        count += 1
        try:
            cut = t.cut(Budget(torch.nextafter(torch.tensor(cut.got, dtype=torch.float64), torch.tensor(0.0)).item(), convention))  # type: ignore[arg-type]
        except BudgetError:
            break
    assert count > 50


@pytest.mark.parametrize(
    "budget",
    [
        Budget(ratio=0.001),
        Budget(ratio=0.001, convention="model"),
        Budget(ratio=0.001, convention="paper"),
        Budget(params=1),
        Budget(stored_bytes=1),
        Budget(stored_bytes=1, bits=4),
        Budget(memory_mb=1, context=77, batch=3),
    ],
    ids=lambda budget: f"{budget.kind}-{budget.convention}-{budget.bits}",
)
def test_the_smallest_size_that_an_error_names_is_reachable(budget: Budget) -> None:
    with pytest.raises(BudgetError) as refused:
        table().cut(budget)
    match = re.search(r"the smallest is ([\d.,]*\d)", str(refused.value))
    assert match is not None
    number = float(match[1].replace(",", ""))
    fields = {kind: getattr(budget, kind) for kind in ("convention", "context", "batch", "bits")}
    asked = number if budget.kind in ("ratio", "memory_mb") else int(number)
    cut = table().cut(Budget(**{**fields, budget.kind: asked}))
    assert cut.got <= asked


def test_the_perplexity_that_an_error_names_is_reachable() -> None:
    with pytest.raises(BudgetError) as refused:
        table().cut(Budget(max_perplexity=7))
    match = re.search(r"has perplexity ([\d.]*\d)", str(refused.value))
    assert match is not None
    assert table().cut(Budget(max_perplexity=float(match[1]))).sizes["linear"] <= 1.0


@many
@given(needed=st.integers(1, 10**15))
def test_needed_and_available_memory_are_printed_as_different_amounts(needed: int) -> None:
    """The needed amount is rounded up, and the available amount is rounded down."""
    assert Decimal(_gigabytes(needed)) > Decimal(_gigabytes(needed - 1, math.floor))
