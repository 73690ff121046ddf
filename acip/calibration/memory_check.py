"""Check before a calibration whether it fits in memory, and suggest recipe changes if it does not."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import nn

from acip.calibration.memory_plan import Memory, Phase, predict, predict_shared, predict_streamed
from acip.errors import CalibrationError
from acip.recipe import Recipe
from acip.utils.free_memory import free_memory

HEADROOM = 0.05  # of the prediction, for the losses of allocators


def fits(memory: Memory | Phase, available: float) -> bool:
    """Return whether `memory`, with headroom, fits in `available` bytes."""
    return (memory.peak if isinstance(memory, Memory) else memory.total) * (1 + HEADROOM) <= available


def plan(
    model: nn.Module, recipe: Recipe, available: float, device: str | torch.device | None = None, workers: int = 1, context: int = 0,
    sampled: bool = False,
) -> Memory:  # fmt: skip
    """Return the predicted memory, with the phases streamed that do not fit in `available` bytes otherwise, where that is possible.

    `context` and `sampled` are those of `predict`. If one phase of the calibration has to be streamed, all of them are. Such a model is not
    sampled from, so the job needs text that was sampled before, and there is no trial step.
    """
    streamed = predict_streamed(model, recipe, device, workers, context)
    phases = predict(model, recipe, device, workers, context, sampled).phases
    calibrating = {*streamed} - {"measure"}
    by_block = bool(calibrating) and not all(fits(phase, available) for phase in phases if phase.name in {*calibrating, "prune"})
    left_out = {"sample", "prune"} if by_block else set()

    def planned(phase: Phase) -> Phase:
        held = not by_block if phase.name in calibrating else fits(phase, available)
        return phase if held else streamed.get(phase.name, phase)

    return Memory(tuple(planned(phase) for phase in phases if phase.name not in left_out))


def fits_shared(model: nn.Module, recipe: Recipe, available: float, device: str | torch.device | None = None) -> bool:
    """Return whether the moments of the Fisher basis can be summed in the passes that gather the statistics of codes, and fit then."""
    phase = predict_shared(model, recipe, device)
    return phase is not None and fits(phase, available)


def check(
    model: nn.Module, recipe: Recipe, available: float, device: str | torch.device | None = None, workers: int = 1, context: int = 0,
    sampled: bool = False,
) -> Memory:  # fmt: skip
    """Return the predicted memory (see `plan`). Raises CalibrationError if it does not fit.

    The message lists changes of the fleet file that fit.
    """
    memory = plan(model, recipe, available, device, workers, context, sampled)
    if fits(memory, available):
        return memory
    ways = [f"{text} ({_gigabytes(peak)} GB)" for text, peak in _ways(model, recipe, available, device, workers, context, sampled)]
    raise CalibrationError(
        f"the calibration needs {_gigabytes(memory.peak)} GB and {HEADROOM:.0%} of headroom, "
        f"but {_gigabytes(available, math.floor)} GB are available. "
        f"Its peak is in {memory.worst}. "
        + ("Pruning and post-tuning need the whole model. " if recipe.trains and recipe.code != "bits" else "")
        + (f"Changes that fit: {'; '.join(ways)}." if ways else "No change of settings fits; use a larger device.")
    )


def _gigabytes(bytes_: float, rounded: Callable[[float], int] = math.ceil) -> str:
    """Format bytes as GB. Needs are rounded up and available memory is rounded down, so that a refusal never names two equal amounts."""
    return f"{rounded(bytes_ / 1e7) / 100:.2f}"


def available(model: nn.Module, device: torch.device) -> float:
    """Return the bytes that a calibration of `model` may use on `device`: free memory, plus the memory that this process already holds.

    See `acip.utils.free_memory` for a CPU.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    parameters = sum(p.numel() * p.itemsize for p in model.parameters() if p.device.type == "cpu")
    used = psutil.Process().memory_info()
    held = min(parameters, used.rss - getattr(used, "shared", 0))  # weights that are mapped from a file are not held
    return free_memory() + held


def _ways(
    model: nn.Module, recipe: Recipe, available: float, device: Any, workers: int, context: int, sampled: bool
) -> list[tuple[str, float]]:
    """Return changes that fit, in the syntax of fleet files, with their peaks: of one field, else of several or of the workers."""

    def tried(*changes: dict[str, Any]) -> list[tuple[str, float]]:
        """Return the first of `changes` that fits, in a list, or an empty list."""
        for change in changes:
            fields = {name: value for name, value in change.items() if name != "num_workers"}
            memory = plan(model, replace(recipe, **fields), available, device, change.get("num_workers", workers), context, sampled)
            if fits(memory, available):
                return [(", ".join(f"{name}: {_yaml(value)}" for name, value in change.items()), memory.peak)]
        return []

    def batch(b: int) -> dict[str, Any]:
        """Return the change to batches of `b` windows, with about as many windows per optimizer step as now."""
        return (
            {"batch_size": b, "gradient_accumulation_steps": max(1, recipe.gradient_accumulation_steps * recipe.batch_size // b)}
            if b != recipe.batch_size
            else {}
        )

    lean, four_bit = {"gradient_checkpointing": True}, recipe.quantize != "none"
    to_four_bit = [{"quantize": "nf4"}] if not four_bit and workers == 1 else []  # 4-bit layers cannot be sharded
    smaller = [batch(b) for b in range(recipe.batch_size - 1, 0, -1) if recipe.batch_size % b == 0 and b % workers == 0]
    least = lean | (smaller[-1] if smaller else {})
    more = [lean | {"num_workers": n} | (batch(n) if recipe.batch_size % n else {}) for n in (2, 4, 8, 16) if n > workers and not four_bit]
    single = [
        *tried(*([lean] if not recipe.gradient_checkpointing else [])),
        *tried(*([{"adapter_dropout": 0.0}] if recipe.adapter_dropout else [])),
        *tried(*smaller),
        *tried(*({"seq_len": recipe.seq_len >> i} for i in range(1, 4) if recipe.seq_len >> i >= 2)),
        *tried(*to_four_bit),
        *tried(*({"adapter_rank": recipe.adapter_rank >> i} for i in range(1, 4) if recipe.adapter_rank >> i)),
        *tried(*([{"dtype": "bfloat16"}] if recipe.dtype in ("float32", "float64") else [])),
        *tried(*([{"code": "ranks"}] if recipe.code != "ranks" else [])),
    ]
    streamed = tried(*([{"code": "bits", "code_tune_steps": 0}] if (recipe.code, recipe.code_tune_steps) != ("bits", 0) else []))
    untrained = {
        **({"scores": "fisher"} if recipe.prunes else {}), "post_tune_steps": 0, **({"total_steps": None} if recipe.total_steps else {}),
        **({"code_tune_steps": 0} if recipe.code == "both" else {}), **({"quantize": "none"} if four_bit else {}),
    }  # fmt: skip
    streamed += tried(untrained) if recipe.code != "bits" else []
    return (single or [*tried(least, *(way | bits for way in (lean, least) for bits in to_four_bit)), *tried(*more)]) + streamed


def _yaml(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else "null" if value is None else str(value).lower()
