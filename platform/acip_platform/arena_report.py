"""The arena's rows as the paper's Table 1 has them: for people, for a README, and as a picture."""

import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from acip_platform.arena import DENSE, Arena, Row, total_cost
from acip_platform.console import duration

QUOTED = " (quoted)"
COSTS = ("Method", "runs (sizes)", "wall time", "processors", "peak memory", "on")


def quoted() -> dict[str, Any]:
    """The paper's own Table 1: LLaMA-7B, not measured here."""
    content: dict[str, Any] = json.loads(importlib.resources.files("acip").joinpath("baselines", "quoted.json").read_text(encoding="utf-8"))
    return content


def with_quoted(rows: Sequence[Row], arena: Arena) -> list[Row]:
    """`rows`, and the paper's number after each one that it has, where the arena wants it."""
    if not arena.quoted:
        return list(rows)
    theirs = {(row["method"], row["asked"]): row for row in quoted()["rows"]}
    shown: list[Row] = []
    for row in rows:
        shown.append(row)
        if found := theirs.get((row["method"], row["asked"])):
            shown.append({**found, "title": row["title"] + QUOTED})
    return shown


def columns(rows: Sequence[Row]) -> list[str]:
    """The metrics of any row, perplexities first."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return sorted(names, key=lambda name: not name.startswith("perplexity"))


def heading(metric: str) -> str:
    return f"{metric} {'↓' if 'perplexity' in metric else '↑'}"


def number(value: float | None, error: float | None = None) -> str:
    """With its standard error, where there is one: to two digits of it where it is small, else to hundredths, as the paper."""
    if value is None:
        return ""
    if value >= 1e5:
        return f"{value:.2e}"
    if error is None:
        return f"{value:.2f}"
    digits = 3 if value < 1 else 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Size, method, metrics, what is stored; a size is written once."""
    names, found, last = columns(rows), [], None
    for row in rows:
        size = f"{row['asked']:.0%}"
        stores = f"{row['got']:.4f}, {row['stored_bytes'] / 1e6:.1f} MB: {row['counted']}" if "got" in row else ""
        errors = row.get("stderr", {})
        numbers = [number(row["metrics"].get(name), errors.get(name)) for name in names]
        found.append([size if size != last else "", row["title"], *numbers, stores])
        last = size
    return found


def table(rows: Sequence[Row], arena: Arena) -> Table:
    shown = with_quoted(rows, arena)
    title = f"{arena.name}: {arena.base}, calibrated on {arena.data}; {_measured(arena)}"
    made = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(["Size", "Method", *map(heading, columns(shown)), "stored"]):
        made.add_column(name, justify="left" if i == 1 else "right", no_wrap=True)
    lines = cells(shown)
    for i, line in enumerate(lines):
        made.add_row(*line, end_section=i + 1 < len(lines) and lines[i + 1][0] != "")
    return made


def costs(rows: Sequence[Row]) -> Table:
    """What each method took."""
    title = "cost of compression, evaluation aside (but in the peak memory of CPUs)"
    made = Table(title=title, title_justify="left", title_style="bold")
    for name in COSTS:
        made.add_column(name, justify="right" if name in ("wall time", "processors", "peak memory") else "left", no_wrap=True)
    for line in cost_cells(rows):
        made.add_row(*line)
    return made


def cost_cells(rows: Sequence[Row]) -> list[list[str]]:
    found = []
    for title in dict.fromkeys(row["title"] for row in rows if row["method"] != DENSE):
        own = [row for row in rows if row["title"] == title]
        seconds, worked, peak = total_cost(own)
        runs = "one per size" if own[0]["one_run_per_size"] else "one for all sizes"
        found.append([title, f"{runs} ({len(own)})", duration(seconds), duration(worked), f"{peak / 1e9:.2f} GB", own[0]["device"]])
    return found


def markdown(rows: Sequence[Row], arena: Arena) -> str:
    """The two tables, for a README."""
    shown = with_quoted(rows, arena)
    heads = ["Size", "Method", *map(heading, columns(shown)), "stored"]
    text = [_line(heads), _line(["---"] * len(heads)), *map(_line, cells(shown)), ""]
    text += [_line(COSTS), _line(["---"] * len(COSTS)), *map(_line, cost_cells(rows)), ""]
    text.append(
        f"{arena.base} in {arena.dtype}, calibrated on {arena.data} (at most {arena.windows} x {arena.context} tokens, seed {arena.seed}), "
        f"measured on {_measured(arena)}. A size counts all numbers that compressed layers store, adapters "
        "too, of those of the dense ones; embeddings and head are left alone."
    )
    if arena.quoted:
        text.append(f"\n(quoted): {quoted()['source']}, {quoted()['model']}. {quoted()['note']}")
    return "\n".join(text) + "\n"


def _measured(arena: Arena) -> str:
    text = f"held-out windows of {arena.eval_context} tokens ({arena.protocol})"
    return text + (f", tasks zero-shot, {f'the first {arena.task_limit}' if arena.task_limit else 'all'} items" if arena.tasks else "")


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"


def figure(rows: Sequence[Row], arena: Arena) -> Figure:
    """A panel for each metric, a line for each method, over what was got; the dense base as a dashed line."""
    names = columns(rows)
    made = Figure(figsize=(5.5 * max(1, len(names)), 4.8), layout="constrained")
    panels = made.subplots(1, max(1, len(names)), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=False):
        for row in rows:
            if row["method"] == DENSE and name in row["metrics"]:
                panel.axhline(row["metrics"][name], color="black", linestyle="--", linewidth=1, label=row["title"])
        for i, title in enumerate(dict.fromkeys(row["title"] for row in rows if row["method"] != DENSE)):
            own = [row for row in rows if row["title"] == title and name in row["metrics"]]
            panel.plot(
                [row["got"] for row in own], [row["metrics"][name] for row in own], "os^Dv"[i % 5] + "-", color=f"C{i % 10}", label=title
            )
        if name.startswith("perplexity"):
            panel.set_yscale("log")
        panel.set_title(heading(name))
        panel.set_xlabel("size: numbers stored by the compressed layers / dense")
        panel.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=7)
    made.suptitle(f"{arena.name}: {arena.base}", fontsize=10)
    return made
