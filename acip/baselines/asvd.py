"""ASVD: the SVD of weights that are scaled by the magnitude of their inputs, with ranks by the sensitivity of each layer.

Source: Yuan et al., 2024, arXiv 2312.05821.

    d = (sum over windows of mean_t |x_t|)^alpha + 1e-6        scale of each input feature
    W diag(d) = U S V^T                                        truncated at r
    y = (U_r S_r^1/2) (S_r^1/2 V_r^T diag(d)^-1) x

Sensitivity search: for every layer and every ratio, measure the perplexity on calibration text with only this layer cut to this ratio.
Sort the entries by perplexity, highest first, and exclude the first p of them. Each layer takes its smallest remaining ratio, or stays
dense. Storage grows with p, so bisection finds the largest p that fits a size. The table is measured once for all sizes.

Two differences from the authors' code: the SVD is exact, not randomized, and p is exactly the largest that fits; the authors' p may be
off by one.
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
    require_calls,
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
    """The loss of the model with one layer at one ratio."""

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
    """Yield (size, model) for each size.

    d is computed from the first `scale_windows` windows, the sensitivities from the first `search_windows`, in layers x ratios passes.
    Raises RecipeError for invalid options, and BudgetError for a size that the ratios cannot reach.
    """
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise RecipeError(f"ratios are {ratios!r}; each must be between 0 and 1.")
    if scale_windows < 1 or search_windows < 1:
        raise RecipeError(f"scale_windows is {scale_windows} and search_windows is {search_windows}; both must be at least 1.")
    model = base.model
    linears = find_linears(model, exclude)
    dense, least = (stored_at(linears, ranks) for ranks in (dict.fromkeys(linears), uniform_ranks(linears, min(ratios))))
    if least > allowed(size := min(sizes), dense):
        smallest = -(-least * 10**4 // dense) / 10**4
        raise BudgetError(f"size {size!r} cannot be reached with these ratios; the smallest size is {smallest:.4f}. Add smaller ratios.")
    d = scales(model, linears, windows[:scale_windows], alpha)
    factors: dict[str, Factors] = {}
    for name, layer_factors in each(linears, lambda name, linear: scaled_svd(linear, d[name])):
        factors[name] = layer_factors
        progress("SVD", len(factors), len(linears))
    table = sensitivities(model, linears, factors, windows[:search_windows], ratios, progress) if min(sizes) < 1 else []
    for size in sizes:
        with swapped(model, layers_at(linears, factors, plan(table, linears, size))):
            yield size, model


@torch.no_grad()
def scales(model: nn.Module, linears: Mapping[str, nn.Module], windows: Tensor, alpha: float) -> dict[str, Tensor]:
    """Return d [N] per layer, in the accumulation dtype."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x_SN: Tensor) -> None:
        sums[name] = sums.get(name, 0) + widened(x_SN).abs().mean(0)

    with hooked(on_inputs(linears, add)):
        feed(model, windows)
    require_calls(linears, sums)
    return {name: total**alpha + 1e-6 for name, total in sums.items()}


@torch.no_grad()
def scaled_svd(linear: nn.Module, d_N: Tensor) -> Factors:
    """Return the factors with d folded back in: at full rank, W = left right exactly."""
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
    """Return the entries of all layers and ratios, highest loss first.

    The blocks before that of the cut layer return their outputs in the base model, without computing them again. This saves half of
    the work.
    """
    device, blocks = next(model.parameters()).device, blocks_of(model, linears)
    sums = {(name, ratio): 0.0 for name in linears for ratio in ratios}
    ranks = {ratio: uniform_ranks(linears, ratio) for ratio in ratios}
    done, total = 0, len(windows) * len(sums)
    for window in windows.split(1):
        ids_1T = window.long().to(device)
        outputs: dict[str, list[Any]] = {}
        with hooked(model.get_submodule(block).register_forward_hook(_append_to(outputs.setdefault(block, []))) for block in blocks):
            next_token(model, ids_1T)
        before: dict[str, Any] = {}
        for block, block_outputs in outputs.items():
            with fixed_outputs(model, before):
                for name, ratio in product(blocks[block], ratios):
                    rank = ranks[ratio][name]
                    assert rank is not None
                    with swapped(model, {name: factors[name].at(linears[name], rank)}):
                        sums[name, ratio] += float(next_token(model, ids_1T)) / len(windows)
                    progress("sensitivity", done := done + 1, total)
            if len(block_outputs) == 1:  # a block that runs several times has several outputs
                before[block] = block_outputs[0]
    table = [Entry(loss if math.isfinite(loss) else math.inf, name, ratio) for (name, ratio), loss in sums.items()]
    return sorted(table, key=lambda entry: -entry.loss)


def _append_to(outputs: list[Any]) -> Callable[..., None]:
    return lambda _block, _args, output: outputs.append(output)


@contextmanager
def fixed_outputs(model: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Make the blocks named in `outputs` return these outputs for any input, inside the context."""
    blocks = {model.get_submodule(name): output for name, output in outputs.items()}
    for block, output in blocks.items():
        block.forward = lambda *_args, output=output, **_kwargs: output
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def plan(table: Sequence[Entry], linears: Mapping[str, nn.Module], size: float) -> dict[str, int | None]:
    """Return the ranks of the largest plan within `size`; None = dense. All layers at the smallest ratio must fit in `size`."""
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
