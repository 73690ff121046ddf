"""Fine-tune a registered version at one size on a Ray Train worker: `tune_one` is all work of the worker.

    read one size -> measure -> attach adapters -> train (checkpoints, resume) -> artifact -> curve -> registry

The base model is not needed, because the artifact holds the weights that are trained. The result is a new version of the same
model, a candidate. Its tags and its manifest name the version that it comes from.
"""

import functools
import hashlib
import math
from dataclasses import replace
from typing import Any

import torch

from acip.artifact.artifact import Artifact
from acip.base import Base
from acip.data import SELF, TokenBatches, start_tokens
from acip.errors import DataError
from acip.evaluate import perplexity
from acip.finetune import attach, finetune, save, scores_of
from acip.mixture import Mixture
from acip.recipe import Recipe
from acip.sizing.budget import Budget, is_coded
from acip.sizing.elastic_model import ElasticModel
from acip_platform.scheduling.fleet import Job, heldout_source
from acip_platform.settings import Settings
from acip_platform.storage import base_models
from acip_platform.storage.checkpoints import Checkpoints, Emit
from acip_platform.storage.store import Store
from acip_platform.tracking.provenance import provenance
from acip_platform.tracking.registry import CANDIDATE, ModelVersion, Registry
from acip_platform.tracking.runs import Run
from acip_platform.training.calibration_text import CalibrationText, TextReader, mixed
from acip_platform.training.completion import Heldout, finish, stored
from acip_platform.training.worker import Observer, run_trial_step


def tuning_job(version: ModelVersion, artifact: Artifact, recipe: Recipe, changes: dict[str, Any]) -> Job:
    """Return the job of fine-tuning `version`. Text and evaluation are those of its calibration, except for `changes`."""
    calibration = artifact.manifest["provenance"].get("job", {})
    fields = {
        key: calibration[key] for key in ("data", "eval_context", "eval_windows", "eval_protocol", "domain_windows") if key in calibration
    }
    fields["domains"] = tuple(calibration.get("domains", Job.domains))
    fields["byte_sizes"] = tuple(calibration.get("byte_sizes", Job.byte_sizes))
    fields["eval_data"] = calibration.get("eval_data", "")
    if "data" in fields:
        fields["data"] = Mixture.of(fields["data"]).data
        fields["eval_data"] = fields["eval_data"] or heldout_source(fields["data"])
    sizes = tuple(sorted({*calibration.get("sizes", Job.sizes), recipe.stop_ratio}, reverse=True))
    return Job(version.name, artifact.manifest["base"]["source"], recipe, **{**fields, "sizes": sizes, **changes})


def fingerprint(job: Job, artifact: Artifact) -> str:
    """Return a hash of all that decides the result, including the artifact it starts from. The base model is not read."""
    job = replace(job, base=artifact.manifest["base"]["digest"])
    return hashlib.sha256(f"{job.fingerprint}{artifact.manifest['files']['factors.safetensors']['sha256']}".encode()).hexdigest()[:12]


def lineage(job: Job, version: ModelVersion) -> dict[str, str]:
    """Return the tags of the run and of the new version."""
    recipe = job.recipe
    facts = {"from": version.version, "at": f"{recipe.stop_ratio:g}", "data": job.data, "steps": recipe.post_tune_steps}
    facts |= {"quantize": recipe.quantize} if recipe.quantize != "none" else {}
    return {f"finetuned_{key}": str(value) for key, value in facts.items()}


