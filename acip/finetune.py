"""One size of a calibrated model, trained further: its adapters alone, at that size alone (paper 3.3).

In an artifact the adapters are folded into the directions, sorted, most important first. Of a layer's rows a size keeps the first:

    [ beside the layer | kept at the size | the rest ]
         goes on            adapted          stays as it is

* Adapters beside the layer (the paper's) go on from where their calibration ended: their rows are the matrices A and B.
* On the kept directions new ones start, B = 0, so the first step starts from the very model that is served. Folded in, they cost
  nothing. Where adapters are beside the layer, the directions stay as they are.

The result is an artifact again. Its removal order and its other rows are the old ones, so it has every size; but what helps this size
may harm those far above it.

In 4 bit (`Recipe.quantize`, paper 3.4) the kept directions and the dense layers are frozen in 4 bit, and the adapters, in 16 bit, make
up for what that lost. Its artifact holds the sum, in the model's own dtype: what was trained. An export in 4 bit rounds it once more, as
factors (acip.export.quantization).

    any_size = artifact.load(size=0.5)
    recipe = tuning(artifact, 0.5, post_tune_steps=1000)
    attach(any_size, recipe)
    finetune(any_size, scores_of(artifact), batches, recipe)
    save(folder, artifact, any_size, {...})
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acip.artifact.artifact import Artifact
from acip.calibration.loop import Batches, Loop, Observe, training
from acip.calibration.losses import Task, next_token
from acip.calibration.state import CalibrationState, StepReport
from acip.errors import BudgetError, RecipeError
from acip.layers.directions import DirectionMatrix, FourBitLinear
from acip.layers.linear import ElasticLinear, LoRA
from acip.layers.targets import weight_MN
from acip.modeling_acip import set_module, widened
from acip.recipe import Recipe
from acip.sizing.cut_table import Budget
from acip.sizing.elastic_model import ElasticModel
from acip.sizing.score_map import ScoreMap

STEPS, LR = 25_000, 2e-4  # paper, Appendix B


def tuning(artifact: Artifact, size: float, **changes: Any) -> Recipe:
    """The calibration's recipe made that of a fine-tuning at the `linear` ratio `size`, with `changes`. Next-token loss, another seed.

    BudgetError where the size can't be reached or is the base model, RecipeError where a change is not allowed.
    """
    if not any(artifact.table().cut(Budget(size)).ranks.values()):
        raise BudgetError(f"at size {size} every layer is the base model's own, without adapters: there is nothing to tune. Ask for less.")
    calibration = artifact.recipe
    recipe = replace(
        calibration, stop_ratio=size, convention="linear", scores_until=None, post_tune="stop", post_tune_steps=STEPS, total_steps=None,
        lr=LR, post_tune_lr=None, distill_weight=0.0, quantize="none", seed=calibration.seed + 1,
        adapter_rank=calibration.adapter_rank or Recipe.adapter_rank,
    )  # fmt: skip
    recipe = Recipe.from_dict(changes, recipe)
    if recipe.post_tune_steps < 1:
        raise RecipeError(f"steps is {recipe.post_tune_steps}; a fine-tuning takes at least 1.")
    if calibration.adapter_rows not in (0, recipe.adapter_rank):
        raise RecipeError(
            f"adapter_rank is {recipe.adapter_rank}; the adapters beside these layers go on from their calibration's, "
            f"whose rank is {calibration.adapter_rank}. Leave it out."
        )
    return recipe


def attach(any_size: ElasticModel, recipe: Recipe) -> None:
    """Trainable adapters on the present size of `any_size`, in place; it can't be resized any more. In 4 bit where the recipe says so."""
    torch.manual_seed(recipe.seed)  # the adapters' start
    any_size.load_missing = None
    for name, layer in any_size.layers.items():
        set_module(any_size.model, name, _dense(layer, recipe) if layer.rank is None else _adapted(layer, recipe))
    any_size.model.eval()  # the adapters' dropout is on only where they are trained


