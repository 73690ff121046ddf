"""Example masks while L1 pruning shrinks them (the paper's Figure 3): a few directions of a few layers, over the steps.

They are looked at, not used: samples that a crash loses are lost.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from acip.calibration.state import CalibrationState
from acip.sizing.score_map import ScoreMap

FILE = "masks.json"  # in the run
LAYERS = 12  # evenly over the model, so kinds and depths mix
DIRECTIONS = 8  # of each, evenly from the strongest to the weakest
ROWS = 400  # steps that are kept; more are thinned out


@dataclass
class MaskSamples:
    layers: list[str]
    directions: list[list[int]]  # of each layer, indices in its basis
    steps: list[int] = field(default_factory=list)
    values: list[list[list[float]]] = field(default_factory=list)  # by step, layer, direction
    every: int = 1  # steps between two samples

    @classmethod
    def of(cls, scores: ScoreMap) -> "MaskSamples":
        layers = list(dict.fromkeys(scores.names[int(i)] for i in torch.linspace(0, len(scores.names) - 1, LAYERS)))
        return cls(layers, [[int(i) for i in torch.linspace(0, len(scores.of(name)) - 1, DIRECTIONS)] for name in layers])

    def take(self, state: CalibrationState, step: int) -> None:
        """The masks after `step`, unless that is too soon after the last sample, or there are no masks any more."""
        if not state.masks or (self.steps and step < self.steps[-1] + self.every):
            return
        picked = state.flat_masks()[self._places(state.scores).to(state.scores.score.device)]
        self.steps.append(step)
        self.values.append([[round(p, 7) for p in row] for row in picked.tolist()])
        if len(self.steps) > ROWS:
            self.steps, self.values, self.every = self.steps[::2], self.values[::2], self.every * 2

    def _places(self, scores: ScoreMap) -> Tensor:
        """[layers, directions] indices among all directions."""
        offsets = torch.tensor([scores.offsets[scores.names.index(name)] for name in self.layers])
        return torch.tensor(self.directions) + offsets[:, None]

    def to_dict(self) -> dict[str, Any]:
        return vars(self)
