"""The last steps of a job: store the artifact, measure its curve, log it to MLflow, and register its version.

    save -> stored -> measured curve -> figures of the run -> LoggedModels -> registered version -> champion or candidate -> tasks

The curve is measured from the stored artifact, once: an artifact that has a curve keeps it.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from acip.artifact.artifact import Artifact
from acip.base import Base, positions
from acip.calibration.memory_plan import STREAMED_HIDDEN
from acip.errors import DataError, EvaluationError
from acip.evaluate import CurveSetup, DivergenceOn, Samples, Text, evaluate, streamed_trade_off, trade_off
from acip.evaluate.domains import CHAT, CONTEXT, chat_windows, text_windows
from acip.evaluate.measurement import Subject
from acip.mixture import Mixture
from acip.sizing.budget import Budget
from acip.sizing.domains import domain_name
from acip.sizing.elastic_model import ElasticModel
from acip_platform.evaluation.measure import measure_tasks
from acip_platform.reporting import figures
from acip_platform.reporting.mask_samples import FILE, MaskSamples
from acip_platform.reporting.text_samples import side_by_side, size_label
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.storage.checkpoints import Emit
from acip_platform.storage.disk import StoreError, reason
from acip_platform.storage.store import Store
from acip_platform.tracking import logged_models, run_descriptions
from acip_platform.tracking.promotion import Verdict, promote_if_better
from acip_platform.tracking.registry import CHAMPION, ModelVersion, Registry
from acip_platform.tracking.runs import Run


@dataclass(frozen=True)
class Heldout:
    """The text that a curve is measured on, and its windows of token ids, none longer than the model's context.

    `domains` has the windows of the other domains by name. Those of conversations are added when a curve is measured.
    """

    text: Text
    windows: list[torch.Tensor]
    domains: dict[str, list[torch.Tensor]]

    @classmethod
    def of(cls, job: Job, base: Base) -> "Heldout":
        """Read the held-out text of `job` with the tokenizer of `base`, in the same windows as jobs/evaluate.py."""
        context = min(job.eval_context, positions(base.model.config) or job.eval_context)
        text = dataclasses.replace(job.heldout, context=context)
        windows = text.tokens(base.tokenizer)
        calibrated_on = (*Mixture.of(job.data).sources, text.source)
        domains = {
            domain_name(source): text_windows(source, base.tokenizer, min(CONTEXT, context), job.domain_windows, calibrated_on)
            for source in job.domains
            if source not in (CHAT, text.source)
        }
        return cls(dataclasses.replace(text.read_by(base.tokenizer), windows=len(windows)), windows, domains)

    def add_chat(self, job: Job, model: ElasticModel, tokenizer: Any, emit: Emit, streamed: bool) -> None:
        """Let the base model of `model` answer the prompts of the domain `chat`, or report why the domain is left out."""
        if CHAT not in job.domains or CHAT in self.domains:
            return
        try:
            if streamed:
                raise EvaluationError("the base model does not fit in memory, so it can't answer prompts.")
            emit("stage", text="the base model answers the prompts of the domain chat")
            subject = Subject(model.model, tokenizer, model)
            self.domains[CHAT] = chat_windows(subject, min(CONTEXT, self.text.context), job.domain_windows)
        except (DataError, EvaluationError) as error:
            emit("stage", text=f"domain {CHAT} is left out: {error}")


def stored(settings: Settings, key: str, save: Callable[[Path], Artifact]) -> str:
    """Let `save` write an artifact to a temporary folder, move it into the store under `key`, and return its URI.

    StoreError if that fails; no file stays on this machine then.
    """
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="saving-", dir=settings.home, ignore_cleanup_errors=True) as folder:
            return Store.of(settings).put(save(Path(folder)).folder, key)
    except (OSError, SafetensorError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise StoreError(f"can't write the artifact to {settings.home}: {why}. Free some space there; checkpoints are kept.") from error


def finish(
    job: Job,
    uri: str,
    run: Run,
    settings: Settings,
    heldout: Heldout,
    device: torch.device,
    emit: Emit,
    fingerprint: str = "",
    alias: str = CHAMPION,
    streamed: bool = False,
) -> dict[str, Any]:
    """Measure, log and register the artifact at `uri`; each step is skipped if an earlier attempt completed it.

    `fingerprint` identifies the result in the registry ("" = that of the job). `alias` is the highest that the version may get:
    the champion's, if its curve is better (acip_platform.tracking.promotion), or the candidate's. The curve of an artifact that does not
    fit in memory is `streamed`: measured with the weights of one block in memory, without text samples.
    Returns a summary: URI, version, verdict of the promotion, curve and stop ratio.
    """
    store = Store.of(settings)
    artifact = Artifact.open(store.fetch(uri))
    model = artifact.unloaded(device) if streamed else artifact.load(device)
    if not artifact.curve:
        artifact = store.record_curve(uri, artifact, measured_curve(job, artifact, model, heldout, emit, streamed))
    log_artifact(job, artifact, uri, run)
    model_id = logged_models.log_artifact(run, job.name, artifact, uri)
    registry = Registry(settings)
    version = registered_version(job, artifact, uri, run, registry, fingerprint, model_id)
    verdict = promote_if_better(registry, store, version, artifact, alias == CHAMPION)
    log_verdict(job, artifact, uri, run, version, verdict)
    artifact = measure_tasks(job, artifact, model, uri, run, settings, emit)  # last, because a missing task set must not undo the rest
    if job.tasks:
        logged_models.log_artifact(run, job.name, artifact, uri)
    return {
        "uri": uri,
        "version": version.version,
        "verdict": str(verdict),
        "curve": artifact.curve,
        "stop_ratio": job.recipe.stop_ratio,
    }


def measured_curve(
    job: Job, artifact: Artifact, model: ElasticModel, heldout: Heldout, emit: Emit, streamed: bool = False
) -> list[dict[str, Any]]:
    """Measure the loss, the divergence from the base model and text samples at each size of the job. See `finish` for `streamed`."""
    text, tokenizer = heldout.text, artifact.tokenizer()

    def add_samples(row: dict[str, Any]) -> None:
        row["evaluation"] += evaluate(model, tokenizer, [Samples()])["evaluation"]
        emit("stage", text=f"size {size_label(row)}: perplexity {row['perplexity']:.2f}")

    heldout.add_chat(job, model, tokenizer, emit, streamed)
    domains = heldout.domains if job.domains else None
    also = f", and on {', '.join(heldout.domains)}" if heldout.domains else ""
    emit("stage", text=f"measuring the curve on {len(heldout.windows)} windows of {text.source}{also}")
    sizes = [*map(Budget, job.sizes), *(Budget(size, "bytes") for size in job.byte_sizes if model.table.byte_sizes)]
    stop = artifact.recipe.stop_ratio
    setup = CurveSetup(heldout.windows, text.source, stop, text.protocol, text.start, DivergenceOn(text), domains)
    if not streamed:
        return trade_off(model, sizes, setup, add_samples)
    return streamed_trade_off(model, sizes, setup, STREAMED_HIDDEN, lambda done, total: emit("code", what="curve", done=done, total=total))


def registered_version(
    job: Job, artifact: Artifact, uri: str, run: Run, registry: Registry, fingerprint: str, model_id: str
) -> ModelVersion:
    """Register the artifact as a version of the model, with the tags and texts that help to choose between versions."""
    tags = {"fingerprint": fingerprint or job.fingerprint, **run_descriptions.choosing(job, artifact)}
    description = run_descriptions.of_version(job, artifact, uri)
    version = registry.register(job.name, uri, run.run_id, tags, description, run_descriptions.of_model(job), model_id)
    registry.link(version, model_id)
    return version


def log_artifact(job: Job, artifact: Artifact, uri: str, run: Run) -> None:
    """Log the artifact's URI, curve, samples, figures, provenance and adapter to the MLflow run."""
    table, manifest = artifact.table(), artifact.manifest
    run.tags({"artifact_uri": uri, "base": job.base, "stop_step": str(manifest["stop_step"])})
    if sampled := manifest["provenance"].get("sampled_text"):
        run.params({f"sampled_text.{key}": value for key, value in sampled.items()})
    if run.last_step("tradeoff/perplexity") == 0:
        run.metrics(run_descriptions.curve(artifact.curve))
    if samples := side_by_side(artifact.curve):
        run.table(samples, "samples.json")
    run.json({key: manifest[key] for key in ("base", "recipe", "provenance", "stop_step", "steps")}, "provenance.json")
    log_figures(job, artifact, run)
    if job.recipe.adapter_rank and job.recipe.code != "bits":
        from acip.export.peft import save_peft  # importing peft takes seconds

        with tempfile.TemporaryDirectory() as folder:
            cut = table.cut(Budget(job.recipe.stop_ratio, job.recipe.convention))
            save_peft(artifact, folder, cut, job.base)
            run.folder(Path(folder), f"adapter_at_{round(job.recipe.stop_ratio * 100)}")


