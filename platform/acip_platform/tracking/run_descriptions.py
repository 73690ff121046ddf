"""The text and tables on MLflow's pages of a run, a version, a registered model and a fleet, and the values logged with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from acip.artifact.artifact import Artifact
from acip.errors import BudgetError
from acip.evaluate import divergence_of, improbable
from acip.evaluate.heldout_text import cut_by
from acip.export.card import shown
from acip.recipe import nearest
from acip.sizing.budget import MEGA, Budget, is_coded
from acip.sizing.domains import DOMAINS, worst_domain
from acip.sizing.excess_loss_area import excess_loss_area
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Outcome
from acip_platform.tracking.runs import AXES, at_size

# fields of a curve's row that describe the size and the measurement; all other numbers are results
DESCRIPTIVE_FIELDS = (
    "asked", "got", "got_paper", "got_model", "convention", "params", "stderr", "corpus", "context", "windows", "extrapolated",
)  # fmt: skip
NAMES = {"loss": "loss_nats", "bytes": "stored_bytes", "flops": "flops_per_token"}
DOMAIN_METRICS = {"kl_nats": "kl_nats", "same_top_share": "same_top_share", "ppl": "perplexity"}
CLOSE_KL = 0.05  # nats per token; with less, a model is called close to its base model
CELL_PADDING = "&emsp;"  # MLflow draws tables without space between the columns


def settings(job: Job) -> dict[str, Any]:
    """Return the run's parameters: everything in which two runs may differ."""
    return {
        "recipe": recipe_name(job), **job.recipe.to_dict(), "base": job.base, "data": job.data, "num_workers": job.num_workers,
        "eval_data": job.heldout.source, "eval_context": job.eval_context, "eval_windows": job.eval_windows,
        "eval_protocol": job.eval_protocol, "domains": ", ".join(job.domains), "domain_windows": job.domain_windows,
    }  # fmt: skip


def recipe_name(job: Job) -> str:
    """Return the name of the nearest recipe and the changes to it: `demo with lr 0.003`."""
    name, changes = nearest(job.recipe)
    return name + (" with " if changes else "") + ", ".join(f"{key} {value}" for key, value in changes.items())


