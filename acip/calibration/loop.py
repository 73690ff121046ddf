"""The calibration loop: one gradient descent that prunes and orders the directions of all layers and trains the adapters.

`calibrate` is Algorithm 1 of the paper (details in its Appendix B), read from top to bottom:

    prune       take a step on task loss + lambda * sum of relu(p); ramp lambda; update the scores; test the stop ratio
    post-tune   freeze the masks and train the adapters alone, at the stop ratio (the paper) or at many sizes (ours)

Three parts are ours; `recipe.paper` turns them off:

* Scores are Fisher information by default, computed from backward passes before the first step (acip.calibration.fixed_scores). Pruning by
  L1 takes half of the steps and yields a worse order (tests/benchmarks/QUALITY.md). All steps are then post-tuning.
* While pruning, the loss is a mix of the task loss and the KL divergence from the base model. In post-tuning, the divergence is the loss.
* Post-tuning steps alternate between the stop ratio and a random larger size.

On an accelerator, the host reads results only every few steps. The stop test runs on the device. After it fires, steps are no-ops;
the host rewinds the step counter at its next read. The read interval therefore cannot change results.

Observers receive the `StepReport`s since the last read and the `CalibrationState` after them; they must not change the model. A run that
resumes from a saved state equals an uninterrupted run bit for bit (on a CPU).
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from acip.calibration.fixed_scores import fixed_scores, require_gradients
from acip.calibration.losses import Task, next_token, objective
from acip.calibration.result import Calibration, StepReport, transfer
from acip.calibration.state import CalibrationState
from acip.calibration.training_mode import recomputing, training
from acip.errors import CalibrationError
from acip.layers import sharding
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import targets
from acip.recipe import Recipe
from acip.sizing.cut_table import Budget, CutTable, LayerShape
from acip.sizing.model_sizes import cut_table, layer_shapes, live_ranks, set_size, size_ratio

__all__ = ["Batches", "Calibration", "Loop", "Observe", "StepReport", "calibrate", "training", "transfer", "trial_step"]

# Post-tuning divides the gradient of each step by divergence ** SIZE_WEIGHT_EXPONENT. 0 = the smallest sizes dominate, since their
# divergence is largest; 1 = all sizes have equal weight (the logarithm of the divergence). Measured on a small Llama: QUALITY.md.
SIZE_WEIGHT_EXPONENT = 0.75
MIN_DIVERGENCE_NATS = 1e-3  # lower bound of the divergence in that weight
HOST_SYNC_STEPS = 4  # optimizer steps between two reads of the host on an accelerator, and between two packings of the layers

Observe = Callable[[list[StepReport], CalibrationState], None]


class Batches(Protocol):
    """The training batches: `batches[i]` is the same for the same `i`, so that a resumed run reads what the first run would have."""

    def __getitem__(self, i: int, /) -> Any: ...


def calibrate(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    resume: str | Path | None = None,
    observe: Observe = lambda reports, state: None,
    task: Task = next_token,
    look_every: int | None = None,
) -> Calibration:
    """Run or resume the calibration of a parametrized `model` (see `parametrize`), in place (paper, Algorithm 1).

    `batches[i]` is [B, T] token ids for the task `next_token`. `resume` is a folder that `CalibrationState.save` wrote. The host reads
    losses and sizes every `look_every` steps and at every multiple of HOST_SYNC_STEPS; None = every HOST_SYNC_STEPS steps on
    an accelerator, and every step on a CPU, where a read costs nothing.

    Raises CalibrationError if `model` is not freshly parametrized, a loss is not finite, the stop ratio is not reached within
    `recipe.max_prune_steps`, or the saved state does not fit.
    """
    state = CalibrationState.start(model, recipe)
    loop = Loop.of(model, batches, recipe, task, state.scores.score.device, look_every)
    with training(model, recipe):
        if resume is not None:
            state.load(Path(resume), model, recipe)
        elif not recipe.prunes:
            state.scores.score = fixed_scores(model, state.layers, recipe, loop.batch, task)
            state.end_pruning(model, recipe)

        # Prune until the stop ratio is reached.
        shapes = layer_shapes(model)
        while state.stop_step is None and state.size > recipe.stop_ratio:
            if state.step >= recipe.max_prune_steps:
                raise CalibrationError(
                    f"the stop ratio {recipe.stop_ratio} was not reached in max_prune_steps = {recipe.max_prune_steps} steps (the size is "
                    f"{state.size:.3f}). Increase lr, lambda_start, lambda_factor or max_prune_steps, or decrease lambda_interval."
                )
            log = PruneLog(state.step)
            size = torch.tensor(state.size, dtype=torch.float64, device=loop.device)
            stopped = torch.zeros((), dtype=torch.bool, device=loop.device)
            for _ in loop.until_sync(state.step, recipe.max_prune_steps):
                # take a step
                masks_before = state.flat_masks()
                losses = loop.step(state, recipe.prune_distill_weight, stopped)
                masks = state.flat_masks()
                # ramp lambda
                if state.step % recipe.lambda_interval == 0:
                    state.lambda_ *= recipe.lambda_factor
                # update the scores
                state.scores.update(masks_before, masks, frozen=stopped | (size <= (recipe.scores_until or 0.0)))
                # test the stop ratio
                ranks = live_ranks(masks, state.scores)
                size = size_ratio(ranks, shapes, recipe)
                stopped = stopped | (size <= recipe.stop_ratio)
                log.add(losses, size, ranks, masks, state.lambda_)
            reports = log.reports(shapes, recipe)
            state.step, state.lambda_ = reports[-1].step, reports[-1].lambda_  # rewind the no-op steps after the stop
            state.record(reports, recipe)
            if state.step % HOST_SYNC_STEPS == 0:
                state.pack()
            observe(reports, state)  # before `end_pruning`: shared_pruning saves the state that the last pruning step left
        if state.stop_step is None:
            state.require_finite(recipe)
            state.stop_ranks = live_ranks(state.flat_masks(), state.scores).tolist()
            state.end_pruning(model, recipe)
        assert state.stop_step is not None

        # Post-tune: train the adapters alone.
        table = cut_table(model, state.scores, recipe)
        loop.post_tune(state, PostTuneSizes(state, table, recipe).set_next, observe)

    return Calibration(model, recipe, state.scores, table, state.stop_step, state.history)


@dataclass(frozen=True)
class Loop:
    """The constants of a training run, one optimizer step, and post-tuning, which fine-tuning shares (acip.finetune)."""

    model: nn.Module
    batches: Batches
    recipe: Recipe
    task: Task
    device: torch.device
    sync_steps: int

    @classmethod
    def of(cls, model: nn.Module, batches: Batches, recipe: Recipe, task: Task, device: torch.device, look_every: int | None) -> "Loop":
        """Return a loop whose host reads every `look_every` steps; None = 1 on a CPU, HOST_SYNC_STEPS on an accelerator."""
        return cls(model, batches, recipe, task, device, look_every or (1 if device.type == "cpu" else HOST_SYNC_STEPS))

    def until_sync(self, step: int, end: int) -> range:
        """Return the steps from `step` to the next read of the host, `end` at most. Every multiple of HOST_SYNC_STEPS ends at a read."""
        return range(step, min(end, *(step + every - step % every for every in (self.sync_steps, HOST_SYNC_STEPS))))

    def batch(self, i: int) -> Any:
        """Return this worker's part of batch `i`, on the device."""
        return sharding.my_part(self.batches[i]).to(self.device, non_blocking=True)

    def post_tune(self, state: CalibrationState, set_next_size: Callable[[], float], observe: Observe) -> None:
        """Train the adapters alone to the last step. `set_next_size()` sets the size of the model for the next step and returns it."""
        assert state.stop_step is not None
        recipe, end = self.recipe, self.recipe.end(state.stop_step)
        while state.step < end:
            first, sizes, losses = state.step, [], []
            for _ in self.until_sync(first, end):
                for group in state.optimizer.param_groups:
                    group["lr"] = recipe.tuning_lr(state.step - state.stop_step, end - state.stop_step)
                sizes.append(set_next_size())
                losses.append(self.step(state, recipe.distill_weight, balance_sizes=recipe.post_tune == "sizes"))
            reports = []
            for step, ((loss, task_loss), size) in enumerate(zip(_to_host(losses), sizes, strict=True), first + 1):
                progress = (step - state.stop_step) / (end - state.stop_step)
                live = sum(state.stop_ranks)
                reports.append(StepReport(step, "post_tune", loss, size, state.lambda_, live, progress, _none_if_nan(task_loss)))
            state.record(reports, recipe)
            if state.step == end:
                state.require_finite(recipe)  # of the last step: no later loss shows it
            observe(reports, state)

    def step(self, state: CalibrationState, distill_weight: float, stopped: Tensor | None = None, balance_sizes: bool = False) -> Tensor:
        """Take one optimizer step. Return its loss and the loss of the task alone, [2], on the device.

        While pruning, `stopped` is a boolean on the device: if true, the step changes nothing. `balance_sizes` divides the gradient by
        divergence ** SIZE_WEIGHT_EXPONENT. Dropout is seeded by the step, so a resumed run draws the same numbers.
        """
        recipe, optimizer = self.recipe, state.optimizer
        torch.manual_seed((recipe.seed * 1_000_003 + state.step) * sharding.workers() + sharding.rank())
        total, task_total = torch.zeros(2, dtype=state.scores.score.dtype, device=self.device)
        for i in range(recipe.gradient_accumulation_steps):
            batch = self.batch(state.step * recipe.gradient_accumulation_steps + i)
            loss, task_loss = (
                part / recipe.gradient_accumulation_steps for part in objective(self.model, state.layers, batch, self.task, distill_weight)
            )
            task_total += task_loss
            if stopped is not None and i == 0:
                loss = loss + state.lambda_ * torch.stack([p.relu().sum() for p in state.masks]).sum()
            total += loss.detach()
            if balance_sizes:
                sharding.average([scale := loss.detach().clone() * recipe.gradient_accumulation_steps])
                loss = loss * scale.clamp_min(MIN_DIVERGENCE_NATS) ** -SIZE_WEIGHT_EXPONENT
            if loss.requires_grad:  # false at a size where every layer is dense: it trains nothing
                loss.backward()
        sharding.average(p.grad for p in state.params.values() if p.grad is not None)
        if stopped is not None:
            if recipe.scores == "gradient":
                gradients = torch.cat([p.grad - state.lambda_ * (p > 0) for p in state.masks if p.grad is not None])
                state.gradients += torch.where(stopped, 0.0, gradients)
            # The fused kernel skips the update if this float32 flag is set.
            optimizer.found_inf = stopped.float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        return torch.stack([total, task_total])


