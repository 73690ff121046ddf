"""Export a size of an artifact without loading the model.

A size in bytes consists of tensors that the artifact stores as an export does: codes and bfloat16 numbers, encoded. They are copied from
file to file. The bytes of a local artifact are mapped, not read into memory, so that a size takes no more memory than its metadata.

A size in ranks, or in 8 or 4 bit, has to be computed: the model is loaded.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from acip import modeling_acip
from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Folder
from acip.artifact.loading import ModelLoader
from acip.artifact.manifest import CODES
from acip.export.folder import check_target, empty_model, export, stored_in_fewer_bytes, write
from acip.export.quantization import Kind, kind_of
from acip.sizing.budget import Budget
from acip.sizing.cut_table import Cut


def export_size(
    artifact: Artifact,
    budget: Budget,
    folder: str | Path,
    kind: Kind | None = None,
    max_shard_size: str | int = "5GB",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the largest size of `artifact` within `budget` to `folder`, and return its provenance. An earlier export there is replaced.

    See `acip.export.folder.export` for `kind`, `facts` and errors. Raise BudgetError if no size is within the budget.
    """
    folder, table = check_target(folder), artifact.table()
    cut = table.cut(budget)
    if kind_of(cut, kind) is not None or not stored_in_fewer_bytes(cut, table):
        return export(artifact.load(size=budget), artifact, folder, kind, max_shard_size, facts)
    model = empty_model(plain := ModelLoader(artifact, "cpu").empty_base())
    versions = cut.versions or {}
    forms = {row["name"]: "codes" if row["name"] in versions else "dense" for row in artifact.manifest["layers"]}
    model.config.acip["layers"] = {name: {"form": form, "rank": None} for name, form in forms.items()}
    model.generation_config = plain.generation_config
    transposed = {f"{name}.weight" for name in forms if isinstance(plain.get_submodule(name), Conv1D)}
    tensors, model.config.acip["bfloat16"] = stored_tensors(artifact, cut, transposed)

    def save(where: Path) -> None:
        shutil.copyfile(modeling_acip.__file__, where / modeling_acip.CODE)
        PreTrainedModel.save_pretrained(model, where, state_dict=tensors, max_shard_size=max_shard_size, save_original_format=False)

    return write(model, cut, artifact, folder, facts=facts, save=save)


def stored_tensors(artifact: Artifact, cut: Cut, transposed: set[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the files of a size in bytes, and the field "bfloat16" of its config.

    They are those of `acip.modeling_acip.encoded_tensors`. `transposed` are the weights that the model holds as [in, out]. Checksums are
    compared. Raise ArtifactError if the artifact is damaged.
    """
    checked = Folder(artifact.source.folder, checked=True) if isinstance(artifact.source, Folder) else artifact.source
    source = replace(artifact, source=checked)
    versions = cut.versions or {}
    exact = [f"{row['name']}.weight" for row in artifact.manifest["layers"] if row["name"] not in versions]
    tensors: dict[str, Tensor] = {}
    chunks: dict[str, Any] = {}
    for file, names in (("rest", list(source.tensors("rest").entries)), ("dense", exact)):
        entries = source.tensors(file).entries
        for key, tensor in source.tensors(file).stored(names).items():
            entry, turned = entries[key], key in transposed
            if entry.coded is not None:
                chunks[key] = [list(entry.shape), list(entry.coded), *(["transposed"] if turned else [])]
            tensors[key] = tensor.T.contiguous() if turned and entry.coded is None else tensor
    if versions:
        exported = {f"{name}.{version}.{part}": f"{name}.{part}" for name, version in versions.items() for part in modeling_acip.PARTS}
        tensors |= {exported[key]: tensor for key, tensor in source.tensors(CODES).stored(list(exported)).items()}
    return tensors, chunks
