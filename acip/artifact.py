"""The artifact: a folder from which a model of any size is read. safetensors and JSON only; nothing in it is executed.

manifest.json         written last, atomically: without it the artifact does not exist. Schema, provenance, recipe,
                      layer table, curve, and size and sha256 of every other file
factors.safetensors   per target layer `NAME.left` [S, M], `NAME.right` [S, N]: one direction a row, most important
                      first, so that a size is a prefix; S is the largest rank that is smaller than the dense layer
adapters.safetensors  the adapters of both factors, B scaled by alpha / R at every knot: `NAME.right.A` [R, N],
                      `NAME.right.B` [max(1, knots), S, R], `NAME.left.A` [S, R], `NAME.left.B` [max(1, knots), M, R];
                      or of one beside the layer: `NAME.layer.A` [R, N], `NAME.layer.B` [max(1, knots), M, R]
dense.safetensors     `NAME.weight` [M, N]: for the layers that are dense at a size
rest.safetensors      every other tensor of the base model (embeddings, norms, biases, head)
order.safetensors     `layer` [D]: the layer that loses a direction, first to leave first; `score`, `crossing`, and
                      `direction`: each layer's basis indices in the order of importance
config.json, tokenizer files, generation_config.json    the base model's own
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from acip.base import Base
from acip.budget import Curve, Decoder
from acip.calibrate import Calibration
from acip.cut import CutTable, LayerShape, Weights
from acip.errors import ArtifactError
from acip.layers import set_module, targets, weight_MN
from acip.linear import ALL, ElasticLinear, LoRA
from acip.materialise import AnySize
from acip.recipe import Recipe

SCHEMA = 2
MANIFEST = "manifest.json"
ITEMSIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of safetensors' names


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: its folder and its checked manifest. Tensors are read when a model is loaded."""

    folder: Path
    manifest: dict[str, Any]

    # ---- write

    @classmethod
    def save(cls, folder: str | Path, base: Base, calibration: Calibration, provenance: Mapping[str, Any]) -> "Artifact":
        """Write a calibrated model. `folder` may hold remains of a broken attempt; they are overwritten."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        recipe, table, layers = calibration.recipe, calibration.table, targets(calibration.model)
        stored = {shape.name: shape.stored_rank(recipe.adapter_rows, recipe.storage, recipe.reset) for shape in table.layers}
        factors: dict[str, Tensor] = {}
        adapters: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        inside: set[int] = set()
        for name, core in layers.items():
            assert isinstance(core, ElasticLinear)
            rows = slice(stored[name])
            factors[f"{name}.left"] = core.left.read(stored[name])
            factors[f"{name}.right"] = core.right.read(stored[name])
            dense[f"{name}.weight"] = weight_MN(core.exact)
            inside.update(id(tensor) for tensor in core.parameters() if tensor is not core.bias)
            for place, lora in core.loras.items():
                A = lora.A[:, rows].T if place == "left" else lora.A
                B = torch.stack([B * lora.scale for B in lora.B])[:, rows if place == "right" else ALL]
                adapters |= {f"{name}.{place}.A": A.to(core.left.dtype), f"{name}.{place}.B": B.to(core.left.dtype)}
        rest: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in (*calibration.model.named_parameters(), *_persistent_buffers(calibration.model)):
            if id(tensor) not in inside and id(tensor) not in seen:  # a tied head is stored once
                rest[name.replace(".original.", ".")] = tensor
                seen.add(id(tensor))
        scores = calibration.scores
        importance = scores.importance()
        order = {
            "layer": table.order,
            "score": scores.score,
            "crossing": scores.crossing,
            "direction": torch.cat([importance[name] for name in scores.names]).to(torch.int32),
        }
        for file, tensors in (("factors", factors), ("adapters", adapters), ("dense", dense), ("rest", rest), ("order", order)):
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / f"{file}.safetensors")
        base.model.config.architectures = [type(base.model).__name__]
        for part in (base.model.config, getattr(base.model, "generation_config", None), base.tokenizer):
            if part is not None:  # a vision model has no words to read or write
                part.save_pretrained(folder)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        manifest = {
            "schema": SCHEMA,
            "base": {"source": base.source, "revision": base.revision, "digest": base.digest},
            "recipe": recipe.to_dict(),
            "provenance": dict(provenance),
            "stop_step": calibration.stop_step,
            "steps": len(calibration.history),
            "layers": [
                {"name": s.name, "M": s.M, "N": s.N, "bias": s.bias, "stored_rank": stored[s.name]} for s in table.layers
            ],
            "rest_params": table.rest_params,
            "curve": [],
            "files": {file: {"bytes": (folder / file).stat().st_size, "sha256": _sha256(folder / file)} for file in files},
        }  # fmt: skip
        _write_atomically(folder / MANIFEST, manifest)
        return cls.open(folder)

    def record_curve(self, rows: list[dict[str, Any]]) -> "Artifact":
        """Put the measured trade-off curve into the manifest. Nothing else changes."""
        _write_atomically(self.folder / MANIFEST, {**self.manifest, "curve": rows})
        return Artifact.open(self.folder)

    # ---- read

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> "Artifact":
        """Open and check an artifact: its manifest, and that every file is there with its size (`verify`: its sha256 too)."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(
                f"{folder} holds no {MANIFEST}: it is not an artifact, or its writing was cut short. Calibrate again, or check the path."
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ArtifactError(f"{folder / MANIFEST} is not JSON ({error}). Fetch the artifact again.") from error
        _check(manifest, folder)
        for file, facts in manifest["files"].items():
            path = folder / file
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                got = f"{path.stat().st_size:,} bytes" if path.is_file() else "missing"
                raise ArtifactError(f"{path} is {got}; the manifest says {facts['bytes']:,} bytes. Fetch the artifact again.")
            if verify and _sha256(path) != facts["sha256"]:
                raise ArtifactError(f"{path} is corrupted: its sha256 is not the manifest's. Fetch the artifact again.")
        return cls(folder, manifest)

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_dict(self.manifest["recipe"])

    @property
    def curve(self) -> list[dict[str, Any]]:
        return self.manifest["curve"]

    def table(self) -> CutTable:
        layers = tuple(LayerShape(row["name"], row["M"], row["N"], row["bias"]) for row in self.manifest["layers"])
        with self._tensors("order") as tensors:
            order = tensors.get_tensor("layer")
        counts = torch.bincount(order.long(), minlength=len(layers))
        if counts.tolist() != [layer.K for layer in layers]:
            raise ArtifactError(f"{self.folder}: the removal order does not fit the layer table. Fetch the artifact again.")
        with self._tensors("dense") as dense:
            itemsizes = tuple(ITEMSIZES[dense.get_slice(f"{layer.name}.weight").get_dtype()] for layer in layers)
        recipe = self.recipe
        return CutTable(
            layers, order, recipe.adapter_rows, self.manifest["rest_params"], recipe.storage, recipe.reset,
            weights=Weights(itemsizes, self._data_bytes("rest")),
            decoder=Decoder.of(AutoConfig.from_pretrained(self.folder), max(itemsizes)),
            curve=Curve.of(self.curve),
        )  # fmt: skip

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    def load(self, device: str | torch.device = "cpu") -> AnySize:
        """The resident model of every size, at size 1.0: bit for bit the base model."""
        config = AutoConfig.from_pretrained(self.folder)
        with init_empty_weights(include_buffers=False):
            model = _model_class(config)._from_config(config, dtype=config.dtype)
        table, recipe = self.table(), self.recipe
        with self._tensors("rest") as tensors:
            rest = {name: tensors.get_tensor(name).to(device) for name in tensors.keys()}  # noqa: SIM118
        model.load_state_dict(rest, strict=False, assign=True)
        with self._tensors("factors") as factors, self._tensors("dense") as dense, self._tensors("adapters") as adapters:
            stored = adapters.keys()
            for layer in table.layers:
                original = model.get_submodule(layer.name)
                weight = dense.get_tensor(f"{layer.name}.weight").to(device)
                weight = weight.T.contiguous() if isinstance(original, Conv1D) else weight
                original.weight = torch.nn.Parameter(weight, requires_grad=False)
                left, right = (factors.get_tensor(f"{layer.name}.{side}").to(device) for side in ("left", "right"))
                loras = {}
                for place in ("layer", "right", "left"):
                    if f"{layer.name}.{place}.A" in stored:
                        A, B = (adapters.get_tensor(f"{layer.name}.{place}.{part}").to(device) for part in "AB")
                        loras[place] = LoRA.of(A.T if place == "left" else A, B)
                set_module(model, layer.name, ElasticLinear(original, left, right, loras))
        model.tie_weights()
        missing = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        if missing:
            raise ArtifactError(f"{self.folder} lacks tensors of its model: {', '.join(missing[:3])}. Fetch the artifact again.")
        if (self.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        model.to(device).eval().requires_grad_(False)
        any_size = AnySize(model, table, recipe)
        any_size.resize(1.0)
        return any_size

    def _data_bytes(self, file: str) -> int:
        """Bytes of a file's tensors: all that follows its header, of which the first 8 bytes say the length."""
        path = self.folder / f"{file}.safetensors"
        with path.open("rb") as opened:
            return path.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")

    def _tensors(self, file: str) -> Any:
        try:
            return safe_open(self.folder / f"{file}.safetensors", framework="pt")
        except Exception as error:  # safetensors raises its own, unrelated types
            raise ArtifactError(f"{self.folder / file}.safetensors can't be read: {error}. Fetch the artifact again.") from error


def _check(manifest: Any, folder: Path) -> None:
    """Refuse what this code did not write: other schemas, missing fields, paths that leave the folder."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise ArtifactError(f"{folder / MANIFEST} is not an acip manifest.")
    if manifest["schema"] != SCHEMA:
        remedy = (
            "Upgrade acip." if manifest["schema"] > SCHEMA else "Calibrate again; nothing reads what was written before the first release."
        )
        raise ArtifactError(f"{folder} has schema {manifest['schema']}; this acip reads {SCHEMA}. {remedy}")
    for key, kind in (("base", dict), ("recipe", dict), ("layers", list), ("files", dict), ("curve", list), ("rest_params", int)):
        if not isinstance(manifest.get(key), kind):
            raise ArtifactError(f"{folder / MANIFEST}: {key!r} is missing or not a {kind.__name__}. Fetch the artifact again.")
    for file, facts in manifest["files"].items():
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise ArtifactError(f"{folder / MANIFEST} names a file outside its folder, or without its size: {file!r}. It is not ours.")
    for row in manifest["layers"]:
        fields = {"name": str, "M": int, "N": int, "bias": bool, "stored_rank": int}
        if not isinstance(row, dict) or any(not isinstance(row.get(key), kind) for key, kind in fields.items()):
            raise ArtifactError(f"{folder / MANIFEST}: malformed layer row {row!r}.")


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that was saved, where transformers has it (an encoder, a vision model); else the causal one for this config."""
    saved = getattr(transformers, (config.architectures or [""])[0], None)
    known = isinstance(saved, type) and issubclass(saved, PreTrainedModel)
    return saved if known else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _persistent_buffers(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    kept = model.state_dict(keep_vars=True)
    return [(name, tensor) for name, tensor in model.named_buffers() if name in kept]


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
