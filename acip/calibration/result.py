"""The result of a calibration, the report of each of its steps, and the transfer of a result to another base model."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from acip.errors import CalibrationError
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import targets
from acip.recipe import Recipe
from acip.sizing.cut_table import CutTable
from acip.sizing.model_sizes import cut_table, layer_shapes, sort_layers
from acip.sizing.score_map import ScoreMap


@dataclass(frozen=True)
class StepReport:
    """The numbers of one optimizer step."""

    step: int
    phase: Literal["prune", "post_tune"]
    loss: float  # total loss before the step, nats per token plus the L1 term
    size: float  # after the step (prune), or the size that was trained (post-tune); in the recipe's convention
    lambda_: float  # after the step
    live: int  # directions that are not pruned
    progress: float  # of this phase, [0, 1]; an estimate while pruning
    task_loss: float | None = None  # of the batch, at the size before the step (prune) or at `size`; nats per token for text


@dataclass
class Calibration:
    """The result of a calibration: the score map, the trained adapters (inside `model`), and the history of its steps."""

    model: nn.Module  # its targets are ElasticLinear layers with adapters, directions sorted by score
    recipe: Recipe
    scores: ScoreMap
    table: CutTable
    stop_step: int
    history: list[StepReport]


def transfer(calibration: Calibration, model: nn.Module, recipe: Recipe) -> Calibration:
    """Apply the scores and adapters of `calibration` to another, freshly parametrized `model` with the same layers, in place.

    This moves a calibration of 4-bit weights to the full-precision base model (paper 3.4). `recipe` is the recipe of `model`. Its basis
    and adapter fields must equal those of the calibration, and its basis must come from the same text. Raises CalibrationError if
    a field or the layers differ.
    """
    for name in ("basis", "adapter", "adapter_rank", "adapter_alpha", "exclude", "mask_scale", "storage", "convention"):
        if getattr(recipe, name) != getattr(calibration.recipe, name):
            raise CalibrationError(
                f"{name} is {getattr(recipe, name)!r}; to transfer the scores it must be {getattr(calibration.recipe, name)!r}."
            )
    source, destination = targets(calibration.model), targets(model)
    if layer_shapes(model) != layer_shapes(calibration.model) or not all(isinstance(core, SVDLinear) for core in destination.values()):
        raise CalibrationError("scores can be transferred only to a freshly parametrized model with the same layers.")
    for name, core in sort_layers(model, calibration.scores).items():
        for place, lora in core.loras.items():
            lora.load_state_dict(source[name].loras[place].state_dict())
    model.eval()
    table = cut_table(model, calibration.scores, recipe)
    return Calibration(model, recipe, calibration.scores, table, calibration.stop_step, calibration.history)
