"""Figures of a calibration: the score map, the kept ranks, shrinking masks and trade-off curves.

MLflow gets matplotlib figures. The report gets SVG with CSS variables as colors.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from acip.errors import BudgetError
from acip.evaluate import divergence_of
from acip.sizing.budget import Budget, as_perplexity, is_coded
from acip.sizing.cut_table import CutTable
from acip_platform.reporting.mask_samples import MaskSamples

mpl.rcParams["text.parse_math"] = False  # names of models and texts may contain dollar signs

CurveRows = Sequence[Mapping[str, Any]]
Points = list[tuple[float, Mapping[str, Any]]]
KEPT_AT = (0.8, 0.6, 0.4)  # sizes whose kept ranks are drawn
Axis = Literal["ranks", "bytes", "flops"]
Quantity = Literal["perplexity", "excess", "kl"]
AXES: dict[Axis, str] = {
    "ranks": "size: numbers stored by the target layers, relative to dense (achieved)",
    "bytes": "stored bytes of the model, relative to the base model",
    "flops": "FLOPs of a token without attention, relative to the base model",
}
QUANTITIES: dict[Quantity, str] = {
    "perplexity": "perplexity",
    "excess": "excess loss over the base model, nats per token",
    "kl": "KL divergence from the base model, nats per token",
}
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


def curves(
    named: Mapping[str, CurveRows],
    baselines: Mapping[str, CurveRows] | None = None,
    over: Axis = "ranks",
    quantity: Quantity = "perplexity",
) -> Figure | None:
    """Draw trade-off curves in one panel, or return None if there is nothing to draw.

    `over` is the cost: `ranks` draws sizes of ranks over their stored numbers, `flops` over their FLOPs, and `bytes` draws both kinds of
    sizes over the stored bytes, if there are coded sizes. `quantity` is the held-out perplexity, the `excess` of its loss over that of each
    curve's base model, or the `kl` divergence from the base model.

    Baselines are dashed; those with the convention `bytes` are drawn over bytes only. Hollow points lie below the stop ratio. Bars are
    standard errors. Rows without a finite value are left out.
    """
    series = [(label, points, "-") for name, rows in named.items() for label, points in _series(name, rows, over).items()]
    for name, rows in (baselines or {}).items():  # a baseline may have a model's name
        of_axis = [(row["got"], row) for row in rows if (row.get("convention") == "bytes") is (over == "bytes")]
        series.append((name, [] if over == "flops" else of_axis, "--"))
    drawn = [(label, kept, dash) for label, points, dash in series if (kept := _finite(points, quantity))]
    if not drawn or (over == "bytes" and not any(is_coded(row) or dash == "--" for _, points, dash in drawn for _, row in points)):
        return None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    heights: list[float] = []
    for i, (label, points, dash) in enumerate(drawn):
        base = points[-1][1]["loss"] if quantity == "excess" else 0.0
        value = as_perplexity if quantity == "perplexity" else lambda loss, base=base: loss - base
        y = [value(_loss(row, quantity)) for _, row in points]
        heights += y
        style = (dash, f"C{i}")
        for ((left, row), (right, _)), line in zip(pairwise(points), pairwise(y), strict=True):
            axes.plot([left, right], line, ":" if row.get("extrapolated") else style[0], color=style[1])
        for (x, row), at in zip(points, y, strict=True):
            has_error = quantity == "perplexity" and _is_number(row.get("stderr"))  # it does not apply to a difference on the same text
            error = row["stderr"] if has_error else 0.0
            filled = "none" if row.get("extrapolated") else style[1]
            spread = [[at - value(_loss(row, quantity) - error)], [value(_loss(row, quantity) + error) - at]]
            axes.errorbar([x], [at], spread, fmt="o", color=style[1], mfc=filled, capsize=2)
        axes.plot([], [], style[0], color=style[1], label=label)
    logarithmic = quantity == "kl" or (quantity == "perplexity" and max(heights) > 10 * min(heights))
    if logarithmic:
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    first: Mapping[str, Any] = drawn[0][1][0][1]
    scale = " (log scale)" * logarithmic
    axes.set_ylabel(f"{QUANTITIES[quantity]}{scale}\n{first.get('corpus', 'unknown text')}, {first.get('context', '?')} tokens")
    axes.set_xlabel(AXES[over])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _series(name: str, rows: CurveRows, over: Axis) -> dict[str, Points]:
    """Return the lines of one model by label: points (x, row)."""
    over_ranks, coded = ([row for row in rows if is_coded(row) is kind] for kind in (False, True))
    base = next((row for row in over_ranks if row["got"] == 1.0), None)
    if over == "ranks":
        return {name: [(row["got"], row) for row in over_ranks]}
    if over == "flops":
        known = [row for row in over_ranks if "flops" in row]
        return {name: [(row["flops"] / base["flops"], row) for row in known]} if base is not None and base in known else {}
    base_bytes = coded[0]["bytes"] / coded[0]["got"] if coded else base and base.get("bytes")
    if not base_bytes:
        return {}
    lines = {f"{name}, codes": [*coded, *([base] if base else [])] if coded else [], f"{name}, ranks": over_ranks}
    return {label: [(row["bytes"] / base_bytes, row) for row in line if row.get("bytes")] for label, line in lines.items()}


def _loss(row: Mapping[str, Any], quantity: Quantity) -> float:
    return divergence_of(row).get("kl_nats", math.nan) if quantity == "kl" else row["loss"]


def _finite(points: Points, quantity: Quantity) -> Points:
    """Return the points with a finite value, which must be above 0 for a divergence, by increasing x."""
    values = ((x, row, _loss(row, quantity)) for x, row in points)
    kept = [(x, row) for x, row, value in values if _is_number(value) and (quantity != "kl" or value > 0)]
    return sorted(kept, key=lambda point: point[0])


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
