"""THE loop: one gradient descent that prunes, orders all directions of all layers, and tunes the adapters.

Paper, Algorithm 1 and Appendix B, top to bottom in `calibrate`:

    prune       loss = task loss + lambda * sum of relu(p);  ramp lambda;  update scores;  test stop
    post-tune   masks frozen, adapters alone: at the stop size (the paper), or at many sizes (ours)

Our default takes its scores from one backward pass instead (`fisher`, acip.scores): pruning by L1 costs half of the steps
and a worse order, see tests/benchmarks/QUALITY.md. Then all steps are post-tuning.

While pruning, the task loss is mixed with the divergence from the base model's own distribution; in post-tuning that alone
is the target, and every step is taken at one size: the stop ratio and a uniform one in turn. Each adapter keeps its B at
several sizes (knots) and interpolates between them. (All of this ours; `recipe.paper` turns it off.)

Observers get a `StepReport` and the `CalibrationState` after each step and change nothing. A state that is saved and
loaded again goes on bit for bit as if nothing had happened (CPU).
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acip.cut import Budget, Cut, CutTable, LayerShape, stored_params
from acip.errors import CalibrationError
from acip.linear import Compressible, ElasticLinear, SVDLinear, knot_place, sort_directions
from acip.parametrise import set_module, targets, weight_MN
from acip.recipe import Recipe
from acip.scores import ScoreMap, fisher

PACK_EVERY = 8  # optimiser steps between looks at which layers to pack
PACK_BELOW = 0.9  # of the directions that are multiplied now; packing copies, so not for a few


TaskLoss = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]  # (model, batch) -> loss, logits [..., classes]


class Batches(Protocol):
    def __getitem__(self, i: int, /) -> Tensor: ...


@dataclass(frozen=True)
class StepReport:
    """What happened in one optimiser step. `size` is the size after it (prune) or the size it trained (post-tune)."""

    step: int
    phase: Literal["prune", "post_tune"]
    loss: float  # total loss before the step, nats per token plus the L1 term
    size: float  # in the recipe's convention
    lambda_: float  # after the step
    live: int  # directions not pruned
    progress: float  # [0, 1] of this phase, an estimate while pruning


@dataclass
class Calibration:
    """What a calibration leaves: the score map, the adapters (inside `model`), and how it went."""

    model: nn.Module  # its targets are ElasticLinear layers, sorted, under their adapters
    recipe: Recipe
    scores: ScoreMap
    table: CutTable
    stop_step: int
    history: list[StepReport]


@dataclass
class CalibrationState:
    """Every variable of the loop. Tensors are live: `save` reads them, nothing else may."""

    layers: dict[str, SVDLinear | ElasticLinear]
    scores: ScoreMap
    params: dict[str, nn.Parameter]  # what is trained, by name
    optimizer: torch.optim.Optimizer
    lambda_: float
    gradients: Tensor  # [D] the task loss' gradients of the masks, summed over the steps; stays 0 where scores don't need it
    step: int = 0
    stop_step: int | None = None
    stop_ranks: list[int] = field(default_factory=list)  # directions of each layer that were left when pruning stopped
    history: list[StepReport] = field(default_factory=list)

    @property
    def masks(self) -> list[nn.Parameter]:
        return [core.p for core in self.layers.values() if isinstance(core, SVDLinear)]

    def packed(self) -> dict[str, Tensor]:
        """The directions that packed layers multiply. Sums over fewer terms round differently, so this is state."""
        cores = {name: core for name, core in self.layers.items() if isinstance(core, SVDLinear)}
        return {name: core.packed for name, core in cores.items() if core.packed is not None}

    def save(self, folder: str | Path) -> None:
        """Write the state as `state.safetensors` and `state.json` into an existing folder."""
        tensors = {"score": self.scores.score, "crossing": self.scores.crossing, "gradients": self.gradients}
        for name, packed in self.packed().items():
            tensors[f"packed/{name}"] = packed
        for name, param in self.params.items():
            tensors[f"param/{name}"] = param.detach()
            for key, value in self.optimizer.state.get(param, {}).items():
                tensors[f"optim/{name}/{key}"] = value
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, Path(folder) / "state.safetensors")
        scalars = {
            "lambda": self.lambda_,
            "step": self.step,
            "stop_step": self.stop_step,
            "stop_ranks": self.stop_ranks,
            "history": [asdict(r) for r in self.history],
        }
        (Path(folder) / "state.json").write_text(json.dumps(scalars))


def next_token(model: nn.Module, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each next token, nats; and the logits."""
    out = model(input_ids=ids_BT, labels=ids_BT, use_cache=False)
    return out.loss, out.logits


