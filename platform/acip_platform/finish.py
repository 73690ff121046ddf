"""A stored artifact -> its measured curve, its run's pictures, and its registered version.

The curve is measured from what was saved, once: an artifact that has one keeps it.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from acip.artifact import Artifact
from acip.base import Base
from acip.cut import Budget
from acip.data import documents, token_windows
from acip.evaluate import trade_off
from acip.materialise import AnySize
from acip.peft_export import save_peft
from acip_platform import figures
from acip_platform.evaluate import measure_tasks
from acip_platform.fleet import Job
from acip_platform.settings import Settings
from acip_platform.store import Store
from acip_platform.tracking import CHAMPION, Registry, Run


def heldout_windows(job: Job, base: Base) -> torch.Tensor:
    """The text that `job`'s curve is measured on, [n, T] token ids."""
    context = min(job.eval_context, getattr(base.model.config, "max_position_embeddings", job.eval_context))
    return token_windows(documents(job.eval_data or job.data, "heldout"), base.tokenizer, context, job.eval_windows or None)


def finish(
    job: Job,
    uri: str,
    run: Run,
    settings: Settings,
    heldout: torch.Tensor,
    device: torch.device,
    say: Callable[..., None],
    fingerprint: str = "",
    alias: str = CHAMPION,
) -> dict[str, Any]:
    """Measure, show and register the artifact at `uri`, under `alias`. `fingerprint` is what identifies it ("" = the job's).

    Returns a summary: the URI, the version and the curve.
    """
    store = Store(settings.store, settings.home / "cache")
    artifact = Artifact.open(store.fetch(uri))
    any_size = artifact.load(device)
    if not artifact.curve:
        rows = []
        for row in trade_off(artifact, any_size, heldout, job.eval_data or job.data, job.sizes):
            rows.append(row)
            say("stage", text=f"size {row['asked']:.2f}: perplexity {row['perplexity']:.2f}")
        artifact = artifact.record_curve(rows)
        store.replace_manifest(uri, artifact.folder)
    _show(job, artifact, any_size, uri, run)
    registry = Registry(settings)
    version = registry.register(job.name, uri, run.run_id, {"fingerprint": fingerprint or job.fingerprint, "base": job.base})
    registry.set_alias(version, alias)
    artifact = measure_tasks(job, artifact, any_size, uri, run, settings, say)  # last, because a set that is missing undoes nothing
    return {"uri": uri, "version": version.version, "curve": artifact.curve, "stop_ratio": job.recipe.stop_ratio}


def _show(job: Job, artifact: Artifact, any_size: AnySize, uri: str, run: Run) -> None:
    """The run's pictures, curve, adapter and URI."""
    table = artifact.table()
    run.tags({"artifact_uri": uri, "base": job.base, "stop_step": str(artifact.manifest["stop_step"])})
    if run.last_step("tradeoff/perplexity") == 0:
        points = []
        for row in artifact.curve:
            values = {key: row[key] for key in ("perplexity", "loss", "params", "bytes", "got")}
            points.append((round(row["asked"] * 100), {f"tradeoff/{key}": float(value) for key, value in values.items()}))
        run.metrics(points)
    run.table({key: [row[key] for row in artifact.curve] for key in artifact.curve[0] if key != "evaluation"}, "tradeoff.json")
    run.figure(figures.curve(artifact, job.name), "tradeoff.png")
    run.figure(figures.score_map(table), "score_map.png")
    for size in (0.8, 0.6, 0.4):
        figure = figures.kept_ranks(table, size)
        if figure is not None:
            run.figure(figure, f"kept_ranks_{round(size * 100)}.png")
    if job.recipe.adapter_rank:
        with tempfile.TemporaryDirectory() as folder:
            cut = artifact.table().cut(Budget(job.recipe.stop_ratio, job.recipe.convention))
            save_peft(artifact, folder, cut, job.base)
            run.folder(Path(folder), f"adapter_at_{round(job.recipe.stop_ratio * 100)}")
