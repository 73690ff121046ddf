"""What a person needs to choose a size: every size with its bytes and quality, where it takes its directions from, and samples."""

import math
import re
from typing import Any

from acip.errors import BudgetError
from acip.sizing.budget import Budget, as_perplexity
from acip_platform.serve.engine.resident_model import ResidentModel

SMALLEST = 20  # percent: what is below is of no use to anyone
LAYER = re.compile(r"^.*?\.(\d+)\.(.*)$")


def trade_off(served: ResidentModel) -> dict[str, Any]:
    """The body of /v1/models/{id}/tradeoff, samples aside."""
    table, card = served.any_size.table, served.card()
    decoder = table.decoder
    return {
        "model": served.version.name,
        "version": served.version.version,
        "base": card["base"],
        "max_model_len": served.context,
        "device": str(served.any_size.model.device),
        "dtype": str(served.any_size.model.dtype).removeprefix("torch."),
        "chat": served.chat,
        "resident_bytes": served.bytes,
        "size": card["size"],
        "measured": card["curve"],
        "sizes": [row for percent in range(100, SMALLEST - 1, -1) if (row := _size(served, percent / 100)) is not None],
        "memory": decoder and {"kv_bytes_per_token": decoder.cache(1, 1), "overhead_bytes": decoder.overhead(1)},
        "heatmap": heatmap(served),
    }


def _size(served: ResidentModel, asked: float) -> dict[str, Any] | None:
    try:
        cut = served.cut(Budget(ratio=asked))
    except BudgetError:
        return None
    size = served.size(cut)
    predicted = cut.predicted and cut.predicted["perplexity"]
    measured = [row for row in served.artifact.curve if row.get("got") == cut.sizes["linear"]]
    if measured and math.isfinite(measured[0].get("loss", math.nan)):
        predicted = as_perplexity(measured[0]["loss"])
    keys = ("asked", "got", "params", "bytes", "extrapolated")
    return {key: size[key] for key in keys} | {"perplexity": predicted, "predicted": predicted is not None and not measured}


def heatmap(served: ResidentModel) -> dict[str, Any]:
    """Kept ranks, layer kind by depth, at sizes in steps of 0.05. A dense layer counts as its full rank."""
    table = served.any_size.table
    found = {layer.name: (match[2], int(match[1])) for layer in table.layers if (match := LAYER.match(layer.name))}
    kinds = list(dict.fromkeys(kind for kind, _ in found.values()))
    depths = max((depth for _, depth in found.values()), default=-1) + 1

    def grid(value: dict[str, int]) -> list[list[int | None]]:
        rows: list[list[int | None]] = [[None] * depths for _ in kinds]
        for name, (kind, depth) in found.items():
            rows[kinds.index(kind)][depth] = value[name]
        return rows

    full = {layer.name: layer.K for layer in table.layers}
    ranks = {}
    for percent in range(100, SMALLEST - 1, -5):
        try:
            cut = served.cut(Budget(ratio=percent / 100))
        except BudgetError:
            break
        ranks[str(percent / 100)] = grid({name: full[name] if rank is None else rank for name, rank in cut.ranks.items()})
    return {"kinds": kinds, "depths": depths, "full": grid(full), "ranks": ranks}
