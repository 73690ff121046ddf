"""config.json of an export -> the config of its base model, with the forms of its layers as vLLM's quantization "acip"."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from acip.modeling_acip import MODEL_TYPE, base_config

METHOD = MODEL_TYPE  # the name of the quantization method of exports in vLLM
ANY_SIZE = "acip-any-size"  # that of artifacts, and of the resident models of acip_platform


def served_config(fields: Mapping[str, Any], folder: str, uri: str) -> PreTrainedConfig:
    """Return the config that vLLM loads an export or an artifact with, from the fields of its config.json.

    It is the base model's config, with its class and a quantization: `{"quant_method": "acip", "layers", "quantize", "bfloat16"}` for an
    export, `{"quant_method": "acip-any-size", "folder", "uri"}` for an artifact, which is at `uri` and has its small files in `folder`.
    """
    acip = fields["acip"]
    config = base_config({key: value for key, value in fields.items() if key != "auto_map"})
    if acip.get("artifact"):
        config.quantization_config = {"quant_method": ANY_SIZE, "folder": folder, "uri": uri}
        return config
    kind = acip.get("quantize", acip.get("quantise"))  # the spelling of exports before version 0.1
    config.quantization_config = {
        "quant_method": METHOD,
        "layers": acip["layers"],
        "quantize": kind,
        "bfloat16": acip.get("bfloat16") or {},
    }
    return config