def log_figures(job: Job, artifact: Artifact, run: Run) -> None:
    """Plot the curves, the scores, the kept ranks at some sizes, and the masks over the steps if they were sampled."""
    table = artifact.table()
    for name, figure in (
        ("tradeoff", figures.curves({job.name: artifact.curve})),
        ("perplexity_over_bytes", figures.curves({job.name: artifact.curve}, over="bytes")),
        ("kl_over_bytes", figures.curves({job.name: artifact.curve}, over="bytes", quantity="kl")),
        ("perplexity_over_flops", figures.curves({job.name: artifact.curve}, over="flops")),
        ("score_map", figures.score_map(table)),
    ):
        if figure is not None:
            run.figure(figure, f"{name}.png")
    for size in figures.KEPT_AT:
        figure = figures.kept_ranks(table, size)
        if figure is not None:
            run.figure(figure, f"kept_ranks_{round(size * 100)}.png")
    if masks := run.read_json(FILE):
        run.figure(figures.mask_shrinkage(MaskSamples(**masks)), "masks.png")


def log_verdict(job: Job, artifact: Artifact, uri: str, run: Run, version: ModelVersion, verdict: Verdict) -> None:
    """Log the registered version, and whether it became the champion, to the MLflow run."""
    run.tags({"version": f"{version.name} {version.version}", "verdict": str(verdict)})
    run.describe(run_descriptions.of_run(job, artifact, uri, f"Version {version.version} of {version.name}, {verdict}."))
