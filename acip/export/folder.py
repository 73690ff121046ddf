"""One size of an artifact as a folder that transformers loads: a plain model in its smallest form, with all that belongs to it.

model*.safetensors       the weights of this size, nothing else: the bytes of the cut, in shards
config.json              the base model's, and each target layer's form and rank (acip/modeling_acip.py)
modeling_acip.py         the code of these layers, for who has no acip
tokenizer files          with the chat template
generation_config.json   with every end-of-sequence id that the base model, its tokenizer or its config knows
README.md                the model card: the measured curve, what was asked and got, how to use it (acip/export/card.py)
provenance.json          base model, recipe, sizes, versions, sha256 of every other file; written last

It is written beside its place and renamed: a crash leaves no half export.
"""

import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Folder
from acip.artifact.safetensors_ranges import TensorFile
from acip.base import quiet_progress
from acip.errors import ArtifactError
from acip.export.card import card, shown
from acip.export.quantization import Kind, kind_of, quantize_in_place
from acip.modeling_acip import CompressedModel, LowRankLinear, PivotLinear, classes
from acip.sizing.cut_table import Cut
from acip.sizing.elastic_model import ElasticModel
from acip.utils.checksums import sha256

PROVENANCE = "provenance.json"
SCHEMA = 1


def export(
    any_size: ElasticModel,
    artifact: Artifact,
    folder: str | Path,
    kind: Kind | None = None,
    max_shard_size: str | int = "5GB",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the present size of `any_size` to `folder`; returns its provenance. An earlier export there is replaced.

    `kind` quantizes the target layers' matrices. A cut whose budget was counted in 8 or 4 bit must be quantized so.
    `facts` go into the provenance: what the caller knows of this export.
    """
    folder = check_target(folder)
    assert any_size.cut is not None, "resize first"
    return write(compressed_model(any_size, kind_of(any_size.cut, kind)), any_size.cut, artifact, folder, max_shard_size, facts)


def compressed_model(any_size: ElasticModel, kind: Kind | None = None) -> PreTrainedModel:
    """The present size as a transformers model on its own, whose `save_pretrained` writes what `from_pretrained` reads."""
    plain = any_size.materialize()
    model = empty_model(plain)
    model.config.acip["layers"] = {name: _row(model.get_submodule(name), plain.get_submodule(name)) for name in any_size.layers}
    move_modules(model, plain)
    model.requires_grad_(True)
    if kind is not None:
        quantize_in_place(model, kind)
    return model


def empty_model(plain: PreTrainedModel, mixin: type | None = None) -> PreTrainedModel:
    """A model of the class of any size for `plain`'s class (and of `mixin`), as yet without weights."""
    base_class = base_class_of(plain)
    try:
        config_class, model_class = classes(plain.config.model_type, base_class)
    except ValueError as error:
        raise ArtifactError(f"{base_class} can't be exported: {error}") from error
    if not plain.can_generate():
        raise ArtifactError(f"{type(plain).__name__} generates no text; only causal language models can be exported.")
    ours = ("model_type", "architectures", "base_model_type", "auto_map")
    fields = {key: value for key, value in plain.config.to_dict().items() if key not in ours}
    config = config_class.from_dict(fields | {"acip": {"base_class": base_class, "quantize": None, "layers": {}}})
    if mixin is not None:
        model_class = any_size_class(mixin, model_class)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = model_class._from_config(config, dtype=plain.dtype)
    return model


def base_class_of(model: PreTrainedModel) -> str:
    """The name of the base model's class, of which `model` may be any size."""
    acip = getattr(model.config, "acip", None)
    return str(acip["base_class"]) if isinstance(acip, dict) else type(model).__name__


@cache
def any_size_class(mixin: type, model_class: type) -> Any:
    """`model_class` with `mixin` before it, one class for each pair, so that pickle finds it by its name."""
    name = f"AnySize{model_class.__name__.removeprefix('Acip')}"
    return type(name, (mixin, model_class), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})


