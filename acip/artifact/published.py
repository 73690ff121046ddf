"""Read a checkpoint in the format of the paper's authors as a base model and its `Calibration`.

config.json             the base model's name, the mask scale s, and the rank and alpha of the adapters
model.safetensors       or its shards and model.safetensors.index.json; every tensor name starts with `model.`

    LAYER[.base_layer].parametrization.     (`.base_layer` if the layer has an adapter)
        ortho.weight        [M, K]      U / sqrt(s); U holds the left singular vectors of W
        ortho.bias          [M]         the bias of the layer, if it has one
        base.weight         [K, N]      U^T W / sqrt(s), so that W = s ortho base
        mask_score          [K]         the scores
        mask, S             [K]         the last masks; the singular values
    LAYER.lora_A.default.weight [R, N], LAYER.lora_B.default.weight [M, R]
    all other tensors are those of the base model

s ortho base equals W only up to rounding, but an artifact at size 1.0 is the base model bit for bit. Therefore the base model is
loaded from its source, and compared with the tensors of the checkpoint.

Nothing in the folder is executed: code beside the weights is never imported, and pickles are never opened.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from acip.base import Base, load_base
from acip.calibration.result import Calibration
from acip.errors import ArtifactError, RecipeError
from acip.layers.adapters import LoRA
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import find_linears, weight_MN
from acip.modeling_acip import accumulation_dtype, set_module, widened
from acip.recipe import Recipe, paper
from acip.sizing.model_sizes import cut_table
from acip.sizing.score_map import ScoreMap

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
PLAIN_LORA = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "lora_bias": False,
    "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
}  # fmt: skip
PROBES = 8  # random vectors x on which W x and s ortho base x are compared, instead of whole matrices


def open_published(folder: str | Path, base: Base | str | None = None) -> tuple[Base, Calibration]:
    """Read the checkpoint in `folder`. Return the arguments of `Artifact.save`; `base.model` is changed in place.

    `base` is a loaded base model or its source (see acip.base); None means the hub id in the checkpoint's config. It must be the
    model that the checkpoint was made from, in the checkpoint's dtype. The recipe is the paper's, with the checkpoint's mask scale,
    adapters and dtype. The checkpoint does not record the number of steps, so `stop_step` is 0 and the history is empty. It does
    not record when in a step a mask crossed zero either, so among equal scores the weaker singular direction is removed first.

    Raise ArtifactError if the folder is not such a checkpoint, is incomplete, or was made from another base model.
    Memory: the base model, all factors, and the tensors of one layer.
    """
    checkpoint = Checkpoint.open(Path(folder))
    recipe = checkpoint.recipe
    base = _base(checkpoint, base, recipe)
    linears = find_linears(base.model)
    layers = checkpoint.layers
    if unknown := [name for name in layers if name not in linears]:
        raise ArtifactError(f"{_other_base(checkpoint, base)}: it has no linear layer {unknown[0]}.")
    names = [name for name in linears if name in layers]  # in the order of the model
    shapes = {name: (W.shape[0], W.shape[1]) for name in names for W in (weight_MN(linears[name]),)}

    scores = ScoreMap.start({name: checkpoint.read(name, "mask_score", min(shapes[name])) for name in names})
    excluded = tuple(name for name in linears if name not in layers)
    recipe = replace(recipe, exclude=excluded, stop_ratio=_stop_ratio(checkpoint, scores, shapes))
    importance = scores.importance()
    elastic_layers: dict[str, ElasticLinear] = {}
    for name in names:
        elastic_layers[name] = _elastic_layer(checkpoint, name, linears[name], importance[name], recipe, base)
        if recipe.adapter_rank:
            (M, N), R = shapes[name], recipe.adapter_rank
            A, B = checkpoint.read(name, "lora_A", R, N), checkpoint.read(name, "lora_B", M, R)
            elastic_layers[name].loras["layer"] = LoRA.of(A, B * (recipe.adapter_alpha / R))
    _compare_rest(checkpoint, base, names)
    for name, layer in elastic_layers.items():
        set_module(base.model, name, layer)
    base.model.eval().requires_grad_(False)
    return base, Calibration(base.model, recipe, scores, cut_table(base.model, scores, recipe), stop_step=0, history=[])


@dataclass(frozen=True)
class Checkpoint:
    """A folder, its config, and the open file of each tensor. Tensors are read one at a time, after their shape is checked."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Open the checkpoint in `folder`."""
        config = _json(folder / CONFIG)
        if "parametrization_config" not in config:
            raise ArtifactError(
                f"{folder / CONFIG} has no 'parametrization_config': it is not a checkpoint in the published ACIP format (model_type "
                f"{config.get('model_type')!r}). An artifact is opened with Artifact.open, a base model with load_base."
            )
        return cls(folder, config, _tensors(folder))

    def section(self, *path: str) -> dict[str, Any]:
        """Return the object at `path` in the config, or {} if it is missing or null."""
        section = self.config
        for key in path:
            section = section.get(key) or {}
            if not isinstance(section, dict):
                raise ArtifactError(
                    f"{self.folder / CONFIG}: {key!r} is {section!r}; it must be a JSON object. Fetch the checkpoint again."
                )
        return section

    @property
    def adapter(self) -> str | None:
        """The name of the adapter within the tensors' names; None if there is no adapter."""
        adapters = self.section("adapter_config", "peft_config")
        if len(adapters) > 1:
            raise ArtifactError(
                f"{self.folder / CONFIG} has the adapters {', '.join(adapters)}; only one is allowed. Save it with one adapter."
            )
        return next(iter(adapters), None)

    @property
    def recipe(self) -> Recipe:
        """The paper's recipe with the checkpoint's mask scale, adapters and dtype."""
        kind = self.section("parametrization_config").get("module_factory_cls")
        if kind != "svd":
            raise ArtifactError(f"{self.folder / CONFIG}: the parametrization is {kind!r}; only 'svd' can be opened.")
        factory = self.section("parametrization_config", "module_factory_kwargs")
        fields: dict[str, Any] = {"mask_scale": factory.get("mask_scaling_factor", "norm"), "dtype": self.dtype}
        if self.adapter is None:
            fields |= {"adapter_rank": 0, "post_tune_steps": 0}
        else:
            lora = self.section("adapter_config", "peft_config", self.adapter)
            for key, plain in PLAIN_LORA.items():
                if (lora.get(key, plain) or None) != (plain or None):
                    raise ArtifactError(
                        f"{self.folder / CONFIG}: the adapter's {key} is {lora[key]!r}; it must be {plain!r}, as in a plain LoRA."
                    )
            dropout = lora.get("lora_dropout", 0.0)
            fields |= {"adapter_rank": lora.get("r"), "adapter_alpha": lora.get("lora_alpha"), "adapter_dropout": dropout}
        try:
            recipe = Recipe.from_dict(fields, start=paper())
        except RecipeError as error:
            raise ArtifactError(f"{self.folder / CONFIG} does not give a valid recipe: {error}") from error
        if not math.isfinite(recipe.mask_scale * recipe.adapter_alpha):
            raise ArtifactError(f"{self.folder / CONFIG}: mask scale {recipe.mask_scale} and alpha {recipe.adapter_alpha} must be finite.")
        return recipe

    @property
    def base_source(self) -> str:
        """The hub id or path of the base model in the checkpoint's config."""
        return str(self.section("base_model_config", "pretrained_model_kwargs").get("pretrained_model_name_or_path"))

    @property
    def layers(self) -> list[str]:
        """The names of the target layers."""
        start, end = self.key("\0", "ortho.weight").split("\0")
        return [key[len(start) : -len(end)] for key in self.tensors if key.startswith(start) and key.endswith(end)]

    @property
    def dtype(self) -> str:
        """The dtype of the factors."""
        if not self.layers:
            raise ArtifactError(f"{self.folder} holds no layer in the published format: no tensor {self.key('*', 'ortho.weight')}.")
        dtype = self.tensors[key := self.key(self.layers[0], "ortho.weight")].get_slice(key).get_dtype()
        if dtype not in DTYPES:
            raise ArtifactError(f"{self.folder}: {key} is {dtype}; allowed: {', '.join(DTYPES)}. Save the checkpoint before quantizing it.")
        return DTYPES[dtype]

    def key(self, layer: str, part: str) -> str:
        """Return the name of a tensor."""
        if part.startswith("lora_"):
            return f"model.{layer}.{part}.{self.adapter}.weight"
        return f"model.{layer}.{'base_layer.' if self.adapter else ''}parametrization.{part}"

    def read(self, layer: str, part: str, *shape: int) -> Tensor:
        """Return a tensor. Raise ArtifactError unless it exists, has this shape and a dtype in DTYPES, and is finite."""
        key = self.key(layer, part)
        if key not in self.tensors:
            raise ArtifactError(f"{self.folder} lacks the tensor {key}. Fetch the whole checkpoint again.")
        facts = self.tensors[key].get_slice(key)
        found, dtype = tuple(facts.get_shape()), facts.get_dtype()
        if found != shape or dtype not in DTYPES:
            raise ArtifactError(
                f"{self.folder}: {key} is {dtype} {list(found)}; it must be {list(shape)}, in {', '.join(DTYPES)}. "
                "If it was compressed or quantized before it was saved, save it uncompressed; otherwise check the base model."
            )
        tensor: Tensor = self.tensors[key].get_tensor(key)
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{self.folder}: {key} holds NaN or infinity. Fetch the checkpoint again, or calibrate again.")
        return tensor


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{path} can't be read ({error.strerror}): this is not a checkpoint folder. Check the path, or fetch the checkpoint."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON ({error}). Fetch the checkpoint again.") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is a {type(content).__name__}; it must be a JSON object. Fetch the checkpoint again.")
    return content


