"""config.json of an export -> the config of its base model, with the forms of its layers as vLLM's quantization "acip"."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from acip.modeling_acip import MODEL_TYPE, base_config

METHOD = MODEL_TYPE  # the name of the quantization method in vLLM


def served_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config that vLLM loads an export with, from the fields of its config.json.

    It is the base model's config, with its class and the quantization `{"quant_method": "acip", "layers", "quantize", "bfloat16"}`.
    Raise ValueError for an artifact, which holds all sizes.
    """
    acip = fields["acip"]
    if acip.get("artifact"):
        raise ValueError(
            "this folder is an artifact, which holds all sizes of a model. Export one size of it, for example with "
            "`python jobs/materialize.py`, and give vLLM the folder of the export."
        )
    config = base_config({key: value for key, value in fields.items() if key != "auto_map"})
    kind = acip.get("quantize", acip.get("quantise"))  # the spelling of exports before version 0.1
    config.quantization_config = {
        "quant_method": METHOD,
        "layers": acip["layers"],
        "quantize": kind,
        "bfloat16": acip.get("bfloat16") or {},
    }
    return config
