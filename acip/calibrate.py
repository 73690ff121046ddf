"""THE loop: one gradient descent that prunes, orders all directions of all layers, and tunes the adapters.

Paper, Algorithm 1 and Appendix B, top to bottom in `calibrate`:

    prune       loss = task loss + lambda * sum of relu(p);  ramp lambda;  update scores;  test stop
    post-tune   masks frozen, adapters alone: at the stop size (the paper), or at many sizes (ours)

A size-conditioned adapter keeps B at several sizes (knots) and interpolates between them; in post-tuning every step is
taken at one size, the stop ratio and a uniform one in turn, with the base model's distribution as the target.

Observers get a `StepReport` and the `CalibrationState` after each step and change nothing. A state that is saved and
loaded again goes on bit for bit as if nothing had happened (CPU).
"""

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acip.cut import Budget, Cut, CutTable, LayerShape, stored_params
from acip.errors import CalibrationError
from acip.linear import ElasticLinear, KnotLinear, SVDLinear, knot_place
from acip.parametrise import ADAPTER, Target, targets
from acip.recipe import Recipe
from acip.scores import ScoreMap

PACK_EVERY = 8  # optimiser steps between looks at which layers to pack
PACK_BELOW = 0.9  # of the directions that are multiplied now; packing copies, so not for a few


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

    layers: list[Target]
    scores: ScoreMap
    params: dict[str, nn.Parameter]  # what is trained, by name
    optimizer: torch.optim.Optimizer
    lambda_: float
    step: int = 0
    stop_step: int | None = None
    history: list[StepReport] = field(default_factory=list)

    def packed(self) -> dict[str, Tensor]:
        """The directions that packed layers multiply. Sums over fewer terms round differently, so this is state."""
        cores = {target.name: target.core for target in self.layers if isinstance(target.core, SVDLinear)}
        return {name: core.packed for name, core in cores.items() if core.packed is not None}

    def save(self, folder: str | Path) -> None:
        """Write the state as `state.safetensors` and `state.json` into an existing folder."""
        tensors = {"score": self.scores.score, "crossing": self.scores.crossing}
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
            "history": [asdict(r) for r in self.history],
        }
        (Path(folder) / "state.json").write_text(json.dumps(scalars))


def calibrate(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    resume: str | Path | None = None,
    observe: Callable[[StepReport, CalibrationState], None] = lambda report, state: None,
) -> Calibration:
    """Run or resume the calibration of a parametrised `model` (see `parametrise`) on `batches[i]` -> [B, T] token ids.

    `resume` is a folder that `CalibrationState.save` wrote. Raises CalibrationError where the loss is not finite or the
    stop ratio is not reached in `recipe.max_prune_steps`.
    """
    state = _start(targets(model), recipe)
    shapes = tuple(layer_shape(target) for target in state.layers)
    model.eval()  # the base model's own dropout stays off; the adapters' is on
    for target in state.layers:
        if target.lora is not None:
            target.lora.lora_dropout.train()
    if resume is not None:
        _load(state, Path(resume), model, recipe)

    # prune: until the stop ratio is reached
    while state.stop_step is None:
        if state.step >= recipe.max_prune_steps:
            raise CalibrationError(
                f"the stop ratio {recipe.stop_ratio} was not reached in max_prune_steps = {recipe.max_prune_steps} steps (now at "
                f"{state.history[-1].size:.3f}). Raise lr, lambda_start or lambda_factor, lower lambda_interval, or allow more steps."
            )
        masks_before = _masks(state.layers)
        l1 = state.lambda_ * torch.stack([p.relu().sum() for name, p in state.params.items() if name.endswith(".mask")]).sum()
        loss = _step(model, batches, recipe, state, next_token_loss, extra=l1)
        if state.step % recipe.lambda_interval == 0:
            state.lambda_ *= recipe.lambda_factor
        masks = _masks(state.layers)
        state.scores.update(masks_before, masks)
        ranks = _live_ranks(masks, state.scores)
        size, live = _size_ratio(ranks, shapes, recipe), int(ranks.sum())
        if state.step % PACK_EVERY == 0:
            _pack(state.layers, ranks)
        if size <= recipe.stop_ratio:
            state.stop_step = state.step
            _freeze_masks(model, state, recipe)
        progress = 1.0 if state.stop_step else _progress(masks, live, shapes, recipe)
        report = StepReport(state.step, "prune", loss, size, state.lambda_, live, progress)
        state.history.append(report)
        observe(report, state)

    # post-tune: the adapters alone, at the stop size or at many
    table = cut_table(model, state.scores, recipe)
    live = int((state.scores.score > 0).sum())
    at_stop = _live_ranks(state.scores.score, state.scores).tolist()
    while state.step < state.stop_step + recipe.post_tune_steps:
        if recipe.post_tune == "stop":
            size = state.history[-1].size
            for target, rank in zip(state.layers, at_stop, strict=True):
                set_rank(target, rank)
        else:
            size = _next_size(state.step, recipe)
            set_size(state.layers, table.cut(Budget(size, recipe.convention)), size, recipe.knots)
        objective = next_token_loss if recipe.distill == "none" else _distillation_from(state.layers)
        loss = _step(model, batches, recipe, state, objective)
        progress = (state.step - state.stop_step) / recipe.post_tune_steps
        report = StepReport(state.step, "post_tune", loss, size, state.lambda_, live, progress)
        state.history.append(report)
        observe(report, state)

    model.eval()
    return Calibration(model, recipe, state.scores, table, state.stop_step, state.history)


