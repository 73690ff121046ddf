"""The baseline of the benchmarks is honest: it replays the recorded run of the published implementation."""

import json

import pytest
import torch
from safetensors.torch import load_file

from acip.base import load_base
from acip.data import TokenBatches
from tests.benchmarks import literal
from tests.conftest import GOLDEN


def test_the_literal_baseline_replays_the_recorded_run(small_base: str, golden_tokens: torch.Tensor) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = json.loads((GOLDEN / "config.json").read_text())
    model = load_base(small_base, "float32").model
    layers = literal.parametrise(model, config["lora_r"], config["lora_alpha"], config["mask_scale"])
    adapters = load_file(GOLDEN / "initial_adapters.safetensors")
    with torch.no_grad():
        for name, layer in layers.items():
            layer.A.copy_(adapters[f"model.{name}.lora_A.default.weight"])
    run = literal.calibrate(
        model,
        layers,
        TokenBatches(golden_tokens, config["B"], shuffle=False),
        lr=config["lr"],
        lambda_=config["reg_start"],
        lambda_factor=config["reg_factor"],
        lambda_interval=config["reg_every"],
        stop_ratio=config["stop_ratio"],
        post_tune_steps=config["post_tune_steps"],
    )
    torch.set_num_threads(threads)

    trace = json.loads((GOLDEN / "trace.json").read_text())
    assert len(run.history) == len(trace)
    assert run.stop_step == config["stop_step"]
    for ours, theirs in zip(run.history, trace, strict=True):
        assert ours.live == theirs["live"]
        assert ours.size == pytest.approx(theirs["size_ratio"], abs=1e-12)
        assert ours.lambda_ == pytest.approx(theirs["reg_weight_after"], rel=1e-12)
        assert ours.loss == pytest.approx(theirs["loss"], rel=1e-4)
    for key, score in load_file(GOLDEN / "score_map.safetensors").items():
        torch.testing.assert_close(run.scores[key.removesuffix(".base_layer.parametrization.mask")], score, rtol=0, atol=1e-4)
