"""Sweeps resume after a kill without repeating finished trials, report failures, and make the winner the candidate."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.tracking.registry import CANDIDATE, Registry
from acip_platform.tracking.runs import Tracking
from acip_platform.training import sweep_worker
from acip_platform.training.completion import Heldout
from acip_platform.training.sweep import Cost, Outcome, Sweep, front, winner
from acip_platform.training.sweep_space import Space, Trial
from acip_platform.training.sweep_worker import Rungs
from ray import tune
from safetensors.torch import load_file

from acip.artifact.artifact import Artifact
from acip.base import load_base
from acip.calibration.loop import calibrate
from acip.calibration.parametrize import parametrize
from acip.calibration.state import CalibrationState, StepReport
from acip.data import TokenBatches
from acip.errors import AcipError
from acip.recipe import Recipe
from tests.acip.calibration.test_resume import interruptible
from tests.conftest import write_fleet
from tests.support.waiting import JOB_S, PATIENCE_S, exit_code, until

ROOT = Path(__file__).parents[3]
SPACE = """\
name: both
scheduler: asha
set: {scores: order, max_prune_steps: 40, lr: 6.0e-3}
space:
  lambda_factor: [1.4, 2.0]
  stop_ratio: [0.8, 0.6, 0.01]
"""


def command(folder: Path, *arguments: str) -> list[str]:
    fleet, space = str(folder / "fleet.yaml"), str(folder / "space.yaml")
    return [sys.executable, str(ROOT / "jobs" / "sweep.py"), "--fleet", fleet, "--space", space, *arguments]


@pytest.fixture(scope="module")
def sweep_home(tmp_path_factory: pytest.TempPathFactory, small_base: str) -> tuple[Path, dict[str, str]]:
    return prepare(tmp_path_factory.mktemp("sweep"), small_base)


def prepare(folder: Path, small_base: str) -> tuple[Path, dict[str, str]]:
    write_fleet(folder / "fleet.yaml", "post_tune_steps: 8", f"name: small, base: {small_base}")
    (folder / "space.yaml").write_text(SPACE)
    return folder, {**os.environ, "ACIP_HOME": str(folder / "home"), "RAY_ADDRESS": "local"}


def stop_after_a_trial(folder: Path, env: dict[str, str], signal_number: signal.Signals) -> int:
    """Start a sweep, kill it with its workers or interrupt it once Tune has saved a finished trial, and return its exit code."""
    log = folder / "log"
    with log.open("w") as out, interruptible():
        job = subprocess.Popen(command(folder), env=env, stdout=out, stderr=out)

    def finished_trials() -> set[str]:
        assert job.poll() is None, f"the sweep ended before a trial finished:\n{log.read_text()}"
        return finished(folder)

    try:
        until(finished_trials, lambda: f"no trial has finished:\n{log.read_text()}", JOB_S)
        if signal_number == signal.SIGINT:
            job.send_signal(signal_number)
            exit_code(job, log)
    finally:
        if job.poll() is None:
            for process in [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            job.wait(PATIENCE_S)
    return job.returncode


def finished(folder: Path) -> set[str]:
    """Return the trials that the last snapshot of Tune marks as finished."""
    completed: set[str] = set()
    for snapshot in sorted((folder / "home" / "runs").glob("*/trials/experiment_state-*.json")):
        with suppress(ValueError):  # the file is being written
            trials = [json.loads(state) for state, _ in json.loads(snapshot.read_text())["trial_data"]]
            completed |= {trial["relative_logdir"] for trial in trials if trial["status"] == "TERMINATED"}
    return completed


@pytest.mark.slow
def test_a_killed_sweep_resumes(sweep_home: tuple[Path, dict[str, str]]) -> None:
    folder, env = sweep_home
    settings = Settings.from_env(env)
    stop_after_a_trial(folder, env, signal.SIGKILL)
    before = finished(folder)
    assert before
    second = subprocess.run(command(folder), env=env, capture_output=True, text=True, timeout=JOB_S, check=False)
    text = second.stdout
    assert second.returncode == 1, text + second.stderr
    assert "acip: sweep both of small in fleet small: 6 trials, 2 shared prunings" in text
    repeated = set(re.findall(r"^\[small (t\d+)\]", text, re.MULTILINE))
    (version,) = (Registry(settings).resolve("small", CANDIDATE),)
    count = re.search(r"(\d) finished, (\d) ended early, 2 failed", text)
    assert count and int(count[1]) + int(count[2]) == 4, text
    assert text.count("its pruning failed: the stop ratio 0.01 was not reached in max_prune_steps = 40") == 2
    assert "Shared pruning took" in text

    tracking = Tracking(settings, "acip/small")
    (parent,) = tracking.client.search_runs([tracking.experiment_id], "tags.winner != ''")
    children = tracking.client.search_runs([tracking.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert len(children) == 6 + 2
    assert repeated - {parent.data.tags["winner"]} <= {f"t{i:02d}" for i in range(6)} - before, "finished trials were repeated"
    areas = {
        run.info.run_name[:3]: run.data.metrics["area_under_excess_nats"] for run in children if run.data.tags.get("state") == "finished"
    }
    assert len(areas) == int(count[1])
    assert all(
        {"tradeoff/loss_nats", "tradeoff/stored_bytes"} <= run.data.metrics.keys() for run in children if run.info.run_name[:3] in areas
    )
    assert min(areas, key=lambda name: areas[name]) == parent.data.tags["winner"]
    assert {"curves.png", "trials.json"} <= {item.path for item in tracking.client.list_artifacts(parent.info.run_id)}

    assert parent.data.tags["winner_run"] == next(run.info.run_id for run in children if run.data.tags.get("artifact_uri") == version.uri)
    (experiment,) = (folder / "home" / "runs").glob("*/trials")
    analysis = tune.ExperimentAnalysis(experiment, default_metric="area", default_mode="min")
    assert len(analysis.trials) == 6
    assert analysis.best_trial.config["trial"] == parent.data.tags["winner"]
    assert {"area", "share", "config/trial"} <= set(analysis.dataframe().columns)

    artifacts = [path.parent for path in Path(settings.store).rglob("manifest.json")]
    assert artifacts == [Path(version.uri)], "only the artifact of the winner is kept"
    states = list((folder / "home" / "runs").glob("*/*/*/checkpoint_*"))
    assert not states, "trial checkpoints are removed"


@pytest.mark.slow
def test_an_interrupted_sweep_has_no_winner_and_resumes(tmp_path: Path, small_base: str) -> None:
    folder, env = prepare(tmp_path, small_base)
    assert stop_after_a_trial(folder, env, signal.SIGINT) == 130
    assert "interrupted. Finished work is kept" in (folder / "log").read_text()
    assert Registry(Settings.from_env(env)).models() == []
    before = finished(folder)
    assert before
    second = subprocess.run(command(folder), env=env, capture_output=True, text=True, timeout=JOB_S, check=False)
    assert second.returncode == 1, second.stdout + second.stderr
    assert re.search(r"(\d) finished, (\d) ended early, 2 failed", second.stdout), second.stdout
    assert Registry(Settings.from_env(env)).resolve("small", CANDIDATE).version == "1"


@pytest.mark.slow
def test_the_winner_equals_a_separate_calibration(
    sweep_home: tuple[Path, dict[str, str]], small_base: str, golden_tokens: torch.Tensor
) -> None:
    """The artifact of the winner equals the artifact of `calibrate_all` with the same recipe, bit for bit.

    The winner was forked, measured at its rungs, saved by Tune, and written by another process.
    """
    folder, env = sweep_home
    settings = Settings.from_env(env)
    winner_folder = Path(Registry(settings).resolve("small", CANDIDATE).uri)
    recipe = Artifact.open(winner_folder).recipe
    changes = {name: value for name, value in recipe.to_dict().items() if value != Recipe().to_dict()[name]}
    (folder / "alone.yaml").write_text(
        f"defaults: {{data: package:wikipedia, eval_context: 64, eval_windows: 8, sizes: [1.0, 0.5], domains: [], cpus: 1}}\n"
        f"models:\n- {{name: alone, base: {small_base}, set: {json.dumps(changes)}}}\n"
    )
    calibrate_command = [sys.executable, str(ROOT / "jobs" / "calibrate_all.py"), "--fleet", str(folder / "alone.yaml")]
    completed = subprocess.run(calibrate_command, env=env, capture_output=True, text=True, timeout=JOB_S, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    reference_folder = Path(Registry(settings).resolve("alone").uri)
    for file in ("order", "factors", "adapters"):
        a, b = load_file(winner_folder / f"{file}.safetensors"), load_file(reference_folder / f"{file}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), file


# ---- rungs, without Ray


def test_measuring_at_rungs_does_not_change_the_model(
    small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, calibrated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring keeps the rank and mode of every layer. The result equals an unobserved calibration bit for bit."""
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(sweep_worker, "report", lambda metrics, state: reports.append(dict(metrics)))
    base = load_base(small_base, quick_recipe.dtype)
    parametrize(base.model, quick_recipe, golden_tokens)
    job = Job("small", small_base, quick_recipe, data="package:austen", eval_context=64, eval_windows=4, sizes=(1.0, 0.7, 0.4), domains=())
    rungs = Rungs(job, base.model, Heldout.of(job, base), lambda reports, state: None, measure_rungs=True)  # type: ignore[arg-type]

    def layer_modes(state: CalibrationState) -> list[Any]:
        return [(getattr(layer, "rank", 0), [module.training for module in layer.modules()]) for layer in state.layers.values()]

    def observe(step_reports: list[StepReport], state: CalibrationState) -> None:
        before = layer_modes(state)
        rungs(step_reports, state)
        assert layer_modes(state) == before

    calibration = calibrate(base.model, TokenBatches(golden_tokens, quick_recipe.batch_size), quick_recipe, observe=observe)
    assert [report["share"] for report in reports] == [1, 2, 4] and all(report["area"] > 0 for report in reports)
    assert calibration.history == calibrated[1].history
    assert torch.equal(calibration.scores.score, calibrated[1].scores.score)


