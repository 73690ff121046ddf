"""Figures of a calibration: the score map, the kept ranks, shrinking masks and trade-off curves.

MLflow gets matplotlib figures. The report gets SVG with CSS variables as colors.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from acip.errors import BudgetError
from acip.sizing.budget import as_perplexity
from acip.sizing.cut_table import Budget, CutTable
from acip_platform.reporting.mask_samples import MaskSamples

mpl.rcParams["text.parse_math"] = False  # names of models and texts may contain dollar signs

CurveRows = Sequence[Mapping[str, Any]]
# placeholder colors in an SVG -> CSS variables of the page, which has a light and a dark theme
THEME = {"#010203": "var(--ink)", "#020304": "var(--soft)", "#030405": "var(--line)", "#040506": "var(--accent)"}
INK, SOFT, LINE, ACCENT = THEME
SERIES = ("#c2703d", "#6b7fb8", "#a3568c", "#8a8f2a", "#4b9ab0", "#b8860b", "#7a6a58", "#5f8f5f")  # visible on white and on black


def short(name: str) -> str:
    """Shorten the name of a layer: `model.layers.3.self_attn.q_proj` becomes `3.q_proj`."""
    parts = name.split(".")
    return ".".join([part for part in parts if part.isdigit()][-1:] + parts[-1:])


def score_map(table: CutTable) -> Figure | None:
    """Draw the removal order: a line for each layer, grouped by kind, with its directions from most to least important.

    The color is the share of all directions that are removed earlier. None if no direction can be removed.
    """
    if not len(table.order):
        return None
    kinds = list(dict.fromkeys(_kind(layer.name) for layer in table.layers))
    line_of = np.argsort(np.argsort([kinds.index(_kind(layer.name)) for layer in table.layers], kind="stable"))
    picture = np.full((len(table.layers), max(layer.K for layer in table.layers)), np.nan)
    remaining = [layer.K for layer in table.layers]
    for position, layer in enumerate(table.order.tolist()):
        remaining[layer] -= 1
        picture[line_of[layer], remaining[layer]] = position / len(table.order)
    figure = Figure(figsize=(9, min(6.5, 0.03 * len(table.layers) + 2.5)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(picture, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    lines = {kind: [line_of[i] for i, layer in enumerate(table.layers) if _kind(layer.name) == kind] for kind in kinds}
    axes.set_yticks([float(np.mean(numbers)) for numbers in lines.values()], kinds)
    for numbers in list(lines.values())[1:]:
        axes.axhline(min(numbers) - 0.5, color="white", linewidth=1.5)
    axes.set_ylabel("blocks, first on top")
    axes.set_xlabel("direction of the layer, most important first")
    axes.set_title("Score map: the order of removal")
    figure.colorbar(image, label="share of directions removed earlier")
    return figure


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def kept_ranks(table: CutTable, size: float) -> Figure | None:
    """Draw the kept share of each layer's rank at one size, by kind and depth. None if the size can't be reached."""
    try:
        cut = table.cut(Budget(ratio=size))
    except BudgetError:
        return None
    kinds = list(dict.fromkeys(_kind(layer.name) for layer in table.layers))
    columns: dict[str, list[float]] = {kind: [] for kind in kinds}
    for layer in table.layers:
        rank = cut.ranks[layer.name]
        columns[_kind(layer.name)].append(1.0 if rank is None else rank / layer.K)
    depth = max(len(values) for values in columns.values())
    picture = np.full((len(kinds), depth), np.nan)
    for row, kind in enumerate(kinds):
        picture[row, : len(columns[kind])] = columns[kind]
    figure = Figure(figsize=(max(5.0, 0.28 * depth + 2.5), 0.45 * len(kinds) + 1.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(picture, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    axes.set_title(f"Kept rank at size {size} (got {cut.sizes['linear']:.4f}); 1 = dense")
    figure.colorbar(image)
    return figure


def mask_shrinkage(samples: MaskSamples) -> Figure:
    """Draw the masks over the pruning steps: a panel for each example layer, a line for each direction, the strongest darkest."""
    columns = min(4, len(samples.layers))
    rows = -(-len(samples.layers) // columns)
    figure = Figure(figsize=(2.7 * columns, 1.9 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    values = np.array(samples.values)  # [steps, layers, directions]
    for i, panel in enumerate(panels):
        panel.axis("on" if i < len(samples.layers) else "off")
        if i < len(samples.layers):
            shades = mpl.colormaps["viridis"](np.linspace(0, 0.9, values.shape[2]))
            for k, shade in enumerate(shades):
                panel.plot(samples.steps, values[:, i, k].clip(min=0), color=shade, linewidth=1)
            panel.set_title(short(samples.layers[i]), fontsize=8)
            panel.tick_params(labelsize=7)
    figure.suptitle("Example masks during pruning: a direction is removed when its mask reaches 0 (dark = strong in its layer)", fontsize=9)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("mask", fontsize=8)
    return figure


def curves(named: Mapping[str, CurveRows], baselines: Mapping[str, CurveRows] | None = None, excess: bool = False) -> Figure:
    """Draw trade-off curves in one panel: held-out perplexity, or with `excess` the loss above that of each curve's base model.

    Baselines are dashed. Hollow points lie below the stop ratio. Bars are standard errors. Rows without a finite loss are left out.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    drawn = [(name, _finite(rows), "-") for name, rows in named.items()]
    drawn += [(name, _finite(rows), "--") for name, rows in (baselines or {}).items()]  # a baseline may have a model's name
    heights: list[float] = []
    for i, (name, rows, dash) in enumerate(drawn):
        base = rows[-1]["loss"] if rows and excess else 0.0
        value = (lambda loss, base=base: loss - base) if excess else as_perplexity
        y = [value(row["loss"]) for row in rows]
        heights += y
        style = (dash, f"C{i}")
        for (a, b), line in zip(pairwise(rows), pairwise(y), strict=True):
            axes.plot([a["got"], b["got"]], line, ":" if a.get("extrapolated") else style[0], color=style[1])
        for row, at in zip(rows, y, strict=True):
            has_error = not excess and _is_number(row.get("stderr"))  # it does not apply to a difference on the same text
            error = row["stderr"] if has_error else 0.0
            filled = "none" if row.get("extrapolated") else style[1]
            spread = [[at - value(row["loss"] - error)], [value(row["loss"] + error) - at]]
            axes.errorbar([row["got"]], [at], spread, fmt="o", color=style[1], mfc=filled, capsize=2)
        axes.plot([], [], style[0], color=style[1], label=name)
    logarithmic = not excess and bool(heights) and max(heights) > 10 * min(heights)
    if logarithmic:
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    first: Mapping[str, Any] = next((rows[0] for _, rows, _ in drawn if rows), {})
    quantity = "excess loss over the base model, nats per token" if excess else "perplexity" + " (log scale)" * logarithmic
    axes.set_ylabel(f"{quantity}\n{first.get('corpus', 'unknown text')}, {first.get('context', '?')} tokens")
    axes.set_xlabel("size: numbers stored by the target layers, relative to dense (achieved)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _finite(rows: CurveRows) -> list[Mapping[str, Any]]:
    """Return the rows with a finite loss, by increasing size."""
    return sorted((row for row in rows if _is_number(row["loss"])), key=lambda row: row["got"])


def _is_number(value: float | None) -> bool:
    """Return whether `value` is finite. In JSON, other values are null."""
    return value is not None and math.isfinite(value)


def svg(draw: Callable[[], Figure | None]) -> str:
    """Return a figure as an <svg> element in the page's colors, or "" for None. Text stays text, and equal figures give equal bytes."""
    theme: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "acip", "font.family": "sans-serif", "font.size": 9,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.framealpha": 0.0,
        "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": LINE, "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": SOFT,
        "axes.prop_cycle": cycler(color=[ACCENT, *SERIES]),
    }  # fmt: skip
    with mpl.rc_context(theme):
        file = io.StringIO()
        if (figure := draw()) is None:
            return ""
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    text = re.sub(r"^<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1 role=\"img\">", text, count=1)
    for color, variable in THEME.items():
        text = text.replace(color, variable)
    return text
