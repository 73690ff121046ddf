"""Pictures of a calibration, by matplotlib: the score map, the kept ranks, the trade-off curve."""

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from acip.artifact import Artifact
from acip.cut import Budget, CutTable
from acip.errors import BudgetError


def short(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `3.q_proj`."""
    parts = name.split(".")
    return ".".join([part for part in parts if part.isdigit()][-1:] + parts[-1:])


def score_map(table: CutTable) -> Figure:
    """One line per layer, its directions from most to least important; colour: the share of all directions that leaves before."""
    order = table.order.long().numpy()
    width = max(layer.K for layer in table.layers)
    picture = np.full((len(table.layers), width), np.nan)
    seen = [layer.K for layer in table.layers]
    for place, layer in enumerate(order):
        seen[layer] -= 1
        picture[layer, seen[layer]] = place / len(order)
    figure = Figure(figsize=(9, max(3.0, 0.055 * len(table.layers) + 1.5)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(picture, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    step = max(1, len(table.layers) // 30)
    axes.set_yticks(range(0, len(table.layers), step), [short(layer.name) for layer in table.layers[::step]], fontsize=6)
    axes.set_xlabel("direction of the layer, most important first")
    axes.set_title("Score map: when a direction leaves")
    figure.colorbar(image, label="share of all directions that leaves before (bright = stays longest)")
    return figure


def kept_ranks(table: CutTable, size: float) -> Figure | None:
    """Layer kind x depth: the kept share of each layer's rank at one size. None where the size can't be reached."""
    try:
        cut = table.cut(Budget(ratio=size))
    except BudgetError:
        return None
    kinds = list(dict.fromkeys(layer.name.rsplit(".", 1)[-1] for layer in table.layers))
    columns: dict[str, list[float]] = {kind: [] for kind in kinds}
    for layer in table.layers:
        rank = cut.ranks[layer.name]
        columns[layer.name.rsplit(".", 1)[-1]].append(1.0 if rank is None else rank / layer.K)
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


def curve(artifact: Artifact, name: str) -> Figure:
    """Held-out perplexity over size; hollow points lie below the stop ratio."""
    rows: list[dict[str, Any]] = sorted(artifact.curve, key=lambda row: row["got"])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for a, b in pairwise(rows):
        style = ":" if a["extrapolated"] else "-"
        axes.plot([a["got"], b["got"]], [a["perplexity"], b["perplexity"]], style, color="C0")
    for row in rows:
        low, high = (np.exp(min(700.0, row["loss"] + sign * row["stderr"])) for sign in (-1, 1))
        hollow = "none" if row["extrapolated"] else "C0"
        spread = [[row["perplexity"] - low], [high - row["perplexity"]]]
        axes.errorbar([row["got"]], [row["perplexity"]], spread, fmt="o", color="C0", mfc=hollow, capsize=2)
    axes.set_xlabel("size: stored parameters of the target layers / dense (got)")
    axes.set_ylabel(f"perplexity, {rows[0]['corpus']}, {rows[0]['context']} tokens")
    axes.set_title(f"{name}: size against quality (bars: standard error; hollow: below the stop ratio)", fontsize=9)
    axes.grid(alpha=0.3)
    return figure