def calibrate(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    resume: str | Path | None = None,
    observe: Callable[[StepReport, CalibrationState], None] = lambda report, state: None,
    task_loss: TaskLoss = next_token,
) -> Calibration:
    """Run or resume the calibration of a parametrised `model` (see `parametrise`) on `batches[i]` -> [B, T] token ids.

    `resume` is a folder that `CalibrationState.save` wrote. `task_loss(model, batches[i])` returns the loss and the logits
    that are distilled. Raises CalibrationError where the loss is not finite or the stop ratio is not reached in
    `recipe.max_prune_steps`.
    """
    state = _start(model, recipe)
    shapes = layer_shapes(model)
    model.eval()  # the base model's own dropout stays off; the adapters' is on
    for core in state.layers.values():
        core.train()
    if resume is not None:
        _load(state, Path(resume), model, recipe)
    elif not recipe.prunes:
        state.scores.score = _fixed_scores(model, batches, recipe, state.layers, task_loss)
        _end_pruning(model, state, recipe)

    # prune: until the stop ratio is reached
    while state.stop_step is None:
        if state.step >= recipe.max_prune_steps:
            raise CalibrationError(
                f"the stop ratio {recipe.stop_ratio} was not reached in max_prune_steps = {recipe.max_prune_steps} steps (now at "
                f"{state.history[-1].size:.3f}). Raise lr, lambda_start or lambda_factor, lower lambda_interval, or allow more steps."
            )
        masks_before = _flat(state.masks)
        l1 = state.lambda_ * torch.stack([p.relu().sum() for p in state.masks]).sum()
        loss = _step(model, batches, recipe, state, task_loss, recipe.distill_prune, l1)
        if state.step % recipe.lambda_interval == 0:
            state.lambda_ *= recipe.lambda_factor
        masks = _flat(state.masks)
        ranks = _live_ranks(masks, state.scores)
        size, live = _size_ratio(ranks, shapes, recipe), int(ranks.sum())
        if not state.history or state.history[-1].size > (recipe.scores_until or 0):
            state.scores.update(masks_before, masks)
        if state.step % PACK_EVERY == 0 and recipe.quantise == "none":
            _pack(state.layers, ranks)
        if size <= recipe.stop_ratio:
            state.stop_ranks = ranks.tolist()
            _end_pruning(model, state, recipe)
        progress = 1.0 if state.stop_step else _progress(masks, live, shapes, recipe)
        report = StepReport(state.step, "prune", loss, size, state.lambda_, live, progress)
        state.history.append(report)
        observe(report, state)

    # post-tune: the adapters alone, at the stop size or at many
    table = cut_table(model, state.scores, recipe)
    live = sum(state.stop_ranks)
    end = recipe.end(state.stop_step)
    while state.step < end:
        size = _take_size(state, table, recipe)
        loss = _step(model, batches, recipe, state, task_loss, recipe.distill)
        progress = (state.step - state.stop_step) / (end - state.stop_step)
        report = StepReport(state.step, "post_tune", loss, size, state.lambda_, live, progress)
        state.history.append(report)
        observe(report, state)

    model.eval()
    return Calibration(model, recipe, state.scores, table, state.stop_step, state.history)


def transfer(calibration: Calibration, model: nn.Module, recipe: Recipe) -> Calibration:
    """The scores and adapters of one calibration on another, freshly parametrised `model` of the same layers, in place.

    So a calibration on 4-bit weights serves the full-precision base (paper 3.4). `recipe` is the other model's; its basis
    and adapters must be those of the calibration, and its basis must come from the same text.
    """
    for name in ("basis", "adapter", "adapter_rank", "adapter_alpha", "exclude", "mask_scale", "storage", "convention", "knots"):
        if getattr(recipe, name) != getattr(calibration.recipe, name):
            raise CalibrationError(
                f"{name} is {getattr(recipe, name)!r}; to carry scores over it must be {getattr(calibration.recipe, name)!r}."
            )
    theirs, ours = targets(calibration.model), targets(model)
    if layer_shapes(model) != layer_shapes(calibration.model) or not all(isinstance(core, SVDLinear) for core in ours.values()):
        raise CalibrationError("scores can be carried over to a freshly parametrised model with the same layers only.")
    ours = sort_layers(model, calibration.scores)
    for name, core in ours.items():
        for place, lora in core.loras.items():
            lora.grow(max(1, len(recipe.knots)))
            lora.load_state_dict(theirs[name].loras[place].state_dict())
    model.eval()
    table = cut_table(model, calibration.scores, recipe)
    return Calibration(model, recipe, calibration.scores, table, calibration.stop_step, calibration.history)


