"""The text and tables on MLflow's pages of a run, a version, a registered model and a fleet, and the values logged with them."""

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

# fields of a curve's row that describe the size and the measurement; all other numbers are results
DESCRIPTIVE_FIELDS = (
    "asked", "got", "got_paper", "got_model", "convention", "params", "stderr", "corpus", "context", "windows", "extrapolated",
)  # fmt: skip
NAMES = {"loss": "loss_nats", "bytes": "stored_bytes"}
CELL_PADDING = "&emsp;"  # MLflow draws tables without space between the columns


def settings(job: Job) -> dict[str, Any]:
    """Return the run's parameters: everything in which two runs may differ."""
    return {
        "recipe": recipe_name(job), **job.recipe.to_dict(), "base": job.base, "data": job.data, "num_workers": job.num_workers,
        "eval_data": job.eval_data or job.data, "eval_context": job.eval_context, "eval_windows": job.eval_windows,
        "eval_protocol": job.eval_protocol,
    }  # fmt: skip


def recipe_name(job: Job) -> str:
    """Return the name of the nearest recipe and the changes to it: `demo with lr 0.003`."""
    name, changes = nearest(job.recipe)
    return name + (" with " if changes else "") + ", ".join(f"{key} {value}" for key, value in changes.items())


def measured(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the results in a row of the curve as metrics."""
    values = {key: value for key, value in row.items() if key not in DESCRIPTIVE_FIELDS and isinstance(value, int | float)}
    return {f"tradeoff/{NAMES.get(key, key)}": float(value) for key, value in values.items()}


def curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """Return a model's curve as metrics of its run: (size in percent, metrics)."""
    return [(round(row["asked"] * 100), measured(row) | metrics({"evaluation": [], **row})) for row in rows]


def choosing(job: Job, artifact: Artifact) -> dict[str, str]:
    """Return the tags by which a person chooses a version. `ppl_60` is the perplexity at size 0.6; MLflow's columns are narrow."""
    quality = {f"ppl_{round(row['asked'] * 100)}": f"{row['perplexity']:.4g}" for row in artifact.curve if math.isfinite(row["perplexity"])}
    origin, warnings = artifact.manifest["provenance"], improbable(artifact.curve)
    return {
        **quality, **({"curve_warning": " ".join(warnings)} if warnings else {}),
        "area": _area(artifact.curve), "base": job.base, "recipe": recipe_name(job), "stop_ratio": str(job.recipe.stop_ratio),
        "steps": str(artifact.manifest["steps"]), "data": job.data, "measured_on": job.eval_data or job.data,
        "commit": str(origin.get("commit", "unknown")),
    }  # fmt: skip


def of_model(job: Job) -> str:
    """Return the description of a registered model."""
    return (
        f"{shown(job.base)} at any size. Each version is the result of one calibration: a folder from which every size can be read. The "
        "`champion` is served. A `candidate` was not better than the champion, or not comparable with it. Choose a version by its tags: "
        "`ppl_60` is the perplexity at size 0.6, and so on; `area` is the area under the excess loss (nats per token) over all sizes, and "
        f"less is better. `python jobs/promote.py {job.name} VERSION` makes a version the champion; `--rollback` restores the previous one."
    )


def of_version(job: Job, artifact: Artifact, uri: str) -> str:
    """Return the description of a version."""
    return "\n\n".join([*_summary(job, artifact), _table(artifact.curve), *improbable(artifact.curve), f"Artifact: `{uri}`"])


def of_run(job: Job, artifact: Artifact, uri: str, outcome: str) -> str:
    """Return the description of a run: its settings, its outcome, the curve, and the list of the files in it."""
    masks = ", `masks.png` (masks during L1 pruning)" if job.recipe.prunes else ""
    return "\n\n".join([
        outcome, *_summary(job, artifact), _table(artifact.curve), *improbable(artifact.curve), f"Artifact: `{uri}`",
        f"**Model metrics**. {AXES}",
        "**Artifacts**: `samples.json` "
        "(text generated at each size), `tradeoff.png`, `score_map.png`, `kept_ranks_*.png`" + masks + ", the adapter for PEFT, "
        "`provenance.json`.",
    ])  # fmt: skip


def excess(name: str, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """Return one model's curve as metrics of the fleet's run: (size in percent, excess loss). Empty if size 1.0 was not measured."""
    base = next((row["loss"] for row in rows if row["got"] == 1.0), None)
    return [] if base is None else [(round(row["asked"] * 100), {f"excess_loss_nats/{name}": row["loss"] - base}) for row in rows]


def of_fleet(outcomes: Sequence[Outcome]) -> str:
    """Return the description of a fleet's run: the outcome of each model."""
    lines = ["| model | outcome | area | recipe |", "|:--|:--|:--|:--|"]
    for outcome in outcomes:
        job, summary = outcome.job, outcome.summary
        result = f"FAILED: {outcome.error}" if summary is None else f"version {summary['version']}, {summary['verdict']}"
        area = "" if summary is None else _area(summary["curve"])
        cells = (cell.replace("|", "/").replace("\n", " ") for cell in (job.name, result, area, recipe_name(job)))
        lines.append(f"| {' | '.join(cell + CELL_PADDING for cell in cells)} |")
    legend = "area: the area under the excess loss (nats per token) over all sizes; less is better. The runs of the models are child runs."
    return "\n\n".join(["\n".join(lines), legend, AXES])


def _area(rows: Sequence[Mapping[str, Any]]) -> str:
    if len(rows) == 1:
        return "unknown: one size"
    return f"{excess_loss_area(rows):.5g}" if any(row["got"] == 1.0 for row in rows) else "unknown: no size 1.0"


def _summary(job: Job, artifact: Artifact) -> list[str]:
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
        lines.append(f"| {' | '.join(cell + CELL_PADDING for cell in cells)} |")
    cut = f"{first['windows']} windows of {first['context']} tokens ({cut_by(first)})"
    return "\n".join(lines) + f"\n\nPerplexity on {first['corpus']}, held out, {cut}."
