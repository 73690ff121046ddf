"""Fine-tune a calibrated model at one size. Only the adapters are trained (paper 3.3).

In an artifact, the rows of a layer are its directions with the adapters folded in, sorted by importance. A size keeps the first rows:

    [ adapter beside the layer | kept at the size | the rest  ]
       training continues        new adapters       unchanged

* Adapters beside the layer (the paper's) continue from their calibration: their rows are the matrices A and B. The directions are
  then not trained.
* Otherwise, new adapters are added to the kept directions. They start at B = 0, so the first step starts from exactly the served
  model. They are folded in afterwards and cost no rank.

The result is an artifact with the same removal order and the same other rows, so it still has every size. Training for this size may
harm much larger sizes.

With `Recipe.quantize` (paper 3.4), the kept directions and the dense layers are frozen in 4 bit, and the adapters, in 16 bit,
compensate for the loss. The artifact stores the sum in the model's dtype. A 4-bit export rounds the sum once more, as factors
(acip.export.quantization).

    any_size = artifact.load(size=Budget(0.5))  # a ratio alone would count bytes if the artifact has codes
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
from acip.base import require_positions
from acip.calibration.loop import Batches, Loop, Observe, training
from acip.calibration.losses import Task, next_token
from acip.calibration.state import CalibrationState, StepReport
from acip.errors import BudgetError, RecipeError
from acip.layers.adapters import LoRA
from acip.layers.directions import DirectionMatrix, FourBitLinear
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import weight_MN
from acip.modeling_acip import set_module, widened
from acip.recipe import Recipe
from acip.sizing.budget import Budget
from acip.sizing.elastic_model import ElasticModel
from acip.sizing.score_map import ScoreMap

STEPS, LR = 25_000, 2e-4  # paper, Appendix B


def tuning(artifact: Artifact, size: float, **changes: Any) -> Recipe:
    """Return the recipe of a fine-tuning at the `linear` size ratio `size`: the calibration's recipe with `changes`.

    The loss is the next-token loss, and the seed differs from the calibration's. Raises BudgetError if the size can't be reached or
    is the base model or if the artifact holds codes only, and RecipeError if a change is not allowed.
    """
    if artifact.recipe.code == "bits":
        raise BudgetError(
            "this artifact holds codes only, which can't be fine-tuned: adapters belong to directions. Calibrate with code: both, and "
            "fine-tune a size of ranks."
        )
    if not any(artifact.table().cut(Budget(size)).ranks.values()):
        raise BudgetError(f"at size {size} every layer is the base model's own, so there is nothing to tune. Use a smaller size.")
    calibration = artifact.recipe
    recipe = replace(
        calibration, stop_ratio=size, convention="linear", scores_until=None, post_tune="stop", post_tune_steps=STEPS, total_steps=None,
        lr=LR, post_tune_lr=None, distill_weight=0.0, quantize="none", seed=calibration.seed + 1,
        adapter_rank=calibration.adapter_rank or Recipe.adapter_rank,
    )  # fmt: skip
    recipe = Recipe.from_dict(changes, recipe)
    if recipe.post_tune_steps < 1:
        raise RecipeError(f"steps is {recipe.post_tune_steps}; it must be at least 1.")
    require_positions(artifact.config, recipe.seq_len, RecipeError, f"seq_len is {recipe.seq_len:,}", "Use a smaller seq_len.")
    if calibration.adapter_rows not in (0, recipe.adapter_rank):
        raise RecipeError(
            f"adapter_rank is {recipe.adapter_rank}; it must be {calibration.adapter_rank}, because the adapters beside these layers "
            "continue from the calibration. Omit adapter_rank."
        )
    return recipe


def attach(any_size: ElasticModel, recipe: Recipe) -> None:
    """Add trainable adapters to `any_size` at its current size, in place, and quantize it to 4 bit if the recipe requires it.

    The model can't be resized afterwards. Raise BudgetError for a size of coded layers.
    """
    if any_size.cut is not None and any_size.cut.versions is not None:
        raise BudgetError(
            "a size of coded layers can't be fine-tuned: adapters belong to directions. Load a size of ranks, such as Budget(0.6)."
        )
    torch.manual_seed(recipe.seed)  # for the initial adapters
    any_size.load_missing = None
    for name, layer in any_size.layers.items():
        set_module(any_size.model, name, _dense(layer, recipe) if layer.rank is None else _adapted(layer, recipe))
    any_size.model.eval()  # dropout of the adapters is switched on by the training loop only


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
    """Train the adapters that `attach` added, in place: `recipe.post_tune_steps` steps with a fresh optimizer (Appendix B).

    With `recipe.distill_weight` > 0, the base model's own layers must be loaded as well. `resume` is a folder that
    `CalibrationState.save` wrote. Raises CalibrationError if there are no adapters, or if the training diverges.
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
    """Return the score map that an artifact stores."""
    offsets = [0]
    for layer in artifact.table().layers:
        offsets.append(offsets[-1] + layer.K)
    tensors = artifact.tensors("order").read(["score", "crossing"])
    names = tuple(layer.name for layer in artifact.table().layers)
    return ScoreMap(names, tuple(offsets), tensors["score"].to(device), tensors["crossing"].to(device))


def save(folder: str | Path, artifact: Artifact, any_size: ElasticModel, provenance: Mapping[str, Any]) -> Artifact:
    """Write `artifact` with the trained adapters of `any_size` folded in to an empty `folder`. The result has no measured curve yet."""
    factors: dict[str, Tensor] = {}
    adapters: dict[str, Tensor] = {}
    old, stored = artifact.tensors("adapters"), {row["name"]: row["stored_rank"] for row in artifact.manifest["layers"]}
    for name, core in any_size.layers.items():
        if core.rank is not None:
            factors[f"{name}.left"], factors[f"{name}.right"] = core.folded(core.rank)
        for place, lora in core.loras.items():
            A, B = lora.A.detach().cpu(), (lora.B.detach() * lora.scale).cpu()
            more = stored[name] - (core.rank or 0)  # directions beyond this size are not changed
            if place == "left":
                A = F.pad(A, (0, more))
            elif place == "right":
                B = F.pad(B, (0, 0, 0, more))
            keys = f"{name}.{place}.A", f"{name}.{place}.B"
            if place != "layer" and keys[0] in old.entries:  # append to the calibration's adapters: the ranks add up
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
    lead, rank, R, bits = layer.lead, layer.rank, recipe.adapter_rank, recipe.quantize
    (M, N), scale = (left.shape[1], right.shape[1]), recipe.adapter_alpha / R
    assert rank is not None

    def lora(inputs: int, outputs: int) -> LoRA:
        return LoRA(inputs, outputs, R, scale, recipe.adapter_dropout, left.device, left.dtype)

    if lead:
        loras = {"layer": lora(N, M)}
        with torch.no_grad():
            loras["layer"].A.copy_(right[:lead])
            loras["layer"].B.copy_(left[:lead].T / scale)
    else:
        loras = {"right": lora(N, rank), "left": lora(rank, M)}

    core = ElasticLinear(layer.original, DirectionMatrix.of(left[lead:], bits), DirectionMatrix.of(right[lead:], bits), loras)
    core.set_rank(rank)
    return core
