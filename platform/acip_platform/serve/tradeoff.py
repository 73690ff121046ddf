"""The facts for choosing a size: every size with its bytes and quality, and the ranks or bits of its layers.

A model with coded layers has sizes in bytes; if it also has ranks, their facts are under "ranks", in the same format.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from acip.errors import BudgetError
from acip.sizing.budget import BITS_PER_WEIGHT, Budget, Convention, as_perplexity
from acip.sizing.cut_table import Cut
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.size_facts import as_json, curve_row, model_card, size_facts

SMALLEST_PERCENT: dict[Convention, int] = {"linear": 20, "bytes": 1}  # models are not usable below
HEATMAP_PERCENT: dict[Convention, int] = {"linear": 5, "bytes": 1}  # steps of the heatmap
LAYER = re.compile(r"^.*?\.(\d+)\.(.*)$")


def trade_off(model: ResidentModel) -> dict[str, Any]:
    """Return the body of GET /v1/models/{id}/tradeoff, without samples."""
    table, card = model.any_size.table, model_card(model)
    decoder = table.decoder
    ranks = card["size"].get("ranks")
    return {
        "model": model.name,
        "version": model.version.version,
        "base": card["base"],
        "max_model_len": model.context,
        "device": str(model.any_size.model.device),
        "dtype": str(model.any_size.model.dtype).removeprefix("torch."),
        "chat": card["chat"],
        "resident_bytes": model.bytes,
        "memory": decoder and {"kv_bytes_per_token": decoder.cache(1, 1), "overhead_bytes": decoder.overhead(1)},
        "size": card["size"],
        **_sizes(model, table.convention),
        "ranks": ranks and {"size": ranks, **_sizes(model, "linear")},
    }


def _sizes(model: ResidentModel, convention: Convention) -> dict[str, Any]:
    """Return the measured sizes, all sizes and the heatmap in one convention."""
    cuts = {}
    for percent in range(100, SMALLEST_PERCENT[convention] - 1, -1):
        try:
            cuts[percent] = model.cut(Budget(ratio=percent / 100, convention=convention))
        except BudgetError:  # too small, or more than the server's largest size
            continue
    measured = [row for row in model.artifact.curve if _is_measured_in(row, convention)]
    return {
        "measured": as_json(list(map(curve_row, measured))),
        "sizes": [_size(model, cut, measured) for cut in cuts.values()],
        "heatmap": heatmap(model, {percent: cut for percent, cut in cuts.items() if percent % HEATMAP_PERCENT[convention] == 0}),
    }


def _is_measured_in(row: Mapping[str, Any], convention: Convention) -> bool:
    """Return whether a row of the curve is of a size in this convention. The base model is a size in each."""
    return (BITS_PER_WEIGHT in row) == (convention == "bytes") or row.get("got") == 1.0


def _size(model: ResidentModel, cut: Cut, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts of one size, with its measured or predicted perplexity and KL divergence."""
    size, table = size_facts(cut, model.removed_at_stop), model.any_size.table
    predicted = cut.predicted or {}
    perplexity = predicted.get("perplexity")
    is_base = not any(cut.ranks.values()) and cut.versions is None
    rows = [row for row in measured if row.get("got") == (1.0 if is_base else cut.got)]
    if rows and math.isfinite(rows[0].get("loss", math.nan)):
        perplexity = as_perplexity(rows[0]["loss"])
    memory = cut.bytes
    if table.byte_sizes is not None and (is_base or cut.versions is not None):
        memory = table.byte_sizes.memory(cut.versions or {})
    keys = ("asked", "got", "params", "bytes", "bits_per_weight", "extrapolated")
    return {key: size[key] for key in keys} | {
        "memory_bytes": memory, "perplexity": perplexity, "kl": predicted.get("kl"), "predicted": perplexity is not None and not rows,
    }  # fmt: skip


def heatmap(model: ResidentModel, cuts: Mapping[int, Cut]) -> dict[str, Any]:
    """Return the kept ranks of each layer, or the bits per weight of coded ones: kind of layer by depth, by size.

    `cuts` are by percent. A dense layer counts as its full rank, or as all bits of its dtype.
    """
    table = model.any_size.table
    places = {layer.name: (match[2], int(match[1])) for layer in table.layers if (match := LAYER.match(layer.name))}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    depths = max((depth for _, depth in places.values()), default=-1) + 1

    def grid(value: Callable[[str], float]) -> list[list[float | None]]:
        rows: list[list[float | None]] = [[None] * depths for _ in kinds]
        for name, (kind, depth) in places.items():
            rows[kinds.index(kind)][depth] = value(name)
        return rows

    codes = table.byte_sizes if any(cut.versions is not None for cut in cuts.values()) else None
    if codes is None:
        full: dict[str, float] = {layer.name: layer.K for layer in table.layers}
    else:
        assert table.weights is not None
        full = {layer.name: 8 * size for layer, size in zip(table.layers, table.weights.itemsizes, strict=True)}
    numbers = {layer.name: layer.M * layer.N for layer in table.layers}

    def kept(cut: Cut, name: str) -> float:
        if codes is not None and name in (cut.versions or {}):
            return round(8 * codes.order.versions[name][cut.versions[name]].bytes / numbers[name], 3)  # type: ignore[index]
        rank = cut.ranks[name]
        return full[name] if rank is None else rank

    grids = {str(percent / 100): grid(partial(kept, cut)) for percent, cut in cuts.items()}
    if codes is not None:  # all sizes above are the base model
        base = [at for at, cut in zip(grids, cuts.values(), strict=True) if cut.versions is None]
        grids = {at: rows for at, rows in grids.items() if at not in base[:-1]}
    return {"kinds": kinds, "depths": depths, "full": grid(full.__getitem__), "ranks" if codes is None else "bits": grids}
