"""The literal baseline of the benchmarks replays the recorded runs of the published implementation."""

import torch

from tests.benchmarks import literal
from tests.support.replay import Precision, Recording, assert_close_run, assert_same_run, start_adapters


def replayed(small_base: str, dtype: Precision) -> tuple[Recording, literal.Run]:
    recording = Recording(dtype)
    config, model = recording.config, recording.base(small_base).model
    layers = literal.parametrize(model, config["lora_r"], config["lora_alpha"], config["mask_scale"])
    with torch.no_grad():
        for name, layer in layers.items():
            layer.A.copy_(start_adapters(name)[0])
    run = literal.calibrate(
        model,
        layers,
        recording.batches(),
        lr=config["lr"],
        lambda_=config["reg_start"],
        lambda_factor=config["reg_factor"],
        lambda_interval=config["reg_every"],
        stop_ratio=config["stop_ratio"],
        post_tune_steps=config["post_tune_steps"],
    )
    return recording, run


def test_the_literal_baseline_equals_the_recorded_run(small_base: str) -> None:
    """The runs are equal in float64, as are those of acip (tests/acip/calibration/test_golden_replay.py)."""
    recording, run = replayed(small_base, "float64")
    assert_same_run(recording, run.history, run.stop_step, run.scores, l1=0.0)


def test_in_float32_the_literal_baseline_follows_the_recorded_run(small_base: str) -> None:
    recording, run = replayed(small_base, "float32")
    assert_close_run(recording, run.history, run.stop_step, run.scores)
