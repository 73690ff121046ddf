"""A cut as clients are told of it."""

import json
from typing import Any

from acip.sizing.cut_table import Cut


def size_facts(cut: Cut, removed_at_stop: int) -> dict[str, Any]:
    """What was asked for and what it is. Below the size that calibration stopped at, the order is extrapolated."""
    return {
        "asked": cut.asked, "got": cut.got, "unit": cut.unit, "convention": cut.convention, "ratio": cut.sizes["linear"],
        "params": cut.params, "bytes": cut.bytes, "extrapolated": cut.removed > removed_at_stop,
    }  # fmt: skip


def as_json(body: Any) -> Any:
    """Without what JSON can't say: an infinite perplexity is null."""
    return json.loads(json.dumps(body), parse_constant=lambda _: None)
