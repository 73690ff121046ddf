"""An artifact -> a resident model, of which only the bytes that a size needs are read (paper 2.2.3; the format: acip.artifact.artifact).

A layer at rank r reads rows [0, r) of its factors; a dense one its weight. What is there stays: growing reads the difference.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from acip.errors import ArtifactError
from acip.layers.directions import DirectionMatrix
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import weight_MN
from acip.modeling_acip import set_module

if TYPE_CHECKING:
    from acip.artifact.artifact import Artifact


class ModelLoader:
    """One artifact's open files, and the layers of one model that are filled from them."""

    def __init__(self, artifact: "Artifact", device: str | torch.device) -> None:
        self.artifact, self.device = artifact, device
        self.factors, self.dense = artifact.tensors("factors"), artifact.tensors("dense")
        self.stored = {row["name"]: row["stored_rank"] for row in artifact.manifest["layers"]}
        self.lead = artifact.recipe.adapter_rows
        for row in artifact.manifest["layers"]:
            name, rows = row["name"], row["stored_rank"] + self.lead
            places = ((self.factors, "left", (rows, row["M"])), (self.factors, "right", (rows, row["N"])))
            for file, part, shape in (*places, (self.dense, "weight", (row["M"], row["N"]))):
                if (found := file.entry(f"{name}.{part}")).shape != shape or not found.dtype.is_floating_point:
                    raise ArtifactError(
                        f"{artifact.source.where}: {name}.{part} is {found.dtype} {list(found.shape)}; the layer table says {list(shape)}."
                    )

    def __deepcopy__(self, memo: Any) -> "ModelLoader":
        """Itself: nothing of it changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelLoader, (self.artifact, self.device)

    def model(self) -> PreTrainedModel:
        """Everything but the target layers' numbers."""
        config, where = copy.deepcopy(self.artifact.config), self.artifact.source.where  # the model may change its own
        rest = self.artifact.tensors("rest")
        try:
            with init_empty_weights(include_buffers=False):
                model = _model_class(config)._from_config(config, dtype=config.dtype)
            tensors = {name: tensor.to(self.device) for name, tensor in rest.read(list(rest.entries)).items()}
            model.load_state_dict(tensors, strict=False, assign=True)
        except ArtifactError:
            raise
        except Exception as error:  # whatever a foreign config makes of transformers and torch
            raise ArtifactError(f"{where} does not make the model that its config.json describes: {error}") from error
        modules = dict(model.named_modules())
        for row in self.artifact.manifest["layers"]:
            name, original = row["name"], modules.get(row["name"])
            if not isinstance(original, nn.Linear | Conv1D) or weight_MN(original).shape != (row["M"], row["N"]):
                raise ArtifactError(f"{where}: the model of config.json has no linear layer {name} of {row['M']} x {row['N']}.")
            dtype = self.factors.entry(f"{name}.left").dtype
            left, right = (torch.empty(0, row[side], dtype=dtype, device=self.device) for side in ("M", "N"))
            set_module(model, name, ElasticLinear(original, left, right, lead=self.lead))
        model.tie_weights()
        targets = {f"{name}.original.weight" for name in self.stored}
        named = (*model.named_parameters(), *model.named_buffers())
        if missing := [name for name, tensor in named if tensor.is_meta and name not in targets]:
            raise ArtifactError(f"{where} lacks tensors of its model: {', '.join(missing[:3])}. Fetch the artifact again.")
        if "generation_config.json" in self.artifact.manifest["files"]:
            folder = self.artifact.local("generation_config.json").parent
            try:
                model.generation_config = GenerationConfig.from_pretrained(folder)
            except Exception as error:  # as above
                raise ArtifactError(f"{where}/generation_config.json can't be read: {error}") from error
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for buffer_name, buffer in list(model.named_buffers(remove_duplicate=False)):  # those that no file holds
            parent, _, child = buffer_name.rpartition(".")
            model.get_submodule(parent)._buffers[child] = buffer.to(self.device)
        return model.eval()

    def everything(self) -> dict[str, int | None]:
        return dict(self.stored)

    def fill(self, layers: Mapping[str, ElasticLinear], ranks: Mapping[str, int | None], dense: bool = False) -> None:
        """Read what these ranks need and the layers lack: rows, weights of dense layers, or (`dense`) of all."""
        wanted: list[tuple[str, int, int]] = []
        weights: list[str] = []
        for name, rank in ranks.items():
            layer = layers[name]
            if (rank is None or dense) and layer.original.weight.is_meta:
                weights.append(name)
            for side in ("left", "right") if rank is not None else ():
                if (there := len(getattr(layer, side))) < self.lead + (rank or 0):
                    wanted.append((f"{name}.{side}", there, self.lead + (rank or 0)))
        for (key, *_), new in zip(wanted, self.factors.rows(wanted) if wanted else [], strict=True):
            name, _, side = key.rpartition(".")
            held: DirectionMatrix = getattr(layers[name], side)
            more = new.to(held.values)
            held.values = nn.Parameter(torch.cat([held.values, more]) if len(held) else more, requires_grad=False)
        for name, weight in self.dense.read([f"{name}.weight" for name in weights]).items() if weights else ():
            layer = layers[name.removesuffix(".weight")]
            original: Any = layer.original
            moved: Tensor = weight.to(layer.left.values)
            original.weight = nn.Parameter(moved.T.contiguous() if isinstance(original, Conv1D) else moved, requires_grad=False)


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that was saved, where transformers has it (an encoder, a vision model); else the causal one for this config."""
    saved = getattr(transformers, (config.architectures or [""])[0], None)
    known = isinstance(saved, type) and issubclass(saved, PreTrainedModel)
    return saved if known else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
