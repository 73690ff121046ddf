"""A calibrated model in transformers' hands, at any size (the paper's three lines).

    model = acip.from_pretrained("path/to/artifact", size=0.6)     or "8GB", "800M params", a Budget
    model = AutoModelForCausalLM.from_pretrained("path")           the same, after `import acip`; also from the hub
    model.prune_model_by_score(size_ratio=0.5)                     another size, at once, as often as you like
    model.compress()                                               plain layers, adapters folded in; memory falls
    model.quantize("nf4")                                          their matrices in 4 bit
    model.save_pretrained("folder")                                an export (acip/export/folder.py)

Each of the three returns the model, and works on it in place. What `compress` dropped is read again from the artifact
when another size is asked for.
"""

import re
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from acip import modeling_acip
from acip.artifact.artifact import Artifact
from acip.artifact.manifest import CONFIG, MANIFEST
from acip.base import check_report, quiet
from acip.errors import ArtifactError, BudgetError, foreign_errors
from acip.export.folder import any_size_class, check_target, compressed_model, empty_model, export, move_modules, write
from acip.export.hub import snapshot
from acip.export.quantization import BEST, Kind, counted, kind_of, quantize_in_place
from acip.modeling_acip import MODEL_TYPE, set_module
from acip.recipe import Convention
from acip.sizing.budget import Budget
from acip.sizing.cut_table import Cut
from acip.sizing.elastic_model import ElasticModel
from acip.utils.hub_ids import HUB_ID

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
IDLE_ARGUMENTS = (  # what transformers passes on to every model
    "adapter_kwargs", "code_revision", "_commit_hash", "_from_auto", "low_cpu_mem_usage", "subfolder", "tp_plan",
    "trust_remote_code", "use_safetensors", "state_dict", "_from_pipeline",
)  # fmt: skip