class PruneLog:
    """The numbers of the pruning steps since the last read. They stay on the device until `reports` reads them."""

    def __init__(self, step: int) -> None:
        self.first_step = step
        self.rows: list[Tensor] = []
        self.lambdas: list[float] = []

    def add(self, losses: Tensor, size: Tensor, ranks: Tensor, masks: Tensor, lambda_: float) -> None:
        self.rows.append(torch.stack([*losses.double(), size, ranks.sum().double(), masks.clamp(min=0).double().sum()]))
        self.lambdas.append(lambda_)
        self.directions = masks.numel()

    def reports(self, shapes: tuple[LayerShape, ...], recipe: Recipe) -> list[StepReport]:
        """Return a report per step, up to the step that reached the stop ratio."""
        reports: list[StepReport] = []
        for (loss, task_loss, size, live, mass), lambda_ in zip(_to_host(self.rows), self.lambdas, strict=True):
            stops = size <= recipe.stop_ratio
            progress = 1.0 if stops else _prune_progress(mass, int(live), self.directions, shapes, recipe)
            step = self.first_step + len(reports) + 1
            reports.append(StepReport(step, "prune", loss, size, lambda_, int(live), progress, _none_if_nan(task_loss)))
            if stops:
                break
        return reports


@dataclass(frozen=True)
class PostTuneSizes:
    """The sizes of the post-tuning steps: always the stop ratio (the paper), or the stop ratio and a random larger size in turn (ours)."""

    state: CalibrationState
    table: CutTable
    recipe: Recipe

    def set_next(self) -> float:
        """Set the layers to the size of the next step, and return that size in the recipe's convention."""
        recipe, step = self.recipe, self.state.step
        if recipe.post_tune == "stop" and self.state.stop_ranks:  # the masks that pruning left, not a cut
            for core, rank in zip(self.state.layers.values(), self.state.stop_ranks, strict=True):
                assert isinstance(core, ElasticLinear)
                core.set_rank(rank)
            return float(size_ratio(torch.tensor(self.state.stop_ranks), self.table.layers, recipe))
        if recipe.post_tune == "stop" or step % 2 == 0:
            size = recipe.stop_ratio
        else:
            size = random.Random(recipe.seed * 1_000_003 + step).uniform(recipe.stop_ratio, 1.0)
        set_size(self.state.layers, self.table.cut(Budget(size, recipe.convention)))
        return size


