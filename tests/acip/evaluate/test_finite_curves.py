"""A loss that is not finite is an error or a warning, and never a point of a curve."""

import math
from typing import Any

import pytest
import torch

from acip.artifact.artifact import Artifact
from acip.errors import EvaluationError
from acip.evaluate.curve import CurveSetup, trade_off
from acip.evaluate.perplexity import perplexity
from acip.layers.elastic_linear import ElasticLinear


def simulate_overflow(any_size: Any, rank_below: bool) -> None:
    """Simulate overflow in all layers, or only in low-rank layers."""

    def multiply_by_infinity(layer: ElasticLinear, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * torch.inf if layer.rank is not None or not rank_below else out

    for layer in any_size.layers.values():
        layer.register_forward_hook(multiply_by_infinity)


def test_a_size_without_a_finite_loss_is_a_warning(small_artifact: Artifact, heldout_tokens: torch.Tensor) -> None:
    any_size = small_artifact.load()
    simulate_overflow(any_size, rank_below=True)
    with pytest.warns(UserWarning, match=r"size 0\.5 has no perplexity: the loss is not finite on 3 of 3 windows"):
        rows = trade_off(any_size, (1.0, 0.5), CurveSetup(heldout_tokens[:3], "text", 0.5))
    assert math.isfinite(rows[0]["loss"]) and math.isnan(rows[1]["loss"]) and math.isnan(rows[1]["perplexity"])


def test_a_base_without_a_finite_loss_is_an_error(small_artifact: Artifact, heldout_tokens: torch.Tensor) -> None:
    any_size = small_artifact.load()
    simulate_overflow(any_size, rank_below=False)
    with pytest.raises(EvaluationError, match=r"curve cannot be measured: at size 1, the loss is not finite on 2 of 2 windows"):
        trade_off(any_size, (1.0, 0.5), CurveSetup(heldout_tokens[:2], "text", 0.5))
    with pytest.raises(EvaluationError, match=r"perplexity cannot be measured: the loss is not finite"):
        perplexity(any_size.model, heldout_tokens[:2])
