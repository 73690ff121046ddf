"""The calibration with the settings of the paper replays two recorded runs of the published implementation.

In float64 the replay equals the recorded run step by step on any CPU, both with the SVD of LAPACK, which the recording used, and with the
SVD of acip. In float32 the first steps are equal and the others stay close. In post-tuning the recorded loss includes the L1 term, which
is constant then; the loss of acip does not.
"""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from acip.artifact.artifact import Artifact
from acip.base import Base, load_base
from acip.calibration.basis_cache import BasisCache, basis_keys
from acip.calibration.loop import Calibration, calibrate
from acip.calibration.parametrize import parametrize
from acip.evaluate import perplexity
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import find_linears, targets, weight_MN
from acip.recipe import Recipe
from acip.sizing.model_sizes import layer_shapes
from tests.conftest import GOLDEN, logits
from tests.support.replay import Precision, Recording, assert_close_run, assert_same_run, in_float64, start_adapters

SIZES = ["1.0", "0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3"]
Replay = tuple[Base, Calibration]


def recipe_of(recording: Recording) -> Recipe:
    config = recording.config
    return Recipe(
        basis="svd", convention="paper", post_tune="stop", adapter="layer", scores="order", storage="factors", prune_distill_weight=0.0,
        distill_weight=0.0, mask_scale=config["mask_scale"], adapter_rank=config["lora_r"], adapter_alpha=float(config["lora_alpha"]),
        adapter_dropout=0.0, dtype=recording.dtype, batch_size=config["B"], seq_len=config["T"], lr=config["lr"],
        lambda_start=config["reg_start"], lambda_factor=config["reg_factor"], lambda_interval=config["reg_every"],
        stop_ratio=config["stop_ratio"], post_tune_steps=config["post_tune_steps"], post_tune_lr_end=1.0,
    )  # fmt: skip


def elastic(model: Any) -> dict[str, ElasticLinear]:
    return {name: core for name, core in targets(model).items() if isinstance(core, ElasticLinear)}


def lapack_bases(model: Any, recipe: Recipe, folder: Path) -> BasisCache:
    """Return a cache of LAPACK's SVD of each weight, which the recorded runs started from."""
    linears, cache = find_linears(model), BasisCache(folder)
    for name, key in basis_keys(model, linears, recipe, None).items():
        cache.put(key, torch.linalg.svd(weight_MN(linears[name]), full_matrices=False).U.T.contiguous())
    return cache


def replayed(small_base: str, recording: Recording, bases: Path | None) -> Replay:
    """Calibrate as recorded. If `bases` is a folder, use the SVD of LAPACK and cache its bases there."""
    base, recipe = recording.base(small_base), recipe_of(recording)
    parametrize(base.model, recipe, cache=None if bases is None else lapack_bases(base.model, recipe, bases))
    with torch.no_grad():
        for name, core in targets(base.model).items():
            A, B = start_adapters(name)
            core.loras["layer"].A.copy_(A)
            core.loras["layer"].B.copy_(B)
    return base, calibrate(base.model, recording.batches(), recipe)


@pytest.fixture(scope="module")
def recorded() -> Recording:
    return Recording("float64")