def measured(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the results in a row of the curve as metrics."""
    values = {key: value for key, value in row.items() if key not in DESCRIPTIVE_FIELDS and isinstance(value, int | float)}
    values |= {"kl_nats": divergence["kl_nats"]} if (divergence := divergence_of(row)) else {}
    return {f"tradeoff/{NAMES.get(key, key)}": float(value) for key, value in values.items()}


def on_domains(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the results on the domains of a row as metrics, which the pages of MLflow group by quantity: `kl_nats/code`.

    `kl_nats/worst_domain` and `kl_nats/mean_of_domains` are over all domains.
    """
    domains = row.get(DOMAINS, {})
    values = {f"{key}/{name}": each[field] for name, each in domains.items() for field, key in DOMAIN_METRICS.items() if field in each}
    if worst := worst_domain(row):
        values |= {"kl_nats/worst_domain": worst.kl, "kl_nats/mean_of_domains": worst.mean_kl}
    return {key: float(value) for key, value in values.items() if value is not None}


def curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """Return a model's curve as metrics of its run: (size in percent, or in thousandths of the bytes, metrics)."""
    return [at_size(row, measured(row) | on_domains(row)) for row in rows]


def choosing(job: Job, artifact: Artifact) -> dict[str, str]:
    """Return the tags by which a person chooses a version. The quality of its sizes is in its LoggedModels."""
    origin, warnings, close = artifact.manifest["provenance"], improbable(artifact.curve), close_to_base(artifact)
    return {
        **({"curve_warning": " ".join(warnings)} if warnings else {}),
        **({"close_to_base": close} if close else {}),
        "area": _area(artifact.curve), "base": job.base, "recipe": recipe_name(job), "stop_ratio": str(job.recipe.stop_ratio),
        "steps": str(artifact.manifest["steps"]), "data": str(job.data), "measured_on": job.heldout.source,
        "commit": str(origin.get("commit", "unknown")),
    }  # fmt: skip


def close_to_base(artifact: Artifact) -> str:
    """Return the smallest size whose KL divergence is at most `CLOSE_KL` by the measured curve, with its bytes; "" if there is none."""
    try:
        cut = artifact.table().cut(Budget(max_kl=CLOSE_KL))
    except BudgetError:
        return ""
    share = f"{cut.sizes['bytes']:.3f} of the bytes" if cut.versions is not None else f"size {cut.sizes['linear']:.3f}"
    return f"{share}, {(cut.bytes or 0) / MEGA:.1f} MB"


def of_model(job: Job) -> str:
    """Return the description of a registered model."""
    return (
        f"{shown(job.base)} at any size. Each version is the result of one calibration: a folder from which every size can be read. The "
        "`champion` is served. A `candidate` was not better than the champion, or not comparable with it. Choose a version by the sizes of "
        "its source model (the Models tab of the experiment), or by its tags: `close_to_base` is the "
        f"smallest size with a KL divergence of at most {CLOSE_KL} nats per token; `area` is the area under the excess loss (nats per "
        f"token) over all sizes, and less is better. `python jobs/promote.py {job.name} VERSION` makes a version the champion; "
        "`--rollback` restores the previous one."
    )


def of_version(job: Job, artifact: Artifact, uri: str) -> str:
    """Return the description of a version."""
    return "\n\n".join([*_about(job, artifact), f"Artifact: `{uri}`"])


def _about(job: Job, artifact: Artifact) -> list[str]:
    """Return the paragraphs on the calibration, its smallest good size and its curve."""
    close = close_to_base(artifact)
    smallest = [f"Smallest size with a KL divergence of at most {CLOSE_KL} nats per token: **{close}**."] if close else []
    return [*_summary(job, artifact), *smallest, *_tables(artifact.curve), *improbable(artifact.curve)]


def of_run(job: Job, artifact: Artifact, uri: str, outcome: str) -> str:
    """Return the description of a run: its settings, its outcome, the curve, and the list of the files in it."""
    masks = ", `masks.png` (masks during L1 pruning)" if job.recipe.prunes else ""
    return "\n\n".join([
        outcome, *_about(job, artifact), f"Artifact: `{uri}`",
        f"**Model metrics**. {AXES}",
        "**Artifacts**: `samples.json` "
        "(text generated at each size), `tradeoff.png`, `perplexity_over_flops.png`, with coded sizes "
        "`perplexity_over_bytes.png` and `kl_over_bytes.png`, `score_map.png`, `kept_ranks_*.png`" + masks + ", the adapter for PEFT, "
        "`provenance.json`.",
    ])  # fmt: skip


def excess(name: str, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """Return one model's curve as metrics of the fleet's run, excess losses (`at_size`). Empty if size 1.0 was not measured."""
    base = next((row["loss"] for row in rows if row["got"] == 1.0), None)
    return [] if base is None else [at_size(row, {f"excess_loss_nats/{name}": row["loss"] - base}) for row in rows]


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
    calibrated = f"calibrated for every size down to {recipe.stop_ratio} ({recipe.convention}) in {steps} steps of {tokens:,} tokens"
    coded = f"coded for any number of bytes with the statistics of {recipe.sample_windows * recipe.seq_len:,} tokens"
    done = {"ranks": [calibrated], "bits": [coded], "both": [coded, calibrated]}[recipe.code]
    return [
        f"{shown(job.base)}, {' and '.join(done)} of {job.data}. Recipe: {recipe_name(job)}. "
        f"Code: {origin.get('commit', 'unknown')}, on {origin.get('device', 'unknown')}."
    ]


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the curve as tables: coded sizes over bytes, if there are any, then sizes of ranks."""
    first = rows[0]
    coded, over_ranks = ([row for row in rows if is_coded(row) is kind] for kind in (True, False))
    tables = []
    if coded:
        in_bytes = [(f"{row['asked']:.3g}", f"{row['got']:.4f}", f"{row['bits_per_weight']:.2f}", *_quality(row)) for row in coded]
        tables.append(_table(("of the bytes", "got", "bits per weight", "MB", "perplexity", "KL", "worst domain"), in_bytes))
    if over_ranks:
        below = ("below the stop ratio" if row["extrapolated"] else "" for row in over_ranks)
        cells = [
            (f"{row['asked']:.2f}", f"{row['got']:.4f}", f"{row['params']:,}", *_quality(row), note)
            for row, note in zip(over_ranks, below, strict=True)
        ]
        tables.append(_table(("asked", "got", "parameters", "MB", "perplexity", "KL", "worst domain", ""), cells))
    cut = f"{first['windows']} windows of {first['context']} tokens ({cut_by(first)})"
    return [*tables, f"Perplexity on {first['corpus']}, held out, {cut}. KL: divergence from the base model in nats per token."]


def _quality(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return the cells MB, perplexity, KL divergence and the worst domain with its KL divergence."""
    kl, worst = divergence_of(row).get("kl_nats"), worst_domain(row)
    error = row["perplexity"] * row["stderr"]
    quality = f"{row['perplexity']:.2f} ± {error:.2f}", "" if kl is None else f"{kl:.4f}", f"{worst.name} {worst.kl:.4f}" if worst else ""
    return f"{row['bytes'] / MEGA:.1f}", *quality


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", f"|{':--|' * len(headings)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cell + CELL_PADDING for cell in cells)} |" for cells in rows)])
