"""Models and sizes in the JSON of the HTTP API."""

import json
from typing import Any

from acip.sizing.cut_table import Cut
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.text.model_text import ModelText


def size_facts(cut: Cut, removed_at_stop: int) -> dict[str, Any]:
    """Return the requested size and the actual one. Sizes below the one at which calibration stopped are extrapolated."""
    return {
        "asked": cut.asked, "got": cut.got, "unit": cut.unit, "convention": cut.convention, "ratio": cut.sizes["linear"],
        "params": cut.params, "bytes": cut.bytes, "extrapolated": cut.removed > removed_at_stop,
    }  # fmt: skip


def model_card(model: ResidentModel) -> dict[str, Any]:
    """Return the model as in GET /v1/models."""
    table, recipe = model.any_size.table, model.artifact.recipe
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
        "size": {
            "convention": "linear",
            "smallest": int(table.stored()[-1]) / table.dense_params,
            "calibrated_to": recipe.stop_ratio,
            "calibrated_in": recipe.convention,
            "largest": 1.0,
        },
        "curve": as_json(model.artifact.curve),
    }


def as_json(body: Any) -> Any:
    """Return a copy with null for numbers that JSON does not have, such as an infinite perplexity."""
    return json.loads(json.dumps(body), parse_constant=lambda _: None)