def tune_one(config: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune, store, measure and register one version: all work of a worker. Returns the summary of `finish` and the perplexities."""
    settings: Settings = config["settings"]
    job, version = Job.from_dict(config["job"]), ModelVersion(**config["version"])
    torch.set_num_threads(config["threads"])
    registry, store, run = Registry(settings), Store.of(settings), Run.of(settings, config["run"])
    key = f"{job.name}/{config['attempt']}"

    def emit(kind: str, **facts: Any) -> None:
        config["events"].put.remote({"model": job.name, "kind": kind, **facts})

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parent = store.open(version.uri)
    size = job.recipe.stop_ratio
    text = None if store.exists(store.uri(key)) else _text(job, parent, settings, emit, device)  # before the model takes memory
    emit("stage", text=f"reading version {version.version} at size {size:g}")
    # distillation also needs the dense layers of the base model
    budget = Budget(size, "linear")
    any_size = parent.load(device, None if job.recipe.distill_weight else budget)
    any_size.resize(budget)
    base = Base(any_size.model, parent.tokenizer(), **parent.manifest["base"])
    heldout = Heldout.of(job, base)
    if text is not None:
        facts = {"version": version.version, "uri": version.uri} | _tune(
            job, parent, any_size, text.windows, heldout, run, settings, config["attempt"], emit, config["events"]
        )
        origin = provenance(job) | text.provenance | {"attempt": key, "mlflow_run": run.run_id, "finetuned": facts}
        origin["parent"] = parent.manifest["provenance"]
        uri = stored(settings, key, functools.partial(save, artifact=parent, any_size=any_size, provenance=origin))
        emit("stage", text=f"artifact saved: {uri}")
    del any_size, base
    summary = finish(job, store.uri(key), run, settings, heldout, device, emit, config["fingerprint"], CANDIDATE)
    registry.tag(registry.resolve(job.name, summary["version"]), lineage(job, version))
    facts = store.open(summary["uri"]).manifest["provenance"]["finetuned"]
    facts["perplexity"]["after"] = next(row["perplexity"] for row in summary["curve"] if row["asked"] == size and not is_coded(row))
    run.metrics([(job.recipe.post_tune_steps, {f"perplexity_{when}": value for when, value in facts["perplexity"].items()})])
    return {**summary, "stop_ratio": parent.recipe.stop_ratio, "finetuned": facts}


def _tune(
    job: Job,
    parent: Artifact,
    any_size: ElasticModel,
    windows: torch.Tensor,
    heldout: Heldout,
    run: Run,
    settings: Settings,
    attempt: str,
    emit: Emit,
    events: Any,
) -> dict[str, Any]:
    """Train `any_size` in place, from the last checkpoint if there is one. Returns the settings and the measured perplexities."""
    recipe = job.recipe
    batches = TokenBatches(windows, recipe.batch_size, recipe.seed)
    measured = {"before": perplexity(any_size.model, heldout.windows).perplexity}
    attach(any_size, recipe)
    four_bit = recipe.quantize != "none"
    if four_bit:
        measured[f"before_{recipe.quantize}"] = perplexity(any_size.model, heldout.windows).perplexity
    perplexities = ", ".join(f"{value:.2f} {when.replace('_', ' in ')}" for when, value in measured.items())
    emit("stage", text=f"size {recipe.stop_ratio:g}: perplexity {perplexities}")

    run_trial_step(any_size.model, batches, replace(recipe, prune_distill_weight=recipe.distill_weight), emit)
    device = next(any_size.model.parameters()).device
    checkpoints = Checkpoints(settings, attempt, emit)
    observer = Observer(job, run, emit, device, checkpoints, events)
    with checkpoints.newest() as folder:
        if folder is not None:
            emit("stage", text=f"resuming from checkpoint {folder.name}")
        finetune(any_size, scores_of(parent, device), batches, recipe, resume=folder, observe=observer)
    observer.catch_up()
    if four_bit:
        measured[f"after_{recipe.quantize}"] = perplexity(any_size.model, heldout.windows).perplexity
    return {
        "size": recipe.stop_ratio, "steps": recipe.post_tune_steps, "lr": recipe.lr, "data": Mixture.of(job.data).to_json(),
        "seed": recipe.seed, "quantize": recipe.quantize, "windows": len(windows), "perplexity": measured,
    }  # fmt: skip


def _text(job: Job, parent: Artifact, settings: Settings, emit: Emit, device: torch.device) -> CalibrationText:
    """Return the text of a fine-tuning. The base model is loaded only if text of the source `self` has to be sampled from it."""

    def base_model() -> Any:
        emit("stage", text=f"loading {job.base} to sample text from it")
        base = base_models.load(job.base, parent.recipe.dtype, job.trust_remote_code, Store.of(settings).cache)
        if base.digest != parent.manifest["base"]["digest"]:
            raise DataError(
                f"{job.base} is not the base model of {job.name}, so no text can be sampled from it. Use another source as data."
            )
        return torch.nn.Module.to(base.model, device)

    digest = parent.manifest["base"]["digest"]
    reader = TextReader(digest, parent.tokenizer(), job.recipe.seq_len, job.recipe.seed, settings, emit, functools.cache(base_model))
    return CalibrationText(_windows(job, parent, reader), reader.sampled)


def _windows(job: Job, parent: Artifact, reader: TextReader) -> torch.Tensor:
    """Return windows for one pass over the steps, as far as the text reaches. The windows of the calibration come first and are skipped."""
    recipe, calibrated, origin = job.recipe, parent.recipe, parent.manifest["provenance"]
    while "parent" in origin:  # the parent was fine-tuned itself
        origin = origin["parent"]
    counts = Mixture.of(job.data).counts(recipe.batch_size * recipe.gradient_accumulation_steps * recipe.post_tune_steps)
    data = origin.get("job", {}).get("data")
    drawn = Mixture.of(data).counts(Job(job.name, job.base, calibrated).windows) if data else {}
    if (calibrated.seed, calibrated.seq_len) != (recipe.seed, recipe.seq_len):
        drawn.pop(SELF, None)  # another text is sampled
    start = len(start_tokens(reader.tokenizer))  # tokens of each window that are not from the text
    parts = {}
    for source, wanted in counts.items():
        text_tokens = drawn.get(source, 0) * (calibrated.seq_len - start)
        skipped = math.ceil(text_tokens / (recipe.seq_len - start)) if recipe.seq_len > start else 0
        parts[source] = reader.windows(source, skipped + wanted)[-wanted:]
    return mixed(parts, counts, reader.emit)