def trial_step(model: nn.Module, batches: Batches, recipe: Recipe) -> float:
    """One real forward and backward pass at full size and shape, which changes nothing. Returns its loss.

    Run before the long work: what doesn't fit or doesn't learn fails here, in the first seconds.
    """
    loss = next_token_loss(model, batches[0].to(next(model.parameters()).device))
    loss.backward()
    model.zero_grad(set_to_none=True)
    if not math.isfinite(loss.item()):
        raise CalibrationError(f"the loss of the first batch is {loss.item()}; try dtype float32, and check the base model and its text.")
    return loss.item()


# ---- losses


def next_token_loss(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, nats."""
    return model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss


def _distillation_from(layers: list[Target]) -> Callable[[nn.Module, Tensor], Tensor]:
    """KL(base || model) per token, the base being the same model with every layer dense."""

    def kl(model: nn.Module, ids_BT: Tensor) -> Tensor:
        sizes = [(target, target.core.rank) for target in layers if isinstance(target.core, ElasticLinear)]
        for target, _ in sizes:
            set_rank(target, None)
        with torch.no_grad():
            base = F.log_softmax(model(input_ids=ids_BT, use_cache=False).logits.float(), -1)
        for target, rank in sizes:
            set_rank(target, rank)
        logp = F.log_softmax(model(input_ids=ids_BT, use_cache=False).logits.float(), -1)
        return F.kl_div(logp, base, log_target=True, reduction="sum") / ids_BT.numel()

    return kl


# ---- one optimiser step


def _step(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    state: CalibrationState,
    objective: Callable[[nn.Module, Tensor], Tensor],
    extra: Tensor | None = None,
) -> float:
    """Accumulate, step, count. Dropout is seeded by the step, so a resumed run draws what the straight one drew."""
    torch.manual_seed(recipe.seed * 1_000_003 + state.step)
    device = next(iter(state.params.values())).device
    total = 0.0
    for i in range(recipe.accumulate):
        loss = objective(model, batches[state.step * recipe.accumulate + i].to(device)) / recipe.accumulate
        if extra is not None and i == 0:
            loss = loss + extra
        if loss.requires_grad:  # at a size where every layer is dense there is nothing to learn
            loss.backward()
        total += float(loss.detach())
    if not math.isfinite(total):
        raise CalibrationError(
            f"the loss is {total} at step {state.step + 1}: the calibration diverged. Lower lr (now {recipe.lr}), or use dtype float32."
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return total


def _next_size(step: int, recipe: Recipe) -> float:
    """The smallest size and a uniform one above it, in turn."""
    if step % 2 == 0:
        return recipe.stop_ratio
    return random.Random(recipe.seed * 1_000_003 + step).uniform(recipe.stop_ratio, 1.0)


# ---- sizes of a model whose layers are sorted


def set_rank(target: Target, rank: int | None) -> None:
    """`rank` directions plus adapter; None: the original layer, adapter off."""
    assert isinstance(target.core, ElasticLinear)
    target.core.set_rank(rank)
    target.use_adapter(rank is not None)


def set_size(layers: list[Target], cut: Cut, size: float, knots: tuple[float, ...]) -> None:
    for target in layers:
        set_rank(target, cut.ranks[target.name])
        if target.lora is not None and isinstance(target.B, KnotLinear):
            target.B.place = knot_place(size, knots)


def layer_shape(target: Target) -> LayerShape:
    core = target.core
    (M, N) = (core.U.shape[0], core.V.shape[1]) if isinstance(core, SVDLinear) else (core.left.shape[1], core.right.shape[1])
    return LayerShape(target.name, M, N, core.bias is not None)


def cut_table(model: nn.Module, scores: ScoreMap, recipe: Recipe) -> CutTable:
    """The table of every size of `model`, from its scores."""
    layers = targets(model)
    shapes = tuple(layer_shape(target) for target in layers)
    inside = {id(p) for target in layers for p in target.slot.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)  # parameters() counts tied weights once
    order = scores.layer_of[scores.removal_order()].to(torch.int32).cpu()
    return CutTable(shapes, order, recipe.adapter_rank, rest)


def _masks(layers: list[Target]) -> Tensor:
    return torch.cat([target.core.p.detach() for target in layers if isinstance(target.core, SVDLinear)])


def _live_ranks(values: Tensor, scores: ScoreMap) -> Tensor:
    """[L] on the CPU: how many of each layer's `values` [D] (masks or scores) are alive."""
    alive = (values > 0).long()
    return torch.zeros(len(scores.names), dtype=torch.long, device=values.device).index_add_(0, scores.layer_of, alive).cpu()


def _size_ratio(ranks: Tensor, shapes: tuple[LayerShape, ...], recipe: Recipe) -> float:
    """The size of layers at these ranks, in the recipe's convention."""
    M, N = (torch.tensor([getattr(shape, key) for shape in shapes]) for key in ("M", "N"))
    stored = stored_params(M, N, ranks, 0 if recipe.convention == "paper" else recipe.adapter_rank)
    bias = sum(shape.M for shape in shapes if shape.bias)
    return (int(stored.sum()) + bias) / (int((M * N).sum()) + bias)


def _pack(layers: list[Target], ranks: Tensor) -> None:
    """Layers that lost enough directions since they were packed multiply only the living ones from here on."""
    for target, rank in zip(layers, ranks.tolist(), strict=True):
        core = target.core
        if isinstance(core, SVDLinear):
            multiplied = core.V.shape[0] if core.packed is None else len(core.packed)
            if rank <= PACK_BELOW * multiplied:
                core.pack((core.p > 0).nonzero().squeeze(1))


def _progress(masks: Tensor, live: int, shapes: tuple[LayerShape, ...], recipe: Recipe) -> float:
    """How much of the pruning is done, an estimate: first the masks travel to zero, then directions leave."""
    R = 0 if recipe.convention == "paper" else recipe.adapter_rank
    live_at_stop = sum(max(0.0, recipe.stop_ratio * shape.M * shape.N / (shape.M + shape.N) - R) for shape in shapes)
    gone = (masks.numel() - live) / (masks.numel() - live_at_stop)
    travelled = 1 - float(masks.clamp(min=0).sum()) / (recipe.mask_scale * masks.numel())
    return min(0.99, max(0.0, 0.7 * gone + 0.3 * min(1.0, max(0.0, travelled))))


# ---- the loop's variables: start, the turn from pruning to post-tuning, load


def _parameters(layers: list[Target]) -> dict[str, nn.Parameter]:
    params: dict[str, nn.Parameter] = {}
    for target in layers:
        if isinstance(target.core, SVDLinear):
            params[f"{target.name}.mask"] = target.core.p
        if target.lora is not None:
            params[f"{target.name}.A"] = target.A
            params.update({f"{target.name}.B{i}": B for i, B in enumerate(target.Bs)})
    return params


def _adamw(params: dict[str, nn.Parameter], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(params.values(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def _start(layers: list[Target], recipe: Recipe) -> CalibrationState:
    masks: dict[str, Tensor] = {target.name: target.core.p for target in layers if isinstance(target.core, SVDLinear)}
    if len(masks) != len(layers) or not layers:
        raise CalibrationError("calibrate needs a freshly parametrised model: call parametrise(model, recipe) first.")
    params = _parameters(layers)
    return CalibrationState(layers, ScoreMap.start(masks), params, _adamw(params, recipe.lr), recipe.lambda_start)


def _freeze_masks(model: nn.Module, state: CalibrationState, recipe: Recipe) -> None:
    """Masks are done: sort every layer by score, give each knot its B, and carry the adapters' moments along."""
    state.layers = sort_layers(model, state.layers, state.scores)
    for target in state.layers:
        if target.lora is not None and recipe.knots:
            assert isinstance(target.B, nn.Linear)
            target.lora.lora_B[ADAPTER] = KnotLinear(target.B.weight, len(recipe.knots))
    moments, old = state.optimizer.state, state.params
    state.params = _parameters(state.layers)
    if not state.params:  # no adapters: nothing is left to train
        return
    state.optimizer = _adamw(state.params, recipe.post_tune_lr or recipe.lr)
    for name, param in state.params.items():
        was = old[name if name in old else name.rstrip("0123456789") + "0"]  # every knot's B grows out of B0
        if was in moments:
            state.optimizer.state[param] = {key: value.clone() for key, value in moments[was].items()}


def sort_layers(model: nn.Module, layers: list[Target], scores: ScoreMap) -> list[Target]:
    """Every SVDLinear becomes an ElasticLinear with its directions in the order of their scores."""
    importance = scores.importance()
    return [
        target.replace_core(target.core.sorted(importance[target.name]), model) for target in layers if isinstance(target.core, SVDLinear)
    ]


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
    state.lambda_, state.step, state.stop_step = scalars["lambda"], scalars["step"], scalars["stop_step"]
    state.history = [StepReport(**report) for report in scalars["history"]]
    if state.stop_step is not None:
        _freeze_masks(model, state, recipe)
    if {f"param/{name}" for name in state.params} != {key for key in tensors if key.startswith("param/")}:
        raise CalibrationError(f"the checkpoint in {folder} belongs to another model or recipe: its parameters have other names.")
    with torch.no_grad():
        for name, param in state.params.items():
            param.copy_(tensors[f"param/{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optim/{name}/{key}" in tensors]
            values = {key: tensors[f"optim/{name}/{key}"] for key in keys}
            state.optimizer.state[param] = {k: v if k == "step" else v.to(param.device) for k, v in values.items()}
    for target in state.layers:
        if isinstance(target.core, SVDLinear) and f"packed/{target.name}" in tensors:
            target.core.pack(tensors[f"packed/{target.name}"].to(device))
