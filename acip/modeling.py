"""A calibrated model as a transformers model of any size, with the interface of the paper's code.

    model = acip.from_pretrained("path/to/artifact", size=0.6)     or "8GB", "800M params", a Budget
    model = AutoModelForCausalLM.from_pretrained("path")           the same, after `import acip`; also from the hub
    model.prune_model_by_score(size_ratio=0.5)                     change the size, as often as you like
    model.compress()                                               make plain layers with the adapters folded in; frees memory
    model.quantize("nf4")                                          store their matrices in 4 bit; not for a size of coded layers
    model.save_pretrained("folder")                                write an export (acip/export/folder.py)

`prune_model_by_score`, `compress` and `quantize` change the model in place and return it. A size that is set after `compress` reads
the dropped tensors from the artifact again.
"""

import re
from pathlib import Path
from typing import Any, Literal, cast
from urllib.request import url2pathname

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from acip import modeling_acip, renamed
from acip.artifact.artifact import Artifact
from acip.artifact.manifest import CONFIG, MANIFEST
from acip.base import check_report, quiet, with_report
from acip.errors import ArtifactError, BudgetError, foreign_errors
from acip.export.folder import ELASTIC, check_target, compressed_model, elastic_class, empty_model, export, move_modules, write
from acip.export.hub import snapshot
from acip.export.quantization import BEST, Kind, counted, kind_of, quantize_in_place
from acip.modeling_acip import MODEL_TYPE, set_module
from acip.sizing.budget import Budget, Convention
from acip.sizing.cut_table import Cut
from acip.sizing.elastic_model import ElasticModel
from acip.utils.hub_ids import HUB_ID

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
IGNORED_ARGUMENTS = (  # transformers passes them to every model
    "adapter_kwargs", "code_revision", "_commit_hash", "_from_auto", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors",
    "_from_pipeline",
)  # fmt: skip


