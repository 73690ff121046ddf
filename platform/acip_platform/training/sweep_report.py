"""What a person sees of a sweep: a table of all trials, and their curves over each other."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from rich.table import Table

from acip_platform.reporting.console import duration
from acip_platform.training.sweep import RUNGS, Outcome, front, winner
from acip_platform.training.sweep_space import shown


def status(outcome: Outcome) -> str:
    if outcome.error is not None:
        return "failed"
    return "finished" if outcome.finished else f"ended at {outcome.share}/{RUNGS[-1]}" if outcome.share else "ended"


def columns(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """Heading -> a value per trial: what varied, loss above the base at the measured sizes, their area, the cost, what became of it."""
    best, on_front = winner(outcomes), front(outcomes)
    sizes = sorted({row["asked"] for outcome in outcomes for row in outcome.rows if row["asked"] < 1}, reverse=True)
    found: dict[str, list[str]] = {"trial": [outcome.trial.name for outcome in outcomes]}
    for field in outcomes[0].trial.changes:
        found[field] = [shown(outcome.trial.changes[field]) for outcome in outcomes]
    for size in sizes:
        found[f"{size:g}"] = [_excess(outcome, size) for outcome in outcomes]
    found["area"] = [f"{outcome.area:.4f}" if outcome.rows else "" for outcome in outcomes]
    found["seconds"] = [f"{outcome.cost.seconds:.0f}" for outcome in outcomes]
    found["state"] = [
        f"{status(outcome)}{', front' * any(outcome is one for one in on_front)}{', WINNER' * (outcome is best)}" for outcome in outcomes
    ]
    return found


def _excess(outcome: Outcome, size: float) -> str:
    losses = {row["asked"]: row["loss"] for row in outcome.rows}
    return f"{losses[size] - losses[1.0]:+.3f}" if size in losses else ""


def table(outcomes: Sequence[Outcome], trunk_seconds: Sequence[float]) -> Table:
    """Sorted by the area, the best first. What the trials share is in the title."""
    outcomes = sorted(outcomes, key=lambda outcome: (not outcome.finished, outcome.area))
    rows = next((outcome.rows for outcome in outcomes if outcome.rows), None)
    corpus = f" on {rows[0]['corpus']}, held out, {rows[0]['windows']} x {rows[0]['context']} tokens" if rows else ""
    title = f"Loss above the base model's at each size, nats per token{corpus}."
    if trunk_seconds:
        title += f" Shared pruning took {duration(sum(trunk_seconds))}."
    made = Table(title=title, title_justify="left", title_style="bold")
    cells = columns(outcomes)
    for heading in cells:
        made.add_column(heading, justify="left" if heading in ("trial", "state") else "right", no_wrap=True)
    for row in zip(*cells.values(), strict=True):
        made.add_row(*row)
    return made


def curves(outcomes: Sequence[Outcome], name: str) -> Figure:
    """Held-out excess loss over size of all trials; the front bold, the winner black, what ended early dotted."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    best, on_front = winner(outcomes), front(outcomes)
    for i, outcome in enumerate(outcomes):
        if not outcome.rows:
            continue
        rows = sorted(outcome.rows, key=lambda row: row["got"])
        base = rows[-1]["loss"]
        bold, style = any(outcome is one for one in on_front), "-" if outcome.finished else ":"
        axes.plot(
            [row["got"] for row in rows], [row["loss"] - base for row in rows], style, marker="o", markersize=3,
            linewidth=2.2 if bold else 1.0, alpha=1.0 if bold else 0.6, color="black" if outcome is best else f"C{i % 10}",
            label=f"{outcome.trial.name}: {outcome.trial.label} ({outcome.area:.4f})",
        )  # fmt: skip
    axes.set_xlabel("size: stored parameters of the target layers / dense (got)")
    axes.set_ylabel("held-out loss above the base model's, nats per token")
    axes.set_title(f"{name}: all trials (area under the curve; bold: Pareto front, black: winner, dotted: ended early)", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="upper right")
    return figure