def trial_step(model: nn.Module, batches: Batches, recipe: Recipe, task_loss: TaskLoss = next_token) -> float:
    """One real forward and backward pass at full size and shape, which changes nothing. Returns its loss.

    Run before the long work: what doesn't fit or doesn't learn fails here, in the first seconds.
    """
    loss = _objective(model, targets(model), batches[0].to(next(model.parameters()).device), task_loss, recipe.distill_prune)
    loss.backward()
    idle = [name for name, core in targets(model).items() if isinstance(core, SVDLinear) and core.p.grad is None]
    model.zero_grad(set_to_none=True)
    if idle:
        raise CalibrationError(
            f"the loss does not reach {len(idle)} layers, {idle[0]} among them, and would prune them blindly. Put a part of their names "
            "into exclude."
        )
    if not math.isfinite(loss.item()):
        raise CalibrationError(f"the loss of the first batch is {loss.item()}; try dtype float32, and check the base model and its text.")
    return loss.item()


# ---- losses


def next_token_loss(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, nats."""
    return next_token(model, ids_BT)[0]


@contextmanager
def as_base(layers: Mapping[str, Compressible]) -> Iterator[None]:
    """Inside, every layer is the base model's."""
    for core in layers.values():
        core.bypass = True
    try:
        yield
    finally:
        for core in layers.values():
            core.bypass = False


def _objective(model: nn.Module, layers: Mapping[str, Compressible], batch: Tensor, task_loss: TaskLoss, distill: float) -> Tensor:
    """(1 - distill) * task loss + distill * KL(base || model) per position."""
    if not distill:
        return task_loss(model, batch)[0]
    with torch.no_grad(), as_base(layers):
        base = F.log_softmax(task_loss(model, batch)[1].float(), -1)
    loss, logits = task_loss(model, batch)
    kl = F.kl_div(F.log_softmax(logits.float(), -1), base, log_target=True, reduction="sum") / base.shape[:-1].numel()
    return kl if distill == 1 else (1 - distill) * loss + distill * kl


# ---- scores that are known before the first step


def _fixed_scores(model: nn.Module, batches: Batches, recipe: Recipe, layers: Mapping[str, Compressible], task_loss: TaskLoss) -> Tensor:
    cores = {name: core for name, core in layers.items() if isinstance(core, SVDLinear)}
    if recipe.scores == "singular_values":
        return torch.cat([core.V.float().norm(dim=1) / core.c for core in cores.values()])
    device = next(model.parameters()).device
    with fisher(cores) as scores:
        for i in range(-(-recipe.sample_windows // recipe.batch_size)):
            task_loss(model, batches[i].to(device))[0].backward()
    model.zero_grad(set_to_none=True)
    if idle := [name for name in cores if name not in scores]:
        raise CalibrationError(f"the loss does not reach {len(idle)} layers, {idle[0]} among them. Put a part of their names into exclude.")
    return torch.cat([scores[name] for name in cores])


# ---- one optimiser step


def _step(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    state: CalibrationState,
    task_loss: TaskLoss,
    distill: float,
    l1: Tensor | None = None,
) -> float:
    """Accumulate, step, count. Dropout is seeded by the step, so a resumed run draws what the straight one drew."""
    torch.manual_seed(recipe.seed * 1_000_003 + state.step)
    device = next(iter(state.params.values())).device
    total = 0.0
    for i in range(recipe.accumulate):
        batch = batches[state.step * recipe.accumulate + i].to(device)
        loss = _objective(model, state.layers, batch, task_loss, distill) / recipe.accumulate
        if l1 is not None and i == 0:
            loss = loss + l1
        if loss.requires_grad:  # at a size where every layer is dense there is nothing to learn
            loss.backward()
        total += float(loss.detach())
    if not math.isfinite(total):
        raise CalibrationError(
            f"the loss is {total} at step {state.step + 1}: the calibration diverged. Lower lr (now {recipe.lr}), or use dtype float32."
        )
    if recipe.scores == "gradient" and l1 is not None:
        state.gradients += torch.cat([p.grad - state.lambda_ * (p > 0) for p in state.masks if p.grad is not None])
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return total


def _take_size(state: CalibrationState, table: CutTable, recipe: Recipe) -> float:
    """Set the size of the next post-tuning step, and return it."""
    if recipe.post_tune == "stop" and state.stop_ranks:  # the masks that pruning left, not a cut
        for core, rank in zip(state.layers.values(), state.stop_ranks, strict=True):
            assert isinstance(core, ElasticLinear)
            core.set_rank(rank)
        return _size_ratio(torch.tensor(state.stop_ranks), table.layers, recipe)
    size = recipe.stop_ratio if recipe.post_tune == "stop" else _next_size(state.step, recipe)
    set_size(state.layers, table.cut(Budget(size, recipe.convention)), recipe)
    return size


def _next_size(step: int, recipe: Recipe) -> float:
    """The smallest size and a uniform one above it, in turn."""
    if step % 2 == 0:
        return recipe.stop_ratio
    return random.Random(recipe.seed * 1_000_003 + step).uniform(recipe.stop_ratio, 1.0)


# ---- sizes of a model whose layers are sorted


def set_size(layers: Mapping[str, Compressible], cut: Cut, recipe: Recipe) -> None:
    """Every layer at its rank of `cut`, every adapter at the cut's size."""
    place = knot_place(cut.sizes[recipe.convention], recipe.knots)
    for name, core in layers.items():
        assert isinstance(core, ElasticLinear)
        core.set_rank(cut.ranks[name])
        for lora in core.loras.values():
            lora.place = place


def layer_shapes(model: nn.Module) -> tuple[LayerShape, ...]:
    shapes = []
    for name, core in targets(model).items():
        M, N = weight_MN(core.original).shape
        shapes.append(LayerShape(name, M, N, core.bias is not None))
    return tuple(shapes)


def cut_table(model: nn.Module, scores: ScoreMap, recipe: Recipe) -> CutTable:
    """The table of every size of `model`, from its scores."""
    inside = {id(p) for core in targets(model).values() for p in core.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)  # parameters() counts tied weights once
    order = scores.layer_of[scores.removal_order()].to(torch.int32).cpu()
    return CutTable(layer_shapes(model), order, recipe.adapter_rows, rest, recipe.storage, recipe.reset)


def _flat(masks: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach() for p in masks])


def _live_ranks(values: Tensor, scores: ScoreMap) -> Tensor:
    """[L] on the CPU: how many of each layer's `values` [D] (masks or scores) are alive."""
    alive = (values > 0).long()
    return torch.zeros(len(scores.names), dtype=torch.long, device=values.device).index_add_(0, scores.layer_of, alive).cpu()


def _size_ratio(ranks: Tensor, shapes: tuple[LayerShape, ...], recipe: Recipe) -> float:
    """The size of layers at these ranks, in the recipe's convention."""
    M, N = (torch.tensor([getattr(shape, key) for shape in shapes]) for key in ("M", "N"))
    paper = recipe.convention == "paper"
    stored = stored_params(M, N, ranks, 0 if paper else recipe.adapter_rows, "factors" if paper else recipe.storage)
    bias = sum(shape.M for shape in shapes if shape.bias)
    return (int(stored.sum()) + bias) / (int((M * N).sum()) + bias)


def _pack(layers: Mapping[str, Compressible], ranks: Tensor) -> None:
    """Layers that lost enough directions since they were packed multiply only the living ones from here on."""
    for core, rank in zip(layers.values(), ranks.tolist(), strict=True):
        if isinstance(core, SVDLinear):
            multiplied = core.V.shape[0] if core.packed is None else len(core.packed)
            if rank <= PACK_BELOW * multiplied:
                core.pack((core.p > 0).nonzero().squeeze(1))


def _progress(masks: Tensor, live: int, shapes: tuple[LayerShape, ...], recipe: Recipe) -> float:
    """How much of the pruning is done, an estimate: first the masks travel to zero, then directions leave."""
    R = 0 if recipe.convention == "paper" else recipe.adapter_rows
    live_at_stop = sum(max(0.0, recipe.stop_ratio * shape.M * shape.N / (shape.M + shape.N) - R) for shape in shapes)
    gone = (masks.numel() - live) / (masks.numel() - live_at_stop)
    travelled = 1 - float(masks.clamp(min=0).sum()) / (recipe.mask_scale * masks.numel())
    return min(0.99, max(0.0, 0.7 * gone + 0.3 * min(1.0, max(0.0, travelled))))


# ---- the loop's variables: start, the turn from pruning to post-tuning, load


def _parameters(layers: Mapping[str, Compressible]) -> dict[str, nn.Parameter]:
    params: dict[str, nn.Parameter] = {}
    for name, core in layers.items():
        if isinstance(core, SVDLinear):
            params[f"{name}.mask"] = core.p
        for place, lora in core.loras.items():
            params[f"{name}.{place}.A"] = lora.A
            params.update({f"{name}.{place}.B{i}": B for i, B in enumerate(lora.B)})
    return params


def _adamw(params: dict[str, nn.Parameter], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(params.values(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def _start(model: nn.Module, recipe: Recipe) -> CalibrationState:
    layers = targets(model)
    masks: dict[str, Tensor] = {name: core.p for name, core in layers.items() if isinstance(core, SVDLinear)}
    if len(masks) != len(layers) or not layers:
        raise CalibrationError("calibrate needs a freshly parametrised model: call parametrise(model, recipe) first.")
    params, scores = _parameters(layers), ScoreMap.start(masks)
    return CalibrationState(layers, scores, params, _adamw(params, recipe.lr), recipe.lambda_start, torch.zeros_like(scores.score))


def _end_pruning(model: nn.Module, state: CalibrationState, recipe: Recipe) -> None:
    """Masks are done: sort every layer by score, give each knot its B, and carry the adapters' moments along."""
    state.stop_step = state.step
    if recipe.scores == "gradient":
        state.scores.score = -state.gradients
    importance = state.scores.importance()
    moments, old = state.optimizer.state, state.params
    state.layers = sort_layers(model, state.scores)
    for core in state.layers.values():
        for lora in core.loras.values():
            lora.grow(max(1, len(recipe.knots)))
    state.params = _parameters(state.layers)
    if not state.params:  # no adapters: nothing is left to train
        return
    state.optimizer = _adamw(state.params, recipe.post_tune_lr or recipe.lr)
    for name, param in state.params.items():
        was = old[name if name in old else name.rstrip("0123456789") + "0"]  # every knot's B grows out of B0
        if was in moments:
            layer, place, part = name.rsplit(".", 2)
            state.optimizer.state[param] = {
                key: (value if key == "step" else sort_directions(value, place, part[0], importance[layer])).clone()
                for key, value in moments[was].items()
            }


def sort_layers(model: nn.Module, scores: ScoreMap) -> dict[str, SVDLinear | ElasticLinear]:
    """Every SVDLinear becomes an ElasticLinear with its directions, and its adapters', in the order of their scores."""
    importance = scores.importance()
    for name, core in targets(model).items():
        assert isinstance(core, SVDLinear)
        set_module(model, name, core.sorted(importance[name]))
    return targets(model)


def _load(state: CalibrationState, folder: Path, model: nn.Module, recipe: Recipe) -> None:
    """Put a saved state into a freshly started one."""
    scalars: Mapping[str, Any] = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "state.safetensors")
    device = state.scores.score.device
    if tensors["score"].shape != state.scores.score.shape:
        raise CalibrationError(
            f"the checkpoint in {folder} belongs to another model or recipe: it holds {tensors['score'].numel()} scores."
        )
    state.scores.score, state.scores.crossing = tensors["score"].to(device), tensors["crossing"].to(device)
    state.gradients = tensors["gradients"].to(device)
    state.lambda_, state.step, state.stop_ranks = scalars["lambda"], scalars["step"], scalars["stop_ranks"]
    state.history = [StepReport(**report) for report in scalars["history"]]
    if scalars["stop_step"] is not None and state.stop_step is None:
        _end_pruning(model, state, recipe)
    state.stop_step = scalars["stop_step"]
    if {f"param/{name}" for name in state.params} != {key for key in tensors if key.startswith("param/")}:
        raise CalibrationError(f"the checkpoint in {folder} belongs to another model or recipe: its parameters have other names.")
    with torch.no_grad():
        for name, param in state.params.items():
            param.copy_(tensors[f"param/{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optim/{name}/{key}" in tensors]
            values = {key: tensors[f"optim/{name}/{key}"] for key in keys}
            state.optimizer.state[param] = {k: v if k == "step" else v.to(param.device) for k, v in values.items()}
    for name, core in state.layers.items():
        if isinstance(core, SVDLinear) and f"packed/{name}" in tensors:
            core.pack(tensors[f"packed/{name}"].to(device))
