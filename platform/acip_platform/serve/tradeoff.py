"""The facts for choosing a size: every size with its bytes and quality, and the ranks of its layers."""

import math
import re
from typing import Any

from acip.errors import BudgetError
from acip.sizing.budget import Budget, as_perplexity
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.size_facts import model_card, size_facts

SMALLEST_PERCENT = 20  # models are not usable below
LAYER = re.compile(r"^.*?\.(\d+)\.(.*)$")


def trade_off(model: ResidentModel) -> dict[str, Any]:
    """Return the body of GET /v1/models/{id}/tradeoff, without samples."""
    table, card = model.any_size.table, model_card(model)
    decoder = table.decoder
    return {
        "model": model.name,
        "version": model.version.version,
        "base": card["base"],
        "max_model_len": model.context,
        "device": str(model.any_size.model.device),
        "dtype": str(model.any_size.model.dtype).removeprefix("torch."),
        "chat": card["chat"],
        "resident_bytes": model.bytes,
        "size": card["size"],
        "measured": card["curve"],
        "sizes": [row for percent in range(100, SMALLEST_PERCENT - 1, -1) if (row := _size(model, percent / 100)) is not None],
        "memory": decoder and {"kv_bytes_per_token": decoder.cache(1, 1), "overhead_bytes": decoder.overhead(1)},
        "heatmap": heatmap(model),
    }


def _size(model: ResidentModel, ratio: float) -> dict[str, Any] | None:
    """Return the facts of one size, with its measured or predicted perplexity; None if the model does not have it."""
    try:
        cut = model.cut(Budget(ratio=ratio))
    except BudgetError:
        return None
    size = size_facts(cut, model.removed_at_stop)
    predicted = cut.predicted and cut.predicted["perplexity"]
    measured = [row for row in model.artifact.curve if row.get("got") == cut.sizes["linear"]]
    if measured and math.isfinite(measured[0].get("loss", math.nan)):
        predicted = as_perplexity(measured[0]["loss"])
    keys = ("asked", "got", "params", "bytes", "extrapolated")
    return {key: size[key] for key in keys} | {"perplexity": predicted, "predicted": predicted is not None and not measured}


def heatmap(model: ResidentModel) -> dict[str, Any]:
    """Return the kept ranks, kind of layer by depth, at sizes in steps of 0.05. A dense layer counts as its full rank."""
    table = model.any_size.table
    places = {layer.name: (match[2], int(match[1])) for layer in table.layers if (match := LAYER.match(layer.name))}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    depths = max((depth for _, depth in places.values()), default=-1) + 1

    def grid(value: dict[str, int]) -> list[list[int | None]]:
        rows: list[list[int | None]] = [[None] * depths for _ in kinds]
        for name, (kind, depth) in places.items():
            rows[kinds.index(kind)][depth] = value[name]
        return rows

    full = {layer.name: layer.K for layer in table.layers}
    ranks = {}
    for percent in range(100, SMALLEST_PERCENT - 1, -5):
        try:
            cut = model.cut(Budget(ratio=percent / 100))
        except BudgetError:
            break
        ranks[str(percent / 100)] = grid({name: full[name] if rank is None else rank for name, rank in cut.ranks.items()})
    return {"kinds": kinds, "depths": depths, "full": grid(full), "ranks": ranks}
