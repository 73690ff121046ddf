"""Code the target layers of a base model before its calibration, if the recipe's field `code` says so.

    finished codes of an earlier run of the job -> statistics of the missing layers -> their codes -> finished codes, on disk

The memory is bounded: finished codes are in a temporary file, and the memory that they took is returned to the system. Statistics are
gathered a block at a time and are in files, if those of all layers are large or the job is streamed. The file of a block is removed when
the codes of its layers are stored.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace

import torch
from mlflow.exceptions import MlflowException
from torch import Tensor, nn

from acip.artifact.read_back import tiny_model
from acip.base import Base
from acip.calibration import memory_check
from acip.calibration.bases import fisher_bases_cached
from acip.calibration.basis_cache import BasisCache
from acip.calibration.block_pass import PassFiles
from acip.calibration.memory_plan import STATISTICS, UNSAVED_CODES, statistics_bytes
from acip.coding.block_statistics import StoredStatistics, block_statistics
from acip.coding.coded_model import RATES, CodedLayer, CodedModel, assembled, code_layers, step_scales
from acip.coding.scratch import Scratch
from acip.coding.statistics import LayerStatistics, layer_statistics
from acip.coding.step_tuning import tune_steps
from acip.errors import BaseModelError, RecipeError
from acip.layers.block_chain import BlockChain
from acip.layers.targets import find_linears, weight_MN
from acip.recipe import Recipe
from acip.sizing.budget import MEGA
from acip.utils.malloc import trim
from acip_platform.scheduling.fleet import Job
from acip_platform.storage.checkpoints import Checkpoints, Emit
from acip_platform.storage.code_checkpoints import CodeCheckpoints
from acip_platform.tracking.registry import few_retries
from acip_platform.tracking.runs import Run
from acip_platform.training.idle_workers import IdleWorkers

VERSION = 2  # part of the identity of codes; increase it when the same inputs give others


def codes_of(
    job: Job,
    base: Base,
    windows: Tensor,
    run: Run,
    emit: Emit,
    checkpoints: Checkpoints,
    device: torch.device | None = None,
    streamed: bool = False,
    cache: BasisCache | None = None,
) -> CodedModel | None:
    """Return coded versions of the target layers of `base`, or None if the recipe asks for none.

    The statistics are those of the first `sample_windows` of `windows`, token ids [n, T]. `base.model` is not parametrized yet. Layers
    whose codes are stored beside the `checkpoints` are read back. Layers are computed on `device` (None = that of the model). If the job
    is `streamed`, the model is in the memory of the CPU or mapped from its files, and one block at a time is on `device`. Fisher bases, if
    the recipe has them and the memory has room, are computed from the same passes over the text and put in `cache`.

    Seconds and megabytes are logged to the run. Raises RecipeError if several workers share the model, and BaseModelError if a model can't
    be run a block at a time but has to be.
    """
    recipe, device = job.recipe, device or next(base.model.parameters()).device
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
        layers.clear()
        trim()
    if coded:
        emit("stage", text=f"read back the codes of {len(coded)} of {len(linears)} layers, which an earlier run of this job had finished")
    missing = {name: layer for name, layer in linears.items() if name not in coded}
    by_block = streamed or sum(statistics_bytes(*weight_MN(layer).shape) for layer in missing.values()) > STATISTICS
    files = PassFiles(checkpoints.store.cache / "statistics" / checkpoints.attempt / stored.prefix)
    workers = IdleWorkers(device.type == "cuda")
    room = not (by_block or coded) and memory_check.fits_shared(base.model, recipe, memory_check.available(base.model, device), device)

    def solved(done: int, total: int) -> None:
        emit("code", what="bases", done=done, total=total)

    together = fisher_bases_cached(base.model, missing, recipe, text, cache, workers, solved) if cache and room else nullcontext(0)
    with together as bases:
        statistics = gathered_statistics(base, missing, text, recipe, files if by_block else None, device, emit, streamed)
    gathered = time.monotonic()
    scales = scales or step_scales(missing, statistics, device=device)

    def progress(done: int) -> None:
        emit("code", what="codes", done=len(linears) - len(missing) + done, total=len(linears))

    for some in unsaved(code_layers(missing, statistics, scales, device, workers), len(missing), stored.every_s, progress):
        if stored.write(scales, some) and isinstance(statistics, StoredStatistics):
            statistics.drop(some)
        coded |= in_scratch(some, scratch)
        some.clear()
        trim()
    files.remove()
    model = assembled({name: coded[name] for name in linears})
    ended = time.monotonic()
    emit(
        "stage",
        text=f"codes of {len(linears)} layers: {model.bytes / MEGA:.1f} MB in {ended - began:.0f} s, "
        f"of which {gathered - began:.0f} s for the Fisher statistics"
        + (f" and {bases} Fisher bases" if bases else ", a block at a time" * by_block)
        + workers.text,
    )
    with suppress(MlflowException), few_retries():  # two metrics must not stop a calibration while MLflow is down
        run.metrics([(0, {"coding_seconds": ended - began, "codes_mb": model.bytes / MEGA})])
    return tuned(job, base, linears, model, windows, run, emit)


def gathered_statistics(
    base: Base,
    linears: Mapping[str, nn.Module],
    text: Tensor,
    recipe: Recipe,
    files: PassFiles | None,
    device: torch.device,
    emit: Emit,
    streamed: bool,
) -> Mapping[str, LayerStatistics]:
    """Return the statistics of `linears`: of the whole model, or, if `files` are given, a block at a time with these files.

    A model that can't be run a block at a time is run whole, unless the job is `streamed`; then BaseModelError is raised.
    """

    def progress(done: int, total: int) -> None:
        emit("code", what="statistics", done=done, total=total)

    if not linears:
        return {}
    if files is None:
        return layer_statistics(base.model, linears, text, recipe.seed, progress)
    try:
        chain = chain_of(base, recipe)
    except BaseModelError:
        if streamed:
            raise
        return layer_statistics(base.model, linears, text, recipe.seed, progress)
    return block_statistics(chain, linears, text, files, device, recipe.seed, progress)


def chain_of(base: Base, recipe: Recipe) -> BlockChain:
    """Return the blocks of the model of `base`.

    Raises BaseModelError if the model can't be run a block at a time. This is checked with a small model of the same class.
    """
    chain = BlockChain(base.model)
    if (tiny := tiny_model(base.model, recipe.exclude)) is not None:
        BlockChain(tiny).check(torch.arange(4)[None])
    return chain


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
    settings = {"version": VERSION, "base": base.digest, "rates": RATES}
    settings |= {name: getattr(recipe, name) for name in ("exclude", "dtype", "seed")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + text.contiguous().numpy().tobytes()).hexdigest()[:12]


def unsaved(
    coded: Iterable[tuple[str, CodedLayer]], count: int, every_s: float, progress: Callable[[int], None]
) -> Iterator[dict[str, CodedLayer]]:
    """Yield the layers that have been coded since the last time, every `every_s` seconds or UNSAVED_CODES bytes. `count` are all layers."""
    some: dict[str, CodedLayer] = {}
    since = time.monotonic()
    for done, (name, layer) in enumerate(coded, 1):
        some[name] = layer
        progress(done)
        if done == count or time.monotonic() - since >= every_s or sum(layer.bytes for layer in some.values()) >= UNSAVED_CODES:
            yield some
            some, since = {}, time.monotonic()


def in_scratch(layers: Mapping[str, CodedLayer], scratch: Scratch) -> dict[str, CodedLayer]:
    """Return the same layers with their streams in a temporary file."""
    streams = iter(scratch.add([packed.stream for layer in layers.values() for packed in layer.versions]))
    return {
        name: replace(layer, versions=[replace(packed, stream=next(streams)) for packed in layer.versions])
        for name, layer in layers.items()
    }
