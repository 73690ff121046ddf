"""Step sizes, one per row, so that a bit saves the same loss in every row of every layer.

A code with step t leaves an error of about t^2 / 12 per weight, in the directions in which error feedback leaves it. To second order, the
loss of row m of a layer then rises by

    1/2 importance_m N D t_m^2 / 12,      D = (det H)^(1/N), the mean conditional variance of an input given the others

and the rate falls by log2 of the step. The sum of the losses at a given mean rate is the least where importance_m D t_m^2 is the same for
all rows, so that one number `scale` decides all step sizes:

    t_m = scale / sqrt(importance_m D)

This is the reverse water-filling of rate-distortion theory with the Fisher information as the metric.

Legend: M = out features, N = in features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from acip.coding.codes import TOP

NORMAL_BITS = 0.5 * math.log2(2 * math.pi * math.e)  # entropy of a normal distribution in units of its standard deviation
LEAST_IMPORTANCE = 0.05  # of a row, as a share of the mean of its layer


@dataclass(frozen=True)
class RowScales:
    """The step sizes of a layer at scale 1, with the facts about its weights that limit and price them."""

    steps: Tensor  # [M]: 1 / sqrt(importance D)
    spread: Tensor  # [M]: root mean square of the weights
    largest: Tensor  # [M]: largest absolute weight
    inputs: int  # N

    @classmethod
    def of(cls, weight_MN: Tensor, metric_NN: Tensor, importance_M: Tensor) -> "RowScales":
        """Return the scales of a layer. `metric_NN` is positive definite."""
        W_MN = weight_MN.float()
        log_D = 2 * torch.linalg.cholesky(metric_NN).diagonal().log().mean()
        floor = LEAST_IMPORTANCE * importance_M.mean().clamp_min(torch.finfo(torch.float32).tiny)
        steps_M = (importance_M.clamp_min(floor).log() + log_D).mul(-0.5).exp()
        return cls(steps_M, W_MN.square().mean(1).sqrt(), W_MN.abs().amax(1), W_MN.shape[1])

    def cpu(self) -> "RowScales":
        """Return these scales in the memory of the CPU."""
        return RowScales(self.steps.cpu(), self.spread.cpu(), self.largest.cpu(), self.inputs)

    def at(self, scale: float) -> Tensor:
        """Return the step sizes [M]: at least 1/126 of the row's largest weight, which is beyond 8 bits otherwise, and never 0."""
        return (scale * self.steps).maximum(self.largest / (TOP - 1)).clamp_min(1e-30)

    def rate(self, scale: float) -> float:
        """Return the predicted bits of the whole layer, as if its weights were normally distributed."""
        bits_M = (NORMAL_BITS + (self.spread / self.at(scale)).clamp_min(1e-30).log2()).clamp_min(0)
        return float(bits_M.sum()) * self.inputs


def scale_for(rows: Mapping[str, RowScales], bits: float) -> float:
    """Return the scale at which the predicted mean rate of all layers is `bits` per weight."""
    weights = sum(len(row.steps) * row.inputs for row in rows.values())
    low, high = -60.0, 60.0  # log2 of the scale; the rate falls with it
    for _ in range(60):
        middle = (low + high) / 2
        rate = sum(row.rate(2.0**middle) for row in rows.values()) / weights
        low, high = (middle, high) if rate > bits else (low, middle)
    return float(2.0**high)