@pytest.fixture(scope="module", params=["the bases of LAPACK", "our bases"])
def replay(small_base: str, recorded: Recording, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Replay:
    return replayed(small_base, recorded, None if request.param == "our bases" else tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def replay_in_float32(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return replayed(small_base, Recording("float32"), tmp_path_factory.mktemp("bases"))


def by_layer(calibration: Calibration) -> dict[str, torch.Tensor]:
    return {name: calibration.scores.of(name) for name in calibration.scores.names}


def test_the_directions_of_the_svd_are_the_recorded_ones(small_base: str) -> None:
    """Directions are equal up to sign. Those of nearly equal singular values may be rotated among each other."""
    recording = Recording("float32")
    model = load_base(small_base, "float32").model
    parametrize(model, recipe_of(recording))
    checkpoint = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    for name, core in targets(model).items():
        key = f"model.{name}.base_layer.parametrization"
        cosines_K = (core.left.read() * checkpoint[f"{key}.ortho.weight"].T * recording.config["mask_scale"] ** 0.5).sum(1).abs()
        assert float((cosines_K > 0.998).float().mean()) > 0.97, name
        torch.testing.assert_close(core.right.read().norm(dim=1), checkpoint[f"{key}.S"], rtol=1e-3, atol=2e-4)


def test_every_step_and_score_is_the_recorded_one(replay: Replay, recorded: Recording) -> None:
    _, calibration = replay
    l1 = calibration.history[-1].lambda_ * float(calibration.scores.score.clamp(min=0).sum())
    assert_same_run(recorded, calibration.history, calibration.stop_step, by_layer(calibration), l1)


def test_every_adapter_is_the_recorded_one(replay: Replay, recorded: Recording) -> None:
    base, _ = replay
    for name, layer in elastic(base.model).items():
        for part in ("A", "B"):
            adapter = getattr(layer.loras["layer"], part).detach()
            torch.testing.assert_close(adapter, recorded.final_adapters[f"model.{name}.lora_{part}.default.weight"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("reset", ["", "reset_"])
@pytest.mark.parametrize("size", SIZES)
def test_logits_at_the_recorded_ranks(replay: Replay, recorded: Recording, size: str, reset: str) -> None:
    """The recorded sizes do not split equal scores, so the kept directions at the recorded ranks are the same.

    `reset_`: layers that save nothing are dense and have no adapter (D.3 of the paper).
    """
    base, _ = replay
    ranks, layers = recorded.ranks(size), elastic(base.model)
    for shape in layer_shapes(base.model):
        rank = ranks[shape.name]
        layers[shape.name].set_rank(None if reset and rank * (shape.M + shape.N) >= shape.M * shape.N else rank)
    expected = recorded.probe[f"logits_{reset}{size}"]
    torch.testing.assert_close(logits(base.model, recorded.probe["probe"].long()), expected, rtol=0, atol=1e-10)


def test_the_loss_after_calibration_is_the_recorded_one(replay: Replay, recorded: Recording) -> None:
    base, calibration = replay
    for name, layer in elastic(base.model).items():
        layer.set_rank(int((calibration.scores.of(name) > 0).sum()))
    loss = perplexity(base.model, recorded.probe["hold"], 32).loss
    assert loss == pytest.approx(recorded.sizes["as_calibrated"]["loss"], rel=1e-12)


def test_the_artifact_of_the_replay_computes_the_same(replay: Replay, recorded: Recording, tmp_path: Path) -> None:
    """At size 0.4, where most layers are factors, the model read from disk equals the calibrated one."""
    base, calibration = replay
    any_size = Artifact.save(tmp_path / "paper", base, calibration, {}).load()
    in_float64(any_size.model)
    cut = any_size.resize(0.4)
    tokens = recorded.probe["probe"].long()
    for name, layer in elastic(base.model).items():
        layer.set_rank(cut.ranks[name])
    assert any(rank is not None for rank in cut.ranks.values())
    torch.testing.assert_close(logits(any_size.model, tokens), logits(base.model, tokens), rtol=0, atol=1e-10)


def test_in_float32_the_run_follows_the_recorded_one(replay_in_float32: Replay) -> None:
    _, calibration = replay_in_float32
    assert_close_run(Recording("float32"), calibration.history, calibration.stop_step, by_layer(calibration))


def test_both_precisions_start_from_the_same_inputs() -> None:
    first, second = (Recording(dtype) for dtype in get_args(Precision))
    assert {**first.config, "dtype": "", "steps": 0, "stop_step": 0} == {**second.config, "dtype": "", "steps": 0, "stop_step": 0}
    for key in ("probe", "hold"):
        assert torch.equal(first.probe[key], second.probe[key])
