"""Code the target layers of a base model before its calibration, if the recipe's field `code` says so.

    finished codes of an earlier run of the job -> statistics of the missing layers -> their codes -> finished codes, on disk

The memory is bounded: statistics are gathered for groups of layers, and finished codes are in a temporary file.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from mlflow.exceptions import MlflowException
from torch import Tensor, nn

from acip.base import Base
from acip.calibration.memory_plan import UNSAVED_CODES
from acip.coding.coded_model import RATES, CodedLayer, CodedModel, assembled, code_layer, step_scales
from acip.coding.grouped_statistics import grouped_statistics, groups
from acip.coding.scratch import Scratch
from acip.coding.step_tuning import tune_steps
from acip.errors import RecipeError
from acip.layers.targets import find_linears
from acip.recipe import Recipe
from acip.sizing.budget import MEGA
from acip_platform.scheduling.fleet import Job
from acip_platform.storage.checkpoints import Checkpoints, Emit
from acip_platform.storage.code_checkpoints import CodeCheckpoints
from acip_platform.tracking.registry import few_retries
from acip_platform.tracking.runs import Run


def code_layers(job: Job, base: Base, windows: Tensor, run: Run, emit: Emit, checkpoints: Checkpoints) -> CodedModel | None:
    """Return coded versions of the target layers of `base`, or None if the recipe asks for none.

    The statistics are those of the first `sample_windows` of `windows`, token ids [n, T]. `base.model` is not parametrized yet. Layers
    whose codes are stored beside the `checkpoints` are read back. Seconds and megabytes are logged to the run. Raises RecipeError if
    several workers share the model.
    """
    recipe = job.recipe
    if recipe.code == "ranks":
        return None
    if job.num_workers > 1:
        raise RecipeError(f"code is {recipe.code!r} and num_workers is {job.num_workers}: one worker codes all layers. Change one of them.")
    began = time.monotonic()
    linears, text = find_linears(base.model, recipe.exclude), windows[: recipe.sample_windows]
    scratch = Scratch(checkpoints.store.cache)
    stored = CodeCheckpoints(checkpoints, identity_of(base, recipe, text))
    scales: list[float] = []
    coded: dict[str, CodedLayer] = {}
    for stored_scales, layers in stored.read():
        scales = stored_scales  # the same in all folders
        coded |= in_scratch({name: layer for name, layer in layers.items() if name in linears}, scratch)
    if coded:
        emit("stage", text=f"read back the codes of {len(coded)} of {len(linears)} layers, which an earlier run of this job had finished")
    missing = {name: layer for name, layer in linears.items() if name not in coded}
    statistics = grouped_statistics(
        base.model, missing, text, scratch, seed=recipe.seed,
        progress=lambda done, total: emit("code", what="statistics", done=done, total=total),
    )  # fmt: skip
    gathered = time.monotonic()
    scales = scales or step_scales(missing, statistics)

    def progress(done: int) -> None:
        emit("code", what="codes", done=len(linears) - len(missing) + done, total=len(linears))

    for some in unsaved(missing, lambda name: code_layer(missing[name], statistics[name], scales), stored.every_s, progress):
        stored.write(scales, some)
        coded |= in_scratch(some, scratch)
    model = assembled({name: coded[name] for name in linears})
    ended = time.monotonic()
    emit(
        "stage",
        text=f"codes of {len(linears)} layers: {model.bytes / MEGA:.1f} MB in {ended - began:.0f} s, "
        f"of which {gathered - began:.0f} s for the Fisher statistics in {len(groups(missing))} passes over the text",
    )
    with suppress(MlflowException), few_retries():  # two metrics must not stop a calibration while MLflow is down
        run.metrics([(0, {"coding_seconds": ended - began, "codes_mb": model.bytes / MEGA})])
    return tuned(job, base, linears, model, windows, run, emit)


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


def identity_of(base: Base, recipe: Recipe, text: Tensor) -> str:
    """Return a checksum of everything that decides the codes."""
    settings = {"base": base.digest, "rates": RATES, "exclude": recipe.exclude, "dtype": recipe.dtype, "seed": recipe.seed}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + text.contiguous().numpy().tobytes()).hexdigest()[:12]


def unsaved(
    names: Mapping[str, nn.Module], code: Callable[[str], CodedLayer], every_s: float, progress: Callable[[int], None]
) -> Iterator[dict[str, CodedLayer]]:
    """Code layers, and yield those that have been finished since the last time, every `every_s` seconds or UNSAVED_CODES bytes."""
    some: dict[str, CodedLayer] = {}
    since = time.monotonic()
    for done, name in enumerate(names, 1):
        some[name] = code(name)
        progress(done)
        if done == len(names) or time.monotonic() - since >= every_s or sum(layer.bytes for layer in some.values()) >= UNSAVED_CODES:
            yield some
            some, since = {}, time.monotonic()


def in_scratch(layers: Mapping[str, CodedLayer], scratch: Scratch) -> dict[str, CodedLayer]:
    """Return the same layers with their streams in a temporary file."""
    streams = iter(scratch.add([packed.stream for layer in layers.values() for packed in layer.versions]))
    return {
        name: replace(layer, versions=[replace(packed, stream=next(streams)) for packed in layer.versions])
        for name, layer in layers.items()
    }
