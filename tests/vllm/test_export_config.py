"""vLLM gets the base model's config for an export, and its encoded tensors are decoded one batch after another."""

import json
import random
from pathlib import Path
from typing import Any

import acip_vllm
import pytest
import torch
from acip_vllm import decoding
from acip_vllm.decoding import decoded
from acip_vllm.export_config import served_config
from transformers import LlamaConfig

from acip.artifact.artifact import Artifact
from acip.modeling_acip import read_tensors
from tests.support.exports import half_coded, write_export

LLAMA = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    attention_bias=True, architectures=["LlamaForCausalLM"],
)  # fmt: skip


def fields_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_the_config_is_the_base_models_with_a_quantization(exported: Path) -> None:
    fields = fields_of(exported)
    config = served_config(fields, "folder", "")
    assert (type(config), config.model_type, config.architectures) == (LlamaConfig, "llama", ["LlamaForCausalLM"])
    assert config.quantization_config["quant_method"] == "acip" and config.quantization_config["layers"] == fields["acip"]["layers"]
    assert config.quantization_config["quantize"] is None and config.quantization_config["bfloat16"] == {}
    assert config.hidden_size == fields["hidden_size"] and not hasattr(config, "auto_map") and not hasattr(config, "acip")


def test_an_artifact_is_served_at_any_size(small_artifact: Artifact) -> None:
    folder = str(small_artifact.folder)
    config = served_config(fields_of(Path(folder)), folder, "s3://models/small")
    assert (type(config), config.architectures) == (LlamaConfig, ["LlamaForCausalLM"])
    assert config.quantization_config == {"quant_method": "acip-any-size", "folder": folder, "uri": "s3://models/small"}


@pytest.mark.parametrize("batch_bytes", [0, 20_000, 1 << 30])
def test_encoded_tensors_are_decoded_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int) -> None:
    monkeypatch.setattr(decoding, "BATCH_BYTES", batch_bytes)
    model = write_export(tmp_path, LLAMA, half_coded, dtype=torch.bfloat16)
    acip = fields_of(tmp_path)["acip"]
    stored = list(read_tensors(tmp_path, {}).items())
    assert acip["bfloat16"] and any(row["form"] == "codes" for row in acip["layers"].values())
    random.Random(0).shuffle(stored)
    tensors = dict(decoded(stored, acip))
    expected = model.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=2e-3 if name.endswith("steps") else 0, atol=0)


def test_incomplete_and_damaged_tensors_are_refused(tmp_path: Path) -> None:
    write_export(tmp_path, LLAMA, half_coded, dtype=torch.bfloat16)
    acip = fields_of(tmp_path)["acip"]
    stored = read_tensors(tmp_path, {})
    layer = next(name for name, row in acip["layers"].items() if row["form"] == "codes")
    for name in (f"{layer}.stream", f"{layer}.steps", f"{layer}.unit"):
        with pytest.raises(ValueError, match=rf"lack '{layer}"):
            dict(decoded(((key, value) for key, value in stored.items() if key != name), acip))
    for name in (f"{layer}.stream", next(iter(acip["bfloat16"]))):
        with pytest.raises(ValueError, match="Export the model again"):
            dict(decoded((stored | {name: stored[name][:-1]}).items(), acip))


def test_other_versions_of_vllm_are_refused() -> None:
    acip_vllm.check_version("0.32.0")
    acip_vllm.check_version("0.32.1.post1")
    for version in ("0.31.4", "0.33.0", "1.0"):
        with pytest.raises(ImportError, match=f"works with vLLM >=0.32,<0.33, but vLLM {version} is installed"):
            acip_vllm.check_version(version)
