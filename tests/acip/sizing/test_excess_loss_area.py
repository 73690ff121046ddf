"""The area under excess loss equals values computed by hand."""

import math

import pytest

from acip.errors import BudgetError
from acip.sizing.excess_loss_area import excess_loss_area, rows_of_area


def rows(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"got": got, "loss": loss} for got, loss in points]


def test_the_area_under_excess_loss_equals_values_by_hand() -> None:
    assert excess_loss_area(rows((1.0, 2.0), (0.7, 2.0), (0.4, 2.0))) == 0
    assert excess_loss_area(rows((0.4, 3.0), (1.0, 2.0))) == pytest.approx(0.3)
    assert excess_loss_area(rows((1.0, 2.0), (0.8, 2.5), (0.4, 3.5))) == pytest.approx(0.2 * 0.25 + 0.4 * 1.0)
    assert excess_loss_area(rows((1.0, 2.0), (0.6, 2.4), (0.2, 2.8)), 0.4) == pytest.approx(0.4 * 0.2 + 0.2 * 0.5), (
        "sizes below 0.4 do not count"
    )
    assert excess_loss_area(rows((1.0, 2.0), (0.7, 2.3), (0.3, 2.3), (0.2, 9.0)), 0.4) == pytest.approx(0.3 * 0.15 + 0.3 * 0.3)
    assert excess_loss_area(rows((1.0, 2.0), (0.6, 2.4), (0.2, 2.8))) == pytest.approx(0.4 * 0.2 + 0.4 * 0.6)
    assert excess_loss_area(rows((1.0, 2.0), (0.5, 3.0)), 0.4) == pytest.approx(0.25), "the area ends at the smallest measured size"
    assert excess_loss_area(rows((1.0, 2.0))) == 0
    assert math.isnan(excess_loss_area(rows((1.0, 2.0), (0.6, math.nan))))
    assert excess_loss_area(rows((1.0, 2.0), (0.6, 1.5), (0.4, 1.5))) < 0, "losses below that of the base model count as negative"


def test_the_area_is_over_ranks_or_over_bytes_of_a_model_without_ranks() -> None:
    base, *ranks = rows((1.0, 2.0), (0.6, 2.4), (0.2, 2.8))
    coded = [{**row, "bits_per_weight": 3.0} for row in rows((0.5, 2.1), (0.4, 2.3))]
    assert excess_loss_area([base, *ranks, *coded]) == excess_loss_area([base, *ranks])
    assert rows_of_area([base, *ranks, *coded]) == [base, *ranks]
    assert excess_loss_area([base, *coded]) == pytest.approx(0.5 * 0.05 + 0.1 * 0.2)
    assert excess_loss_area([base, *coded], 0.5) == pytest.approx(0.5 * 0.05)


def test_excess_loss_needs_the_base_model() -> None:
    with pytest.raises(BudgetError, match=r"no row at size 1\.0"):
        excess_loss_area(rows((0.9, 2.0), (0.4, 3.0)))