def _tensors(folder: Path) -> dict[str, Any]:
    """Return the open safetensors file of each tensor, by tensor name."""
    if (folder / INDEX).is_file():
        where = _json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise ArtifactError(f"{folder / INDEX} has no 'weight_map' from tensor names to file names. Fetch the checkpoint again.")
        for file in where.values():
            if PurePosixPath(file).name != file or "\\" in file or not file.endswith(".safetensors"):
                raise ArtifactError(
                    f"{folder / INDEX} names {file!r}; only .safetensors files beside it are allowed. Do not trust this folder."
                )
    elif (folder / WEIGHTS).is_file():
        where = None
    else:
        pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
        content = f"only {pickles[0]}, a pickle, which can run code when it is opened" if pickles else "no weights"
        raise ArtifactError(f"{folder} holds {content}; it must hold {WEIGHTS}, or {INDEX} and its shards. Save it as safetensors.")
    opened: dict[str, Any] = {}
    for file in sorted(set(where.values())) if where is not None else [WEIGHTS]:
        try:
            opened[file] = safe_open(folder / file, framework="pt")
        except Exception as error:  # safetensors raises unrelated exception types of its own
            raise ArtifactError(f"{folder / file} can't be read: {error}. Fetch the whole checkpoint again.") from error
    held = {file: set(tensors.keys()) for file, tensors in opened.items()}
    if where is None:
        where = dict.fromkeys(sorted(held[WEIGHTS]), WEIGHTS)
    for key, file in where.items():
        if key not in held[file]:
            raise ArtifactError(f"{folder / file} lacks {key}, although {INDEX} lists it there. Fetch the checkpoint again.")
    return {key: opened[file] for key, file in where.items()}


