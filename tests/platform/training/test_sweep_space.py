"""Valid space files become trials, which are drawn and checked before the sweep. Errors name the line."""

from pathlib import Path

import pytest
from acip_platform.scheduling.fleet import Fleet, Job
from acip_platform.training.sweep_space import Range, Space, SpaceError

from acip.calibration.shared_pruning import shared_prunings
from acip.recipe import Recipe

ROOT = Path(__file__).parents[3]
JOB = Job("a", "b/c", Recipe(scores="order"))


def load(tmp_path: Path, text: str) -> Space:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return Space.load(path)


def test_demo_space_has_three_schedules_and_five_stop_ratios() -> None:
    (job,) = Fleet.load(ROOT / "jobs" / "fleets" / "demo.yaml").jobs
    trials = Space.load(ROOT / "jobs" / "spaces" / "demo.yaml").trials(job)
    assert len(trials) == 15
    assert sorted(map(len, shared_prunings([trial.job.recipe for trial in trials]))) == [5, 5, 5]
    assert [trial.changes["stop_ratio"] for trial in trials[:3]] == [0.4] * 3, "the best stop ratio over all sizes comes first"
    assert {trial.job.recipe.scores for trial in trials} == {"order"}
    assert len({trial.job.fingerprint for trial in trials}) == 15


def test_random_draws_are_deterministic_and_share_prunings(tmp_path: Path) -> None:
    text = (
        "space: {lr: {loguniform: [1.0e-4, 1.0e-3]}, adapter_rank: {randint: [4, 6]}, exclude: [[], [up_proj]], "
        "post_tune_lr: {uniform: [1, 2]}, stop_ratio: [0.4, 0.6]}\nsearch: random\nsamples: 20\nseed: SEED"
    )
    trials = load(tmp_path, text.replace("SEED", "3")).trials(JOB)
    assert trials == load(tmp_path, text.replace("SEED", "3")).trials(JOB)
    assert trials != load(tmp_path, text.replace("SEED", "4")).trials(JOB)
    recipes = [trial.job.recipe for trial in trials]
    assert len(recipes) == 40
    assert sorted(map(len, shared_prunings(recipes))) == [2] * 20, "each draw is tried with all stop ratios"
    assert {recipe.adapter_rank for recipe in recipes} == {4, 5, 6}
    assert {recipe.exclude for recipe in recipes} == {(), ("up_proj",)}
    assert all(1e-4 <= recipe.lr <= 1e-3 and 1 <= (recipe.post_tune_lr or 0) <= 2 for recipe in recipes)


def test_repeated_draws_are_merged(tmp_path: Path) -> None:
    assert len(load(tmp_path, "space: {basis: [svd, covariance]}\nsearch: random\nsamples: 20").trials(JOB)) == 2


def test_fields_of_a_space(tmp_path: Path) -> None:
    space = load(tmp_path, "set: {lr: 1}\nspace: {adapter_alpha: {uniform: [1, 2]}}\nsearch: random\nkeep: front\nscheduler: asha")
    assert (space.name, space.set, space.keep, space.scheduler, space.samples) == ("space", {"lr": 1.0}, "front", "asha", 8)
    assert space.fields == {"adapter_alpha": Range("uniform", 1.0, 2.0)}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "is empty; it needs space"),
        ("name: a", 1, "'space' is missing"),
        ("space: {}", 1, "nothing would vary"),
        ("spcae: {}", 1, "unknown field 'spcae' of the space file (did you mean 'space'?)"),
        ("space:\n  lr: [1]\n  stop_ration: [0.4]", 3, "unknown field 'stop_ration' of space (did you mean 'stop_ratio'?)"),
        ("set: {lrr: 1}\nspace: {lr: [1]}", 1, "did you mean 'lr'?"),
        ("set:\n  lr: 1\nspace:\n  lr: [1]", 4, "in 'set' and in 'space'"),
        ("space:\n  lr: [1.0e-4, 1e-3]", 2, "write 1.0e-4"),
        ("space:\n  basis: [svd,\n    covarianc]", 3, "allowed: 'fisher', 'covariance', 'svd'"),
        ("space:\n  lr: 1.0e-4", 2, "A value that all trials share goes into 'set'"),
        ("space:\n  lr: []", 2, "an empty list"),
        ("space:\n  lr: {uniform: [1, 2]}", 2, "a grid needs lists"),
        ("search: random\nspace:\n  lr: {unifrom: [1, 2]}", 3, "did you mean 'uniform'?"),
        ("search: random\nspace:\n  lr: {randint: [1, 2]}", 3, "use uniform or loguniform"),
        ("search: random\nspace:\n  basis: {uniform: [1, 2]}", 3, "use a list of values"),
        ("search: random\nspace:\n  lr: {uniform: [2, 1]}", 3, "it must rise"),
        ("search: random\nspace:\n  lr: {loguniform: [0, 1]}", 3, "start above 0"),
        ("search: random\nspace:\n  lr: {uniform: [1]}", 3, "two numbers"),
        ("space: {lr: [1]}\nsearch: randm", 2, "allowed: 'grid', 'random'"),
        ("space: {lr: [1]}\nsamples: 3", 2, "Set search to 'random'"),
        ("space: {lr: [1]}\nsearch: random\nsamples: 0", 3, "at least 1"),
        ("space: {lr: [1]}\nscheduler: pbt", 2, "changes fields during a calibration"),
        ("space: {lr: [1]}\nscheduler: hyperbnd", 2, "allowed: 'none', 'asha'"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    with pytest.raises(SpaceError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    if line is not None:
        assert f"space.yaml, line {line}:" in str(caught.value)


def test_invalid_recipes_are_refused_before_the_sweep(tmp_path: Path) -> None:
    space = load(tmp_path, "set: {scores_until: 0.5}\nspace:\n  stop_ratio: [0.4, 0.6]")
    with pytest.raises(SpaceError, match=r"line 1: scores_until is 0.5; it must be in \(stop_ratio, 1\). \(a with stop_ratio 0.6\)"):
        space.trials(JOB)
    with pytest.raises(SpaceError, match=r"line 2: stop_ratio is 1.4"):
        load(tmp_path, "space:\n  stop_ratio: [0.4, 1.4]").trials(JOB)
