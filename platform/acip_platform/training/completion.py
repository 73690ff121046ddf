"""What was calibrated -> a stored artifact -> its measured curve, its run's pictures, and its registered version.

The curve is measured from what was saved, once: an artifact that has one keeps it.
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
from acip.base import Base
from acip.evaluate import DivergenceOn, Samples, Text, evaluate, trade_off
from acip.export.peft import save_peft
from acip.sizing.cut_table import Budget
from acip_platform.evaluation.measure import measure_tasks
from acip_platform.reporting import figures
from acip_platform.reporting.mask_samples import FILE, MaskSamples
from acip_platform.reporting.text_samples import side_by_side
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.storage.disk import StoreError, reason
from acip_platform.storage.store import Store
from acip_platform.tracking import run_descriptions
from acip_platform.tracking.promotion import promote_if_better
from acip_platform.tracking.registry import CHAMPION, Registry
from acip_platform.tracking.runs import Run


@dataclass(frozen=True)
class Heldout:
    """What a curve is measured on: a text, its windows no longer than the model reads, and their token ids."""

    text: Text
    windows: list[torch.Tensor]

    @classmethod
    def of(cls, job: Job, base: Base) -> "Heldout":
        context = min(job.eval_context, getattr(base.model.config, "max_position_embeddings", job.eval_context))
        text = dataclasses.replace(job.heldout, context=context)
        windows = text.tokens(base.tokenizer)
        text = dataclasses.replace(text.read_by(base.tokenizer), windows=len(windows))
        return cls(text, windows)  # the same, as jobs/evaluate.py asks for it


def stored(settings: Settings, key: str, save: Callable[[Path], Artifact]) -> str:
    """What `save` writes into a folder, moved into the store under `key`; its URI. Where that fails, nothing of it stays here."""
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="saving-", dir=settings.home, ignore_cleanup_errors=True) as folder:
            return Store.of(settings).put(save(Path(folder)).folder, key)
    except (OSError, SafetensorError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise StoreError(f"can't write the artifact to {settings.home}: {why}. Check the space there; checkpoints are kept.") from error


def finish(
    job: Job,
    uri: str,
    run: Run,
    settings: Settings,
    heldout: Heldout,
    device: torch.device,
    say: Callable[..., None],
    fingerprint: str = "",
    alias: str = CHAMPION,
) -> dict[str, Any]:
    """Measure, show and register the artifact at `uri`. `fingerprint` is what identifies it ("" = the job's).

    `alias` is the best that it may become: the champion, where its curve is better (acip_platform.tracking.promotion), or a candidate.
    Returns a summary: the URI, the version, what was decided about it, and the curve.
    """
    store = Store.of(settings)
    artifact = Artifact.open(store.fetch(uri))
    any_size = artifact.load(device)
    if not artifact.curve:
        text, tokenizer, count = heldout.text, artifact.tokenizer(), len(heldout.windows)

        def told(done: int) -> None:
            if done % max(1, count // 4) == 0:
                say("stage", text=f"{len(job.sizes)} sizes measured on {done} of {count} windows of {text.source}")

        rows = trade_off(
            any_size, heldout.windows, text.source, job.sizes, artifact.recipe.stop_ratio, text.protocol, DivergenceOn(text), told,
            text.start,
        )  # fmt: skip
        for row in rows:
            any_size.resize(Budget(ratio=row["asked"]))
            row["evaluation"] += evaluate(any_size, tokenizer, [Samples()])["evaluation"]
            say("stage", text=f"size {row['asked']:.2f}: perplexity {row['perplexity']:.2f}")
        artifact = store.record_curve(uri, artifact, rows)
    _show(job, artifact, uri, run)
    registry = Registry(settings)
    tags = {"fingerprint": fingerprint or job.fingerprint, **run_descriptions.choosing(job, artifact)}
    version = registry.register(
        job.name, uri, run.run_id, tags, run_descriptions.of_version(job, artifact, uri), run_descriptions.of_model(job)
    )
    verdict = promote_if_better(registry, store, version, artifact, alias == CHAMPION)
    run.tags({"version": f"{version.name} {version.version}", "verdict": str(verdict)})
    run.describe(run_descriptions.of_run(job, artifact, uri, f"Version {version.version} of {version.name}, {verdict}."))
    artifact = measure_tasks(job, artifact, any_size, uri, run, settings, say)  # last, because a set that is missing undoes nothing
    return {
        "uri": uri,
        "version": version.version,
        "verdict": str(verdict),
        "curve": artifact.curve,
        "stop_ratio": job.recipe.stop_ratio,
    }


def _show(job: Job, artifact: Artifact, uri: str, run: Run) -> None:
    """The run's pictures, curve, samples, adapter, provenance and URI."""
    table, manifest = artifact.table(), artifact.manifest
    run.tags({"artifact_uri": uri, "base": job.base, "stop_step": str(manifest["stop_step"])})
    if run.last_step("tradeoff/perplexity") == 0:
        run.metrics(run_descriptions.curve(artifact.curve))
    run.table({key: [row[key] for row in artifact.curve] for key in artifact.curve[0] if key != "evaluation"}, "tradeoff.json")
    if said := side_by_side(artifact.curve):
        run.table(said, "samples.json")
    run.json({key: manifest[key] for key in ("base", "recipe", "provenance", "stop_step", "steps")}, "provenance.json")
    run.figure(figures.curves({job.name: artifact.curve}), "tradeoff.png")
    run.figure(figures.score_map(table), "score_map.png")
    for size in (0.8, 0.6, 0.4):
        figure = figures.kept_ranks(table, size)
        if figure is not None:
            run.figure(figure, f"kept_ranks_{round(size * 100)}.png")
    if masks := run.read_json(FILE):
        run.figure(figures.mask_shrinkage(MaskSamples(**masks)), "masks.png")
    if job.recipe.adapter_rank:
        with tempfile.TemporaryDirectory() as folder:
            cut = table.cut(Budget(job.recipe.stop_ratio, job.recipe.convention))
            save_peft(artifact, folder, cut, job.base)
            run.folder(Path(folder), f"adapter_at_{round(job.recipe.stop_ratio * 100)}")
