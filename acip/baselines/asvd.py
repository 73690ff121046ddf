"""ASVD: weights are scaled by how large their inputs are before the SVD, and each layer's rank follows its sensitivity
(Yuan et al., 2024, arXiv 2312.05821).

    d = (sum over windows of mean_t |x_t|)^alpha + 1e-6        scale of each input feature
    W diag(d) = U S V^T                                        truncated at r
    y = (U_r S_r^1/2) (S_r^1/2 V_r^T diag(d)^-1) x

Sensitivity search: of every layer and every ratio, the perplexity on calibration text of the model in which this layer alone is cut
to this ratio. The entries are sorted, worst perplexity first, and the first p of them are forbidden; a layer takes the smallest
ratio that is left to it, or stays dense. What is stored grows with p, so bisection finds the largest p that fits a size.
The table is measured once, and serves every size.

The SVD is exact where the authors' is randomized, and p is the last that fits, where theirs may be one off.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from acip.base import Base
from acip.baselines.prefix_factors import (
    Factors,
    Progress,
    allowed,
    blocks_of,
    each,
    feed,
    layers_at,
    on_inputs,
    refuse_idle,
    stored_at,
    swapped,
    uniform_ranks,
)
from acip.calibration.losses import next_token
from acip.errors import BudgetError, RecipeError
from acip.layers.targets import find_linears, hooked, weight_MN
from acip.modeling_acip import widened

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Entry(NamedTuple):
    """The model's loss with one layer at one ratio."""

    loss: float  # nats per token
    name: str
    ratio: float


def run(
    base: Base,
    windows: Tensor,
    sizes: Sequence[float],
    progress: Progress,
    *,
    exclude: tuple[str, ...] = (),
    alpha: float = 0.5,
    scale_windows: int = 32,
    search_windows: int = 32,
    ratios: tuple[float, ...] = RATIOS,
) -> Iterator[tuple[float, nn.Module]]:
    """`scale_windows` windows for d, `search_windows` (at most) for the sensitivities: there are layers x ratios passes over them."""
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise RecipeError(f"ratios are {ratios!r}; each must lie between 0 and 1.")
    if scale_windows < 1 or search_windows < 1:
        raise RecipeError(f"scale_windows is {scale_windows} and search_windows {search_windows}; both must be at least 1.")
    model = base.model
    linears = find_linears(model, exclude)
    dense, least = (stored_at(linears, ranks) for ranks in (dict.fromkeys(linears), uniform_ranks(linears, min(ratios))))
    if least > allowed(size := min(sizes), dense):
        smallest = -(-least * 10**4 // dense) / 10**4
        raise BudgetError(f"size {size!r} can't be reached with these ratios: the smallest is {smallest:.4f}. Add smaller ratios.")
    d = scales(model, linears, windows[:scale_windows], alpha)
    factors: dict[str, Factors] = {}
    for name, found in each(linears, lambda name, linear: scaled_svd(linear, d[name])):
        factors[name] = found
        progress("SVD", len(factors), len(linears))
    table = sensitivities(model, linears, factors, windows[:search_windows], ratios, progress) if min(sizes) < 1 else []
    for size in sizes:
        with swapped(model, layers_at(linears, factors, plan(table, linears, size))):
            yield size, model


@torch.no_grad()
def scales(model: nn.Module, linears: Mapping[str, nn.Module], windows: Tensor, alpha: float) -> dict[str, Tensor]:
    """Return d [N] per layer, in the accumulation dtype."""
    sums: dict[str, Tensor] = {}

    def see(name: str, x_SN: Tensor) -> None:
        sums[name] = sums.get(name, 0) + widened(x_SN).abs().mean(0)

    with hooked(on_inputs(linears, see)):
        feed(model, windows)
    refuse_idle(linears, sums)
    return {name: total**alpha + 1e-6 for name, total in sums.items()}


@torch.no_grad()
def scaled_svd(linear: nn.Module, d_N: Tensor) -> Factors:
    """W = left right exactly at full rank: d is folded in again."""
    U_MK, S_K, Vh_KN = torch.linalg.svd(widened(weight_MN(linear)) * d_N, full_matrices=False)
    return Factors.of(linear, U_MK * S_K.sqrt(), S_K.sqrt()[:, None] * Vh_KN / d_N)


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    factors: Mapping[str, Factors],
    windows: Tensor,
    ratios: Sequence[float],
    progress: Progress,
) -> list[Entry]:
    """Entries of all layers and ratios, worst first.

    Blocks before the layer's own give what they give in the base model, so they are not computed again: half of the work.
    """
    device, blocks = next(model.parameters()).device, blocks_of(model, linears)
    sums = {(name, ratio): 0.0 for name in linears for ratio in ratios}
    ranks = {ratio: uniform_ranks(linears, ratio) for ratio in ratios}
    done, total = 0, len(windows) * len(sums)
    for window in windows.split(1):
        ids_1T = window.long().to(device)
        given: dict[str, list[Any]] = {}
        with hooked(model.get_submodule(block).register_forward_hook(_note(given.setdefault(block, []))) for block in blocks):
            next_token(model, ids_1T)
        before: dict[str, Any] = {}
        for block, outputs in given.items():
            with answering(model, before):
                for name, ratio in product(blocks[block], ratios):
                    rank = ranks[ratio][name]
                    assert rank is not None
                    with swapped(model, {name: factors[name].at(linears[name], rank)}):
                        sums[name, ratio] += float(next_token(model, ids_1T)) / len(windows)
                    progress("sensitivity", done := done + 1, total)
            if len(outputs) == 1:  # a block that runs several times gives several answers
                before[block] = outputs[0]
    table = [Entry(loss if math.isfinite(loss) else math.inf, name, ratio) for (name, ratio), loss in sums.items()]
    return sorted(table, key=lambda entry: -entry.loss)


def _note(outputs: list[Any]) -> Callable[..., None]:
    return lambda _block, _args, output: outputs.append(output)


@contextmanager
def answering(model: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, these blocks give these outputs, whatever they are fed."""
    blocks = {model.get_submodule(name): output for name, output in outputs.items()}
    for block, output in blocks.items():
        block.forward = lambda *_args, output=output, **_kwargs: output
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def plan(table: Sequence[Entry], linears: Mapping[str, nn.Module], size: float) -> dict[str, int | None]:
    """The ranks of the largest plan within `size`, which all layers at the least ratio are; None where a layer stays dense."""
    if size == 1:
        return dict.fromkeys(linears)
    ranks = {ratio: uniform_ranks(linears, ratio) for ratio in {entry.ratio for entry in table}}

    def ranks_at(p: int) -> dict[str, int | None]:
        ratio: dict[str, float] = {}
        for entry in table[p:]:
            ratio[entry.name] = min(entry.ratio, ratio.get(entry.name, 1.0))
        return {name: ranks[ratio[name]][name] if name in ratio else None for name in linears}

    most = allowed(size, stored_at(linears, dict.fromkeys(linears)))
    low, high = 0, len(table)  # the largest p that fits is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if stored_at(linears, ranks_at(middle)) <= most else (low, middle)
    return ranks_at(low)
