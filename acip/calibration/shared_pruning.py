"""One trajectory, all stop ratios: calibrations that prune alike share their pruning, and fork from it.

    size 1.0 ----prune----- 0.8 ----------- 0.6 ----------- 0.4        one trunk, to the smallest stop ratio
                             \\ post-tune    \\ post-tune    \\ post-tune    a fork for each

Pruning looks at its stop ratio only to stop (paper, Algorithm 1). So the step at which a run to 0.4 first comes to 0.8 is the
very step, in every bit (CPU), at which a run to 0.8 ends its pruning. The state that is saved there is this run's checkpoint:
`calibrate(model, batches, recipe_to_0.8, resume=folder)` goes on as if it had pruned by itself.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from acip.calibration.loop import Batches, calibrate
from acip.calibration.losses import Task, next_token
from acip.calibration.state import CalibrationState, StepReport, history
from acip.recipe import Recipe

LATER = ("stop_ratio", "post_tune", "post_tune_lr", "distill_weight", "dense_if_no_saving")  # what pruning reads only to stop, or never
Keep = Callable[[list[float], CalibrationState], None]


def shared_prunings(recipes: Sequence[Recipe]) -> list[list[int]]:
    """Which of `recipes`, by index, share their pruning. Those that don't prune are in no group.

    How many steps post-tuning takes isn't pruning's business either, but decides how much text is read, and so its order.
    """
    groups: dict[str, list[int]] = {}
    for i, recipe in enumerate(recipes):
        if recipe.prunes:
            pruning = {name: value for name, value in recipe.to_dict().items() if name not in LATER}
            groups.setdefault(json.dumps(pruning), []).append(i)
    return list(groups.values())


def prune(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    stop_ratios: Iterable[float],
    keep: Keep,
    resume: str | Path | None = None,
    observe: Callable[[list[StepReport], CalibrationState], None] = lambda reports, state: None,
    task: Task = next_token,
) -> None:
    """The trunk: prune the parametrized `model` by `recipe` down to the smallest of `stop_ratios`.

    `keep(ratios, state)` is called at the step that first comes to these ratios, and has to save the state; a saved one is also
    what `resume` goes on from. The host looks after every step: these states are exact. Raises what `calibrate` raises; what was
    kept before is good.
    """
    waiting = sorted(stop_ratios, reverse=True)
    if resume is not None:
        reached = history(Path(resume))[-1].size
        waiting = [ratio for ratio in waiting if ratio < reached]
    if not waiting:
        return

    def look(reports: list[StepReport], state: CalibrationState) -> None:
        observe(reports, state)
        crossed = [ratio for ratio in waiting if state.size <= ratio]
        if crossed:
            keep(crossed, state)
            del waiting[: len(crossed)]

    to_smallest = replace(recipe, stop_ratio=waiting[-1], post_tune_steps=0, total_steps=None)
    calibrate(model, batches, to_smallest, resume, look, task, look_every=1)
