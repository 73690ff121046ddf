"""Write an artifact: from a calibration, from codes alone, or from another artifact with fine-tuned factors.

Every function writes the manifest last. A folder whose writing was interrupted has no manifest, so it is not an artifact.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from acip.artifact.byte_sources import Folder
from acip.artifact.codes_file import write_codes
from acip.artifact.manifest import (
    CODES,
    CONFIG,
    DIGESTED,
    DIGESTS,
    MANIFEST,
    SCHEMA,
    TENSOR_FILES,
    UNCODED_SCHEMA,
    write_manifest,
)
from acip.artifact.reader import ArtifactReader
from acip.artifact.safetensors_ranges import TensorFile, chunk_digests
from acip.artifact.tensor_writer import Deferred, save_tensors
from acip.base import Base
from acip.calibration.result import Calibration
from acip.coding.coded_model import CodedModel
from acip.errors import ArtifactError
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import find_linears, targets, weight_MN
from acip.modeling_acip import artifact_config, classes
from acip.recipe import Recipe
from acip.utils.atomic import SUFFIX
from acip.utils.checksums import sha256


def write_artifact(
    folder: Path, base: Base, calibration: Calibration, provenance: Mapping[str, Any], codes: CodedModel | None = None
) -> None:
    """Write a calibrated model to `folder`, with coded versions of its target layers if they are given.

    Files of an earlier, interrupted attempt are overwritten. Raise ArtifactError if `codes` are of other layers, or if `folder` holds
    other files.
    """
    recipe, layers = calibration.recipe, calibration.table.layers
    stored = {shape.name: shape.stored_rank(recipe.adapter_rows, recipe.storage, recipe.dense_if_no_saving) for shape in layers}
    factors, dense, adapters = _target_tensors(calibration, stored)
    contents = (factors, dense, _rest(calibration.model, targets(calibration.model)), _order(calibration), adapters)
    _write(folder, base, recipe, provenance, codes, contents, {
        "stop_step": calibration.stop_step,
        "steps": len(calibration.history),
        "layers": [
            {"name": shape.name, "M": shape.M, "N": shape.N, "bias": shape.bias, "stored_rank": stored[shape.name]} for shape in layers
        ],
        "rest_params": calibration.table.rest_params,
    })  # fmt: skip


def write_coded(folder: Path, base: Base, recipe: Recipe, codes: CodedModel, provenance: Mapping[str, Any]) -> None:
    """Write an artifact that holds codes and the base model, and no directions, to `folder`.

    Files of an earlier, interrupted attempt are overwritten. Raise ArtifactError if `codes` are of other layers, or if `folder` holds
    other files.
    """
    linears = find_linears(base.model, recipe.exclude)
    weights = {name: weight_MN(linear) for name, linear in linears.items()}
    sides = {name: {"left": W_MN.shape[0], "right": W_MN.shape[1]} for name, W_MN in weights.items()}
    factors = {
        f"{name}.{side}": torch.empty(0, length, dtype=weights[name].dtype) for name in weights for side, length in sides[name].items()
    }
    dense = {f"{name}.weight": W_MN for name, W_MN in weights.items()}
    rest = _rest(base.model, linears)
    order = {"score": torch.float32, "crossing": torch.float32, "layer": torch.int32, "direction": torch.int32}
    empty = {name: torch.empty(0, dtype=dtype) for name, dtype in order.items()}
    biases = {id(linear.bias) for linear in linears.values()}
    _write(folder, base, recipe, provenance, codes, (factors, dense, rest, empty, {}), {
        "stop_step": 0,
        "steps": 0,
        "layers": [
            {"name": name, "M": sides["left"], "N": sides["right"], "bias": linears[name].bias is not None, "stored_rank": 0}
            for name, sides in sides.items()
        ],
        "rest_params": sum(p.numel() for p in rest.values() if isinstance(p, nn.Parameter) and id(p) not in biases),
    })  # fmt: skip


def _write(
    folder: Path,
    base: Base,
    recipe: Recipe,
    provenance: Mapping[str, Any],
    codes: CodedModel | None,
    contents: Sequence[Mapping[str, Tensor | Deferred]],
    facts: Mapping[str, Any],
) -> None:
    """Write an artifact with these `contents` of TENSOR_FILES and these facts in its manifest."""
    if codes is not None and codes.versions.keys() != {row["name"] for row in facts["layers"]}:
        raise ArtifactError("the coded layers are not the target layers of the calibration. Code the layers of the same recipe.")
    with tempfile.TemporaryDirectory() as base_files:
        _write_base_files(Path(base_files), base)
        removed = {MANIFEST, f"{CODES}.safetensors", *(path.name for path in folder.glob(f".{MANIFEST}.*{SUFFIX}"))}
        _require_only(folder, {*removed, *_files(Path(base_files)), *(f"{file}.safetensors" for file in (*TENSOR_FILES, DIGESTS))})
        folder.mkdir(parents=True, exist_ok=True)
        for file in removed:
            (folder / file).unlink(missing_ok=True)
        shutil.copytree(base_files, folder, dirs_exist_ok=True)
    for file, tensors in zip(TENSOR_FILES, contents, strict=True):
        save_tensors(tensors, folder / f"{file}.safetensors", compress=codes is not None)
    coded = {} if codes is None else {CODES: write_codes(folder / f"{CODES}.safetensors", codes)}
    seal(folder, {
        "schema": SCHEMA if coded else UNCODED_SCHEMA,
        "base": {"source": base.source, "revision": base.revision, "digest": base.digest},
        "recipe": recipe.to_dict(),
        "provenance": dict(provenance),
        **facts,
        **coded,
    })  # fmt: skip


def _require_only(folder: Path, allowed: set[str]) -> None:
    """Raise ArtifactError if `folder` holds files that are not `allowed`: they would become a part of the artifact."""
    if others := [file for file in _files(folder) if file not in allowed]:
        raise ArtifactError(
            f"{folder} holds other files ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}), which would become a part of the "
            "artifact. Choose an empty folder."
        )


def _files(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def write_tuned(
    artifact: ArtifactReader, folder: Path, factors: Mapping[str, Tensor], adapters: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> None:
    """Write a copy of `artifact` with other factors and adapters to the empty folder `folder`.

    `factors` holds new first rows by tensor name, `adapters` whole tensors. The other rows, the order, and all other files stay
    bit for bit the same, coded layers included: they are those of the base model. The curve is left empty, because it must be
    measured again. Raise ArtifactError if `folder` is not empty.
    """
    _require_only(folder, set())
    rewritten = {f"{file}.safetensors" for file in ("factors", "adapters", DIGESTS)}
    for file in artifact.manifest["files"]:
        if file not in rewritten:
            artifact.copy(file, folder / file)
    new_factors = {}
    for name, rows in artifact.tensors("factors").read(list(artifact.tensors("factors").entries)).items():
        first = factors.get(name, rows[:0])
        new_factors[name] = torch.cat([first.to(rows), rows[len(first) :]])
    compress = CODES in artifact.manifest
    save_tensors(new_factors, folder / "factors.safetensors", compress)
    unchanged = artifact.tensors("adapters").read([name for name in artifact.tensors("adapters").entries if name not in adapters])
    save_tensors({**unchanged, **adapters}, folder / "adapters.safetensors", compress)
    seal(folder, {**artifact.manifest, "provenance": dict(provenance)})


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Complete the artifact in `folder`: write the digests, then `manifest` with an empty curve, and size and sha256 of every file."""
    save_file(dict(_digests(folder)), folder / f"{DIGESTS}.safetensors")
    facts = {file: {"bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)} for file in _files(folder)}
    write_manifest(folder, {**manifest, "curve": [], "files": facts})


def _target_tensors(
    calibration: Calibration, stored: Mapping[str, int]
) -> tuple[dict[str, Tensor | Deferred], dict[str, Tensor | Deferred], dict[str, Tensor | Deferred]]:
    """Return the tensors of the files factors, dense and adapters. `stored` is the stored rank S of each target layer.

    Adapters are folded into the factors of a layer when these are written.
    """
    factors: dict[str, Tensor | Deferred] = {}
    dense: dict[str, Tensor | Deferred] = {}
    adapters: dict[str, Tensor | Deferred] = {}
    for name, layer in targets(calibration.model).items():
        assert isinstance(layer, ElasticLinear)
        rank, dtype = stored[name], layer.left.dtype
        rows = layer.lead + rank + (len(layer.loras["layer"].A) if "layer" in layer.loras else 0)
        for side, place in enumerate(("left", "right")):
            width = weight_MN(layer.exact).shape[side]
            factors[f"{name}.{place}"] = Deferred((rows, width), dtype, partial(_folded, layer, rank, side))
        dense[f"{name}.weight"] = weight_MN(layer.exact)
        for place, lora in layer.loras.items():
            A = lora.A[:, :rank] if place == "left" else lora.A
            B = (lora.B[:rank] if place == "right" else lora.B) * lora.scale
            adapters |= {f"{name}.{place}.A": A.to(dtype), f"{name}.{place}.B": B.to(dtype)}
    return factors, dense, adapters


def _folded(layer: ElasticLinear, rank: int, side: int) -> Tensor:
    """Return one of the two factors of a layer with its adapters folded in, in the dtype of the layer."""
    return layer.folded(rank)[side].to(layer.left.dtype)


def _rest(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return every tensor of the base model that is not part of a target layer, biases included.

    Tied tensors come once, by the name of the one that `tie_weights` gives to the others.
    """
    skipped = {id(tensor) for layer in layers.values() for tensor in layer.parameters() if tensor is not layer.bias}
    persistent = model.state_dict(keep_vars=True)
    buffers = [(name, tensor) for name, tensor in model.named_buffers() if name in persistent]
    rest: dict[str, Tensor] = {}
    tied = getattr(model, "all_tied_weights_keys", {})
    parameters = sorted(model.named_parameters(remove_duplicate=False), key=lambda pair: pair[0] in tied)
    for name, tensor in (*parameters, *buffers):
        if id(tensor) not in skipped:
            rest[name.replace(".original.", ".")] = tensor
            skipped.add(id(tensor))
    return rest


def _order(calibration: Calibration) -> dict[str, Tensor]:
    """Return the removal order, the scores, and the basis indices of each layer in the order of importance."""
    scores = calibration.scores
    importance = scores.importance()
    return {
        "layer": calibration.table.order,
        "score": scores.score,
        "crossing": scores.crossing,
        "direction": torch.cat([importance[name] for name in scores.names]).to(torch.int32),
    }


def _write_base_files(folder: Path, base: Base) -> None:
    """Write the configuration, the generation configuration and the tokenizer of the base model."""
    model_class = type(base.model).__name__
    base.model.config.architectures = [model_class]
    for part in (base.model.config, getattr(base.model, "generation_config", None), base.tokenizer):
        if part is not None:  # a vision model has no tokenizer
            part.save_pretrained(folder)
    if base.model.can_generate():
        with suppress(ValueError):  # transformers has no such class, so it can't load the artifact
            classes(base.model.config.model_type, model_class)
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            (folder / CONFIG).write_text(json.dumps(artifact_config(config, model_class), indent=1), encoding="utf-8")


def _digests(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in DIGESTED:
        if not (folder / f"{file}.safetensors").is_file():  # an artifact without codes
            continue
        written = TensorFile(Folder(folder), f"{file}.safetensors")
        for name, entry in written.entries.items():
            (content,) = written.source.read(written.file, [entry.stored_range(0, entry.rows)])
            yield f"{file}/{name}", chunk_digests(content, entry, 0, entry.rows)
