"""One fine-tuning on one Ray Train worker: `tune_one` is what the worker does, from reading a version to registering its child.

    read one size -> measure -> attach adapters -> tune (checkpoints, resume) -> artifact -> curve -> registry

Needs no base model: an artifact holds what is trained on. The child is a version of its own of the same model, a candidate, whose
tags and manifest say what it comes from.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from acip.artifact.artifact import Artifact
from acip.base import Base
from acip.data import TokenBatches, documents, start_tokens, token_windows
from acip.evaluate import perplexity
from acip.finetune import attach, finetune, save, scores_of
from acip.recipe import Recipe
from acip.sizing.elastic_model import ElasticModel
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.storage.checkpoints import Checkpoints
from acip_platform.storage.store import Store
from acip_platform.tracking.provenance import provenance
from acip_platform.tracking.registry import CANDIDATE, ModelVersion, Registry
from acip_platform.tracking.runs import Run
from acip_platform.training.completion import Heldout, finish, stored
from acip_platform.training.worker import Observer, tried


def tuning_job(version: ModelVersion, artifact: Artifact, recipe: Recipe, changes: dict[str, Any]) -> Job:
    """The job of tuning `version` by a recipe of `acip.finetune.tuning`; text and evaluation are its calibration's but for `changes`."""
    known = artifact.manifest["provenance"].get("job", {})
    fields = {key: known[key] for key in ("data", "eval_context", "eval_windows", "eval_protocol") if key in known}
    fields["eval_data"] = known.get("eval_data") or known.get("data", "")
    sizes = tuple(sorted({*known.get("sizes", Job.sizes), recipe.stop_ratio}, reverse=True))
    return Job(version.name, artifact.manifest["base"]["source"], recipe, **{**fields, "sizes": sizes, **changes})


def fingerprint(job: Job, artifact: Artifact) -> str:
    """Hash of all that decides the result, the artifact it starts from among it. Its base model is not read, and may be gone."""
    job = replace(job, base=artifact.manifest["base"]["digest"])
    return hashlib.sha256(f"{job.fingerprint}{artifact.manifest['files']['factors.safetensors']['sha256']}".encode()).hexdigest()[:12]


def lineage(job: Job, version: ModelVersion) -> dict[str, str]:
    """Tags of the run and of the new version."""
    recipe = job.recipe
    facts = {"from": version.version, "at": f"{recipe.stop_ratio:g}", "data": job.data, "steps": recipe.post_tune_steps}
    facts |= {"quantize": recipe.quantize} if recipe.quantize != "none" else {}
    return {f"finetuned_{key}": str(value) for key, value in facts.items()}


def tune_one(config: dict[str, Any]) -> dict[str, Any]:
    """The worker's whole work. Returns a summary with the artifact's URI, the version, the curve, and what was measured before."""
    settings: Settings = config["settings"]
    job, version = Job.from_dict(config["job"]), ModelVersion(**config["version"])
    torch.set_num_threads(config["threads"])
    registry, store, run = Registry(settings), Store.of(settings), Run.of(settings, config["run"])
    key = f"{job.name}/{config['attempt']}"

    def say(kind: str, **facts: Any) -> None:
        config["inbox"].put.remote({"model": job.name, "kind": kind, **facts})

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parent = store.open(version.uri)
    size = job.recipe.stop_ratio
    say("stage", text=f"reading version {version.version} at size {size:g}")
    # a distillation needs the base model's own layers, too
    any_size = parent.load(device, None if job.recipe.distill_weight else size)
    any_size.resize(size)
    base = Base(any_size.model, parent.tokenizer(), **parent.manifest["base"])
    heldout = Heldout.of(job, base)
    if not store.exists(store.uri(key)):
        facts = {"version": version.version, "uri": version.uri} | _tuned(
            job, parent, any_size, base, heldout, run, settings, config["attempt"], say
        )
        origin = {**provenance(job), "attempt": key, "mlflow_run": run.run_id, "finetuned": facts, "parent": parent.manifest["provenance"]}
        uri = stored(settings, key, functools.partial(save, artifact=parent, any_size=any_size, provenance=origin))
        say("stage", text=f"artifact saved: {uri}")
    del any_size, base
    summary = finish(job, store.uri(key), run, settings, heldout, device, say, config["fingerprint"], CANDIDATE)
    registry.tag(registry.resolve(job.name, summary["version"]), lineage(job, version))
    facts = store.open(summary["uri"]).manifest["provenance"]["finetuned"]
    facts["perplexity"]["after"] = next(row["perplexity"] for row in summary["curve"] if row["asked"] == size)
    run.metrics([(job.recipe.post_tune_steps, {f"perplexity_{when}": value for when, value in facts["perplexity"].items()})])
    return {**summary, "stop_ratio": parent.recipe.stop_ratio, "finetuned": facts}


def _tuned(
    job: Job,
    parent: Artifact,
    any_size: ElasticModel,
    base: Base,
    heldout: Heldout,
    run: Run,
    settings: Settings,
    attempt: str,
    say: Callable[..., None],
) -> dict[str, Any]:
    """Train `any_size` in place, from the last checkpoint if there is one. Returns what is to be known of it."""
    recipe = job.recipe
    windows = _windows(job, parent, base.tokenizer)
    batches = TokenBatches(windows, recipe.batch_size, recipe.seed)
    measured = {"before": perplexity(any_size.model, heldout.windows).perplexity}
    attach(any_size, recipe)
    four_bit = recipe.quantize != "none"
    if four_bit:
        measured[f"before_{recipe.quantize}"] = perplexity(any_size.model, heldout.windows).perplexity
    said = ", ".join(f"{value:.2f} {when.replace('_', ' in ')}" for when, value in measured.items())
    say("stage", text=f"size {recipe.stop_ratio:g}: perplexity {said}")

    tried(any_size.model, batches, replace(recipe, prune_distill_weight=recipe.distill_weight), say)
    device = next(any_size.model.parameters()).device
    checkpoints = Checkpoints(settings, attempt, say)
    observer = Observer(job, run, say, device, checkpoints)
    with checkpoints.newest() as folder:
        if folder is not None:
            say("stage", text=f"going on from the last checkpoint, {folder.name}")
        finetune(any_size, scores_of(parent, device), batches, recipe, resume=folder, observe=observer)
    observer.catch_up()
    if four_bit:
        measured[f"after_{recipe.quantize}"] = perplexity(any_size.model, heldout.windows).perplexity
    chosen = {"size": recipe.stop_ratio, "steps": recipe.post_tune_steps, "lr": recipe.lr, "data": job.data, "seed": recipe.seed}
    return {**chosen, "quantize": recipe.quantize, "windows": len(windows), "perplexity": measured}


def _windows(job: Job, parent: Artifact, tokenizer: Any) -> torch.Tensor:
    """Text enough for one pass, if there is as much; what the calibration drew from comes first and is left out."""
    recipe, before, origin = job.recipe, parent.recipe, parent.manifest["provenance"]
    while "parent" in origin:  # it was tuned itself
        origin = origin["parent"]
    wanted = recipe.batch_size * recipe.gradient_accumulation_steps * recipe.post_tune_steps
    drawn = Job(job.name, job.base, before).windows if origin.get("job", {}).get("data") == job.data else 0
    start = len(start_tokens(tokenizer))  # of each window, those tokens are not the text's
    skipped = math.ceil(drawn * (before.seq_len - start) / (recipe.seq_len - start)) if recipe.seq_len > start else 0
    return token_windows(documents(job.data, "train"), tokenizer, recipe.seq_len, skipped + wanted)[-wanted:]