def _base(checkpoint: Checkpoint, base: Base | str | None, recipe: Recipe) -> Base:
    """Return `base` loaded in the recipe's dtype."""
    if base is None:
        if not re.fullmatch(HUB_ID, checkpoint.base_source):
            raise ArtifactError(
                f"{checkpoint.folder} was made from the base model {checkpoint.base_source!r}, which is not a hub id. "
                "Give the base model: a folder, a GGUF file, or org/name."
            )
        base = checkpoint.base_source
    if isinstance(base, str):
        return load_base(base, recipe.dtype)
    if str(base.model.dtype) != f"torch.{recipe.dtype}":
        raise ArtifactError(f"base {base.source!r} is in {base.model.dtype}; load it in the checkpoint's dtype, {recipe.dtype}.")
    return base


def _other_base(checkpoint: Checkpoint, base: Base) -> str:
    return f"{base.source!r} is not the base model that {checkpoint.folder} was made from ({checkpoint.base_source!r}; give that one)"


def _stop_ratio(checkpoint: Checkpoint, scores: ScoreMap, shapes: dict[str, tuple[int, int]]) -> float:
    """Return the size at which pruning stopped, to the nearest percent: the share that the never pruned directions store."""
    if float(scores.score.min()) > 0:
        raise ArtifactError(f"{checkpoint.folder}: every score is above 0, so nothing was pruned. Save the checkpoint after calibration.")
    kept = sum(min(M * N, int((scores.of(name) > 0).sum()) * (M + N)) for name, (M, N) in shapes.items())
    ratio = kept / sum(M * N for M, N in shapes.values())
    return min(0.99, max(0.01, round(ratio, 2)))


