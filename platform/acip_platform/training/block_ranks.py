"""Bases and scores of a base model that does not fit in memory, a block at a time (acip.calibration.block_calibration)."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from acip.base import Base
from acip.calibration.block_calibration import calibrate_by_block
from acip.calibration.block_pass import PassFiles
from acip.calibration.result import Calibration
from acip.data import TokenBatches
from acip_platform.scheduling.fleet import Job
from acip_platform.storage.checkpoints import Checkpoints, Emit
from acip_platform.training.idle_workers import IdleWorkers
from acip_platform.training.layer_codes import chain_of


@contextmanager
def calibrated_by_block(
    job: Job, base: Base, windows: Tensor, checkpoints: Checkpoints, emit: Emit, device: torch.device
) -> Iterator[Calibration]:
    """Yield the calibration of `base`, which does not train, with the weights of one block on `device` at a time.

    `windows` [n, T] are those of the calibration text. Directions are mapped from files in the cache of this machine. A job that was
    stopped continues with them; they are removed when the context ends without an error, that is, when the artifact holds them.
    """
    recipe, began = job.recipe, time.monotonic()
    digest = hashlib.sha256(json.dumps([base.digest, recipe.to_dict()], sort_keys=True).encode() + windows.contiguous().numpy().tobytes())
    files = PassFiles(checkpoints.store.cache / "ranks" / checkpoints.attempt / digest.hexdigest()[:12])
    workers = IdleWorkers(device.type == "cuda")

    def progress(what: str, done: int, total: int) -> None:
        emit("code", what=what, done=done, total=total)

    batches = TokenBatches(windows, recipe.batch_size, recipe.seed)
    calibration = calibrate_by_block(
        chain_of(base, recipe), recipe, windows, batches.__getitem__, files.folder, device, progress, spread=workers
    )
    emit(
        "stage",
        text=f"{recipe.basis} basis and {recipe.scores} scores of {len(calibration.table.layers)} layers, a block at a time: "
        f"{time.monotonic() - began:.0f} s{workers.text}",
    )
    yield calibration
    files.remove()
