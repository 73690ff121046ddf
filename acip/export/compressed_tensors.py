"""Export a size of coded layers as a folder that transformers and vLLM load without code from acip, in the format compressed-tensors.

A coded layer has integer codes and one step size per row. This is what compressed-tensors calls symmetric, channel-wise quantization:

    NAME.weight_packed    int32 [M, ceil(N bits / 32)]    codes + 2^(bits - 1), the first in the lowest bits ("pack-quantized")
    NAME.weight_scale     float32 [M, 1]                  step sizes
    NAME.weight_shape     int64 [2]                       M, N

Codes take 4 bits if all codes of the layer are in -8 ... 7, else 8 bits. These are the widths that vLLM's kernels read. The files are
therefore larger than the stored bytes of the size, which are those of Huffman codes.

Codes are exact. transformers converts step sizes to the dtype in which it loads the model, so that each row of a bfloat16 model is
scaled by up to 1 + 2^-9, and rounds the products to this dtype; with dtype=torch.float32, the model is the coded one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.artifact.artifact import Artifact
from acip.errors import ArtifactError
from acip.export.folder import check_target, write
from acip.modeling_acip import CodedLinear
from acip.sizing.elastic_model import ElasticModel

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that vLLM computes as one, which needs equal bits


def export_compressed_tensors(
    any_size: ElasticModel,
    artifact: Artifact,
    folder: str | Path,
    max_shard_size: str | int = "5GB",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the present size of `any_size`, whose layers are coded, to `folder`, and return its provenance.

    An earlier export there is replaced. `facts` are added to the provenance. Raise ArtifactError for a size of ranks, or for layers that
    the format does not know.
    """
    folder, cut = check_target(folder), any_size.cut
    assert cut is not None, "resize first"
    if cut.versions is None:
        raise ArtifactError(
            "compressed-tensors stores coded layers, but this size has none. Calibrate with code: both or code: bits, and ask for fewer "
            "bytes than the base model's."
        )
    if other := next((name for name, layer in any_size.layers.items() if not isinstance(layer.original, nn.Linear)), None):
        raise ArtifactError(f"{other} is a {type(any_size.layers[other].original).__name__}; compressed-tensors stores nn.Linear only.")
    model = any_size.materialize()
    layers = {name: layer for name in any_size.layers if isinstance(layer := model.get_submodule(name), CodedLinear)}
    bits = bits_of(layers)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in layers or key.endswith(".bias")}
    for name, layer in layers.items():
        tensors[f"{name}.weight_packed"] = packed(layer.codes, bits[name])
        tensors[f"{name}.weight_scale"] = layer.steps[:, None]
        tensors[f"{name}.weight_shape"] = torch.tensor(layer.codes.shape)
    model.config.quantization_config = quantization_config(bits, [name for name in any_size.layers if name not in layers])

    def save(where: Path) -> None:
        model.save_pretrained(where, state_dict=tensors, max_shard_size=max_shard_size)

    return write(model, cut, artifact, folder, facts=facts, save=save)


def bits_of(layers: Mapping[str, CodedLinear]) -> dict[str, int]:
    """Return the bits of the codes of each layer, 4 or 8; equal for layers that are computed as one."""
    alone = {name: 4 if int(layer.codes.min()) >= -8 and int(layer.codes.max()) <= 7 else 8 for name, layer in layers.items()}
    bits = {}
    for name in layers:
        parent, _, last = name.rpartition(".")
        together = next((group for group in FUSED if last in group), (last,))
        bits[name] = max(alone.get(f"{parent}.{each}", 4) for each in together)
    return bits


def packed(codes_MN: Tensor, bits: int) -> Tensor:
    """Return int8 codes as int32 [M, ceil(N bits / 32)], for 4 or 8 bits."""
    unsigned = (codes_MN.cpu().short() + 2 ** (bits - 1)).to(torch.uint8)
    unsigned = F.pad(unsigned, (0, -codes_MN.shape[1] % (32 // bits)))
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return unsigned.view(torch.int32)


def quantization_config(bits: Mapping[str, int], exact: Sequence[str] = ()) -> dict[str, Any]:
    """Return the field quantization_config of config.json for layers with codes of so many bits, and exact layers."""
    groups = {width: [name for name in bits if bits[name] == width] for width in sorted(set(bits.values()))}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *exact],
        "config_groups": {
            f"group_{i}": {
                "targets": names,
                "weights": {"num_bits": width, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            }
            for i, (width, names) in enumerate(groups.items())
        },
    }
