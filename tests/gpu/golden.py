"""Replay of the recorded runs of the published implementation on a device. See tests/golden/README.md and tests/support/replay.py."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from acip.calibration.basis_cache import BasisCache, basis_keys
from acip.calibration.loop import Calibration, calibrate
from acip.calibration.parametrize import parametrize
from acip.layers.targets import find_linears, targets, weight_MN
from acip.recipe import Recipe
from acip.sizing.model_sizes import layer_shapes
from tests.gpu.report import Row
from tests.gpu.scale import Scale
from tests.support.small import GOLDEN, write_small_base

RECORDED = {"float32": GOLDEN, "float64": GOLDEN.with_name("reference-trace-64")}
MAX_LOGIT_ERROR = 1e-9  # limit for logits of about 10 at the recorded ranks, in float64
SAME_STEPS = 100  # steps whose losses agree in float32
SIZES = ("1.0", "0.8", "0.6", "0.4")


def replay(row: Row, scale: Scale, dtype: Any) -> None:
    """Repeat the recorded calibration with LAPACK's bases. Compare every step, the scores, and the logits at the recorded ranks."""
    if not (RECORDED[dtype] / "trace.json").is_file():
        row.require(False, "the recording is missing", str(RECORDED[dtype].name))
        return
    from tests.support.replay import Recording, assert_same_run, rank_correlation, start_adapters

    recording = Recording(dtype)
    config = recording.config
    recipe = Recipe(
        basis="svd", convention="paper", post_tune="stop", adapter="layer", scores="order", storage="factors", prune_distill_weight=0.0,
        distill_weight=0.0, mask_scale=config["mask_scale"], adapter_rank=config["lora_r"], adapter_alpha=float(config["lora_alpha"]),
        adapter_dropout=0.0, dtype=dtype, batch_size=config["B"], seq_len=config["T"], lr=config["lr"],
        lambda_start=config["reg_start"], lambda_factor=config["reg_factor"], lambda_interval=config["reg_every"],
        stop_ratio=config["stop_ratio"], post_tune_steps=config["post_tune_steps"], post_tune_lr_end=1.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model: Any = recording.base(str(write_small_base(Path(folder) / "base"))).model
        linears, cache = find_linears(model), BasisCache(Path(folder) / "bases")
        bases = {name: torch.linalg.svd(weight_MN(linear), full_matrices=False).U.T.contiguous() for name, linear in linears.items()}
        model.to(scale.device)
        for name, key in basis_keys(model, linears, recipe, None).items():
            cache.put(key, bases[name])
        parametrize(model, recipe, cache=cache)
    with torch.no_grad():
        for name, core in targets(model).items():
            A, B = start_adapters(name)
            core.loras["layer"].A.copy_(A)
            core.loras["layer"].B.copy_(B)
    calibration = calibrate(model, recording.batches(), recipe)
    scores = {name: calibration.scores.of(name).cpu() for name in calibration.scores.names}
    if dtype == "float64":
        l1 = calibration.history[-1].lambda_ * float(calibration.scores.score.clamp(min=0).sum())
        assert_same_run(recording, calibration.history, calibration.stop_step, scores, l1)
        error = max_logit_error(model, recording)
        row.require(
            error < MAX_LOGIT_ERROR,
            f"{len(calibration.history)} equal steps, logits differ by {error:.1e}",
            f"at most {MAX_LOGIT_ERROR:.0e}",
        )
    else:  # the runs diverge once the order of summation decides whether a mask crosses zero
        pairs = list(zip(calibration.history, recording.trace, strict=False))
        losses = max(abs(step.loss - recorded["loss"]) / recorded["loss"] for step, recorded in pairs[:SAME_STEPS])
        live = max(abs(step.live - recorded["live"]) / recorded["live"] for step, recorded in pairs[: config["stop_step"] - 3])
        correlation = min(rank_correlation(scores[name], recording.scores[name]) for name in scores)
        row.require(losses < 1e-3, f"losses of the first {SAME_STEPS} steps differ by {losses:.1e}", "at most 1e-3")
        row.require(live < 0.02, f"active directions differ by {live:.2%}", "at most 2%")
        row.require(
            abs(calibration.stop_step - config["stop_step"]) <= 5, f"stop at step {calibration.stop_step}", f"{config['stop_step']}"
        )
        row.require(
            correlation > 0.97,
            f"losses differ by {losses:.0e}, active directions by {live:.2%}, score rank correlation {correlation:.4f}",
            "at least 0.97",
        )
    row.numbers |= {"losses": [report.loss for report in calibration.history], "live": [report.live for report in calibration.history]}


def max_logit_error(model: Any, recording: Any) -> float:
    """Return the largest difference from the recorded logits at the recorded ranks."""
    tokens, error = recording.probe["probe"].long().to(model.device), 0.0
    for size in SIZES:
        ranks, layers = recording.ranks(size), targets(model)
        for shape in layer_shapes(model):
            core: Any = layers[shape.name]
            core.set_rank(ranks[shape.name])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits.cpu()
        error = max(error, float((logits - recording.probe[f"logits_{size}"]).abs().max()))
    return error


def same_result(first: Calibration, second: Calibration) -> bool:
    """Return whether two calibrations have the same history and scores, bit for bit."""
    return first.history == second.history and torch.equal(first.scores.score, second.scores.score)
