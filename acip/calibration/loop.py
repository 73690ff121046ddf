"""THE loop: one gradient descent that prunes, orders all directions of all layers, and tunes the adapters.

Paper, Algorithm 1 and Appendix B, top to bottom in `calibrate`:

    prune       loss = task loss + lambda * sum of relu(p);  ramp lambda;  update scores;  test stop
    post-tune   masks frozen, adapters alone: at the stop size (the paper), or at many sizes (ours)

Our default takes its scores from one backward pass instead (`fisher`, acip.sizing.score_map): pruning by L1 costs half of the steps
and a worse order, see tests/benchmarks/QUALITY.md. Then all steps are post-tuning.

While pruning, the task loss is mixed with the divergence from the base model's own distribution; in post-tuning that alone
is the target, and every step is taken at one size: the stop ratio and a uniform one in turn. (All of this ours;
`recipe.paper` turns it off.)

On an accelerator the host looks only once in several steps. The stop test is the device's: from the step that reaches the
stop ratio on, steps change nothing, until the host has seen it and takes back its count. So it never matters when it looks.

Observers get the `StepReport`s since the last look and the `CalibrationState` after them, and change nothing. A state that
is saved and loaded again goes on bit for bit as if nothing had happened (CPU).
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acip.calibration.losses import Task, as_base, next_token, objective
from acip.calibration.state import CalibrationState, StepReport
from acip.errors import CalibrationError
from acip.layers import sharding
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import targets
from acip.modeling_acip import widened
from acip.recipe import Recipe
from acip.sizing.cut_table import Budget, CutTable, LayerShape
from acip.sizing.model_sizes import cut_table, layer_shapes, live_ranks, set_size, size_ratio, sort_layers
from acip.sizing.score_map import ScoreMap, fisher

SIZE_WEIGHT_EXPONENT = 0.75  # 0 = sizes weigh as much as their divergence, the smallest most; 1 = all alike (small Llama: QUALITY.md)
MIN_DIVERGENCE_NATS = 1e-3  # nats; a smaller divergence weighs no more
HOST_SYNC_STEPS = 4  # optimizer steps; of the host at an accelerator, and at which layers to pack


Observe = Callable[[list[StepReport], CalibrationState], None]


class Batches(Protocol):
    def __getitem__(self, i: int, /) -> Any: ...


@dataclass
class Calibration:
    """What a calibration leaves: the score map, the adapters (inside `model`), and how it went."""

    model: nn.Module  # its targets are ElasticLinear layers, sorted, with their adapters
    recipe: Recipe
    scores: ScoreMap
    table: CutTable
    stop_step: int
    history: list[StepReport]


def calibrate(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    resume: str | Path | None = None,
    observe: Observe = lambda reports, state: None,
    task: Task = next_token,
    look_every: int | None = None,
) -> Calibration:
    """Run or resume the calibration of a parametrized `model` (see `parametrize`) on `batches[i]` -> [B, T] token ids.

    `resume` is a folder that `CalibrationState.save` wrote. The host reads losses and sizes every `look_every` steps, and at every
    multiple of LOOK_EVERY; None = every LOOK_EVERY steps on an accelerator, and every step on a CPU, where it is free.
    Raises CalibrationError where the loss is not finite or the stop ratio is not reached in `recipe.max_prune_steps`.
    """
    state = CalibrationState.start(model, recipe)
    loop = Loop.of(model, batches, recipe, task, state.scores.score.device, look_every)
    with training(model, recipe):
        if resume is not None:
            state.load(Path(resume), model, recipe)
        elif not recipe.prunes:
            state.scores.score = loop.fixed_scores(state)
            state.end_pruning(model, recipe)

        # prune: until the stop ratio is reached
        shapes = layer_shapes(model)
        while state.stop_step is None and state.size > recipe.stop_ratio:
            if state.step >= recipe.max_prune_steps:
                raise CalibrationError(
                    f"the stop ratio {recipe.stop_ratio} was not reached in max_prune_steps = {recipe.max_prune_steps} steps (now at "
                    f"{state.size:.3f}). Raise lr, lambda_start or lambda_factor, lower lambda_interval, or allow more steps."
                )
            reports = loop.prune(state, shapes)
            state.record(reports, recipe)
            if state.step % HOST_SYNC_STEPS == 0:
                state.pack()
            observe(
                reports, state
            )  # of the last step, too, as pruning left it: acip.calibration.shared_pruning goes on from there in other ways
        if state.stop_step is None:
            state.stop_ranks = live_ranks(state.flat_masks(), state.scores).tolist()
            state.end_pruning(model, recipe)
        assert state.stop_step is not None

        # post-tune: the adapters alone, at the stop size or at many
        table = cut_table(model, state.scores, recipe)
        loop.post_tune(state, lambda: _take_size(state, table, recipe), observe)

    return Calibration(model, recipe, state.scores, table, state.stop_step, state.history)


@dataclass(frozen=True)
class Loop:
    """What stays the same all through, and the steps between two looks of the host."""

    model: nn.Module
    batches: Batches
    recipe: Recipe
    task: Task
    device: torch.device
    look_every: int

    @classmethod
    def of(cls, model: nn.Module, batches: Batches, recipe: Recipe, task: Task, device: torch.device, look_every: int | None) -> "Loop":
        return cls(model, batches, recipe, task, device, look_every or (1 if device.type == "cpu" else HOST_SYNC_STEPS))

    def until_look(self, step: int, end: int) -> range:
        """Return the steps from `step` to the next look, at most to `end`. Every step at which layers may be packed ends at a look."""
        return range(step, min(end, *(step + every - step % every for every in (self.look_every, HOST_SYNC_STEPS))))

    def batch(self, i: int) -> Any:
        return sharding.my_part(self.batches[i]).to(self.device, non_blocking=True)

    def prune(self, state: CalibrationState, shapes: tuple[LayerShape, ...]) -> list[StepReport]:
        """Algorithm 1's body, until the next look or until the stop."""
        recipe, scores = self.recipe, state.scores
        rows, lambdas, first = [], [], state.step
        stopped = torch.zeros((), dtype=torch.bool, device=self.device)
        size = torch.tensor(state.size, dtype=torch.float64, device=self.device)
        for _ in self.until_look(state.step, recipe.max_prune_steps):
            masks_before = state.flat_masks()
            losses = self.step(state, recipe.prune_distill_weight, stopped)
            if state.step % recipe.lambda_interval == 0:
                state.lambda_ *= recipe.lambda_factor
            masks = state.flat_masks()
            scores.update(masks_before, masks, frozen=stopped | (size <= (recipe.scores_until or 0.0)))
            ranks = live_ranks(masks, scores)
            size = size_ratio(ranks, shapes, recipe)
            stopped = stopped | (size <= recipe.stop_ratio)
            rows.append(torch.stack([*losses.double(), size, ranks.sum().double(), masks.clamp(min=0).double().sum()]))
            lambdas.append(state.lambda_)
        reports: list[StepReport] = []
        for (loss_, own, size_, live, mass), lambda_ in zip(_averaged(rows), lambdas, strict=True):
            stops = size_ <= recipe.stop_ratio
            progress = 1.0 if stops else _progress(mass, int(live), scores.score.numel(), shapes, recipe)
            reports.append(StepReport(first + len(reports) + 1, "prune", loss_, size_, lambda_, int(live), progress, _known(own)))
            if stops:
                break
        state.step, state.lambda_ = reports[-1].step, reports[-1].lambda_
        return reports

    def post_tune(self, state: CalibrationState, take_size: Callable[[], float], observe: Observe) -> None:
        """Steps of the adapters alone to the end, each at the size that `take_size` sets and returns."""
        assert state.stop_step is not None
        while state.step < self.recipe.end(state.stop_step):
            reports = self._tune(state, take_size)
            state.record(reports, self.recipe)
            observe(reports, state)

    def _tune(self, state: CalibrationState, take_size: Callable[[], float]) -> list[StepReport]:
        """Those until the next look."""
        assert state.stop_step is not None
        first, losses, sizes, end = state.step, [], [], self.recipe.end(state.stop_step)
        for _ in self.until_look(state.step, end):
            sizes.append(take_size())
            losses.append(self.step(state, self.recipe.distill_weight, even=self.recipe.post_tune == "sizes"))
        reports = []
        for step, ((loss, own), size) in enumerate(zip(_averaged(losses), sizes, strict=True), first + 1):
            progress = (step - state.stop_step) / (end - state.stop_step)
            reports.append(StepReport(step, "post_tune", loss, size, state.lambda_, sum(state.stop_ranks), progress, _known(own)))
        return reports

    def step(self, state: CalibrationState, distill_weight: float, stopped: Tensor | None = None, even: bool = False) -> Tensor:
        """One optimizer step; its loss and the task's own. While pruning, `stopped` tells on the device whether it still counts.

        `even` weighs sizes more alike than their losses do: with EVEN = 1, the logarithm of the loss would be minimized.

        Dropout is seeded by the step, so a resumed run draws what the straight one drew.
        """
        recipe, optimizer = self.recipe, state.optimizer
        torch.manual_seed((recipe.seed * 1_000_003 + state.step) * sharding.workers() + sharding.rank())
        total, task_total = torch.zeros(2, dtype=state.scores.score.dtype, device=self.device)
        for i in range(recipe.gradient_accumulation_steps):
            batch = self.batch(state.step * recipe.gradient_accumulation_steps + i)
            loss, own = (
                part / recipe.gradient_accumulation_steps for part in objective(self.model, state.layers, batch, self.task, distill_weight)
            )
            task_total += own
            if stopped is not None and i == 0:
                loss = loss + state.lambda_ * torch.stack([p.relu().sum() for p in state.masks]).sum()
            total += loss.detach()
            if even:
                sharding.average([scale := loss.detach().clone() * recipe.gradient_accumulation_steps])
                loss = loss * scale.clamp_min(MIN_DIVERGENCE_NATS) ** -SIZE_WEIGHT_EXPONENT
            if loss.requires_grad:  # at a size where every layer is dense there is nothing to learn
                loss.backward()
        sharding.average(p.grad for p in state.params.values() if p.grad is not None)
        if stopped is not None:
            if recipe.scores == "gradient":
                gradients = torch.cat([p.grad - state.lambda_ * (p > 0) for p in state.masks if p.grad is not None])
                state.gradients += torch.where(stopped, 0.0, gradients)
            optimizer.found_inf = stopped.float()  # type: ignore[attr-defined]  # the fused kernel's switch, always float32: change nothing
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        return torch.stack([total, task_total])

    def fixed_scores(self, state: CalibrationState) -> Tensor:
        """Scores that are known before the first step."""
        cores = {name: core for name, core in state.layers.items() if isinstance(core, SVDLinear)}
        if self.recipe.scores == "singular_values":
            return torch.cat([widened(core.right.read()).norm(dim=1) for core in cores.values()])
        with fisher(cores) as scores, as_base(cores):
            for i in range(-(-self.recipe.sample_windows // self.recipe.batch_size)):
                batch = self.batch(i)
                for part in batch.split(scored_at_once(len(batch), self.recipe.seq_len)):  # every layer's inputs are kept
                    self.task(self.model, part).backward()
        _all_reached([name for name in cores if name not in scores])
        score = torch.cat([scores[name] for name in cores])
        sharding.average([score])  # of sums over a part of the tokens, squared gradients of a mean over that part: n times too much
        return score / sharding.workers()


def transfer(calibration: Calibration, model: nn.Module, recipe: Recipe) -> Calibration:
    """The scores and adapters of one calibration on another, freshly parametrized `model` of the same layers, in place.

    So a calibration on 4-bit weights serves the full-precision base (paper 3.4). `recipe` is the other model's; its basis
    and adapters must be those of the calibration, and its basis must come from the same text.
    """
    for name in ("basis", "adapter", "adapter_rank", "adapter_alpha", "exclude", "mask_scale", "storage", "convention"):
        if getattr(recipe, name) != getattr(calibration.recipe, name):
            raise CalibrationError(
                f"{name} is {getattr(recipe, name)!r}; to carry scores over it must be {getattr(calibration.recipe, name)!r}."
            )
    theirs, ours = targets(calibration.model), targets(model)
    if layer_shapes(model) != layer_shapes(calibration.model) or not all(isinstance(core, SVDLinear) for core in ours.values()):
        raise CalibrationError("scores can be carried over to a freshly parametrized model with the same layers only.")
    ours = sort_layers(model, calibration.scores)
    for name, core in ours.items():
        for place, lora in core.loras.items():
            lora.load_state_dict(theirs[name].loras[place].state_dict())
    model.eval()
    table = cut_table(model, calibration.scores, recipe)
    return Calibration(model, recipe, calibration.scores, table, calibration.stop_step, calibration.history)


def trial_step(model: nn.Module, batches: Batches, recipe: Recipe, task: Task = next_token) -> float:
    """One real forward and backward pass at full size and shape, which changes nothing. Returns its loss.

    Run before the long work: what doesn't fit or doesn't learn fails here, in the first seconds.
    """
    layers = targets(model)
    batch = sharding.my_part(batches[0]).to(next(model.parameters()).device)
    with recomputing(model, recipe.gradient_checkpointing):
        loss, _ = objective(model, layers, batch, task, recipe.prune_distill_weight)
        loss.backward()
    idle = [name for name, core in layers.items() if isinstance(core, SVDLinear) and core.p.grad is None]
    model.zero_grad(set_to_none=True)
    _all_reached(idle)
    if not math.isfinite(loss.item()):
        raise CalibrationError(f"the loss of the first batch is {loss.item()}; try dtype float32, and check the base model and its text.")
    return loss.item()


def _all_reached(idle: list[str]) -> None:
    if idle:
        raise CalibrationError(
            f"the loss does not reach {len(idle)} layers, {idle[0]} among them, and would prune them blindly. Put a part of their names "
            "into exclude."
        )


@contextmanager
def training(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Inside, the adapters' dropout is on; the base model's own stays off."""
    model.eval()
    for core in targets(model).values():
        core.train()
    with recomputing(model, recipe.gradient_checkpointing):
        yield
    model.eval()


@contextmanager
def recomputing(model: nn.Module, on: bool) -> Iterator[None]:
    """Inside, the activations of each block are computed again in the backward pass instead of kept."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks = [block for blocks in lists for block in blocks if targets(block)] if on else []
    inner = {id(module) for block in blocks for module in block.modules() if module is not block}
    blocks = [block for block in blocks if id(block) not in inner]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def scored_at_once(batch_size: int, seq_len: int) -> int:
    """Windows in a pass for Fisher scores: long ones go alone."""
    return 1 if seq_len >= 1024 else batch_size


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _averaged(rows: list[Tensor]) -> list[Any]:
    """What the steps since the last look computed, the workers' mean, on the host."""
    table = torch.stack(rows)
    sharding.average([table])
    return table.tolist()


def _take_size(state: CalibrationState, table: CutTable, recipe: Recipe) -> float:
    """Set the size of the next post-tuning step, and return it."""
    if recipe.post_tune == "stop" and state.stop_ranks:  # the masks that pruning left, not a cut
        for core, rank in zip(state.layers.values(), state.stop_ranks, strict=True):
            assert isinstance(core, ElasticLinear)
            core.set_rank(rank)
        return float(size_ratio(torch.tensor(state.stop_ranks), table.layers, recipe))
    size = recipe.stop_ratio if recipe.post_tune == "stop" else _next_size(state.step, recipe)
    set_size(state.layers, table.cut(Budget(size, recipe.convention)))
    return size


def _next_size(step: int, recipe: Recipe) -> float:
    """The smallest size and a uniform one above it, in turn."""
    if step % 2 == 0:
        return recipe.stop_ratio
    return random.Random(recipe.seed * 1_000_003 + step).uniform(recipe.stop_ratio, 1.0)


def _progress(mass: float, live: int, directions: int, shapes: tuple[LayerShape, ...], recipe: Recipe) -> float:
    """How much of the pruning is done, an estimate: first the masks (their sum is `mass`) travel to zero, then directions leave."""
    R = 0 if recipe.convention == "paper" else recipe.adapter_rows
    live_at_stop = sum(max(0.0, recipe.stop_ratio * shape.M * shape.N / (shape.M + shape.N) - R) for shape in shapes)
    gone = (directions - live) / (directions - live_at_stop)
    traveled = 1 - mass / (recipe.mask_scale * directions)
    return min(0.99, max(0.0, 0.7 * gone + 0.3 * min(1.0, max(0.0, traveled))))