def from_pretrained(
    source: str | Path | Artifact,
    size: float | str | Budget | None = None,
    quantize: Kind | Literal["best"] | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """An artifact as a transformers model of `size` (default: the base model), with the methods of `ElasticCausalLM`.

    `quantize` compresses, too; "best" only where the curves that were measured in 8 and 4 bit say that it is better. A folder that
    was exported at one size is loaded as it is. At a size only its bytes are read, and those of larger ones when they are asked for.
    From S3: `from_pretrained(Store(...).open("s3://..."), size=0.6)`.
    """
    budget = None if size is None else as_budget(size)
    if isinstance(source, Artifact):
        return _compressed(source, budget, quantize, device)
    if "://" in str(source) and not str(source).startswith("file://"):
        raise ArtifactError(f"{source} is no folder. Open it with acip_platform.storage.store.Store, and pass what comes back.")
    folder = Path(url2pathname(urlparse(str(source)).path) if str(source).startswith("file://") else source)
    if not folder.exists() and re.fullmatch(HUB_ID, str(source)):
        folder = Path(snapshot(str(source)))
    if not (folder / MANIFEST).is_file() and (folder / CONFIG).is_file():
        with foreign_errors(ArtifactError, f"{folder / CONFIG} can't be read", "Export it again, or fetch all of it."):
            fields, _ = PreTrainedConfig.get_config_dict(folder)
        if fields.get("model_type") != MODEL_TYPE:
            raise ArtifactError(f"{folder} is neither an artifact nor an export of one. Calibrate it first (jobs/calibrate_all.py).")
        layers = fields.get("acip")
        if not (isinstance(layers, dict) and layers.get("artifact")):  # else an artifact that lacks its manifest
            if size is not None or quantize is not None:
                raise BudgetError(f"{folder} is a model of one size; another size is made from its artifact. Leave size and quantize out.")
            with foreign_errors(ArtifactError, f"the export {folder} can't be loaded", "Export it again, or fetch all of it."), quiet():
                loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
            exported, report = loaded
            check_report(f"the export {folder}", exported, report, ArtifactError)
            return exported.to(device)
    return _compressed(Artifact.open(folder), budget, quantize, device)


def through_transformers(
    source: str | Path,
    size: float | str | Budget | None = None,
    quantize: Kind | Literal["best"] | None = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    **others: Any,
) -> PreTrainedModel:
    """What `AutoModelForCausalLM.from_pretrained` makes of an artifact's folder, or of one on the hub: a model of every size.

    It takes `size` and `quantize`, too. ArtifactError for arguments that mean nothing here.
    """
    hub = {key: others.pop(key) for key in HUB_ARGUMENTS if others.get(key) is not None}
    if meant := sorted(key for key, value in others.items() if value is not None and key not in IDLE_ARGUMENTS):
        raise ArtifactError(
            f"{', '.join(meant)}: an artifact is loaded with size, quantize, dtype, device_map (a device), attn_implementation, "
            "and those of the hub alone."
        )
    if isinstance(device_map, dict) and len(device_map) == 1:
        (device_map,) = device_map.values()
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device_map, str | int | torch.device | None):
        raise ArtifactError(f"device_map is {device_map!r}; an artifact is loaded to one device, like 'cuda:0'.")
    folder = source if Path(source).is_dir() else snapshot(str(source), **hub)
    model = from_pretrained(folder, size, quantize, torch.device("cpu" if device_map is None else device_map))
    dtype = dtype if dtype is not None else torch_dtype
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    if dtype not in (None, "auto"):
        torch.nn.Module.to(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model


def _compressed(
    artifact: Artifact, budget: Budget | None, quantize: Kind | Literal["best"] | None, device: str | torch.device
) -> PreTrainedModel:
    if budget is None and quantize == BEST:
        raise BudgetError('quantize="best" needs a size in bytes, memory or perplexity, like size="8GB".')
    model = ElasticCausalLM.of(artifact, device, None if budget is None else counted(budget, quantize))
    if quantize is not None and (kind := kind_of(model.cut, quantize)) is not None:
        model.quantize(kind)
    return cast(PreTrainedModel, model)


def as_budget(size: float | str | Budget) -> Budget:
    if isinstance(size, Budget):
        return size
    return Budget.parse(size) if isinstance(size, str) else Budget(ratio=size)


def __getattr__(name: str) -> Any:
    """The classes of models of any size by their names: pickle looks for them here."""
    if not name.startswith("ElasticModel"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return any_size_class(ElasticCausalLM, getattr(modeling_acip, f"Acip{name.removeprefix('AnySize')}"))


class ElasticCausalLM:
    """Mixed into the base model's class: a resident model of every size until `compress`, a plain model of one after it."""

    artifact: Artifact
    any_size: ElasticModel | None  # None once compressed
    cut: Cut

    @classmethod
    def of(cls, artifact: Artifact, device: str | torch.device = "cpu", budget: Budget | None = None) -> "ElasticCausalLM":
        any_size = artifact.load(device, budget)
        model: Any = empty_model(any_size.model, cls)
        model.artifact = artifact
        move_modules(model, any_size.model)
        model._own(any_size)
        return cast(ElasticCausalLM, model)

    def prune_model_by_score(
        self, size_ratio: float | None = None, compression_rate: float | None = None, convention: Convention = "linear"
    ) -> "ElasticCausalLM":
        """Take the largest size up to `size_ratio` of the base model, counted in `convention` (acip/sizing/cut_table.py).

        `compression_rate` is 1 - `size_ratio`; give one of the two.
        """
        if (size_ratio is None) == (compression_rate is None):
            raise BudgetError("give either size_ratio (0.4 keeps 40 %) or compression_rate (0.6 takes 60 % away), and not both.")
        if size_ratio is None:
            assert compression_rate is not None
            if not isinstance(compression_rate, int | float) or not 0 <= compression_rate < 1:
                raise BudgetError(f"compression_rate is {compression_rate!r}; it must be a number from 0 (the base model) and below 1.")
            size_ratio = round(1 - compression_rate, 12)
        return self.resize(Budget(ratio=size_ratio, convention=convention))

    def resize(self, budget: Budget | float | str) -> "ElasticCausalLM":
        """The largest size within any budget. `cut` says what was got."""
        if self.any_size is None:
            model = cast(PreTrainedModel, self)
            if getattr(model, "_hf_peft_config_loaded", False):
                raise ArtifactError("a model with PEFT adapters keeps its size: merge or unload them before another size is asked for.")
            any_size = self.artifact.load(model.device, as_budget(budget))
            if any_size.model.dtype != model.dtype:  # as it was asked for when it was loaded
                torch.nn.Module.to(any_size.model, model.dtype)
            for name, layer in any_size.layers.items():  # the rest of the model is its own, and may have changed
                set_module(model, name, layer)
            self._own(any_size)
        else:
            self.cut = self.any_size.resize(as_budget(budget))
        return self

    def compress(self) -> "ElasticCausalLM":
        """Plain layers in their smallest form, adapters folded in. The other sizes leave the memory."""
        if self.any_size is not None:
            small, model = compressed_model(self.any_size), cast(Any, self)
            acip = small.config.acip
            move_modules(model, small)
            model.config.acip = acip
            model.requires_grad_(True)
            self.any_size = None
        return self

    def quantize(self, kind: Kind | None = None) -> "ElasticCausalLM":
        """The compressed layers' matrices in 4 bit (nf4, fp4) or 8 bit (int8). Default: as the size was counted, else nf4."""
        kind = kind_of(self.cut, kind) or "nf4"  # refuses more bits than the budget was counted in
        self.compress()
        quantize_in_place(cast(PreTrainedModel, self), kind)
        return self

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """An export of the present size. Once compressed, with a Trainer's arguments, the model's files only."""
        if self.any_size is not None:
            if args or kwargs.keys() - {"max_shard_size"}:
                raise ArtifactError("a model of every size is saved as an export, with max_shard_size alone: call compress() first.")
            return export(self.any_size, self.artifact, save_directory, max_shard_size=kwargs.get("max_shard_size", "5GB"))
        if args or kwargs.keys() - {"max_shard_size"} or getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if self.cut.bits is not None and cast(Any, self).config.acip["quantize"] is None:
            raise ArtifactError(f"this size was cut to fit in {self.cut.bits} bit: call quantize() before it is saved.")
        return write(cast(PreTrainedModel, self), self.cut, self.artifact, check_target(save_directory), **kwargs)

    def _own(self, any_size: ElasticModel) -> None:
        """The layers of `any_size` are in this model: from now on there is no other with them."""
        model = any_size.model = cast(Any, self)
        model.config.acip = {**model.config.acip, "quantize": None, "layers": {}}
        model.requires_grad_(False)
        self.any_size = any_size
        assert any_size.cut is not None
        self.cut = any_size.cut
