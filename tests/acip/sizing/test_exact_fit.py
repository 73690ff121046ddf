"""A budget that a size fits exactly is never refused: in bytes, MB and GB, as a ratio, and as the least that an error names."""

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
    """The exact decimal of `amount` in `unit`, as a person writes it."""
    return f"{Decimal(amount) / unit:f}"


@cache
def table() -> CutTable:
    layers = (LayerShape("a", 70, 90, True), LayerShape("b", 61, 37, False), LayerShape("c", 83, 83, False))
    order = torch.tensor([i for i, layer in enumerate(layers) for _ in range(layer.K)], dtype=torch.int32)
    mixed = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    curve = Curve((1.0, 0.5), (2.0123456, 2.9))
    return CutTable(layers, mixed, 0, 4321, "factors", True, Weights((4, 2, 4), 999), Decoder(3, 2, 16, 100, 2), curve)


@many
@given(amount=whole_bytes)
@example(amount=2_300_000_000)  # 2.3 * 1e9 is 2299999999.9999995
def test_an_amount_in_units_is_the_decimal_that_was_written(amount: int) -> None:
    for unit, name in ((MEGA, "MB"), (GIGA, "GB")):
        assert Budget.parse(f"{decimal(amount, unit)}{name}").stored_bytes == amount
        assert in_bytes(float(decimal(amount, unit)), unit) == amount
        assert in_bytes(amount / unit, unit) == amount


@many
@given(removed=st.integers(0, 190), context=st.integers(1, 10**6), batch=st.integers(1, 64))
def test_memory_that_is_just_enough(removed: int, context: int, batch: int) -> None:
    t = table()
    beside = 2 * 3 * 2 * 16 * context * batch * 2 + Decoder(3, 2, 16, 100, 2).overhead(batch)
    needed = int(t.least_bytes()[removed]) + 999 + beside
    for memory_mb in (needed / MEGA, float(decimal(needed, MEGA)), in_bytes(needed / GIGA, GIGA) / MEGA):
        cut = t.cut(Budget(memory_mb=memory_mb, context=context, batch=batch))
        assert cut.bytes is not None and cut.bytes + beside == needed
    if removed == 190:
        with pytest.raises(BudgetError, match="can't be reached"):
            t.cut(Budget(memory_mb=(needed - 1) / MEGA, context=context, batch=batch))


@pytest.mark.parametrize("convention", ["linear", "model", "paper"])
def test_what_was_got_can_be_asked_for(convention: str) -> None:
    """Each size's own ratio, as it is told, gives that size again."""
    t, start = table(), Budget(1.0, convention)  # type: ignore[arg-type]
    cut, seen = t.cut(start), 0
    while cut.removed < len(t.order):
        again = t.cut(Budget(cut.got, convention))  # type: ignore[arg-type]
        assert (again.removed, again.got) == (cut.removed, cut.got)
        seen += 1
        try:
            cut = t.cut(Budget(torch.nextafter(torch.tensor(cut.got, dtype=torch.float64), torch.tensor(0.0)).item(), convention))  # type: ignore[arg-type]
        except BudgetError:
            break
    assert seen > 50


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
def test_the_smallest_that_an_error_names_is_reached(budget: Budget) -> None:
    with pytest.raises(BudgetError) as refused:
        table().cut(budget)
    named = re.search(r"the smallest is ([\d.,]*\d)", str(refused.value))
    assert named is not None
    number = float(named[1].replace(",", ""))
    fields = {kind: getattr(budget, kind) for kind in ("convention", "context", "batch", "bits")}
    asked = number if budget.kind in ("ratio", "memory_mb") else int(number)
    cut = table().cut(Budget(**{**fields, budget.kind: asked}))
    assert cut.got <= asked


def test_the_perplexity_that_an_error_names_is_reached() -> None:
    with pytest.raises(BudgetError) as refused:
        table().cut(Budget(max_perplexity=7))
    named = re.search(r"has perplexity ([\d.]*\d)", str(refused.value))
    assert named is not None
    assert table().cut(Budget(max_perplexity=float(named[1]))).sizes["linear"] <= 1.0


@many
@given(needed=st.integers(1, 10**15))
def test_a_refusal_never_names_two_equal_amounts(needed: int) -> None:
    """Needs are rounded up, and what is available is rounded down."""
    assert Decimal(_gigabytes(needed)) > Decimal(_gigabytes(needed - 1, math.floor))
