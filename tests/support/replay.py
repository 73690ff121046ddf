"""The inputs and expected results for replays of the recorded runs of the published implementation.

tests/golden/README.md describes the two recordings. A replay in float64 has to give the same steps on every CPU. A replay in float32
gives the same steps until the order of summation decides whether a mask crosses zero, and stays close to the recording after that.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from acip.base import Base, load_base
from acip.data import TokenBatches
from acip.modeling_acip import set_module
from tests.support.small import GOLDEN

Precision = Literal["float32", "float64"]
SAME_STEPS = 150  # of the float32 run; on one CPU the first mask that crosses zero at a different step did so at step 197
LIVE_SHARE = 0.05  # of the directions that are alive; 0.0112 was seen with two threads
MASK = ".base_layer.parametrization.mask"


class Step(Protocol):
    """One optimizer step of a replay."""

    @property
    def phase(self) -> Literal["prune", "post_tune"]: ...
    @property
    def loss(self) -> float: ...
    @property
    def size(self) -> float: ...
    @property
    def live(self) -> int: ...
    @property
    def lambda_(self) -> float: ...


@dataclass(frozen=True)
class Recording:
    """One of the two recorded runs."""

    dtype: Precision

    @property
    def folder(self) -> Path:
        return GOLDEN if self.dtype == "float32" else GOLDEN.with_name("reference-trace-64")

    @cached_property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self._json("config.json")
        return config

    @cached_property
    def trace(self) -> list[dict[str, Any]]:
        """One row per step; the loss includes the L1 term, which is constant in post-tuning."""
        rows: list[dict[str, Any]] = self._json("trace.json")
        return rows

    @cached_property
    def sizes(self) -> dict[str, Any]:
        sizes: dict[str, Any] = self._json("sizes.json")
        return sizes

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """The final scores [K] of each layer."""
        return {key.removesuffix(MASK): score for key, score in load_file(self.folder / "score_map.safetensors").items()}

    @cached_property
    def probe(self) -> dict[str, Tensor]:
        return load_file(self.folder / "probe.safetensors")

    @cached_property
    def final_adapters(self) -> dict[str, Tensor]:
        return load_file(self.folder / "final_adapters.safetensors")

    def base(self, folder: str) -> Base:
        """Load the recorded base model from `folder` in this dtype; in float64 its norms and rotary embedding also compute in float64."""
        base = load_base(folder, self.dtype)
        if self.dtype == "float64":
            in_float64(base.model)
        return base

    def batches(self) -> TokenBatches:
        """Return the batches in the recorded order; the first rows follow again after the last one."""
        rows = load_file(GOLDEN / "batches.safetensors")["batches"].long()
        return TokenBatches(torch.cat([rows, rows[:64]]), self.config["B"], shuffle=False)

    def ranks(self, size: str) -> dict[str, int]:
        return {key.removesuffix(MASK): rank for key, rank in self.sizes[size]["ranks"].items()}

    def _json(self, file: str) -> Any:
        return json.loads((self.folder / file).read_text())


def start_adapters(name: str) -> tuple[Tensor, Tensor]:
    """Return the recorded (A, B) of a layer at step 0."""
    adapters = load_file(GOLDEN / "initial_adapters.safetensors")
    return adapters[f"model.{name}.lora_A.default.weight"], adapters[f"model.{name}.lora_B.default.weight"]


# ---- a Llama that computes entirely in float64


class Norm(nn.Module):
    """LlamaRMSNorm without its cast to float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))
        return scaled


class Rotary(nn.Module):
    """LlamaRotaryEmbedding entirely in float64, including the inverse frequencies."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        dim, theta = 2 * len(rotary.inv_freq), rotary.config.rope_parameters["rope_theta"]
        self.frequencies = 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        half = position_ids[..., None].double() * self.frequencies.to(position_ids.device)
        angles = torch.cat((half, half), dim=-1)
        return angles.cos(), angles.sin()


def in_float64(model: nn.Module) -> None:
    """Replace, in place, the modules of a Llama that cast to float32."""
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind in ("LlamaRMSNorm", "LlamaRotaryEmbedding"):
            set_module(model, name, Norm(module) if kind == "LlamaRMSNorm" else Rotary(module))


# ---- comparisons


def assert_same_run(recording: Recording, steps: Sequence[Step], stop_step: int, scores: Mapping[str, Tensor], l1: float) -> None:
    """Assert that a float64 run equals the recording: steps and pruned scores exactly, losses and remaining scores to 1e-12.

    `l1` is the L1 term that the recorded losses include in post-tuning and the losses of `steps` do not.
    """
    assert stop_step == recording.config["stop_step"]
    assert len(steps) == len(recording.trace)
    for step, row in zip(steps, recording.trace, strict=True):
        assert step.live == row["live"], row
        assert step.size == row["size_ratio"], row
        assert step.lambda_ == pytest.approx(row["reg_weight_after"], rel=1e-14), row
        assert step.loss + l1 * (step.phase == "post_tune") == pytest.approx(row["loss"], rel=1e-12), row
    assert scores.keys() == recording.scores.keys()
    for name, expected_K in recording.scores.items():
        score_K = scores[name]
        assert score_K.dtype == torch.float64
        assert torch.equal(score_K > 0, expected_K > 0), name
        assert torch.equal(score_K[expected_K <= 0], expected_K[expected_K <= 0]), name
        torch.testing.assert_close(score_K, expected_K, rtol=0, atol=1e-12)


def assert_close_run(recording: Recording, steps: Sequence[Step], stop_step: int, scores: Mapping[str, Tensor]) -> None:
    """Assert that a float32 run equals the recording for SAME_STEPS steps and stays close to it afterwards."""
    for step, row in list(zip(steps, recording.trace, strict=False))[:SAME_STEPS]:
        assert step.live == row["live"], row
        assert step.size == pytest.approx(row["size_ratio"], abs=1e-12), row
        assert step.loss == pytest.approx(row["loss"], rel=1e-5), row
    assert abs(stop_step - recording.config["stop_step"]) <= 6
    assert len(steps) == stop_step + recording.config["post_tune_steps"]
    for step, row in zip(steps[:stop_step], recording.trace[: recording.config["stop_step"]], strict=False):
        assert step.live == pytest.approx(row["live"], rel=LIVE_SHARE), row
        assert step.lambda_ == pytest.approx(row["reg_weight_after"], rel=1e-12), row
    assert scores.keys() == recording.scores.keys()
    for name, expected_K in recording.scores.items():
        assert rank_correlation(scores[name], expected_K) >= 0.95, name


def rank_correlation(a_K: Tensor, b_K: Tensor) -> float:
    """Return Spearman's rank correlation. Equal scores share the mean of their ranks."""
    ranks = [(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2 for x in (a_K, b_K)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
