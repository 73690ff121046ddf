"""The rows of an arena in the format of the paper's Table 1: for the console, as Markdown and as a figure."""

import importlib.resources
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from acip_platform.evaluation.method_comparison import DENSE, MEAN, Arena, Row, total_cost
from acip_platform.reporting.console import duration

QUOTED = " (quoted)"
MAX_RELATIVE_PERPLEXITY = 200.0  # upper end of the y axis, relative to the base model
COSTS_TITLE = "Cost of compression. A run for all sizes is counted once; reading text and evaluation are left out."
COSTS = ("Method", "runs (sizes)", "wall time", "CPU time", "peak memory", "device")


def quoted() -> dict[str, Any]:
    """Return Table 1 of the paper: results for LLaMA-7B, quoted and not measured here."""
    content: dict[str, Any] = json.loads(importlib.resources.files("acip").joinpath("baselines", "quoted.json").read_text(encoding="utf-8"))
    return content


def with_quoted(rows: Sequence[Row], arena: Arena) -> list[Row]:
    """Return `rows`; if the arena has `quoted`, each row is followed by the paper's row of the same method and size."""
    if not arena.quoted:
        return list(rows)
    paper = {(row["method"], row["asked"]): row for row in quoted()["rows"]}
    shown: list[Row] = []
    for row in rows:
        shown.append(row)
        if quote := paper.get((row["method"], row["asked"])):
            shown.append({**quote, "title": row["title"] + QUOTED})
    return shown


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the names of all metrics in the rows, perplexities first."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return sorted(names, key=lambda name: not name.startswith("perplexity"))


def heading(metric: str) -> str:
    """Return a metric's name with an arrow in the direction of better values."""
    return f"{metric} {'↓' if 'perplexity' in metric else '↑'}"


def number(value: float | None, error: float | None = None) -> str:
    """Format a value. With a standard error, the digits depend on the value; without one it has two decimals, as in the paper."""
    if value is None:
        return ""
    if value >= 1e5:
        return f"{value:.2e}"
    if error is None:
        return f"{value:.2f}"
    digits = 3 if value < 1 else 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table's lines: size, method, metrics, and what is stored. Repeated sizes are left empty."""
    names, lines, last = columns(rows), [], None
    for row in rows:
        size = f"{row['asked']:.0%}"
        stored = f"{row['got']:.4f}, {row['stored_bytes'] / 1e6:.1f} MB: {row['counted']}" if "got" in row else ""
        errors = row.get("stderr", {})
        numbers = [number(row["metrics"].get(name), errors.get(name)) for name in names]
        lines.append([size if size != last else "", row["title"], *numbers, stored])
        last = size
    return lines


