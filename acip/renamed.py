"""Old names that keep working for one release, with a `FutureWarning` that gives the new name.

There is one table for each kind of name that appears in users' files and programs: recipe fields, environment variables,
command-line options, modules, and names inside modules. `acip` and `acip_platform` install a finder for their old modules
when they are imported.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

RECIPE_FIELDS = {
    "recompute": "gradient_checkpointing",
    "accumulate": "gradient_accumulation_steps",
    "reset": "dense_if_no_saving",
    "distill": "distill_weight",
    "distill_prune": "prune_distill_weight",
    "quantise": "quantize",
}
ENVIRONMENT = {"ACIP_STORE": "ACIP_ARTIFACT_URI", "ACIP_RUNS": "ACIP_CHECKPOINT_URI"}
OPTIONS = {
    "--back": "--rollback",
    "--whole": "--all-documents",
    "--recompute": "--gradient-checkpointing",
    "--distill": "--distill-weight",
    "--quantise": "--quantize",
    "--size any": "--all-sizes",  # an option and its value
}
MODULES: dict[str, str | tuple[str, ...]] = {  # a tuple where the old module was split
    "acip.area": "acip.sizing.excess_loss_area",
    "acip.baselines.factors": "acip.baselines.prefix_factors",
    "acip.bases": "acip.calibration.bases",
    "acip.basis_cache": "acip.calibration.basis_cache",
    "acip.budget": "acip.sizing.budget",
    "acip.calibrate": "acip.calibration.loop",
    "acip.card": "acip.export.card",
    "acip.cut": "acip.sizing.cut_table",
    "acip.evaluate.packaged": "acip.evaluate.packaged_tasks",
    "acip.evaluate.rows": "acip.evaluate.measurement",
    "acip.evaluate.text": "acip.evaluate.heldout_text",
    "acip.fit": "acip.calibration.memory_check",
    "acip.hub": "acip.export.hub",
    "acip.linear": ("acip.layers.elastic_linear", "acip.layers.svd_linear", "acip.layers.adapters", "acip.modeling_acip"),
    "acip.losses": "acip.calibration.losses",
    "acip.materialise": "acip.sizing.elastic_model",
    "acip.memory": "acip.calibration.memory_plan",
    "acip.mixed": "acip.layers.mixed_sizes",
    "acip.moments": "acip.calibration.activation_covariance",
    "acip.packed": "acip.layers.packing",
    "acip.parametrise": "acip.calibration.parametrize",
    "acip.peft_export": "acip.export.peft",
    "acip.published": "acip.artifact.published",
    "acip.quantise": "acip.export.quantization",
    "acip.read_back": "acip.artifact.read_back",
    "acip.reader": "acip.artifact.loading",
    "acip.rows": "acip.layers.directions",
    "acip.scores": "acip.sizing.score_map",
    "acip.shard": "acip.layers.sharding",
    "acip.sizes": "acip.sizing.model_sizes",
    "acip.source": "acip.artifact.byte_sources",
    "acip.state": "acip.calibration.state",
    "acip.tensors": "acip.artifact.safetensors_ranges",
    "acip.threads": "acip.utils.threads",
    "acip.trunk": "acip.calibration.shared_pruning",
    "acip_platform.arena": "acip_platform.evaluation.method_comparison",
    "acip_platform.arena_report": "acip_platform.evaluation.method_comparison_report",
    "acip_platform.champion": "acip_platform.tracking.promotion",
    "acip_platform.checkpoints": "acip_platform.storage.checkpoints",
    "acip_platform.console": "acip_platform.reporting.console",
    "acip_platform.disk": "acip_platform.storage.disk",
    "acip_platform.evaluate": "acip_platform.evaluation.measure",
    "acip_platform.figures": "acip_platform.reporting.figures",
    "acip_platform.finetune": "acip_platform.training.fine_tuning",
    "acip_platform.finish": "acip_platform.training.completion",
    "acip_platform.fleet": "acip_platform.scheduling.fleet",
    "acip_platform.inbox": "acip_platform.scheduling.events",
    "acip_platform.lease": "acip_platform.scheduling.leases",
    "acip_platform.masks": "acip_platform.reporting.mask_samples",
    "acip_platform.provenance": "acip_platform.tracking.provenance",
    "acip_platform.report": "acip_platform.reporting.report",
    "acip_platform.s3": "acip_platform.storage.s3",
    "acip_platform.samples": "acip_platform.reporting.text_samples",
    "acip_platform.schedule": "acip_platform.scheduling.job_queue",
    "acip_platform.serve.answers": "acip_platform.serve.http.answers",
    "acip_platform.serve.batch": "acip_platform.serve.engine.batch",
    "acip_platform.serve.body": "acip_platform.serve.http.body",
    "acip_platform.serve.download": "acip_platform.serve.http.download",
    "acip_platform.serve.edge": "acip_platform.serve.http.edge",
    "acip_platform.serve.errors": "acip_platform.serve.http.errors",
    "acip_platform.serve.exact": "acip_platform.serve.engine.exactness_check",
    "acip_platform.serve.grammar": "acip_platform.serve.text.grammar",
    "acip_platform.serve.keys": "acip_platform.serve.http.keys",
    "acip_platform.serve.logprobs": "acip_platform.serve.text.token_logprobs",
    "acip_platform.serve.messages": "acip_platform.serve.http.messages",
    "acip_platform.serve.metrics": "acip_platform.serve.http.metrics",
    "acip_platform.serve.models": "acip_platform.serve.engine.model_cache",
    "acip_platform.serve.prompt_logprobs": "acip_platform.serve.text.prompt_logprobs",
    "acip_platform.serve.recorded": "acip_platform.serve.recorded_samples",
    "acip_platform.serve.reference": "acip_platform.serve.http.api_reference",
    "acip_platform.serve.request": "acip_platform.serve.http.requests",
    "acip_platform.serve.routes": "acip_platform.serve.http.routes",
    "acip_platform.serve.sampling": "acip_platform.serve.engine.sampling",
    "acip_platform.serve.served": "acip_platform.serve.engine.resident_model",
    "acip_platform.serve.sizes": "acip_platform.serve.size_facts",
    "acip_platform.serve.slots": "acip_platform.serve.engine.kv_cache",
    "acip_platform.serve.stated": "acip_platform.serve.engine.generation_settings",
    "acip_platform.serve.structured": "acip_platform.serve.text.structured_output",
    "acip_platform.serve.token_bytes": "acip_platform.serve.text.token_bytes",
    "acip_platform.serve.tools": "acip_platform.serve.text.tools",
    "acip_platform.sources": "acip_platform.storage.inputs",
    "acip_platform.space": "acip_platform.training.sweep_space",
    "acip_platform.store": "acip_platform.storage.store",
    "acip_platform.story": "acip_platform.tracking.run_descriptions",
    "acip_platform.sweep": ("acip_platform.training.sweep", "acip_platform.training.sweep_worker"),
    "acip_platform.sweep_report": "acip_platform.training.sweep_report",
    "acip_platform.train": "acip_platform.training.worker",
}
NAMES: dict[str, dict[str, str]] = {  # new module -> {old name: new name}
    "acip.artifact.loading": {"Reader": "ModelLoader"},
    "acip.calibration.activation_covariance": {"moments": "activation_covariances", "moment_bytes": "covariance_matrix_bytes"},
    "acip.calibration.parametrize": {"parametrise": "parametrize"},
    "acip.calibration.shared_pruning": {"trunks": "shared_prunings"},
    "acip.export.folder": {"framed": "empty_model", "adopt": "move_modules", "free": "check_target", "sized": "compressed_model"},
    "acip.layers.directions": {"Rows": "DirectionMatrix", "FourBitRows": "FourBitDirectionMatrix"},
    "acip.modeling": {"AnySizeModel": "ElasticCausalLM", "through_transformers": "load_artifact", "_sized": "_compressed"},
    "acip.modeling_acip": {"door": "artifact_config", "SizedConfig": "CompressedConfig", "SizedModel": "CompressedModel"},
    "acip.sizing.elastic_model": {"AnySize": "ElasticModel"},
    "acip.sizing.excess_loss_area": {"area": "excess_loss_area"},
    "acip_platform.reporting.figures": {"Rows": "CurveRows"},
    "acip_platform.scheduling.events": {"Inbox": "EventQueue", "open_inbox": "open_event_queue", "here": "on_this_node"},
    "acip_platform.scheduling.job_queue": {"Line": "JobQueue", "Share": "Resources", "share": "resources_of"},
    "acip_platform.serve.engine.engine": {"Ticket": "ActiveRequest"},
    "acip_platform.serve.engine.generation_settings": {"Stated": "GenerationSettings"},
    "acip_platform.serve.engine.kv_cache": {"Slots": "KVCache", "Piece": "CachePiece"},
    "acip_platform.serve.engine.model_cache": {"Models": "ModelCache", "Place": "CacheEntry"},
    "acip_platform.serve.engine.resident_model": {"Served": "ResidentModel"},
    "acip_platform.serve.engine.sampling": {"Choice": "SampledToken", "choose": "sample"},
    "acip_platform.serve.http.requests": {"Sized": "ModelSizeRequest", "Asked": "OpenAIRequest"},
    "acip_platform.serve.size_facts": {"told": "size_facts"},
    "acip_platform.serve.text.structured_output": {"Form": "AnswerFormat", "Forms": "AnswerFormats"},
    "acip_platform.storage.checkpoints": {"Say": "Emit"},
    "acip_platform.tracking.promotion": {"contend": "promote_if_better", "judge": "compare", "Rows": "CurveRows"},
}
PACKAGES: dict[str, dict[str, tuple[str, str]]] = {  # modules that became packages: name -> the new module and the new name
    "acip_platform.serve.engine": {
        "Engine": ("acip_platform.serve.text_engine", "TextEngine"),
        "Event": ("acip_platform.serve.text.events", "TextEvent"),
        "Ticket": ("acip_platform.serve.text_engine", "TextRequest"),
    },
    "acip_platform.serve.text": {"Text": ("acip_platform.serve.text.detokenizer", "Detokenizer")},
}


def warn(kind: str, old: str, new: str, stacklevel: int = 3) -> None:
    """Issue a FutureWarning that `old` is now called `new`. `stacklevel` selects the caller that the warning shows."""
    warnings.warn(f"the {kind} {old} is now called {new}; the old name will stop working in the next release.", FutureWarning, stacklevel)


def recipe_field(name: str) -> str:
    """Return the current name of a recipe field, with a warning if `name` is an old one."""
    new = RECIPE_FIELDS.get(name)
    if new is None:
        return name
    warn("recipe field", name, new, stacklevel=4)
    return new


def environment(env: Mapping[str, str], name: str) -> str | None:
    """Return the variable `name` from `env`, or the variable with its old name and a warning. None if neither is set."""
    if env.get(name):
        return env[name]
    for old, new in ENVIRONMENT.items():
        if new == name and env.get(old):
            warn("environment variable", old, new, stacklevel=4)
            return env[old]
    return None


def name_of_package(package: str, name: str) -> Any:
    """Return what `name` stood for in a module that is now the package `package`, with a warning. It serves as its `__getattr__`."""
    if name not in PACKAGES.get(package, {}):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module, new = PACKAGES[package][name]
    warn("name", f"{package}.{name}", f"{module}.{new}", stacklevel=4)
    return getattr(importlib.import_module(module), new)


class OldModules:
    """A finder and loader for the moved modules of one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in MODULES and name.split(".", maxsplit=1)[0] == self.package:
            return importlib.util.spec_from_loader(name, self)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        entry = MODULES[module.__name__]
        targets = (entry,) if isinstance(entry, str) else entry
        warn("module", module.__name__, " and ".join(targets), stacklevel=6)
        moved = [importlib.import_module(target) for target in targets]

        def attribute(name: str) -> Any:
            for target in moved if not name.startswith("__") else ():
                new_name = NAMES.get(target.__name__, {}).get(name, name)
                if hasattr(target, new_name):
                    return getattr(target, new_name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = attribute  # type: ignore[method-assign]


def install(package: str) -> None:
    """Make the old modules of `package` importable. Existing modules take precedence."""
    if not any(isinstance(finder, OldModules) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.append(OldModules(package))
