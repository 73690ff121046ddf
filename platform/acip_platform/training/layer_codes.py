"""Code the target layers of a base model before its calibration, if the recipe's field `code` says so."""

import time
from collections.abc import Mapping
from contextlib import suppress

from mlflow.exceptions import MlflowException
from torch import Tensor, nn

from acip.base import Base
from acip.coding.coded_model import CodedModel, code_model
from acip.coding.statistics import layer_statistics
from acip.coding.step_tuning import tune_steps
from acip.errors import RecipeError
from acip.layers.targets import find_linears
from acip.sizing.budget import MEGA
from acip_platform.scheduling.fleet import Job
from acip_platform.storage.checkpoints import Emit
from acip_platform.tracking.registry import few_retries
from acip_platform.tracking.runs import Run


def code_layers(job: Job, base: Base, windows: Tensor, run: Run, emit: Emit) -> CodedModel | None:
    """Return coded versions of the target layers of `base`, or None if the recipe asks for none.

    The statistics are those of the first `sample_windows` of `windows`, token ids [n, T]. `base.model` is not parametrized yet. Seconds
    and megabytes are logged to the run. Raises RecipeError if several workers share the model.
    """
    recipe = job.recipe
    if recipe.code == "ranks":
        return None
    if job.num_workers > 1:
        raise RecipeError(f"code is {recipe.code!r} and num_workers is {job.num_workers}: one worker codes all layers. Change one of them.")
    began = time.monotonic()
    linears = find_linears(base.model, recipe.exclude)
    text = windows[: recipe.sample_windows]
    statistics = layer_statistics(
        base.model, linears, text, recipe.seed, lambda done, total: emit("code", what="statistics", done=done, total=total)
    )
    gathered = time.monotonic()
    coded = code_model(linears, statistics, progress=lambda done, total: emit("code", what="codes", done=done, total=total))
    ended = time.monotonic()
    emit(
        "stage",
        text=f"codes of {len(linears)} layers: {coded.bytes / MEGA:.1f} MB in {ended - began:.0f} s, "
        f"of which {gathered - began:.0f} s for the Fisher statistics",
    )
    with suppress(MlflowException), few_retries():  # two metrics must not stop a calibration while MLflow is down
        run.metrics([(0, {"coding_seconds": ended - began, "codes_mb": coded.bytes / MEGA})])
    return tuned(job, base, linears, coded, windows, run, emit)


def tuned(job: Job, base: Base, linears: Mapping[str, nn.Module], coded: CodedModel, windows: Tensor, run: Run, emit: Emit) -> CodedModel:
    """Return `coded` with trained step sizes, if `recipe.code_tune_steps` is not 0. Seconds are logged to the run."""
    recipe = job.recipe
    if not recipe.code_tune_steps:
        return coded
    began = time.monotonic()
    coded = tune_steps(
        base.model, linears, coded, windows, recipe.code_tune_steps, seed=recipe.seed,
        progress=lambda done, total: emit("code", what="step sizes", done=done, total=total),
    )  # fmt: skip
    seconds = time.monotonic() - began
    emit("stage", text=f"trained the step sizes of the codes in {recipe.code_tune_steps} steps: {seconds:.0f} s")
    with suppress(MlflowException), few_retries():
        run.metrics([(0, {"code_tuning_seconds": seconds})])
    return coded
