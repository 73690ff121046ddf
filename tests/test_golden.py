"""It is ACIP before it is more: the paper's settings replay a recorded run of the published implementation.

golden/README.md says what was recorded. The recorded loss includes the (constant) L1 term in post-tuning; ours doesn't.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from acip.artifact import Artifact
from acip.base import load_base
from acip.basis_cache import BasisCache, basis_keys
from acip.calibrate import Calibration, calibrate
from acip.data import TokenBatches
from acip.layers import find_linears, targets, weight_MN
from acip.linear import ElasticLinear
from acip.parametrise import parametrise
from acip.recipe import Recipe
from acip.sizes import layer_shapes
from acip.state import StepReport
from tests.conftest import GOLDEN

CONFIG = json.loads((GOLDEN / "config.json").read_text())
RECIPE = Recipe(
    basis="svd",
    convention="paper",
    post_tune="stop",
    adapter="layer",
    scores="order",
    storage="factors",
    distill_prune=0.0,
    distill=0.0,
    mask_scale=CONFIG["mask_scale"],
    adapter_rank=CONFIG["lora_r"],
    adapter_alpha=float(CONFIG["lora_alpha"]),
    adapter_dropout=0.0,
    dtype="float32",
    batch_size=CONFIG["B"],
    seq_len=CONFIG["T"],
    lr=CONFIG["lr"],
    lambda_start=CONFIG["reg_start"],
    lambda_factor=CONFIG["reg_factor"],
    lambda_interval=CONFIG["reg_every"],
    stop_ratio=CONFIG["stop_ratio"],
    post_tune_steps=CONFIG["post_tune_steps"],
)


def elastic(model: Any) -> dict[str, ElasticLinear]:
    return {name: core for name, core in targets(model).items() if isinstance(core, ElasticLinear)}


def recorded_bases(model: Any, folder: Path) -> BasisCache:
    """LAPACK's SVD of each weight, which the recorded run started from: from step 196 on it hangs on the last bit of it."""
    linears, cache = find_linears(model), BasisCache(folder)
    for name, key in basis_keys(model, linears, RECIPE, None).items():
        cache.put(key, torch.linalg.svd(weight_MN(linears[name]), full_matrices=False).U.T.contiguous())
    return cache


@pytest.fixture(scope="module")
def replay(small_base: str, golden_tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Calibration]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of summation is part of the recording
    base = load_base(small_base, "float32")
    parametrise(base.model, RECIPE, cache=recorded_bases(base.model, tmp_path_factory.mktemp("bases")))
    adapters = load_file(GOLDEN / "initial_adapters.safetensors")
    with torch.no_grad():
        for name, core in targets(base.model).items():
            core.loras["layer"].A.copy_(adapters[f"model.{name}.lora_A.default.weight"])
            core.loras["layer"].B.copy_(adapters[f"model.{name}.lora_B.default.weight"])
    calibration = calibrate(base.model, TokenBatches(golden_tokens, CONFIG["B"], shuffle=False), RECIPE)
    torch.set_num_threads(threads)
    return base, calibration


def test_the_svds_directions_are_the_recorded_ones(small_base: str) -> None:
    """Up to sign; where singular values lie close together, up to a rotation among them."""
    model = load_base(small_base, "float32").model
    parametrise(model, RECIPE)
    recorded = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    for name, core in targets(model).items():
        key = f"model.{name}.base_layer.parametrization"
        cosines_K = (core.left.read() * recorded[f"{key}.ortho.weight"].T * CONFIG["mask_scale"] ** 0.5).sum(1).abs()
        assert float((cosines_K > 0.998).float().mean()) > 0.97, name
        torch.testing.assert_close(core.right.read().norm(dim=1), recorded[f"{key}.S"], rtol=1e-3, atol=2e-4)


def test_every_step_is_the_recorded_one(replay: tuple[Any, Calibration]) -> None:
    _, calibration = replay
    trace = json.loads((GOLDEN / "trace.json").read_text())
    l1 = calibration.history[-1].lambda_ * float(calibration.scores.score.clamp(min=0).sum())
    assert len(calibration.history) == len(trace)
    assert calibration.stop_step == CONFIG["stop_step"]

    def total(report: StepReport) -> float:
        return report.loss + (l1 if report.phase == "post_tune" else 0.0)

    for ours, theirs in zip(calibration.history, trace, strict=True):
        assert ours.live == theirs["live"], ours
        assert ours.size == pytest.approx(theirs["size_ratio"], abs=1e-12), ours
        assert ours.lambda_ == pytest.approx(theirs["reg_weight_after"], rel=1e-12)
        assert total(ours) == pytest.approx(theirs["loss"], rel=1e-5), ours


def test_every_score_is_the_recorded_one(replay: tuple[Any, Calibration]) -> None:
    _, calibration = replay
    for key, score in load_file(GOLDEN / "score_map.safetensors").items():
        name = key.removesuffix(".base_layer.parametrization.mask")
        torch.testing.assert_close(calibration.scores.of(name), score, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reset", ["", "reset_"])
@pytest.mark.parametrize("size", ["1.0", "0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3"])
def test_logits_at_the_recorded_ranks(replay: tuple[Any, Calibration], size: str, reset: str) -> None:
    """The recorded sizes leave ties whole, so at its ranks the kept directions are the same.

    `reset_`: layers that save nothing are the original ones again, without adapter (D.3).
    """
    base, _ = replay
    ranks = json.loads((GOLDEN / "sizes.json").read_text())[size]["ranks"]
    probe = load_file(GOLDEN / "probe.safetensors")
    layers = elastic(base.model)
    for shape in layer_shapes(base.model):
        rank = ranks[f"{shape.name}.base_layer.parametrization.mask"]
        layers[shape.name].set_rank(None if reset and rank * (shape.M + shape.N) >= shape.M * shape.N else rank)
    with torch.no_grad():
        ours = base.model(input_ids=probe["probe"].long()).logits
    theirs = probe[f"logits_{reset}{size}"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_the_artifact_of_the_replay_says_the_same(replay: tuple[Any, Calibration], tmp_path: Any) -> None:
    """At size 0.4 most layers are factors: what is read from disk computes what the calibrated model computes."""
    base, calibration = replay
    artifact = Artifact.save(tmp_path / "paper", base, calibration, {})
    any_size = artifact.load()
    cut = any_size.resize(0.4)
    tokens = load_file(GOLDEN / "probe.safetensors")["probe"].long()
    for name, layer in elastic(base.model).items():
        layer.set_rank(cut.ranks[name])
    with torch.no_grad():
        torch.testing.assert_close(any_size.model(input_ids=tokens).logits, base.model(input_ids=tokens).logits, rtol=0, atol=1e-4)
