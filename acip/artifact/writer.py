"""Write an artifact: from a calibration, or from another artifact with fine-tuned factors.

Every function writes the manifest last. A folder whose writing was interrupted has no manifest, so it is not an artifact.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

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
from acip.base import Base
from acip.calibration.result import Calibration
from acip.coding.coded_model import CodedModel
from acip.errors import ArtifactError
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import targets, weight_MN
from acip.modeling_acip import artifact_config, classes
from acip.utils.atomic import SUFFIX
from acip.utils.checksums import sha256


def write_artifact(
    folder: Path, base: Base, calibration: Calibration, provenance: Mapping[str, Any], codes: CodedModel | None = None
) -> None:
    """Write a calibrated model to `folder`, with coded versions of its target layers if they are given.

    Files of an earlier, interrupted attempt are overwritten. Raise ArtifactError if `codes` are of other layers.
    """
    recipe, layers = calibration.recipe, calibration.table.layers
    if codes is not None and codes.versions.keys() != {shape.name for shape in layers}:
        raise ArtifactError("the coded layers are not the target layers of the calibration. Code the layers of the same recipe.")
    folder.mkdir(parents=True, exist_ok=True)
    for left in (folder / MANIFEST, folder / f"{CODES}.safetensors", *folder.glob(f".{MANIFEST}.*{SUFFIX}")):
        left.unlink(missing_ok=True)
    stored = {shape.name: shape.stored_rank(recipe.adapter_rows, recipe.storage, recipe.dense_if_no_saving) for shape in layers}
    factors, dense, adapters = _target_tensors(calibration, stored)
    for file, tensors in zip(TENSOR_FILES, (factors, dense, _rest(calibration), _order(calibration), adapters), strict=True):
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / f"{file}.safetensors")
    coded = {} if codes is None else {CODES: write_codes(folder / f"{CODES}.safetensors", codes)}
    _write_base_files(folder, base)
    seal(folder, {
        "schema": SCHEMA if coded else UNCODED_SCHEMA,
        "base": {"source": base.source, "revision": base.revision, "digest": base.digest},
        "recipe": recipe.to_dict(),
        "provenance": dict(provenance),
        "stop_step": calibration.stop_step,
        "steps": len(calibration.history),
        "layers": [
            {"name": shape.name, "M": shape.M, "N": shape.N, "bias": shape.bias, "stored_rank": stored[shape.name]} for shape in layers
        ],
        "rest_params": calibration.table.rest_params,
        **coded,
    })  # fmt: skip


def write_tuned(
    artifact: ArtifactReader, folder: Path, factors: Mapping[str, Tensor], adapters: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> None:
    """Write a copy of `artifact` with other factors and adapters to the empty folder `folder`.

    `factors` holds new first rows by tensor name, `adapters` whole tensors. The other rows, the order, and all other files stay
    bit for bit the same, coded layers included: they are those of the base model. The curve is left empty, because it must be
    measured again.
    """
    rewritten = {f"{file}.safetensors" for file in ("factors", "adapters", DIGESTS)}
    for file in artifact.manifest["files"]:
        if file not in rewritten:
            artifact.copy(file, folder / file)
    new_factors = {}
    for name, rows in artifact.tensors("factors").read(list(artifact.tensors("factors").entries)).items():
        first = factors.get(name, rows[:0])
        new_factors[name] = torch.cat([first.to(rows), rows[len(first) :]])
    save_file(new_factors, folder / "factors.safetensors")
    unchanged = artifact.tensors("adapters").read([name for name in artifact.tensors("adapters").entries if name not in adapters])
    changed = {name: matrix.cpu().contiguous() for name, matrix in adapters.items()}
    save_file({**unchanged, **changed}, folder / "adapters.safetensors")
    seal(folder, {**artifact.manifest, "provenance": dict(provenance)})


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Complete the artifact in `folder`: write the digests, then `manifest` with an empty curve, and size and sha256 of every file."""
    save_file(dict(_digests(folder)), folder / f"{DIGESTS}.safetensors")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    facts = {file: {"bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)} for file in files}
    write_manifest(folder, {**manifest, "curve": [], "files": facts})


def _target_tensors(calibration: Calibration, stored: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the files factors, dense and adapters. `stored` is the stored rank S of each target layer."""
    factors: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    adapters: dict[str, Tensor] = {}
    for name, layer in targets(calibration.model).items():
        assert isinstance(layer, ElasticLinear)
        rank, dtype = stored[name], layer.left.dtype
        left, right = layer.folded(rank)
        factors |= {f"{name}.left": left.to(dtype), f"{name}.right": right.to(dtype)}
        dense[f"{name}.weight"] = weight_MN(layer.exact)
        for place, lora in layer.loras.items():
            A = lora.A[:, :rank] if place == "left" else lora.A
            B = (lora.B[:rank] if place == "right" else lora.B) * lora.scale
            adapters |= {f"{name}.{place}.A": A.to(dtype), f"{name}.{place}.B": B.to(dtype)}
    return factors, dense, adapters


def _rest(calibration: Calibration) -> dict[str, Tensor]:
    """Return every tensor of the base model that is not part of a target layer; tied tensors once, biases included."""
    model = calibration.model
    skipped = {id(tensor) for layer in targets(model).values() for tensor in layer.parameters() if tensor is not layer.bias}
    persistent = model.state_dict(keep_vars=True)
    buffers = [(name, tensor) for name, tensor in model.named_buffers() if name in persistent]
    rest: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *buffers):
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
            (content,) = written.source.read(written.file, [(entry.start, entry.start + entry.rows * entry.row_bytes)])
            yield f"{file}/{name}", chunk_digests(content, entry)
