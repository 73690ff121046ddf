"""Export one size of an artifact as a folder for transformers: a plain model in its smallest form, with tokenizer and metadata.

model*.safetensors       the weights of this size, in shards; their bytes are those of the cut, coded layers as Huffman codes
config.json              the base model's config, and the form and rank of each target layer (acip/modeling_acip.py)
modeling_acip.py         the code of these layers, for machines without acip
tokenizer files          with the chat template
generation_config.json   with every end-of-sequence id of the base model's generation config, config and tokenizer
README.md                the model card: requested and actual size, measured curve, how to use the model (acip/export/card.py)
provenance.json          base model, recipe, sizes, versions, and sha256 of every other file; written last

The folder is written under a temporary name and renamed, so a crash leaves no partial export.
"""

import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Folder
from acip.artifact.loading import without_weights
from acip.artifact.safetensors_ranges import TensorFile
from acip.base import quiet_progress
from acip.errors import ArtifactError
from acip.export.card import card, shown
from acip.export.quantization import Kind, kind_of, quantize_in_place
from acip.modeling_acip import CodedLinear, CompressedModel, LowRankLinear, PivotLinear, classes
from acip.sizing.cut_table import Cut, CutTable
from acip.sizing.elastic_model import ElasticModel
from acip.utils.checksums import sha256

PROVENANCE = "provenance.json"
SCHEMA = 1
ELASTIC = "Elastic"  # prefix of the names of classes that `elastic_class` makes


def export(
    any_size: ElasticModel,
    artifact: Artifact,
    folder: str | Path,
    kind: Kind | None = None,
    max_shard_size: str | int = "5GB",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the present size of `any_size` to `folder`, and return its provenance. An earlier export there is replaced.

    `kind` quantizes the matrices of the target layers. A cut whose budget was counted in 8 or 4 bit is always quantized.
    `facts` are added to the provenance. Raise ArtifactError if `folder` holds anything but an earlier export.
    """
    folder = check_target(folder)
    assert any_size.cut is not None, "resize first"
    return write(compressed_model(any_size, kind_of(any_size.cut, kind)), any_size.cut, artifact, folder, max_shard_size, facts)


def compressed_model(any_size: ElasticModel, kind: Kind | None = None) -> PreTrainedModel:
    """Return the present size as a transformers model that shares nothing with `any_size` and can be saved with `save_pretrained`."""
    plain = any_size.materialize()
    model = empty_model(plain)
    model.config.acip["layers"] = {name: _row(model.get_submodule(name), plain.get_submodule(name)) for name in any_size.layers}
    assert any_size.cut is not None
    if stored_in_fewer_bytes(any_size.cut, any_size.table):
        model.config.acip["bfloat16"] = {}
    move_modules(model, plain)
    model.requires_grad_(True)
    if kind is not None:
        quantize_in_place(model, kind)
    return model


def stored_in_fewer_bytes(cut: Cut, table: CutTable) -> bool:
    """Return whether the bytes of a cut are those of encoded tensors: coded layers, or the base model within a budget of bytes."""
    base = cut.bits is None and not any(cut.ranks.values())
    return cut.versions is not None or (base and cut.bytes is not None and cut.bytes < table.base_bytes)


def empty_model(plain: PreTrainedModel, mixin: type | None = None) -> PreTrainedModel:
    """Return a model of the compressed class for the class of `plain` (and of `mixin`), without weights."""
    base_class = base_class_of(plain)
    try:
        config_class, model_class = classes(plain.config.model_type, base_class)
    except ValueError as error:
        raise ArtifactError(f"{base_class} can't be exported: {error}") from error
    if not plain.can_generate():
        raise ArtifactError(f"{type(plain).__name__} does not generate text; only causal language models can be exported.")
    replaced = ("model_type", "architectures", "base_model_type", "auto_map")
    fields = {key: value for key, value in plain.config.to_dict().items() if key not in replaced}
    config = config_class.from_dict(fields | {"acip": {"base_class": base_class, "quantize": None, "layers": {}}})
    if mixin is not None:
        model_class = elastic_class(mixin, model_class)
    return without_weights(model_class, config, plain.dtype)


def base_class_of(model: PreTrainedModel) -> str:
    """Return the name of the base model's class. `model` is the base model or a compressed model."""
    acip = getattr(model.config, "acip", None)
    return str(acip["base_class"]) if isinstance(acip, dict) else type(model).__name__


@cache
def elastic_class(mixin: type, model_class: type) -> Any:
    """Return `model_class` with `mixin` as its first base. Each pair gives one class, which pickle finds by its name."""
    name = f"{ELASTIC}{model_class.__name__.removeprefix('Acip')}"
    return type(name, (mixin, model_class), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})