def from_pretrained(
    source: str | Path | Artifact,
    size: float | str | Budget | None = None,
    quantize: Kind | Literal["best"] | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load an artifact as a transformers model of `size`, with the methods of `ElasticCausalLM`. The default is the base model.

    `source` is a folder, a repository of the hub, or an opened artifact; for S3, pass `Store(...).open("s3://...")`. Only the bytes that
    the size needs are read; a later, larger size reads the difference. A ratio counts the base model's bytes if the artifact has codes,
    unless `quantize` is given, and numbers otherwise. `quantize` also compresses the model. With "best", it is
    quantized only if the measured curves in 8 and 4 bit predict a better model within the budget. An export, which has one size, is
    loaded as it is.

    Raise ArtifactError if `source` is neither an artifact nor an export, and BudgetError for a size that can't be reached.
    """
    if isinstance(source, Artifact):
        return _compressed(source, size, quantize, device)
    if "://" in str(source) and not str(source).startswith("file:///"):
        raise ArtifactError(f"{source} is not a local folder. Open it with acip_platform.storage.store.Store.open, and pass the result.")
    folder = Path(url2pathname(str(source).removeprefix("file://")) if str(source).startswith("file:///") else source)
    if not folder.exists() and re.fullmatch(HUB_ID, str(source)):
        folder = Path(snapshot(str(source)))
    if not (folder / MANIFEST).is_file() and (folder / CONFIG).is_file():
        with foreign_errors(ArtifactError, f"{folder / CONFIG} can't be read", "Export it again, or fetch the whole folder."):
            fields, _ = PreTrainedConfig.get_config_dict(folder)
        if fields.get("model_type") != MODEL_TYPE:
            raise ArtifactError(f"{folder} is neither an artifact nor an export of one. Calibrate it first (jobs/calibrate_all.py).")
        layers = fields.get("acip")
        if not (isinstance(layers, dict) and layers.get("artifact")):  # otherwise it is an artifact without its manifest
            if size is not None or quantize is not None:
                raise BudgetError(f"{folder} is a model of one size: omit size and quantize, or load its artifact.")
            with (
                foreign_errors(ArtifactError, f"the export {folder} can't be loaded", "Export it again, or fetch the whole folder."),
                quiet(),
            ):
                loaded, report = with_report(folder)
            exported: Any = loaded
            check_report(f"the export {folder}", exported, report, ArtifactError)
            return exported.to(device)
    return _compressed(Artifact.open(folder), size, quantize, device)


def load_artifact(
    source: str | Path,
    size: float | str | Budget | None = None,
    quantize: Kind | Literal["best"] | None = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    subfolder: str | None = None,
    **others: Any,
) -> PreTrainedModel:
    """Load an artifact for `AutoModelForCausalLM.from_pretrained`, from a folder or from the hub, as a model of any size.

    `size` and `quantize` are those of `from_pretrained`. Raise ArtifactError for arguments that do not apply to artifacts.
    """
    hub = {key: others.pop(key) for key in HUB_ARGUMENTS if others.get(key) is not None}
    if unsupported := sorted(key for key, value in others.items() if value is not None and key not in IGNORED_ARGUMENTS):
        raise ArtifactError(
            f"an artifact can't be loaded with {', '.join(unsupported)}; allowed are size, quantize, dtype, device_map (one device), "
            f"attn_implementation, subfolder, {', '.join(HUB_ARGUMENTS)}."
        )
    if isinstance(device_map, dict) and len(device_map) == 1:
        (device_map,) = device_map.values()
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    with foreign_errors(ArtifactError, f"device_map is {device_map!r}, but an artifact is loaded to one device", "Name it, like 'cuda:0'."):
        device = torch.device("cpu" if device_map is None else device_map)
    folder = source if Path(source).is_dir() else snapshot(str(source), **hub)
    model = from_pretrained(Path(folder, subfolder or ""), size, quantize, device)
    dtype = dtype if dtype is not None else torch_dtype
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    if dtype not in (None, "auto"):
        torch.nn.Module.to(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model


def _compressed(
    artifact: Artifact, size: float | str | Budget | None, quantize: Kind | Literal["best"] | None, device: str | torch.device
) -> PreTrainedModel:
    if size is None and quantize == BEST:
        raise BudgetError('quantize="best" needs a size in bytes, memory or perplexity, like size="8GB".')
    budget = None
    if size is not None:  # codes cannot be quantized again, so that a ratio then counts numbers
        budget = counted(artifact.table().budget(size, None if quantize is None else "linear"), quantize)
    model = ElasticCausalLM.of(artifact, device, budget)
    if quantize is not None and (kind := kind_of(model.cut, quantize)) is not None:
        model.quantize(kind)
    return cast(PreTrainedModel, model)


def __getattr__(name: str) -> Any:
    """Return a class of `elastic_class` by its name, which pickle needs, or the new name for an old one."""
    if new := renamed.NAMES[__name__].get(name):
        renamed.warn("name", f"{__name__}.{name}", new)
        return globals()[new]
    if not name.startswith(ELASTIC):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return elastic_class(ElasticCausalLM, getattr(modeling_acip, f"Acip{name.removeprefix(ELASTIC)}"))


class ElasticCausalLM:
    """A mixin for the base model's class: a resident model of any size until `compress`, then a plain model of one size."""

    artifact: Artifact
    any_size: ElasticModel | None  # None once compressed
    cut: Cut  # the present size

    @classmethod
    def of(cls, artifact: Artifact, device: str | torch.device = "cpu", budget: Budget | None = None) -> "ElasticCausalLM":
        """Load the model of an artifact within `budget`."""
        any_size = artifact.load(device, budget)
        model: Any = empty_model(any_size.model, cls)
        model.artifact = artifact
        move_modules(model, any_size.model)
        model._attach(any_size)
        return cast(ElasticCausalLM, model)

    def prune_model_by_score(
        self, size_ratio: float | None = None, compression_rate: float | None = None, convention: Convention = "linear"
    ) -> "ElasticCausalLM":
        """Change to the largest size up to `size_ratio` of the base model, counted in `convention` (acip/sizing/cut_table.py).

        `compression_rate` is 1 - `size_ratio`; give one of the two. Raise BudgetError for sizes out of range.
        """
        if (size_ratio is None) == (compression_rate is None):
            raise BudgetError("give either size_ratio (0.4 keeps 40 %) or compression_rate (0.6 removes 60 %), not both or neither.")
        if size_ratio is None:
            assert compression_rate is not None
            if not isinstance(compression_rate, int | float) or not 0 <= compression_rate < 1:
                raise BudgetError(f"compression_rate is {compression_rate!r}; it must be a number from 0 (the base model) to below 1.")
            size_ratio = round(1 - compression_rate, 12)
        return self.resize(Budget(ratio=size_ratio, convention=convention))

    def resize(self, budget: Budget | float | str) -> "ElasticCausalLM":
        """Change to the largest size within `budget`. The result is in `cut`."""
        if self.any_size is None:
            model = cast(PreTrainedModel, self)
            if getattr(model, "_hf_peft_config_loaded", False):
                raise ArtifactError("the size of a model with PEFT adapters can't be changed: merge or unload the adapters first.")
            any_size = self.artifact.load(model.device, budget)
            if any_size.model.dtype != model.dtype:  # keep the dtype that the model was loaded or cast to
                torch.nn.Module.to(any_size.model, model.dtype)
            for name, layer in any_size.layers.items():  # other modules stay: they may have been trained or resized
                set_module(model, name, layer)
            self._attach(any_size)
        else:
            self.cut = self.any_size.resize(budget)
        return self

    def compress(self) -> "ElasticCausalLM":
        """Replace the layers by plain ones in their smallest form, with adapters folded in. This frees the memory of other sizes."""
        if self.any_size is not None:
            small, model = compressed_model(self.any_size), cast(Any, self)
            acip = small.config.acip
            move_modules(model, small)
            model.config.acip = acip
            model.requires_grad_(True)
            self.any_size = None
        return self

    def quantize(self, kind: Kind | None = None) -> "ElasticCausalLM":
        """Compress, then store the matrices of the compressed layers in 4 bit (nf4, fp4) or 8 bit (int8).

        The default is the kind in which the budget was counted, or nf4. Raise ArtifactError for more bits than that, and for a size of
        coded layers.
        """
        kind = kind_of(self.cut, kind) or kind_of(self.cut, "nf4")
        assert kind is not None
        self.compress()
        quantize_in_place(cast(PreTrainedModel, self), kind)
        return self

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Write an export of the present size.

        After `compress`, with other arguments than max_shard_size, as a Trainer passes them, write only the model's files.
        """
        if self.any_size is not None:
            if args or kwargs.keys() - {"max_shard_size"}:
                raise ArtifactError("before compress(), the only argument of save_pretrained is max_shard_size: call compress() first.")
            return export(self.any_size, self.artifact, save_directory, max_shard_size=kwargs.get("max_shard_size", "5GB"))
        if args or kwargs.keys() - {"max_shard_size"} or getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if self.cut.bits is not None and cast(Any, self).config.acip["quantize"] is None:
            raise ArtifactError(f"this size was counted in {self.cut.bits} bit: call quantize() before saving it.")
        return write(cast(PreTrainedModel, self), self.cut, self.artifact, check_target(save_directory), **kwargs)

    def _attach(self, any_size: ElasticModel) -> None:
        """Make this model, which holds the layers of `any_size`, the model of `any_size`."""
        model = any_size.model = cast(Any, self)
        model.config.acip = {**model.config.acip, "quantize": None, "layers": {}}
        model.requires_grad_(False)
        self.any_size = any_size
        assert any_size.cut is not None
        self.cut = any_size.cut