# ---- winner and front, without Ray


def outcome(name: str, losses: Sequence[float], share: int = 8, error: str | None = None) -> Outcome:
    rows = [{"asked": size, "got": size, "loss": loss} for size, loss in zip((1.0, 0.7, 0.4), losses, strict=False)]
    return Outcome(Trial(name, {}, Job("a", "b/c")), rows, share, Cost(1.0, 1.0), error, None)


def test_winner_and_front() -> None:
    a, b = outcome("a", (2.0, 2.1, 3.0)), outcome("b", (2.0, 2.2, 2.5))
    worse, failed = outcome("worse", (2.0, 2.2, 3.1)), outcome("failed", (), 0, "no")
    ended_early = outcome("early", (2.0, 2.0, 2.0), share=4)
    outcomes = [worse, ended_early, failed, a, b]
    assert winner(outcomes) is b
    assert front(outcomes) == [a, b], "trials that ended early or failed are excluded"
    assert winner([ended_early, failed]) is None
    assert front([a, outcome("equal", (2.0, 2.1, 3.0))])[0] is a


def test_impossible_sweeps_are_refused(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("space: {stop_ratio: [0.4, 0.6]}")
    space = Space.load(tmp_path / "space.yaml")
    job = Job("a", "b/c")
    assert Sweep.plan(job, space).shared_prunings == {}, "Fisher scores prune nothing"
    with pytest.raises(AcipError, match="num_workers 2"):
        Sweep.plan(replace(job, num_workers=2), space)
    with pytest.raises(AcipError, match=r"needs 1\.0"):
        Sweep.plan(replace(job, sizes=(0.9, 0.4)), space)
