"""Samples of the masks during L1 pruning (Figure 3 of the paper): a few directions of a few layers over the steps.

They are used only for a figure. Samples that are lost in a crash are not restored.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from acip.calibration.state import CalibrationState
from acip.sizing.score_map import ScoreMap

FILE = "masks.json"  # in the MLflow run
LAYERS = 12  # evenly spaced over the model, so that they have different kinds and depths
DIRECTIONS = 8  # of each layer, evenly spaced from the strongest to the weakest
ROWS = 400  # most steps; beyond that, every other sample is dropped


@dataclass
class MaskSamples:
    """Mask values of example directions at some steps."""

    layers: list[str]
    directions: list[list[int]]  # for each layer, indices in its basis
    steps: list[int] = field(default_factory=list)
    values: list[list[list[float]]] = field(default_factory=list)  # by step, layer, direction
    every: int = 1  # steps between two samples

    @classmethod
    def of(cls, scores: ScoreMap) -> "MaskSamples":
        """Choose the layers and directions to sample."""
        layers = list(dict.fromkeys(scores.names[int(i)] for i in torch.linspace(0, len(scores.names) - 1, LAYERS)))
        return cls(layers, [[int(i) for i in torch.linspace(0, len(scores.of(name)) - 1, DIRECTIONS)] for name in layers])

    def take(self, state: CalibrationState, step: int) -> None:
        """Record the masks after `step`, unless the last sample is too recent or there are no masks."""
        if not state.masks or (self.steps and step < self.steps[-1] + self.every):
            return
        masks = state.flat_masks()[self._indices(state.scores).to(state.scores.score.device)]
        self.steps.append(step)
        self.values.append([[round(p, 7) for p in row] for row in masks.tolist()])
        if len(self.steps) > ROWS:
            self.steps, self.values, self.every = self.steps[::2], self.values[::2], self.every * 2

    def _indices(self, scores: ScoreMap) -> Tensor:
        """Return the indices of the sampled directions among all directions, [layers, directions]."""
        offsets = torch.tensor([scores.offsets[scores.names.index(name)] for name in self.layers])
        return torch.tensor(self.directions) + offsets[:, None]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return vars(self)
