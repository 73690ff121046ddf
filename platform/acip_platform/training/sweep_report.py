"""The results of a sweep for people: a table of all trials, and a plot of their curves."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from rich.table import Table

from acip_platform.reporting.console import duration
from acip_platform.training.sweep import Outcome, front, winner
from acip_platform.training.sweep_space import shown
from acip_platform.training.sweep_worker import RUNGS


def status(outcome: Outcome) -> str:
    """Return "failed", "finished", or how far the trial came before it was ended."""
    if outcome.error is not None:
        return "failed"
    return "finished" if outcome.finished else f"ended at {outcome.share}/{RUNGS[-1]}" if outcome.share else "ended"


def columns(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """Return the columns of the table, a value per trial: varied fields, loss above the base by size, area, seconds, state."""
    best, on_front = winner(outcomes), front(outcomes)
    sizes = sorted({row["asked"] for outcome in outcomes for row in outcome.rows if row["asked"] < 1}, reverse=True)
    table: dict[str, list[str]] = {"trial": [outcome.trial.name for outcome in outcomes]}
    for field in outcomes[0].trial.changes:
        table[field] = [shown(outcome.trial.changes[field]) for outcome in outcomes]
    for size in sizes:
        table[f"{size:g}"] = [_excess(outcome, size) for outcome in outcomes]
    table["area"] = [f"{outcome.area:.4f}" if outcome.rows else "" for outcome in outcomes]
    table["seconds"] = [f"{outcome.cost.seconds:.0f}" for outcome in outcomes]
    table["state"] = [
        f"{status(outcome)}{', front' * any(outcome is each for each in on_front)}{', WINNER' * (outcome is best)}" for outcome in outcomes
    ]
    return table


def _excess(outcome: Outcome, size: float) -> str:
    """Return the loss above that of size 1.0, in nats; "" if the size was not measured."""
    losses = {row["asked"]: row["loss"] for row in outcome.rows}
    return f"{losses[size] - losses[1.0]:+.3f}" if size in losses else ""


def table(outcomes: Sequence[Outcome], pruning_seconds: Sequence[float]) -> Table:
    """Return a table of the trials, smallest area first. The title names the text that they share."""
    outcomes = sorted(outcomes, key=lambda outcome: (not outcome.finished, outcome.area))
    rows = next((outcome.rows for outcome in outcomes if outcome.rows), None)
    corpus = f" on {rows[0]['corpus']}, held out, {rows[0]['windows']} x {rows[0]['context']} tokens" if rows else ""
    title = f"Loss above the base model's at each size, nats per token{corpus}."
    if pruning_seconds:
        title += f" Shared pruning took {duration(sum(pruning_seconds))}."
    result = Table(title=title, title_justify="left", title_style="bold")
    cells = columns(outcomes)
    for heading in cells:
        result.add_column(heading, justify="left" if heading in ("trial", "state") else "right", no_wrap=True)
    for row in zip(*cells.values(), strict=True):
        result.add_row(*row)
    return result


def curves(outcomes: Sequence[Outcome], name: str) -> Figure:
    """Plot the held-out excess loss over size of all trials: the front bold, the winner black, trials that ended early dotted."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    best, on_front = winner(outcomes), front(outcomes)
    for i, outcome in enumerate(outcomes):
        if not outcome.rows:
            continue
        rows = sorted(outcome.rows, key=lambda row: row["got"])
        base = rows[-1]["loss"]
        bold, style = any(outcome is each for each in on_front), "-" if outcome.finished else ":"
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
