"""Promotion of model versions: the comparison of curves, aliases, rollback, and detection of finished jobs."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.promotion import Verdict, compare, promote_if_better
from acip_platform.tracking.registry import CANDIDATE, ModelVersion, Registry, RegistryError

from acip.artifact.artifact import Artifact
from acip.recipe import Recipe, named, nearest
from jobs import promote
from jobs.calibrate_all import finished

SIZES = (1.0, 0.8, 0.6, 0.4)


def rows(*losses: float, sizes: Sequence[float] = SIZES, **more: Any) -> list[dict[str, Any]]:
    fields = {"corpus": "text", "context": 64, "windows": 8, "extrapolated": False, "stderr": 0.1}
    return [
        {"asked": size, "got": size, "loss": loss, "perplexity": math.exp(loss), **fields, **more}
        for size, loss in zip(sizes, losses, strict=True)
    ]


def manifest(curve: list[dict[str, Any]], digest: str = "base") -> dict[str, Any]:
    return {"base": {"digest": digest}, "curve": curve}


BETTER, WORSE = rows(2.0, 2.1, 2.2, 2.3), rows(2.0, 2.1, 2.3, 2.4)


def test_curves_are_compared_over_common_sizes() -> None:
    shorter = rows(2.0, 2.05, sizes=[1.0, 0.7])
    verdict = compare(manifest(shorter), manifest(BETTER), "version 1")
    new_area, old_area = 0.3 * 0.025, 0.2 * 0.05 + 0.1 * 0.125
    assert verdict.leads
    assert f"better, area {new_area:.5g} against {old_area:.5g} of version 1 (0.70 to 1.00, {new_area / old_area - 1:+.1%})" == verdict.why


@pytest.mark.parametrize(
    ("new", "old", "leads", "message"),
    [
        (BETTER, WORSE, True, "better, area 0.09 against 0.12 of version 7"),
        (WORSE, BETTER, False, "not better, area"),
        (BETTER, BETTER, False, "not better, area"),
        (BETTER, rows(2.0, 2.1, 2.3, 2.4, corpus="other"), False, "not comparable with version 7: measured on corpus text, not other"),
        (BETTER, rows(2.0, 2.1, 2.3, 2.4, windows=9), False, "measured on windows 8, not 9"),
        (BETTER, rows(2.0, 2.1, 2.3, 2.4, context=65), False, "measured on context 64, not 65"),
        (BETTER, rows(2.0, 2.1, 2.3, 2.4, protocol="field"), False, "measured on protocol packed, not field"),
        (BETTER, [], False, "the curve of version 7, has no size 1.0"),
        (BETTER[1:], WORSE, False, "its own curve has no size 1.0"),
        (BETTER[:1], WORSE, False, "or none below it"),
        (rows(2.0, 2.0, 2.0, math.nan), WORSE, False, "its loss is not a finite number at size 0.40"),
        (BETTER, rows(2.0, 2.1, math.inf, math.nan), True, "the loss of version 7, is not a finite number at size 0.60"),
    ],
)
def test_comparison_rule(new: list[dict[str, Any]], old: list[dict[str, Any]], leads: bool, message: str) -> None:
    verdict = compare(manifest(new), manifest(old), "version 7")
    assert verdict.leads is leads
    assert message in verdict.why


def coded(*losses: float, sizes: Sequence[float] = (0.5, 0.4), **more: Any) -> list[dict[str, Any]]:
    return rows(*losses, sizes=sizes, bits_per_weight=3.0, **more)


@pytest.mark.parametrize(
    ("new", "old", "leads", "message"),
    [
        (
            [*BETTER, *coded(2.2, 2.3)],
            [*WORSE, *coded(2.0, 2.0)],
            True,
            "better, area 0.09 against 0.12 of version 7 (0.40 to 1.00, -25.0%)",
        ),
        (
            [*BETTER[:1], *coded(2.1, 2.2)],
            [*BETTER[:1], *coded(2.1, 2.4)],
            True,
            "area 0.04 against 0.05 of version 7 (0.40 to 1.00 of the",
        ),
        ([*WORSE, *coded(2.1, 2.2)], [*BETTER[:1], *coded(2.1, 2.4)], True, "better, area 0.04 against 0.05 of version 7"),
        ([*BETTER[:1], *coded(2.1, 2.5)], [*WORSE, *coded(2.1, 2.4)], False, "not better, area 0.055 against 0.05 of version 7"),
        (BETTER, [*BETTER[:1], *coded(2.1, 2.4)], False, "not comparable with version 7: its own curve has no size 1.0, or none below it"),
        ([*BETTER[:1], *coded(2.1, math.nan)], [*BETTER[:1], *coded(2.1, 2.4)], False, "its loss is not a finite number at size 0.40"),
    ],
)
def test_artifacts_without_ranks_are_compared_over_bytes(
    new: list[dict[str, Any]], old: list[dict[str, Any]], leads: bool, message: str
) -> None:
    verdict = compare(manifest(new), manifest(old), "version 7")
    assert message in verdict.why
    assert verdict.leads is leads


def test_other_base_models_are_not_comparable() -> None:
    assert compare(manifest(BETTER), manifest(WORSE, "another"), "version 7") == Verdict(
        False, "not comparable with version 7: another base model"
    )


class Contest:
    """A registry of versions of the small model with given curves."""

    def __init__(self, artifact: Artifact, home: Path) -> None:
        self.settings = Settings.from_env({"ACIP_HOME": str(home)})
        self.entries = 0
        home.mkdir()
        self.registry, self.store, self.artifact = Registry(self.settings), Store(self.settings.store, home / "cache"), artifact
        self.registry.client.get_experiment_by_name("Default")  # creates the database

    def add_and_promote(self, curve: list[dict[str, Any]], may_lead: bool = True, **tags: str) -> Verdict:
        version, artifact = self.add(curve, **tags)
        return promote_if_better(self.registry, self.store, version, artifact, may_lead)

    def add(self, curve: list[dict[str, Any]], **tags: str) -> tuple[ModelVersion, Artifact]:
        self.entries += 1
        folder = self.settings.home / f"artifact-{self.entries}"
        artifact = Artifact.open(copytree(self.artifact.folder, folder)).record_curve(curve)
        return self.registry.register("small", str(folder), "", tags), artifact

    def alias(self, which: str) -> str | None:
        try:
            return self.registry.resolve("small", which).version
        except RegistryError:
            return None


@pytest.fixture
def contest(small_artifact: Artifact, tmp_path: Path) -> Contest:
    return Contest(small_artifact, tmp_path / "home")


def test_only_a_better_curve_becomes_champion(contest: Contest) -> None:
    assert str(contest.add_and_promote(WORSE)) == "champion: the first of small"
    worse = contest.add_and_promote(rows(2.0, 2.2, 2.4, 2.6))
    assert (contest.alias("champion"), contest.alias(CANDIDATE), worse.leads) == ("1", "2", False)
    other = contest.add_and_promote(rows(1.0, 1.0, 1.0, 1.0, corpus="other"))
    assert (contest.alias("champion"), contest.alias(CANDIDATE), other.leads) == ("1", "3", False)
    assert contest.add_and_promote(BETTER).leads
    assert (contest.alias("champion"), contest.alias(CANDIDATE)) == ("4", "3")
    assert contest.registry.resolve("small", "4").tags["verdict"].startswith("champion: better, area 0.09 against 0.12 of version 1")
    assert contest.registry.resolve("small", "2").tags["verdict"].startswith("candidate: not better")

    not_allowed = contest.add_and_promote(rows(2.0, 2.0, 2.0, 2.0), may_lead=False)
    assert (contest.alias("champion"), contest.alias(CANDIDATE), not_allowed.leads) == ("4", "5", False)
    again = contest.registry.resolve("small", "4")
    verdict = promote_if_better(contest.registry, contest.store, again, Artifact.open(again.uri))
    assert verdict.leads, "a version is not compared with itself"
    assert contest.registry.resolve("small", "4").tags["verdict"] == again.tags["verdict"]
    rmtree(again.uri)
    assert "no longer exists" in contest.add_and_promote(WORSE).why
    assert contest.alias("champion") == "6"


def test_rollback_command(contest: Contest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ACIP_HOME", str(contest.settings.home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def command(*args: str) -> tuple[int, str]:
        code = promote.main(args)
        return code, " ".join("".join(capsys.readouterr()).split())

    contest.add_and_promote(WORSE, close_to_base="0.414")
    contest.add_and_promote(rows(2.0, 2.2, 2.4, 2.6))
    contest.add_and_promote(BETTER)
    code, output = command("small", "--rollback")
    assert code == 0 and "was version 3 champion version 1" in output
    assert "a running server loads it within a minute" in output
    assert contest.alias("champion") == "1"
    assert command("small", "--rollback") == (2, "error: small had no champion before version 1. Name the version to promote.")
    assert "was version 1 champion version 2" in command("small", CANDIDATE)[1]
    assert (contest.alias("champion"), contest.alias(CANDIDATE)) == ("2", None), "the champion loses the candidate alias"
    command("small", "3")
    contest.registry.client.delete_model_version("small", "2")
    assert "was version 3 champion version 1" in command("small", "--rollback")[1], "deleted versions are skipped"
    contest.registry.set_alias(contest.registry.resolve("small", "3"))  # as a manual change in the UI does
    assert contest.registry.champions("small") == ["1", "3"]
    assert "champion version 1" in command("small", "--rollback")[1]
    overview = command("small")[1]
    assert "champions so far: 1" in overview and "0.414" in overview
    for args in (("smal", "1"), ("smal",), ("smal", "--rollback")):
        assert "did you mean 'small'" in command(*args)[1]
    code, output = command("small", "9")
    assert code == 2 and "no version or alias '9'; it has 3, 1 (champion)." in output
    assert "did you mean 'champion'" in command("small@champio")[1]
    assert "was version 1 champion version 3" in command("small@3")[1]
    contest.registry.tag(contest.registry.resolve("small", "1"), {"verdict": "checked [/by hand]"})
    assert "checked [/by hand]" in command("small")[1]
    rmtree(contest.registry.resolve("small", "1").uri)
    for args in (("small", "1"), ("small", "--rollback")):
        code, output = command(*args)
        assert code == 2 and "version 1 of small points at" in output and contest.alias("champion") == "3"
    assert contest.registry.champions("small") == ["1", "3"]


def test_finished_jobs_are_found_among_all_versions(contest: Contest, small_base: str) -> None:
    job = Job("small", small_base)
    other = dataclasses.replace(job, data="other")
    assert finished(job, contest.registry, contest.store) is None
    contest.add_and_promote(BETTER, fingerprint=other.fingerprint)
    assert finished(job, contest.registry, contest.store) is None, "the champion belongs to another job"
    contest.add(WORSE, fingerprint=job.fingerprint)
    assert finished(job, contest.registry, contest.store) is None, "a version without a verdict is not finished"
    contest.add_and_promote(WORSE, fingerprint=job.fingerprint)
    found = finished(job, contest.registry, contest.store)
    assert found is not None and (found.version, found.aliases) == ("3", (CANDIDATE,))
    contest.add_and_promote(rows(2.0, 2.2, 2.4, 2.6), fingerprint=job.fingerprint)
    contest.registry.set_champion(found)
    found = finished(job, contest.registry, contest.store)
    assert found is not None and found.version == "3", "the champion is preferred to newer versions"
    rmtree(found.uri)
    found = finished(job, contest.registry, contest.store)
    assert found is not None and found.version == "4", "a version with a deleted artifact is skipped"


def test_nearest_named_recipe_and_its_changes() -> None:
    assert nearest(named("demo")) == ("demo", {})
    assert nearest(Recipe.from_dict({"stop_ratio": 0.5, "seed": 3}, named("paper"))) == ("paper", {"stop_ratio": 0.5, "seed": 3})