def summary(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table with a line for each method: perplexities and the mean of tasks at each size, the best values in bold."""
    names = [name for name in columns(rows) if name.startswith("perplexity") or name == MEAN]
    own = [row for row in rows if row["method"] != DENSE]
    sizes = sorted({row["asked"] for row in own}, reverse=True)
    best = {}
    for size, name in itertools.product(sizes, names):
        values = [row["metrics"][name] for row in own if row["asked"] == size and name in row["metrics"]]
        best[size, name] = max(values, default=None) if name == MEAN else min(values, default=None)

    def numbers(row: Row | None, size: float) -> list[str]:
        metrics = row["metrics"] if row else {}
        texts = [_short(metrics[name], name) if name in metrics else "" for name in names]
        return [
            f"**{text}**" if text and metrics[name] == best.get((size, name)) else text for name, text in zip(names, texts, strict=True)
        ]

    heads = [f"{size:g}: {_label(name)}" if name == names[0] else _label(name) for size, name in itertools.product(sizes, names)]
    text = [_line(["method", "runs", *heads]), _line(["---"] * (2 + len(heads)))]
    for row in rows:
        if row["method"] == DENSE:
            text.append(_line(["the base model, 1.0", "", *numbers(row, 1.0), *[""] * (len(heads) - len(names))]))
    for title in dict.fromkeys(row["title"] for row in own):
        at = {row["asked"]: row for row in own if row["title"] == title}
        runs = "one per size" if next(iter(at.values()))["one_run_per_size"] else "one"
        text.append(_line([title, runs, *(cell for size in sizes for cell in numbers(at.get(size), size))]))
    return text


def _label(metric: str) -> str:
    return "tasks" if metric == MEAN else metric.removeprefix("perplexity ")


def _short(value: float, metric: str) -> str:
    if metric == MEAN:
        return f"{value:.3f}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e") if value >= 1e5 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def table(rows: Sequence[Row], arena: Arena) -> Table:
    """Return the full table for the console."""
    shown = with_quoted(rows, arena)
    title = f"{arena.name}: {arena.base}, calibrated on {arena.data}; {_measured(arena)}"
    result = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(["Size", "Method", *map(heading, columns(shown)), "stored"]):
        result.add_column(name, justify="left" if i == 1 else "right", no_wrap=True)
    lines = cells(shown)
    for i, line in enumerate(lines):
        result.add_row(*line, end_section=i + 1 < len(lines) and lines[i + 1][0] != "")
    return result


def costs(rows: Sequence[Row]) -> Table:
    """Return the table of time and memory for the console."""
    result = Table(title=COSTS_TITLE, title_justify="left", title_style="bold")
    for name in COSTS:
        result.add_column(name, justify="right" if name in ("wall time", "CPU time", "peak memory") else "left", no_wrap=True)
    for line in cost_cells(rows):
        result.add_row(*line)
    return result


def cost_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the lines of the table of costs. A ">" marks lower bounds."""
    lines = []
    for title in dict.fromkeys(row["title"] for row in rows if row["method"] != DENSE):
        own = [row for row in rows if row["title"] == title]
        seconds, cpu_seconds, peak = total_cost(own)
        runs = "one per size" if own[0]["one_run_per_size"] else "one for all sizes"
        bound = "" if any(row.get("leads", True) for row in own) else "> "
        numbers = [f"{bound}{duration(seconds)}", f"{bound}{duration(cpu_seconds)}", f"{bound}{peak / 1e9:.2f} GB"]
        lines.append([title, f"{runs} ({len(own)})", *numbers, own[0]["device"]])
    return lines


def markdown(rows: Sequence[Row], arena: Arena) -> str:
    """Return the three tables and the setting as Markdown."""
    shown = with_quoted(rows, arena)
    heads = ["Size", "Method", *map(heading, columns(shown)), "stored"]
    text = [*summary(rows), "", _line(heads), _line(["---"] * len(heads)), *map(_line, cells(shown)), ""]
    text += [COSTS_TITLE, "", _line(COSTS), _line(["---"] * len(COSTS)), *map(_line, cost_cells(rows)), ""]
    text.append(
        f"{arena.base} in {arena.dtype}, calibrated on {arena.data} (at most {arena.windows} x {arena.context} tokens, seed {arena.seed}), "
        f"measured on {_measured(arena)}. Size is the share of numbers that the compressed layers store, "
        "including adapters, relative to the dense layers; embeddings and the output head are not compressed."
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
    """Return a figure with a panel for each metric and a line for each method over the achieved size; the base model is a dashed line."""
    names = columns(rows)
    across = min(3, max(1, len(names)))
    down = math.ceil(max(1, len(names)) / across)
    result = Figure(figsize=(5.5 * across, 4.4 * down), layout="constrained")
    panels = result.subplots(down, across, squeeze=False).flat
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    dense: dict[str, float] = next((row["metrics"] for row in rows if row["method"] == DENSE), {})
    own = [row for row in rows if row["method"] != DENSE]
    for panel, name in zip(panels, names, strict=False):
        if name in dense:
            panel.axhline(dense[name], color="black", linestyle="--", linewidth=1, label="Original")
        for i, title in enumerate(dict.fromkeys(row["title"] for row in own)):
            line = [(row["got"], row["metrics"][name]) for row in own if row["title"] == title and name in row["metrics"]]
            panel.plot(*zip(*line, strict=True) if line else ((), ()), "os^Dv"[i % 5] + "-", color=f"C{i % 10}", label=title)
        if name.startswith("perplexity"):
            panel.set_yscale("log")
            if name in dense:
                panel.set_ylim(dense[name] / 1.5, dense[name] * MAX_RELATIVE_PERPLEXITY)
        panel.set_title(heading(name))
        panel.set_xlabel("size: numbers stored by the compressed layers / dense")
        panel.grid(alpha=0.3, which="both")
    result.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    result.suptitle(f"{arena.name}: {arena.base}", fontsize=10)
    return result
