"""A cut as clients are told of it."""

from typing import Any

from acip.cut import Cut


def told(cut: Cut, removed_at_stop: int) -> dict[str, Any]:
    """What was asked for and what it is. Below the size that calibration stopped at, the order is extrapolated."""
    return {
        "asked": cut.asked, "got": cut.got, "unit": cut.unit, "convention": cut.convention, "ratio": cut.sizes["linear"],
        "params": cut.params, "bytes": cut.bytes, "extrapolated": cut.removed > removed_at_stop,
    }  # fmt: skip
