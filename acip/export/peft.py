"""Save the adapters of an artifact in the format of PEFT."""

from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from acip.artifact.artifact import Artifact
from acip.errors import ArtifactError
from acip.modeling_acip import widened
from acip.sizing.cut_table import Cut


def save_peft(artifact: Artifact, folder: str | Path, cut: Cut, base: str) -> None:
    """Write what the adapters add to the directions of `cut` as a PEFT LoRA for the base model `base`.

    The scale is folded in, so alpha / R = 1. Adapters beside the layer give a LoRA of rank R (more after fine-tuning). Adapters on the
    factors give rank 2 R: (U + c d)(V + b a) - U V = [U b + c d b | c] [a ; d V]. Raise ArtifactError if the artifact has no adapters.
    """
    adapters, factors = artifact.tensors("adapters"), artifact.tensors("factors")
    if not adapters.entries:
        raise ArtifactError(f"{artifact.source.where} has no adapters. Calibrate with adapter_rank above 0.")
    tensors: dict[str, Tensor] = {}
    adapted = {key.rsplit(".", 2)[0] for key in adapters.entries}  # fine-tuning adds adapters only to layers that its size compresses
    names = [name for name, rank in cut.ranks.items() if rank is not None and name in adapted]
    for name in names:
        keys = [key for key in adapters.entries if key.startswith(f"{name}.")]
        lora = {key: widened(value) for key, value in adapters.read(keys).items()}
        if f"{name}.layer.A" in lora:
            B, A = lora[f"{name}.layer.B"], lora[f"{name}.layer.A"]
        else:
            rank = cut.ranks[name]
            left, right = (widened(rows[:rank]) for rows in factors.read([f"{name}.left", f"{name}.right"]).values())
            a, b = lora[f"{name}.right.A"], lora[f"{name}.right.B"][:rank]
            d, c = lora[f"{name}.left.A"][:, :rank], lora[f"{name}.left.B"]
            U, V = left.T - c @ d, right - b @ a
            B, A = torch.cat([U @ b + c @ (d @ b), c], 1), torch.cat([a, d @ V])
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.to(factors.entry(f"{name}.right").dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.to(factors.entry(f"{name}.right").dtype).contiguous()
    max_rank = max((len(A) for key, A in tensors.items() if ".lora_A." in key), default=1)
    for key, matrix in tensors.items():  # fine-tuning adds rank only to layers that are not dense at its size
        padding = max_rank - min(max_rank, matrix.shape[0] if ".lora_A." in key else matrix.shape[1])
        tensors[key] = F.pad(matrix, (0, 0, 0, padding) if ".lora_A." in key else (0, padding))
    config = LoraConfig(r=max_rank, lora_alpha=max_rank, target_modules=names, base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(str(folder))
    save_file(tensors, Path(folder) / "adapter_model.safetensors")