def finetune(
    any_size: ElasticModel,
    scores: ScoreMap,
    batches: Batches,
    recipe: Recipe,
    resume: str | Path | None = None,
    observe: Observe = lambda reports, state: None,
    task: Task = next_token,
    look_every: int | None = None,
) -> list[StepReport]:
    """Train what `attach` put on, in place; `recipe.post_tune_steps` steps of `recipe.lr`, from a fresh optimizer (Appendix B).

    With `recipe.distill_weight` the base model's own layers must have been loaded, too. `resume` is a folder that `CalibrationState.save`
    wrote. Raises CalibrationError where the loss is not finite.
    """
    assert any_size.cut is not None, "load a size first"
    size = any_size.cut.sizes["linear"]
    state = CalibrationState.tuning(any_size.model, scores, recipe)
    loop = Loop.of(any_size.model, batches, recipe, task, scores.score.device, look_every)
    if resume is not None:
        state.load(Path(resume), any_size.model, recipe)
    with training(any_size.model, recipe):
        loop.post_tune(state, lambda: size, observe)
    return state.history


def scores_of(artifact: Artifact, device: str | torch.device = "cpu") -> ScoreMap:
    """The score map that an artifact was cut by."""
    offsets = [0]
    for layer in artifact.table().layers:
        offsets.append(offsets[-1] + layer.K)
    kept = artifact.tensors("order").read(["score", "crossing"])
    names = tuple(layer.name for layer in artifact.table().layers)
    return ScoreMap(names, tuple(offsets), kept["score"].to(device), kept["crossing"].to(device))


def save(folder: str | Path, artifact: Artifact, any_size: ElasticModel, provenance: Mapping[str, Any]) -> Artifact:
    """`artifact` with what `any_size` learned folded in, written into an empty `folder`. Its curve is not measured yet."""
    factors: dict[str, Tensor] = {}
    adapters: dict[str, Tensor] = {}
    old, stored = artifact.tensors("adapters"), {row["name"]: row["stored_rank"] for row in artifact.manifest["layers"]}
    for name, core in any_size.layers.items():
        if core.rank is not None:
            factors[f"{name}.left"], factors[f"{name}.right"] = core.folded(core.rank)
        for place, lora in core.loras.items():
            A, B = lora.A.detach().cpu(), (lora.B.detach() * lora.scale).cpu()
            more = stored[name] - (core.rank or 0)  # directions beyond this size: nothing is added to them
            if place == "left":
                A = F.pad(A, (0, more))
            elif place == "right":
                B = F.pad(B, (0, 0, 0, more))
            keys = f"{name}.{place}.A", f"{name}.{place}.B"
            if place != "layer" and keys[0] in old.entries:  # on top of the calibration's: their ranks add up
                before_A, before_B = old.read(list(keys)).values()
                A, B = torch.cat([widened(before_A), A]), torch.cat([widened(before_B), B], 1)
            adapters |= dict(zip(keys, (A, B), strict=True))
    return artifact.tuned(folder, factors, adapters, provenance)


def _dense(layer: ElasticLinear, recipe: Recipe) -> ElasticLinear:
    if recipe.quantize != "none":
        W_MN = weight_MN(layer.original)
        layer = ElasticLinear(FourBitLinear(layer.original, W_MN, recipe.quantize), layer.left, layer.right)
        layer.park()
    return layer


def _adapted(layer: ElasticLinear, recipe: Recipe) -> ElasticLinear:
    left, right = layer.left.read(layer.kept), layer.right.read(layer.kept)
    beside, rank, R, bits = layer.lead, layer.rank, recipe.adapter_rank, recipe.quantize
    (M, N), scale = (left.shape[1], right.shape[1]), recipe.adapter_alpha / R
    assert rank is not None

    def lora(inputs: int, outputs: int) -> LoRA:
        return LoRA(inputs, outputs, R, scale, recipe.adapter_dropout, left.device, left.dtype)

    if beside:
        loras = {"layer": lora(N, M)}
        with torch.no_grad():
            loras["layer"].A.copy_(right[:beside])
            loras["layer"].B.copy_(left[:beside].T / scale)
    else:
        loras = {"right": lora(N, rank), "left": lora(rank, M)}

    core = ElasticLinear(layer.original, DirectionMatrix.of(left[beside:], bits), DirectionMatrix.of(right[beside:], bits), loras)
    core.set_rank(rank)
    return core
