"""Shared pruning: calibrations that differ only in their stop ratio or post-tuning prune once, and each resumes from a state of that run.

    size 1.0 ----prune----- 0.8 ----------- 0.6 ----------- 0.4        one pruning run, to the smallest stop ratio
                             \\ post-tune    \\ post-tune    \\ post-tune    one calibration each

The stop ratio influences nothing in pruning but its end (paper, Algorithm 1). The step at which a run to 0.4 first reaches 0.8 is therefore
the step at which a run to 0.8 ends its pruning, bit for bit on a CPU. The state that is saved at this step serves as a checkpoint:
`calibrate(model, batches, recipe_to_0.8, resume=folder)` continues as if it had pruned by itself.
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

POST_PRUNING_FIELDS = ("stop_ratio", "post_tune", "post_tune_lr", "post_tune_lr_end", "distill_weight", "dense_if_no_saving")
Keep = Callable[[list[float], CalibrationState], None]


def shared_prunings(recipes: Sequence[Recipe]) -> list[list[int]]:
    """Return groups of indices into `recipes` that can share their pruning. Recipes that do not prune are in no group.

    The number of post-tuning steps must be equal within a group: it decides how much text is read, and so the order of the batches.
    """
    groups: dict[str, list[int]] = {}
    for i, recipe in enumerate(recipes):
        if recipe.prunes:
            pruning = {name: value for name, value in recipe.to_dict().items() if name not in POST_PRUNING_FIELDS}
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
    """Prune the parametrized `model` by `recipe` down to the smallest of `stop_ratios`, in place.

    `keep(ratios, state)` is called at the step that first reaches these ratios, and must save the state. `resume` is a folder with a saved
    state. The host reads after every step, so that these states are exact. Raises CalibrationError as `calibrate` does;
    states that were saved before an error remain valid.
    """
    waiting = sorted(stop_ratios, reverse=True)
    if resume is not None:
        size = history(Path(resume))[-1].size
        waiting = [ratio for ratio in waiting if ratio < size]
    if not waiting:
        return

    def keep_reached(reports: list[StepReport], state: CalibrationState) -> None:
        observe(reports, state)
        reached = [ratio for ratio in waiting if state.size <= ratio]
        if reached:
            keep(reached, state)
            del waiting[: len(reached)]

    to_smallest = replace(recipe, stop_ratio=waiting[-1], post_tune_steps=0, total_steps=None)
    calibrate(model, batches, to_smallest, resume, keep_reached, task, look_every=1)