def move_modules(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """`model` gets every module of `other`, which has the same slots, and its own config and those inside it become theirs."""
    configs: dict[int, Any] = {id(other.config): model.config}
    for part in other.config.sub_configs:
        configs[id(getattr(other.config, part, None))] = getattr(model.config, part, None)
    for name, child in list(other.named_children()):
        setattr(model, name, child)
    model._parameters.update(other._parameters)
    model._buffers.update(other._buffers)
    for module in model.modules():
        if (known := configs.get(id(getattr(module, "config", None)))) is not None:
            module.config = known
    if getattr(other, "generation_config", None) is not None:
        model.generation_config = other.generation_config
    model.train(other.training)


def write(
    model: PreTrainedModel,
    cut: Cut,
    artifact: Artifact,
    folder: Path,
    max_shard_size: str | int = "5GB",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The folder of a model that `compressed_model` made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # nobody else's
    partial, earlier = aside / "new", aside / "earlier"
    try:
        partial.mkdir()
        ends = _keep_ends(model, artifact)
        with quiet_progress():
            CompressedModel.save_pretrained(model, partial, max_shard_size=max_shard_size)  # type: ignore[arg-type]
        tokenizer = artifact.tokenizer()
        tokenizer.save_pretrained(partial)
        _check(partial, tokenizer, ends)
        provenance = {**(facts or {}), **_provenance(model, cut, artifact, partial)}
        (partial / "README.md").write_text(card(provenance, artifact, folder.name), encoding="utf-8")
        provenance["files"] = _files(partial)
        with (partial / PROVENANCE).open("w", encoding="utf-8") as file:
            json.dump(provenance, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():
            folder.rename(earlier)
        try:
            partial.rename(folder)
        except BaseException:
            if earlier.exists():
                earlier.rename(folder)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return provenance


def check_target(folder: str | Path) -> Path:
    """The folder, if an export may be written there: it is not there, empty, or an earlier export and nothing more."""
    folder = Path(folder).absolute()
    if not folder.exists() and not folder.is_symlink():
        return folder
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder. Choose another place for the export.")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if there:
        ours = files_of(folder)
        if not ours:
            raise ArtifactError(f"{folder} holds something that is not an earlier export; it is not overwritten. Choose another folder.")
        if there - ours:
            raise ArtifactError(
                f"{folder} is an earlier export with files added to it ({_some(there - ours)}). Move them, or choose another."
            )
    return folder


def files_of(folder: Path) -> set[str]:
    """The files of the export in a folder, as it names them; none where it holds none."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        return {PROVENANCE, *provenance["files"]} if "acip_export" in provenance else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _row(original: nn.Module, layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, PivotLinear):
        return {"form": "pivot", "rank": layer.rank}
    if isinstance(layer, LowRankLinear):
        return {"form": "factors", "rank": layer.rank}
    return {"form": "dense" if type(layer) is type(original) else "linear", "rank": None}


def _keep_ends(model: PreTrainedModel, artifact: Artifact) -> list[int]:
    """Every end-of-sequence id of base model, config and tokenizer, put into the generation config in this order."""
    generation: Any = model.generation_config
    config, tokenizer = artifact.config, artifact.tokenizer()
    ends: list[int] = []
    for ids in (getattr(generation, "eos_token_id", None), getattr(config.get_text_config(), "eos_token_id", None), tokenizer.eos_token_id):
        ends += [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None and i not in ends]
    if ends:
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    return ends


def _check(folder: Path, tokenizer: Any, ends: list[int]) -> None:
    """What was written is what will be read: end ids, vocabulary, chat template."""
    got = GenerationConfig.from_pretrained(folder).eos_token_id if (folder / "generation_config.json").is_file() else None
    lost = set(ends) - set(got if isinstance(got, list) else [got])
    if lost:
        raise ArtifactError(f"end-of-sequence ids {sorted(lost)} would be lost by the export: generation would not stop at them.")
    read = AutoTokenizer.from_pretrained(folder)
    for what in ("eos_token_id", "bos_token_id", "chat_template"):
        if getattr(read, what, None) != getattr(tokenizer, what, None):
            raise ArtifactError(
                f"the tokenizer's {what} would not survive the export: {getattr(tokenizer, what)!r} became {getattr(read, what)!r}."
            )
    if len(read) != len(tokenizer):
        raise ArtifactError(f"the tokenizer would not survive the export: {len(tokenizer)} tokens became {len(read)}.")


def _provenance(model: PreTrainedModel, cut: Cut, artifact: Artifact, folder: Path) -> dict[str, Any]:
    facts = {key: value for key, value in asdict(cut).items() if key != "ranks"}
    manifest = public(artifact.manifest)
    return {
        "acip_export": SCHEMA,
        "base": manifest["base"],
        "recipe": manifest["recipe"],
        "artifact": manifest["provenance"],
        "size": {**facts, "unit": cut.unit},
        "quantize": model.config.acip["quantize"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "storage": _forms(model.config.acip["layers"]),
        "weight_bytes": tensor_bytes(folder),
        "curve": manifest["curve"],
        "packages": {name: _version(name) for name in ("acip", "torch", "transformers", "safetensors")},
    }


def public(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """An artifact's manifest as it may be published: it does not tell of this machine, or its store."""
    base = manifest["base"]
    told = _without_paths({"provenance": manifest.get("provenance", {}), "curve": manifest["curve"]})
    return {**manifest, "base": {**base, "source": shown(base["source"])}, **told}


def _without_paths(value: Any) -> Any:
    """Of a path, and of a URI that is not the web's, the last part."""
    if isinstance(value, dict) and value.get("kind") != "samples":  # what models said stays as it is
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and re.match(r"/|(?!https?:)[a-z0-9]+://", value) else value


def tensor_bytes(folder: str | Path) -> int:
    """Bytes of the weights in a folder, the files' headers aside."""
    return sum(TensorFile(Folder(path.parent), path.name).data_bytes for path in Path(folder).glob("*.safetensors"))


def _forms(layers: Mapping[str, Any]) -> dict[str, int]:
    forms = [row["form"] for row in layers.values()]
    return {form: forms.count(form) for form in sorted(set(forms))}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