def move_modules(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Move every module of `other` into `model`, which has the same attributes, and give the modules the configs of `model`."""
    configs: dict[int, Any] = {id(other.config): model.config}
    for part in other.config.sub_configs:
        configs[id(getattr(other.config, part, None))] = getattr(model.config, part, None)
    for name, child in list(other.named_children()):
        setattr(model, name, child)
    model._parameters.update(other._parameters)
    model._buffers.update(other._buffers)
    for module in model.modules():
        if (config := configs.get(id(getattr(module, "config", None)))) is not None:
            module.config = config
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
    save: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Write the export of a model, and return its provenance.

    `save` writes the model's files to a folder. None is for a model that `compressed_model` made.
    """
    with replaced(folder) as partial:
        ends = _keep_ends(model, artifact)
        with quiet_progress():
            if save is None:
                CompressedModel.save_pretrained(model, partial, max_shard_size=max_shard_size)  # type: ignore[arg-type]
            else:
                save(partial)
        tokenizer = artifact.tokenizer()
        tokenizer.save_pretrained(partial)
        _check(partial, tokenizer, ends)
        provenance = {**(facts or {}), **_provenance(model, cut, artifact, partial)}
        (partial / "README.md").write_text(card(provenance, artifact, folder.name), encoding="utf-8")
        write_provenance(partial, provenance)
    return provenance


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` at the end of the block, unless the block raises."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    partial, earlier = temporary / "new", temporary / "earlier"
    try:
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rename(earlier)
        try:
            partial.rename(folder)
        except BaseException:
            if earlier.exists():
                earlier.rename(folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Add all files in `folder` to the provenance, and write it there."""
    provenance["files"] = _files(folder)
    with (folder / PROVENANCE).open("w", encoding="utf-8") as file:
        json.dump(provenance, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def check_target(folder: str | Path) -> Path:
    """Return the absolute path of `folder`. Raise ArtifactError unless it does not exist, is empty, or is an unchanged earlier export."""
    folder = replaceable(folder)
    if not folder.exists() and not folder.is_symlink():
        return folder
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder. Choose another place for the export.")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if present:
        exported = files_of(folder)
        if not exported:
            raise ArtifactError(f"{folder} is not empty and not an earlier export; it is not overwritten. Choose another folder.")
        if added := present - exported:
            raise ArtifactError(
                f"{folder} is an earlier export with files added to it ({_some(added)}). Move them, or choose another folder."
            )
    return folder


def replaceable(folder: str | Path) -> Path:
    """Return the absolute path of `folder`. Raise ArtifactError if another folder can't take its place."""
    folder = Path(folder).absolute()
    if Path.cwd().is_relative_to(folder.resolve()) or folder.is_mount():
        raise ArtifactError(f"{folder} can't be replaced: it is a mount point, the current folder, or above it. Name a folder in it.")
    return folder


def files_of(folder: Path) -> set[str]:
    """Return the files of the export in `folder`, according to its provenance; an empty set if there is no export."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        return {PROVENANCE, *provenance["files"]} if "acip_export" in provenance else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _row(original: nn.Module, layer: nn.Module) -> dict[str, Any]:
    """Return the entry of a layer in the config: its form and rank."""
    if isinstance(layer, CodedLinear):
        return {"form": "codes", "rank": None}
    if isinstance(layer, PivotLinear):
        return {"form": "pivot", "rank": layer.rank}
    if isinstance(layer, LowRankLinear):
        return {"form": "factors", "rank": layer.rank}
    return {"form": "dense" if type(layer) is type(original) else "linear", "rank": None}


def _keep_ends(model: PreTrainedModel, artifact: Artifact) -> list[int]:
    """Put every end-of-sequence id of generation config, config and tokenizer into the generation config, and return them."""
    generation: Any = model.generation_config
    config, tokenizer = artifact.config, artifact.tokenizer()
    ends: list[int] = []
    for ids in (getattr(generation, "eos_token_id", None), getattr(config.get_text_config(), "eos_token_id", None), tokenizer.eos_token_id):
        ends += [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None and i not in ends]
    if ends:
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    return ends


def _check(folder: Path, tokenizer: Any, ends: list[int]) -> None:
    """Raise ArtifactError unless end-of-sequence ids, vocabulary and chat template are read back as they were."""
    written = GenerationConfig.from_pretrained(folder).eos_token_id if (folder / "generation_config.json").is_file() else None
    lost = set(ends) - set(written if isinstance(written, list) else [written])
    if lost:
        raise ArtifactError(
            f"end-of-sequence ids {sorted(lost)} would be lost by the export, and generation would not stop at them. "
            "Check the base model's generation_config.json."
        )
    read = AutoTokenizer.from_pretrained(folder)
    for name in ("eos_token_id", "bos_token_id", "chat_template"):
        if getattr(read, name, None) != getattr(tokenizer, name, None):
            raise ArtifactError(
                f"the export would change the tokenizer's {name} from {getattr(tokenizer, name)!r} to {getattr(read, name)!r}. "
                "Check the base model's tokenizer."
            )
    if len(read) != len(tokenizer):
        raise ArtifactError(
            f"the export would change the tokenizer from {len(tokenizer)} to {len(read)} tokens. Check the base model's tokenizer."
        )


def _provenance(model: PreTrainedModel, cut: Cut, artifact: Artifact, folder: Path) -> dict[str, Any]:
    facts = {key: value for key, value in asdict(cut).items() if key not in ("ranks", "versions")}
    manifest = public(artifact.manifest)
    return {
        "acip_export": SCHEMA,
        "base": manifest["base"],
        "recipe": manifest["recipe"],
        "artifact": manifest["provenance"],
        "size": {**facts, "unit": cut.unit},
        **_stored_as(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": tensor_bytes(folder),
        "curve": manifest["curve"],
        "packages": versions("acip", "torch", "transformers", "safetensors"),
    }


def public(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest for publication: without paths of this machine and URIs of its store."""
    base = manifest["base"]
    cleaned = _without_paths({"provenance": manifest.get("provenance", {}), "curve": manifest["curve"]})
    return {**manifest, "base": {**base, "source": shown(base["source"])}, **cleaned}


def _without_paths(value: Any) -> Any:
    """Replace paths, and URIs other than http and https, by their last part."""
    if isinstance(value, dict) and value.get("kind") != "samples":  # the text of samples is not changed
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and re.match(r"/|(?!https?:)[a-z0-9]+://", value) else value


def tensor_bytes(folder: str | Path) -> int:
    """Return the bytes of the weights in a folder, without the headers of the files."""
    return sum(TensorFile(Folder(path.parent), path.name).data_bytes for path in Path(folder).glob("*.safetensors"))


def _stored_as(config: Any) -> dict[str, Any]:
    """Return the format of an export, its quantization, and how many layers have each form."""
    acip = getattr(config, "acip", None)
    if acip is None:
        groups = config.quantization_config["config_groups"].values()
        storage = {f"{group['weights']['num_bits']} bit": len(group["targets"]) for group in groups}
        return {"format": config.quantization_config["quant_method"], "quantize": None, "encoded": False, "storage": storage}
    forms = [row["form"] for row in acip["layers"].values()]
    return {
        "format": "transformers",
        "quantize": acip["quantize"],
        "encoded": acip.get("bfloat16") is not None,
        "storage": {form: forms.count(form) for form in sorted(set(forms))},
    }


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}


def versions(*packages: str) -> dict[str, str | None]:
    """Return the installed version of each package; None if it is not installed as a package."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
