"""The calibration loop resumes bit for bit, orders directions by score, and explains failures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acip.artifact.artifact import Artifact
from acip.base import load_base
from acip.calibration.loop import Calibration, calibrate, trial_step
from acip.calibration.parametrize import parametrize
from acip.calibration.state import CalibrationState, StepReport
from acip.data import TokenBatches
from acip.errors import BaseModelError, CalibrationError
from acip.evaluate import perplexity
from acip.layers.targets import targets
from acip.recipe import Recipe
from acip.sizing.score_map import ScoreMap


@pytest.mark.parametrize("at", [7, -8], ids=["while pruning", "in post-tuning"])
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(
    small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, calibrated: tuple[object, Calibration], tmp_path: Path, at: int
) -> None:
    _, straight = calibrated
    stop_at = at if at > 0 else len(straight.history) + at
    batches = TokenBatches(golden_tokens, quick_recipe.batch_size)

    class Killed(Exception):  # noqa: N818
        pass

    def kill(reports: list[StepReport], state: CalibrationState) -> None:
        if state.step == stop_at:
            state.save(tmp_path)
            raise Killed

    for resume in (None, tmp_path):
        base = load_base(small_base, quick_recipe.dtype)
        parametrize(base.model, quick_recipe, golden_tokens)
        if resume is None:
            with pytest.raises(Killed):
                calibrate(base.model, batches, quick_recipe, observe=kill)
    resumed = calibrate(base.model, batches, quick_recipe, resume=tmp_path)
    assert resumed.history == straight.history
    assert torch.equal(resumed.scores.score, straight.scores.score)
    assert torch.equal(resumed.scores.crossing, straight.scores.crossing)
    assert adapters_equal(resumed, straight)


@pytest.fixture(scope="module")
def stopped_between_syncs(
    small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, calibrated: tuple[object, Calibration]
) -> Calibration:
    """A run whose stop step is not a multiple of 2, 3 or 4: its stop ratio is the size that `calibrated` first reached at such a step."""
    _, usual = calibrated
    sizes = [report.size for report in usual.history if report.phase == "prune"]
    stop_ratio = next(size for step, size in reversed(list(enumerate(sizes, 1))) if step % 6 in (1, 5) and size < min(sizes[: step - 1]))
    recipe = replace(quick_recipe, stop_ratio=stop_ratio, post_tune_steps=9)
    base = load_base(small_base, recipe.dtype)
    parametrize(base.model, recipe, golden_tokens)
    return calibrate(base.model, TokenBatches(golden_tokens, recipe.batch_size), recipe)


@pytest.mark.parametrize("look_every", [2, 3, 4])
def test_the_sync_interval_does_not_change_the_result(
    small_base: str, golden_tokens: torch.Tensor, stopped_between_syncs: Calibration, look_every: int
) -> None:
    """Pruning stops between two syncs with the host, and the steps after the stop change nothing."""
    straight, recipe = stopped_between_syncs, stopped_between_syncs.recipe
    assert straight.stop_step % look_every, "the fixture ensures this"
    base = load_base(small_base, recipe.dtype)
    parametrize(base.model, recipe, golden_tokens)
    calls = []
    batches = TokenBatches(golden_tokens, recipe.batch_size)
    result = calibrate(base.model, batches, recipe, observe=lambda reports, state: calls.append(len(reports)), look_every=look_every)
    assert max(calls) == look_every
    assert result.history == straight.history
    assert torch.equal(result.scores.score, straight.scores.score)
    assert torch.equal(result.scores.crossing, straight.scores.crossing)
    assert adapters_equal(result, straight)


def adapters_equal(first: Calibration, second: Calibration) -> bool:
    others = targets(second.model)
    pairs = [(lora, others[name].loras[key]) for name, core in targets(first.model).items() for key, lora in core.loras.items()]
    return all(torch.equal(a, b) for lora, other in pairs for a, b in zip(lora.parameters(), other.parameters(), strict=True))


def test_gradient_checkpointing_gives_the_same_result(
    small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, calibrated: tuple[object, Calibration]
) -> None:
    base = load_base(small_base, quick_recipe.dtype)
    checkpointing = Recipe.from_dict({"gradient_checkpointing": True}, quick_recipe)
    parametrize(base.model, checkpointing, golden_tokens)
    calibration = calibrate(base.model, TokenBatches(golden_tokens, quick_recipe.batch_size), checkpointing)
    _, straight = calibrated
    assert calibration.history == straight.history, "dropout must be the same as well"
    assert adapters_equal(calibration, straight)
    assert "forward" not in vars(base.model.get_submodule("model.layers.1"))


def test_a_checkpoint_of_another_recipe_is_refused(
    small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, calibrated: tuple[object, Calibration], tmp_path: Path
) -> None:
    def keep(reports: list[StepReport], state: CalibrationState) -> None:
        if state.step == 2:
            state.save(tmp_path)
            raise KeyboardInterrupt

    base = load_base(small_base, "float32")
    batches = TokenBatches(golden_tokens, 4)
    parametrize(base.model, quick_recipe, golden_tokens)
    with pytest.raises(KeyboardInterrupt):
        calibrate(base.model, batches, quick_recipe, observe=keep)
    for change in ({"exclude": ["up_proj"]}, {"adapter_rank": 2}, {"adapter": "layer"}):
        other = Recipe.from_dict(change, quick_recipe)
        base = load_base(small_base, "float32")
        parametrize(base.model, other, golden_tokens)
        with pytest.raises(CalibrationError, match="another model or recipe"):
            calibrate(base.model, batches, other, resume=tmp_path)
    with pytest.raises(CalibrationError, match=r"sha256\.json is missing"):
        calibrate(base.model, batches, other, resume=tmp_path / "state.json")


def test_scores_order_by_the_step_and_then_by_the_moment_of_crossing() -> None:
    scores = ScoreMap.start({"a": torch.full((3,), 0.02), "b": torch.full((2,), 0.02)})
    # step 1: a1 crosses early, b0 late; step 2: a0 crosses; a2 and b1 remain
    one = torch.tensor([0.01, -0.03, 0.02, -0.001, 0.03])
    scores.update(torch.full((5,), 0.02), one)
    two = torch.tensor([-0.01, -0.04, 0.01, -0.002, 0.03])
    scores.update(one, two)
    assert scores.score.tolist() == pytest.approx([-1, -2, 0.01, -2, 0.03])
    assert scores.removal_order().tolist() == [1, 3, 0, 2, 4]
    assert scores.importance()["a"].tolist() == [2, 0, 1]
    assert scores.importance()["b"].tolist() == [1, 0]


def test_pruning_stops_at_the_stop_ratio(calibrated: tuple[object, Calibration], quick_recipe: Recipe) -> None:
    _, calibration = calibrated
    pruning = [report for report in calibration.history if report.phase == "prune"]
    assert len(pruning) == calibration.stop_step
    assert pruning[-1].size <= quick_recipe.stop_ratio < pruning[-2].size
    assert len(calibration.history) == calibration.stop_step + quick_recipe.post_tune_steps
    assert pruning[-1].live == int((calibration.scores.score > 0).sum())


def test_calibration_beats_random_directions(
    small_artifact: Artifact,
    small_base: str,
    golden_tokens: torch.Tensor,
    heldout_tokens: torch.Tensor,
    calibrated: tuple[object, Calibration],
) -> None:
    """At 0.6, the loss increase is clearly smaller than with random directions at the same ranks."""
    any_size = small_artifact.load()
    cut = any_size.resize(0.6)
    calibrated_loss = perplexity(any_size.model, heldout_tokens[:64], 16).loss
    torch.manual_seed(0)
    for name, layer in any_size.layers.items():
        rank = cut.ranks[name]
        if rank:
            keep = torch.randperm(layer.stored_rank)[:rank]
            layer.left.values[:rank] = layer.left.values[keep]
            layer.right.values[:rank] = layer.right.values[keep]
    random_loss = perplexity(any_size.model, heldout_tokens[:64], 16).loss
    base_loss = perplexity(load_base(small_base, "float32").model, heldout_tokens[:64], 16).loss
    assert calibrated_loss - base_loss < 0.8 * (random_loss - base_loss)


def test_the_trial_step_changes_nothing(small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor) -> None:
    base = load_base(small_base, "float32")
    parametrize(base.model, quick_recipe, golden_tokens)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    assert 0 < trial_step(base.model, TokenBatches(golden_tokens, 4), quick_recipe) < 10
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in base.model.named_parameters())


def test_wrong_use_is_refused_with_a_reason(small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor) -> None:
    base = load_base(small_base, "float32")
    batches = TokenBatches(golden_tokens, 4)
    with pytest.raises(CalibrationError, match="parametrize"):
        calibrate(base.model, batches, quick_recipe)
    with pytest.raises(BaseModelError, match="needs calibration text"):
        parametrize(base.model, quick_recipe)
    with pytest.raises(BaseModelError, match=r"nothing to compress|does not skip"):
        parametrize(base.model, Recipe.from_dict({"exclude": ["proj"]}, quick_recipe), golden_tokens)
    slow = Recipe.from_dict({"max_prune_steps": 3}, quick_recipe)
    parametrize(base.model, slow, golden_tokens)
    with pytest.raises(BaseModelError, match="parametrized already"):
        parametrize(base.model, slow, golden_tokens)
    with pytest.raises(CalibrationError, match="not reached in max_prune_steps = 3"):
        calibrate(base.model, batches, slow)


def test_a_diverging_run_stops_with_a_reason(small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor) -> None:
    base = load_base(small_base, "float32")
    wild = Recipe.from_dict({"lr": 1e30}, quick_recipe)
    parametrize(base.model, wild, golden_tokens)
    with pytest.raises(CalibrationError, match=r"diverged\. Lower lr"):
        calibrate(base.model, TokenBatches(golden_tokens, 4), wild)


@pytest.mark.parametrize("phase", ["prune", "post_tune"])
def test_a_last_step_that_diverges_is_noticed(
    phase: str, small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss follows the last step of a phase, so its result is checked itself."""
    record = CalibrationState.record

    def poisoned(self: CalibrationState, reports: list[StepReport], recipe: Recipe) -> None:
        record(self, reports, recipe)
        is_last = reports[-1].size <= recipe.stop_ratio if phase == "prune" else self.step == recipe.end(self.stop_step or 0)
        if reports[-1].phase == phase and is_last:
            next(iter(self.params.values())).data.view(-1)[0] = torch.nan

    monkeypatch.setattr(CalibrationState, "record", poisoned)
    base = load_base(small_base, "float32")
    parametrize(base.model, quick_recipe, golden_tokens)
    with pytest.raises(CalibrationError, match=r"the trained weights are not finite after step \d+.*Lower lr"):
        calibrate(base.model, TokenBatches(golden_tokens, 4), quick_recipe)


def test_calibration_works_without_adapters(
    small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, tmp_path: Path, heldout_tokens: torch.Tensor
) -> None:
    """Without adapters (D.2 of the paper), neither the artifact nor a size stores any."""
    base = load_base(small_base, "float32")
    bare = Recipe.from_dict({"adapter_rank": 0, "post_tune_steps": 0}, quick_recipe)
    parametrize(base.model, bare, golden_tokens)
    calibration = calibrate(base.model, TokenBatches(golden_tokens, 4), bare)
    any_size = Artifact.save(tmp_path / "bare", base, calibration, {}).load()
    assert any_size.resize(0.5).got <= 0.5
    assert not any(layer.loras for layer in any_size.layers.values())
    assert perplexity(any_size.model, heldout_tokens[:8]).loss < 5
