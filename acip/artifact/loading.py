"""Load a model from an artifact, reading only the bytes that a size needs (paper 2.2.3; ARTIFACT.md describes the format).

A layer at rank r needs the rows [0, r) of its factors, a dense layer its weight, a coded layer one version of its codes. Loaded rows
stay in memory, so a later, larger size reads only the difference.
"""

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from acip.artifact.codes_file import StoredVersions
from acip.artifact.reader import ArtifactReader
from acip.coding.codes import Codes
from acip.errors import ArtifactError
from acip.layers.directions import DirectionMatrix
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.packing import PackedLinear
from acip.layers.targets import weight_MN
from acip.modeling_acip import CodedLinear, keep_attention_cap, set_module
from acip.sizing.cut_table import Cut
from acip.utils.half_products import speed_up_products

READ_AT_ONCE = 1 << 28  # stored bytes of codes that are in memory while they are decoded
BUILDING = threading.Lock()  # transformers sets torch's default dtype, which is global, while it builds a model


def without_weights(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype | str | None, **options: Any) -> PreTrainedModel:
    """Return a model whose parameters are on the device meta, as are its stored buffers. Those that are computed are on the CPU.

    Several threads may call this at the same time. The buffers are computed in float32, as transformers does when it loads a model.
    """
    with BUILDING, torch.device("meta"):
        model: PreTrainedModel = model_class._from_config(config, dtype=dtype, **options)
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
    return model