def trial_step(model: nn.Module, batches: Batches, recipe: Recipe, task: Task = next_token) -> float:
    """Run one forward and backward pass at full size and shape, without an update. Return its loss.

    Call it before a long run: too little memory and layers without a gradient then fail within seconds. Raises CalibrationError
    if the loss is not finite or does not depend on a layer.
    """
    layers = targets(model)
    batch = sharding.my_part(batches[0]).to(next(model.parameters()).device)
    with recomputing(model, recipe.gradient_checkpointing):
        loss, _ = objective(model, layers, batch, task, recipe.prune_distill_weight)
        loss.backward()
    unreached = [name for name, core in layers.items() if isinstance(core, SVDLinear) and core.p.grad is None]
    model.zero_grad(set_to_none=True)
    require_gradients(unreached)
    if not math.isfinite(loss.item()):
        raise CalibrationError(
            f"the loss of the first batch is {loss.item()}; it must be finite. Use dtype float32, or check the base model and its text."
        )
    return loss.item()


def _to_host(rows: list[Tensor]) -> list[Any]:
    """Return the numbers of the steps since the last read, averaged over the workers, on the host."""
    table = torch.stack(rows)
    sharding.average([table])
    return table.tolist()


def _none_if_nan(number: float) -> float | None:
    return None if math.isnan(number) else number


def _prune_progress(mass: float, live: int, directions: int, shapes: tuple[LayerShape, ...], recipe: Recipe) -> float:
    """Estimate the progress of pruning, [0, 1]: first the masks (their sum is `mass`) shrink to zero, then directions are pruned."""
    R = 0 if recipe.convention == "paper" else recipe.adapter_rows
    live_at_stop = sum(max(0.0, recipe.stop_ratio * shape.M * shape.N / (shape.M + shape.N) - R) for shape in shapes)
    pruned = (directions - live) / (directions - live_at_stop)
    shrunk = 1 - mass / (recipe.mask_scale * directions)
    return min(0.99, max(0.0, 0.7 * pruned + 0.3 * min(1.0, max(0.0, shrunk))))
