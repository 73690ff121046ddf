"""One shared pruning serves several stop ratios: each result equals that of a separate calibration, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acip.base import load_base
from acip.calibration.loop import Calibration, calibrate
from acip.calibration.parametrize import parametrize
from acip.calibration.shared_pruning import prune, shared_prunings
from acip.calibration.state import CalibrationState
from acip.data import TokenBatches
from acip.errors import CalibrationError
from acip.recipe import Recipe, paper
from tests.acip.calibration.test_loop import adapters_equal

RATIOS = (0.95, 0.9, 0.8, 0.6)


@pytest.fixture(scope="module")
def hasty(quick_recipe: Recipe) -> Recipe:
    """A recipe that prunes in fewer steps."""
    return replace(quick_recipe, sample_windows=16, batch_size=2, lambda_factor=1.4, post_tune_steps=4)


def fresh(base: str, recipe: Recipe, tokens: torch.Tensor) -> tuple[torch.nn.Module, TokenBatches]:
    model = load_base(base, recipe.dtype).model
    parametrize(model, recipe, tokens)
    return model, TokenBatches(tokens, recipe.batch_size)


def keep_states(folder: Path) -> "tuple[dict[float, Path], object]":
    """Return a dict of state folders by stop ratio, and the callback that saves the states and fills the dict."""
    states: dict[float, Path] = {}

    def keep(ratios: list[float], state: CalibrationState) -> None:
        target = folder / f"{state.step}"
        target.mkdir(parents=True)
        state.save(target)
        states.update(dict.fromkeys(ratios, target))

    return states, keep


def same(first: Calibration, second: Calibration) -> bool:
    scores = torch.equal(first.scores.score, second.scores.score) and torch.equal(first.scores.crossing, second.scores.crossing)
    # progress is relative to the stop ratio, so it differs
    histories = [[replace(report, progress=0.0) for report in run.history] for run in (first, second)]
    return scores and adapters_equal(first, second) and first.stop_step == second.stop_step and histories[0] == histories[1]


@pytest.mark.parametrize(
    "change",
    [
        {},  # scores in the order of the masks; post-tuning at sampled sizes
        {"scores": "gradient", "post_tune": "stop", "lambda_factor": 2.0},  # several ratios in one step; post-tuning at the stop
        {"scores_until": 0.95, "total_steps": 45, "adapter": "layer", "convention": "paper", "post_tune_lr": 1e-3},
    ],
    ids=["order", "gradient", "frozen scores"],
)
def test_a_fork_equals_a_separate_run_bit_for_bit(
    small_base: str, hasty: Recipe, golden_tokens: torch.Tensor, tmp_path: Path, change: dict[str, object]
) -> None:
    recipe = Recipe.from_dict(change, hasty)
    states, keep = keep_states(tmp_path)
    prune(*fresh(small_base, recipe, golden_tokens), recipe, RATIOS, keep)  # type: ignore[arg-type]
    assert set(states) == set(RATIOS)
    for ratio in RATIOS[2:]:
        own = replace(recipe, stop_ratio=ratio)
        forked = calibrate(*fresh(small_base, own, golden_tokens), own, resume=states[ratio])
        straight = calibrate(*fresh(small_base, own, golden_tokens), own)
        assert same(forked, straight), ratio
        assert forked.table.order.equal(straight.table.order)
        pruned = [report for report in forked.history if report.phase == "prune"]
        assert pruned[-1].size <= ratio < pruned[-2].size


def test_a_shared_pruning_resumes_from_its_last_fork(small_base: str, hasty: Recipe, golden_tokens: torch.Tensor, tmp_path: Path) -> None:
    straight, keep = keep_states(tmp_path / "straight")
    prune(*fresh(small_base, hasty, golden_tokens), hasty, RATIOS, keep)  # type: ignore[arg-type]
    resumed, keep = keep_states(tmp_path / "resumed")
    prune(*fresh(small_base, hasty, golden_tokens), hasty, RATIOS, keep, resume=straight[0.8])  # type: ignore[arg-type]
    assert set(resumed) == {ratio for ratio in RATIOS if straight[ratio] != straight[0.8] and ratio < 0.8}
    for ratio, folder in resumed.items():
        for file in ("state.safetensors", "state.json"):
            assert (folder / file).read_bytes() == (straight[ratio] / file).read_bytes(), ratio


def test_reached_ratios_are_kept_when_a_later_ratio_fails(
    small_base: str, hasty: Recipe, golden_tokens: torch.Tensor, tmp_path: Path
) -> None:
    whole, keep = keep_states(tmp_path / "whole")
    prune(*fresh(small_base, hasty, golden_tokens), hasty, (0.95,), keep)  # type: ignore[arg-type]
    step = int(whole[0.95].name)
    states, keep = keep_states(tmp_path / "short")
    short = replace(hasty, max_prune_steps=step)
    with pytest.raises(CalibrationError, match=rf"stop ratio 0.05 was not reached in max_prune_steps = {step}"):
        prune(*fresh(small_base, short, golden_tokens), short, (0.95, 0.05), keep)  # type: ignore[arg-type]
    assert set(states) == {0.95}


def test_recipes_that_differ_only_after_pruning_share_it() -> None:
    recipes = [
        paper(),
        replace(paper(), stop_ratio=0.7),
        replace(paper(), lambda_factor=1.1),
        Recipe(),  # Fisher scores: no pruning
        replace(paper(), lambda_factor=1.1, stop_ratio=0.9, post_tune_lr=1e-3, distill_weight=1.0, post_tune="sizes"),
        replace(paper(), post_tune_steps=10),  # reads less text
    ]
    assert shared_prunings(recipes) == [[0, 1], [2, 4], [5]]
