"""Models and sizes in the JSON of the HTTP API."""

import json
from collections.abc import Mapping
from typing import Any

from acip.sizing.cut_table import Cut, CutTable
from acip.sizing.domains import worst_domain
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.text.model_text import ModelText


def size_facts(cut: Cut, removed_at_stop: int) -> dict[str, Any]:
    """Return the requested size and the actual one, and what was counted.

    `ratio` is the share of the base model's bytes for a coded size, else of its compressed numbers. Sizes in ranks below the one at which
    calibration stopped are extrapolated.
    """
    return {
        "asked": cut.asked, "got": cut.got, "unit": cut.unit, "convention": cut.convention,
        "ratio": cut.sizes["linear" if cut.versions is None else "bytes"], "params": cut.params, "bytes": cut.bytes,
        "bits_per_weight": cut.bits_per_weight, "extrapolated": cut.removed > removed_at_stop,
    }  # fmt: skip


def size_range(model: ResidentModel) -> dict[str, Any]:
    """Return the sizes that a model has: in bytes if it has coded layers, with those in ranks under "ranks" if it has both."""
    table, recipe, codes = model.any_size.table, model.artifact.recipe, model.any_size.table.byte_sizes
    ranks = {
        "convention": "linear",
        "smallest": int(table.stored()[-1]) / table.dense_params,
        "calibrated_to": recipe.stop_ratio,
        "calibrated_in": recipe.convention,
        "largest": model.largest.sizes["linear"],
    }
    if codes is None:
        return ranks
    return {
        "convention": "bytes",
        "smallest": codes.share(0),
        "base_from": codes.share(None),  # from this size on, it is the base model
        "largest": model.largest.sizes["bytes"] if model.largest.versions else 1.0,
        "base_bytes": codes.base,
        "ranks": ranks if has_ranks(table) and not model.largest.versions else None,
    }


def has_ranks(table: CutTable) -> bool:
    """Return whether directions can be removed."""
    return len(table.order) > 0


def model_card(model: ResidentModel) -> dict[str, Any]:
    """Return the model as in GET /v1/models."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "acip",
        "max_model_len": model.context,
        "version": model.version.version,
        "artifact": model.version.uri,
        "base": model.artifact.manifest["base"],
        "chat": ModelText.of(model).chat,
        "notes": model.notes,
        "resident_bytes": model.bytes,
        "size": size_range(model),
        "curve": as_json(list(map(curve_row, model.artifact.curve))),
    }


def curve_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the curve with its worst domain as `worst_domain`: name, kl, mean_kl, own and times (`acip.sizing.domains`)."""
    worst = worst_domain(row)
    return {**row, **({"worst_domain": worst._asdict()} if worst else {})}


def as_json(body: Any) -> Any:
    """Return a copy with null for numbers that JSON does not have, such as an infinite perplexity."""
    return json.loads(json.dumps(body), parse_constant=lambda _: None)
