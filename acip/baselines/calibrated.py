"""ACIP, with the settings of the paper or ours: parametrize, calibrate, and cut to every size from one score map (paper 2.2)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from acip.base import Base
from acip.baselines.prefix_factors import Progress, swapped
from acip.calibration.loop import calibrate
from acip.calibration.parametrize import parametrize, restore
from acip.calibration.state import CalibrationState, StepReport
from acip.data import TokenBatches
from acip.errors import RecipeError, cited
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import targets
from acip.recipe import Recipe, named
from acip.sizing.budget import Budget
from acip.sizing.model_sizes import set_size

NO_CHANGES: Mapping[str, Any] = {}


def run(
    base: Base,
    windows: Tensor,
    sizes: Sequence[float],
    progress: Progress,
    *,
    recipe: str | Recipe,
    exclude: tuple[str, ...] = (),
    set: Mapping[str, Any] = NO_CHANGES,
) -> Iterator[tuple[float, nn.Module]]:
    """Yield (size, model) for each size, by `recipe` (a name or a Recipe) with the changes `set`, as in fleet files.

    The fields `seq_len` and `dtype` of the recipe have no effect: the windows and the base model determine them.
    """
    chosen = dataclasses.replace(changed(recipe, set), exclude=exclude, seq_len=windows.shape[1])
    model = base.model

    def observe(reports: list[StepReport], _state: CalibrationState) -> None:
        progress(reports[-1].phase, round(100 * reports[-1].progress), 100)

    try:
        parametrize(model, chosen, windows, lambda done, total: progress("basis", done, total))
        batches = TokenBatches(windows, chosen.batch_size, chosen.seed)
        table = calibrate(model, batches, chosen, observe=observe).table
        cores = {name: core for name, core in targets(model).items() if isinstance(core, ElasticLinear)}
        for size in sizes:
            set_size(cores, table.cut(Budget(ratio=size)))
            with swapped(model, {name: core.materialize(table.storage) for name, core in cores.items()}):
                yield size, model
    finally:
        restore(model)


def changed(recipe: str | Recipe, changes: Any) -> Recipe:
    """Return `recipe` with `changes`. RecipeError if they are not valid changes."""
    if not isinstance(changes, Mapping):
        raise RecipeError(f"set is {cited(changes)}; it must be a mapping of recipe fields.")
    if "exclude" in changes:
        raise RecipeError("set contains exclude. All methods must exclude the same layers; use `exclude` of the arena file instead.")
    return Recipe.from_dict(dict(changes), named(recipe) if isinstance(recipe, str) else recipe)
