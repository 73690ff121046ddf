"""What MLflow says of a calibration in words and tables, to someone who was not there: a run, a version, a model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from acip.artifact.artifact import Artifact
from acip.evaluate import improbable, metrics
from acip.evaluate.heldout_text import cut_by
from acip.export.card import shown
from acip.recipe import nearest
from acip.sizing.excess_loss_area import excess_loss_area
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Outcome
from acip_platform.tracking.runs import AXES

# of a curve's row: what it is and what that follows from, not what it is worth
SIZE = ("asked", "got", "got_paper", "got_model", "convention", "params", "stderr", "corpus", "context", "windows", "extrapolated")
NAMES = {"loss": "loss_nats", "bytes": "stored_bytes"}
WIDE = "&emsp;"  # MLflow draws tables without space between their columns


def settings(job: Job) -> dict[str, Any]:
    """The run's parameters: everything in which two runs may differ."""
    return {
        "recipe": recipe_name(job), **job.recipe.to_dict(), "base": job.base, "data": job.data, "num_workers": job.num_workers,
        "eval_data": job.eval_data or job.data, "eval_context": job.eval_context, "eval_windows": job.eval_windows,
        "eval_protocol": job.eval_protocol,
    }  # fmt: skip


def recipe_name(job: Job) -> str:
    """The recipe by its name and what was changed: `demo with lr 0.003`."""
    name, changes = nearest(job.recipe)
    return name + (" with " if changes else "") + ", ".join(f"{key} {value}" for key, value in changes.items())


def measured(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of the curve as metrics over size."""
    values = {key: value for key, value in row.items() if key not in SIZE and isinstance(value, int | float)}
    return {f"tradeoff/{NAMES.get(key, key)}": float(value) for key, value in values.items()}


def curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """A model's curve as metrics of its run, over size in percent."""
    return [(round(row["asked"] * 100), measured(row) | metrics({"evaluation": [], **row})) for row in rows]


def choosing(job: Job, artifact: Artifact) -> dict[str, str]:
    """The tags of a version: what a person chooses by. `ppl_60` is the perplexity at size 0.6: MLflow shows few letters."""
    quality = {f"ppl_{round(row['asked'] * 100)}": f"{row['perplexity']:.4g}" for row in artifact.curve if math.isfinite(row["perplexity"])}
    origin, warnings = artifact.manifest["provenance"], improbable(artifact.curve)
    return {
        **quality, **({"curve_warning": " ".join(warnings)} if warnings else {}),
        "area": _area(artifact.curve), "base": job.base, "recipe": recipe_name(job), "stop_ratio": str(job.recipe.stop_ratio),
        "steps": str(artifact.manifest["steps"]), "data": job.data, "measured_on": job.eval_data or job.data,
        "commit": str(origin.get("commit", "unknown")),
    }  # fmt: skip


def of_model(job: Job) -> str:
    """A registered model's description."""
    return (
        f"{shown(job.base)} at any size. Each version is one calibration, a folder from which every size is read; `champion` is what is "
        "served, `candidate` was not better, or not comparable. The tags of a version are what to choose by: `ppl_60`, the perplexity at "
        "size 0.6, and so on; `excess_loss_area`, the excess loss (nats per token) over all sizes in one number, less is better. "
        f"`python jobs/promote.py {job.name} VERSION` makes a version the champion, `--rollback` takes the last change back."
    )


def of_version(job: Job, artifact: Artifact, uri: str) -> str:
    return "\n\n".join([*_what(job, artifact), _table(artifact.curve), *improbable(artifact.curve), f"Artifact: `{uri}`"])


def of_run(job: Job, artifact: Artifact, uri: str, outcome: str) -> str:
    """A run's description: what was done, what came out, where it is, where to look."""
    masks = ", `masks.png` (masks while L1 shrinks them)" if job.recipe.prunes else ""
    return "\n\n".join([
        outcome, *_what(job, artifact), _table(artifact.curve), *improbable(artifact.curve), f"Artifact: `{uri}`",
        f"**Model metrics**. {AXES}",
        "**Artifacts**: `samples.json` "
        "(what it says at each size), `tradeoff.png`, `score_map.png`, `kept_ranks_*.png`" + masks + ", the adapter for PEFT, "
        "`provenance.json`.",
    ])  # fmt: skip


def excess(name: str, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """The curve of one model of a fleet as metrics of the fleet's run, over size in percent; nothing where no base was measured."""
    base = next((row["loss"] for row in rows if row["got"] == 1.0), None)
    return [] if base is None else [(round(row["asked"] * 100), {f"excess_loss_nats/{name}": row["loss"] - base}) for row in rows]


def of_fleet(outcomes: Sequence[Outcome]) -> str:
    """A fleet run's description: each model's outcome."""
    lines = ["| model | outcome | area | recipe |", "|:--|:--|:--|:--|"]
    for outcome in outcomes:
        job, summary = outcome.job, outcome.summary
        said = f"FAILED: {outcome.error}" if summary is None else f"version {summary['version']}, {summary['verdict']}"
        whole = "" if summary is None else _area(summary["curve"])
        cells = (cell.replace("|", "/").replace("\n", " ") for cell in (job.name, said, whole, recipe_name(job)))
        lines.append(f"| {' | '.join(cell + WIDE for cell in cells)} |")
    area_is = "area: excess loss (nats per token) over all sizes; less is better. The models' runs are inside this one."
    return "\n\n".join(["\n".join(lines), area_is, AXES])


def _area(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{excess_loss_area(rows):.5g}" if any(row["got"] == 1.0 for row in rows) else "unknown: no size 1.0"


def _what(job: Job, artifact: Artifact) -> list[str]:
    recipe, steps = job.recipe, artifact.manifest["steps"]
    tokens = recipe.batch_size * recipe.gradient_accumulation_steps * recipe.seq_len
    origin = artifact.manifest["provenance"]
    return [
        f"{shown(job.base)}, calibrated for every size down to {recipe.stop_ratio} ({recipe.convention}) in {steps} steps of "
        f"{tokens:,} tokens of {job.data}. Recipe: {recipe_name(job)}. "
        f"Code: {origin.get('commit', 'unknown')}, on {origin.get('device', 'unknown')}."
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    lines = ["| asked | got | parameters | MB | perplexity | |", "|:--|:--|:--|:--|:--|:--|"]
    for row in rows:
        error = row["perplexity"] * row["stderr"]
        below = "below the stop ratio" if row["extrapolated"] else ""
        quality = f"{row['perplexity']:.2f} ± {error:.2f}"
        cells = (f"{row['asked']:.2f}", f"{row['got']:.4f}", f"{row['params']:,}", f"{row['bytes'] / 1e6:.1f}", quality, below)
        lines.append(f"| {' | '.join(cell + WIDE for cell in cells)} |")
    cut = f"{first['windows']} windows of {first['context']} tokens ({cut_by(first)})"
    return "\n".join(lines) + f"\n\nPerplexity on {first['corpus']}, held out, {cut}."
