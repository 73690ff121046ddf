"""The arena's rows as the paper's Table 1 has them: for people, for a README, and as a picture."""

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
FAR = 200.0  # times the base model's perplexity: what is worse leaves the picture
COSTS_ARE = "What compression cost: one run for all sizes is counted once, reading text and evaluation are left out."
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


def summary(rows: Sequence[Row]) -> list[str]:
    """A line of Markdown for each method: perplexities, and the mean of tasks where there are any, size by size; the best in bold."""
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
    made = Table(title=COSTS_ARE, title_justify="left", title_style="bold")
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
        more = "" if any(row.get("leads", True) for row in own) else "> "
        numbers = [f"{more}{duration(seconds)}", f"{more}{duration(worked)}", f"{more}{peak / 1e9:.2f} GB"]
        found.append([title, f"{runs} ({len(own)})", *numbers, own[0]["device"]])
    return found


def markdown(rows: Sequence[Row], arena: Arena) -> str:
    """The three tables, for a README."""
    shown = with_quoted(rows, arena)
    heads = ["Size", "Method", *map(heading, columns(shown)), "stored"]
    text = [*summary(rows), "", _line(heads), _line(["---"] * len(heads)), *map(_line, cells(shown)), ""]
    text += [COSTS_ARE, "", _line(COSTS), _line(["---"] * len(COSTS)), *map(_line, cost_cells(rows)), ""]
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
    across = min(3, max(1, len(names)))
    down = math.ceil(max(1, len(names)) / across)
    made = Figure(figsize=(5.5 * across, 4.4 * down), layout="constrained")
    panels = made.subplots(down, across, squeeze=False).flat
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
                panel.set_ylim(dense[name] / 1.5, dense[name] * FAR)
        panel.set_title(heading(name))
        panel.set_xlabel("size: numbers stored by the compressed layers / dense")
        panel.grid(alpha=0.3, which="both")
    made.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    made.suptitle(f"{arena.name}: {arena.base}", fontsize=10)
    return made