class ModelLoader:
    """Builds the model of one artifact, and loads the tensors of its target layers as sizes need them."""

    def __init__(self, artifact: ArtifactReader, device: str | torch.device) -> None:
        """Open the files of the factors and dense weights. Raise ArtifactError if their shapes contradict the layer table."""
        self.artifact, self.device = artifact, device
        self.factors, self.dense = artifact.tensors("factors"), artifact.tensors("dense")
        self.stored_ranks = {row["name"]: row["stored_rank"] for row in artifact.manifest["layers"]}
        self.lead = artifact.recipe.adapter_rows  # rows of the adapter before the directions
        for row in artifact.manifest["layers"]:
            name, rows = row["name"], row["stored_rank"] + self.lead
            factors = ((self.factors, "left", (rows, row["M"])), (self.factors, "right", (rows, row["N"])))
            for file, part, shape in (*factors, (self.dense, "weight", (row["M"], row["N"]))):
                if (entry := file.entry(f"{name}.{part}")).shape != shape or not entry.dtype.is_floating_point:
                    raise ArtifactError(
                        f"{artifact.source.where}: {name}.{part} is {entry.dtype} {list(entry.shape)}; "
                        f"its shape in the layer table is {list(shape)}."
                    )

    def __deepcopy__(self, memo: Any) -> "ModelLoader":
        """Return the same object: a loader is immutable."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the artifact and the device; opened files are opened again."""
        return ModelLoader, (self.artifact, self.device)

    def model(self) -> PreTrainedModel:
        """Return the model with everything loaded except the target layers, which are ElasticLinear and hold no rows and no weight yet."""
        where = self.artifact.source.where
        model = self._base_without_targets()
        modules = dict(model.named_modules())
        for row in self.artifact.manifest["layers"]:
            name, original = row["name"], modules.get(row["name"])
            if not isinstance(original, nn.Linear | Conv1D) or weight_MN(original).shape != (row["M"], row["N"]):
                raise ArtifactError(f"{where}: the model of config.json has no linear layer {name} of {row['M']} x {row['N']}.")
            set_module(model, name, self._empty_elastic_linear(name, original))
        model.tie_weights()
        targets = {f"{name}.original.weight" for name in self.stored_ranks}
        tensors = (*model.named_parameters(), *model.named_buffers())
        if missing := [name for name, tensor in tensors if tensor.is_meta and name not in targets]:
            raise ArtifactError(f"{where} lacks tensors of its model: {', '.join(missing[:3])}. Fetch the artifact again.")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for buffer_name, buffer in list(model.named_buffers(remove_duplicate=False)):  # those that are computed, not stored
            parent, _, child = buffer_name.rpartition(".")
            model.get_submodule(parent)._buffers[child] = buffer.to(self.device)
        return model.eval()

    def _empty_elastic_linear(self, name: str, original: nn.Module) -> ElasticLinear:
        sides = (self.factors.entry(f"{name}.{side}") for side in ("left", "right"))
        left, right = (torch.empty(0, *entry.shape[1:], dtype=entry.dtype, device=self.device) for entry in sides)
        return ElasticLinear(original, left, right, lead=self.lead)

    def _base_without_targets(self) -> PreTrainedModel:
        """Return the base model with the tensors of rest.safetensors; all other parameters are on the device meta."""
        with self._described():
            model = self._empty_base()
            tensors = {name: tensor.to(self.device) for name, tensor in self.rest_tensors().items()}
            model.load_state_dict(tensors, strict=False, assign=True)
        return self._with_generation_config(model)

    def empty_base(self) -> PreTrainedModel:
        """Return the base model with all parameters on the device meta."""
        with self._described():
            return self._with_generation_config(self._empty_base())

    def _empty_base(self) -> PreTrainedModel:
        config = copy.deepcopy(self.artifact.config)  # the model may change its copy
        keep_attention_cap(config)
        model = without_weights(_model_class(config), config, config.dtype)
        speed_up_products(model.dtype)
        return model

    def _with_generation_config(self, model: PreTrainedModel) -> PreTrainedModel:
        if "generation_config.json" in self.artifact.manifest["files"]:
            folder = self.artifact.local("generation_config.json").parent
            try:
                model.generation_config = GenerationConfig.from_pretrained(folder)
            except Exception as error:  # a malformed file makes transformers raise exceptions of any type
                raise ArtifactError(f"{self.artifact.source.where}/generation_config.json can't be read: {error}") from error
        return model

    @contextmanager
    def _described(self) -> Iterator[None]:
        """Turn the exceptions of any type that transformers and torch raise for a malformed configuration into an ArtifactError."""
        try:
            yield
        except ArtifactError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"{self.artifact.source.where}: the model that config.json describes can't be built from its tensors: {error}"
            ) from error

    # ---- what a subclass may keep for other processes

    def rest_tensors(self) -> dict[str, Tensor]:
        """Return all tensors outside of the target layers."""
        rest = self.artifact.tensors("rest")
        return rest.read(list(rest.entries))

    def directions(self, wanted: Sequence[tuple[str, int, int]]) -> list[Tensor]:
        """Return rows [first, last) of the factors, for (NAME.left or NAME.right, first, last) in `wanted`."""
        return self.factors.rows(wanted)

    def dense_weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the dense weights of layers, as NAME.weight."""
        return self.dense.read([f"{name}.weight" for name in names])

    def decoded(self, name: str, version: int) -> Codes:
        """Return a version of the codes of a layer."""
        return self.codes.read({name: version})[name].unpack()

    def packed(self, name: str, linear: nn.Module) -> PackedLinear:
        """Return a linear layer of the model with a packed copy of its weight."""
        del name
        return PackedLinear(linear)

    # ---- loading

    def all_stored_ranks(self) -> dict[str, int | None]:
        """Return the stored rank of each target layer."""
        return dict(self.stored_ranks)

    def load_size(self, layers: Mapping[str, ElasticLinear], cut: Cut) -> None:
        """Read everything that a size needs and `layers` do not hold yet."""
        coded = {name: version for name, version in (cut.versions or {}).items() if name in layers}
        self.load_codes(layers, coded)
        self.load_missing(layers, {name: cut.ranks[name] for name in layers if name not in coded})

    def load_codes(self, layers: Mapping[str, ElasticLinear], versions: Mapping[str, int]) -> None:
        """Read the versions of codes that `layers` do not hold yet, `READ_AT_ONCE` bytes of them at once."""
        missing = {name: version for name, version in versions.items() if str(version) not in layers[name].coded}
        for some in _parts(missing, {name: self.codes.facts[name][version].bytes for name, version in missing.items()}):
            packed = self.codes.read(some)
            for name, version in some.items():
                layer = layers[name]  # the model may have been moved since it was loaded
                layer.coded[str(version)] = self.coded(name, packed.pop(name).unpack(), layer.bias).to(layer.left.values.device)

    def coded(self, name: str, codes: Codes, bias: Tensor | None) -> CodedLinear:
        """Return the layer `name` with these codes."""
        return CodedLinear(
            self.part(name, "codes", codes.codes).to(self.device), self.part(name, "steps", codes.steps).to(self.device), bias
        )

    def part(self, name: str, side: str, tensor: Tensor) -> Tensor:
        """Return what is kept of a tensor of the layer `name`: all of it. A worker that computes with a part of the layer overrides it."""
        del name, side
        return tensor

    @cached_property
    def codes(self) -> StoredVersions:
        """The coded versions of the target layers, in the artifact's file."""
        return StoredVersions(self.artifact)

    def load_missing(self, layers: Mapping[str, ElasticLinear], ranks: Mapping[str, int | None], dense: bool = False) -> None:
        """Read the rows and dense weights that `ranks` need and `layers` do not hold yet.

        For a rank, these are rows of both factors; for None, it is the dense weight. With `dense`, all layers in `ranks` get their
        dense weights.
        """
        missing_rows: list[tuple[str, int, int]] = []
        missing_weights: list[str] = []
        for name, rank in ranks.items():
            layer = layers[name]
            if (rank is None or dense) and layer.original.weight.is_meta:
                missing_weights.append(name)
            for side in ("left", "right") if rank is not None else ():
                if (loaded := len(getattr(layer, side))) < self.lead + (rank or 0):
                    missing_rows.append((f"{name}.{side}", loaded, self.lead + (rank or 0)))
        for (key, *_), rows in zip(missing_rows, self.directions(missing_rows) if missing_rows else [], strict=True):
            name, _, side = key.rpartition(".")
            matrix: DirectionMatrix = getattr(layers[name], side)
            new = self.part(name, side, rows).to(matrix.values)
            values = torch.cat([matrix.values, new]) if len(matrix) else new
            matrix.values = nn.Parameter(values, requires_grad=False)
        weights = self.dense_weights(missing_weights) if missing_weights else {}
        for key, weight in weights.items():
            name = key.removesuffix(".weight")
            layer = layers[name]
            original: Any = layer.original
            moved = self.part(name, "weight", weight).to(layer.left.values)
            original.weight = nn.Parameter(moved.T.contiguous() if isinstance(original, Conv1D) else moved, requires_grad=False)


def _parts(versions: Mapping[str, int], sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Yield `versions` in parts whose `sizes` are at most READ_AT_ONCE bytes, or of one layer."""
    part: dict[str, int] = {}
    for name, version in versions.items():
        if part and sum(sizes[each] for each in part) + sizes[name] > READ_AT_ONCE:
            yield part
            part = {}
        part[name] = version
    if part:
        yield part


def _model_class(config: PreTrainedConfig) -> Any:
    """Return the class that was saved, if transformers has it (an encoder, a vision model), else the causal model class of the config."""
    saved = getattr(transformers, (config.architectures or [""])[0], None)
    in_transformers = isinstance(saved, type) and issubclass(saved, PreTrainedModel)
    return saved if in_transformers else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