def _elastic_layer(checkpoint: Checkpoint, name: str, linear: nn.Module, importance_K: Tensor, recipe: Recipe, base: Base) -> ElasticLinear:
    """Return a layer with all K directions as rows in the order of importance, around the layer of the base model.

    Raise ArtifactError if the checkpoint's weight or bias differs from the base model's.
    """
    W_MN = weight_MN(linear)
    (M, N), K = W_MN.shape, len(importance_K)
    # One factor is scaled by a power of two, which is exact; the other one takes the rest of s, and is rounded again.
    exact_scale = 2.0 ** round(math.log2(recipe.mask_scale) / 2)
    left_KM = checkpoint.read(name, "ortho.weight", M, K).T[importance_K].to(W_MN) * exact_scale
    right_KN = (widened(checkpoint.read(name, "base.weight", K, N)[importance_K]) * (recipe.mask_scale / exact_scale)).to(W_MN)
    checkpoint.read(name, "mask", K)  # checked, not used

    x_NP = torch.randn(N, PROBES, generator=torch.Generator().manual_seed(0)).to(W_MN.device, accumulation_dtype(W_MN.dtype))
    Wx_MP = widened(W_MN) @ x_NP
    error = float((widened(left_KM.T) @ (widened(right_KN) @ x_NP) - Wx_MP).norm() / Wx_MP.norm().clamp_min(1e-30))
    allowed = max(1e-4, 2 * torch.finfo(W_MN.dtype).eps)
    if not error <= allowed:
        raise ArtifactError(
            f"{_other_base(checkpoint, base)}: the weights of {name} differ by {error:.1%}; rounding explains {allowed:.2%}."
        )
    bias = linear.bias
    if isinstance(bias, Tensor) and not _equal(checkpoint.read(name, "ortho.bias", M), bias):
        raise ArtifactError(f"{_other_base(checkpoint, base)}: the biases of {name} differ.")
    return ElasticLinear(linear, left_KM.contiguous(), right_KN)


def _compare_rest(checkpoint: Checkpoint, base: Base, names: list[str]) -> None:
    """Raise ArtifactError unless all other tensors of the checkpoint are bit for bit those of the base model."""
    parts = ["ortho.weight", "base.weight", "mask", "mask_score", "S"] + (["lora_A", "lora_B"] if checkpoint.adapter else [])
    known = {checkpoint.key(name, part) for name in names for part in parts}
    known.update(checkpoint.key(name, "ortho.bias") for name in names if base.model.get_submodule(name).bias is not None)
    state = {f"model.{name}": tensor for name, tensor in base.model.state_dict().items()}
    for key in sorted(checkpoint.tensors.keys() - known):
        if key not in state:
            raise ArtifactError(
                f"{checkpoint.folder} holds {key}, which is neither in the published format nor in {base.source!r}. Check the base model."
            )
        if not _equal(checkpoint.tensors[key].get_tensor(key), state[key]):
            raise ArtifactError(f"{_other_base(checkpoint, base)}: {key.removeprefix('model.')} differs.")


def _equal(stored: Tensor, loaded: Tensor) -> bool:
    return stored.dtype == loaded.dtype and torch.equal(stored, loaded.cpu())
