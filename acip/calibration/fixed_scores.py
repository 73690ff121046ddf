"""Scores that are computed once, before the first optimizer step: Fisher information (our default) or singular values (paper D.6)."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from acip.calibration.losses import Task, as_base
from acip.errors import CalibrationError
from acip.layers import sharding
from acip.layers.compressible import Compressible
from acip.layers.svd_linear import SVDLinear
from acip.modeling_acip import widened
from acip.recipe import Recipe
from acip.sizing.score_map import fisher


def fixed_scores(model: nn.Module, layers: Mapping[str, Compressible], recipe: Recipe, batch: Callable[[int], Any], task: Task) -> Tensor:
    """Return the scores [D] of all directions of the parametrized `layers`, by `recipe.scores`.

    Fisher scores read `recipe.score_windows` windows; `batch(i)` returns the i-th batch. Raises CalibrationError if the loss
    does not depend on a layer.
    """
    cores = {name: core for name, core in layers.items() if isinstance(core, SVDLinear)}
    if recipe.scores == "singular_values":
        return torch.cat([singular_values(core) for core in cores.values()])
    with fisher(cores) as scores, as_base(cores):
        for part in scored_parts(recipe, batch):
            task(model, part).backward()
    require_gradients([name for name in cores if name not in scores])
    score = torch.cat([scores[name] for name in cores])
    # Each worker sums over its part of the tokens the squared gradients of a mean over that part: too large by the number of workers.
    sharding.average([score])
    return score / sharding.workers()


def singular_values(core: Compressible) -> Tensor:
    """Return the scores [K] of a layer whose basis is that of the SVD."""
    return widened(core.right.read()).norm(dim=1)


def scored_parts(recipe: Recipe, batch: Callable[[int], Any]) -> Iterator[Any]:
    """Yield the windows for Fisher scores in parts, which are scored one after the other: the inputs of every layer are kept in memory."""
    for i in range(-(-recipe.score_windows // recipe.batch_size)):
        windows = batch(i)
        yield from windows.split(scored_at_once(len(windows), recipe.seq_len))


def scored_at_once(batch_size: int, seq_len: int) -> int:
    """Return the number of windows per pass for Fisher scores: 1 for windows of 1024 tokens or more."""
    return 1 if seq_len >= 1024 else batch_size


def require_gradients(unreached: Collection[str]) -> None:
    """Raise CalibrationError if `unreached`, the layers without a gradient, is not empty."""
    if unreached:
        raise CalibrationError(
            f"the loss does not depend on {len(unreached)} layers, for example {next(iter(unreached))}, so they cannot be scored. "
            "Add a part of their names to exclude."
        )
