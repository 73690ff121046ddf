"""A sweep is killed and goes on: what was finished isn't repeated, what fails is told, the winner is the candidate."""

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


def command(folder: Path, *more: str) -> list[str]:
    fleet, space = str(folder / "fleet.yaml"), str(folder / "space.yaml")
    return [sys.executable, str(ROOT / "jobs" / "sweep.py"), "--fleet", fleet, "--space", space, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small_base: str) -> tuple[Path, dict[str, str]]:
    return prepared(tmp_path_factory.mktemp("sweep"), small_base)


def prepared(folder: Path, small_base: str) -> tuple[Path, dict[str, str]]:
    write_fleet(folder / "fleet.yaml", "post_tune_steps: 8", f"name: small, base: {small_base}")
    (folder / "space.yaml").write_text(SPACE)
    return folder, {**os.environ, "ACIP_HOME": str(folder / "home"), "RAY_ADDRESS": "local"}


def struck_after_a_trial(folder: Path, env: dict[str, str], by: signal.Signals) -> int:
    """The exit code of a sweep that is killed, workers and all, or interrupted, once Tune has written down that a trial is finished."""
    log = folder / "log"
    with log.open("w") as out, interruptible():
        job = subprocess.Popen(command(folder), env=env, stdout=out, stderr=out)

    def look() -> set[str]:
        assert job.poll() is None, f"the sweep ended before a trial was finished:\n{log.read_text()}"
        return finished(folder)

    try:
        until(look, lambda: f"no trial is finished:\n{log.read_text()}", JOB_S)
        if by == signal.SIGINT:
            job.send_signal(by)
            exit_code(job, log)
    finally:
        if job.poll() is None:
            for process in [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            job.wait(PATIENCE_S)
    return job.returncode


def finished(folder: Path) -> set[str]:
    """The trials that Tune's last snapshot knows as finished."""
    done: set[str] = set()
    for snapshot in sorted((folder / "home" / "runs").glob("*/trials/experiment_state-*.json")):
        with suppress(ValueError):  # being written
            trials = [json.loads(state) for state, _ in json.loads(snapshot.read_text())["trial_data"]]
            done |= {trial["relative_logdir"] for trial in trials if trial["status"] == "TERMINATED"}
    return done


@pytest.mark.slow
def test_a_killed_sweep_goes_on(place: tuple[Path, dict[str, str]]) -> None:
    folder, env = place
    settings = Settings.from_env(env)
    struck_after_a_trial(folder, env, signal.SIGKILL)
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
    assert [path.parent for path in Path(settings.store).rglob("manifest.json")] == [Path(version.uri)], "only the winner's is kept"
    states = list((folder / "home" / "runs").glob("*/*/*/checkpoint_*"))
    assert not states, "nobody needs them"


@pytest.mark.slow
def test_an_interrupted_sweep_names_no_winner_and_goes_on(tmp_path: Path, small_base: str) -> None:
    folder, env = prepared(tmp_path, small_base)
    assert struck_after_a_trial(folder, env, signal.SIGINT) == 130
    assert "interrupted. Finished work is kept" in (folder / "log").read_text()
    assert Registry(Settings.from_env(env)).models() == []
    before = finished(folder)
    assert before
    second = subprocess.run(command(folder), env=env, capture_output=True, text=True, timeout=JOB_S, check=False)
    assert second.returncode == 1, second.stdout + second.stderr
    assert re.search(r"(\d) finished, (\d) ended early, 2 failed", second.stdout), second.stdout
    assert Registry(Settings.from_env(env)).resolve("small", CANDIDATE).version == "1"


@pytest.mark.slow
def test_the_winner_equals_a_calibration_by_itself(
    place: tuple[Path, dict[str, str]], small_base: str, golden_tokens: torch.Tensor
) -> None:
    """Forked, saved by Tune, made into an artifact by another process: the same bits as `calibrate_all` makes of its recipe.

    It was measured at its rungs, too: that changes nothing.
    """
    folder, env = place
    settings = Settings.from_env(env)
    ours = Path(Registry(settings).resolve("small", CANDIDATE).uri)
    recipe = Artifact.open(ours).recipe
    changes = {name: value for name, value in recipe.to_dict().items() if value != Recipe().to_dict()[name]}
    (folder / "alone.yaml").write_text(
        f"defaults: {{data: package:wikipedia, eval_context: 64, eval_windows: 8, sizes: [1.0, 0.5], cpus: 1}}\n"
        f"models:\n- {{name: alone, base: {small_base}, set: {json.dumps(changes)}}}\n"
    )
    alone = [sys.executable, str(ROOT / "jobs" / "calibrate_all.py"), "--fleet", str(folder / "alone.yaml")]
    done = subprocess.run(alone, env=env, capture_output=True, text=True, timeout=JOB_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = Path(Registry(settings).resolve("alone").uri)
    for file in ("order", "factors", "adapters"):
        a, b = load_file(ours / f"{file}.safetensors"), load_file(theirs / f"{file}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), file


# ---- observing, without Ray


def test_measuring_at_the_rungs_leaves_the_model_as_it_was(
    small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, calibrated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps: the same rank and mode in every layer. In the end: the bits of a calibration that was not observed."""
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(sweep_worker, "report", lambda metrics, state: reports.append(dict(metrics)))
    base = load_base(small_base, quick_recipe.dtype)
    parametrize(base.model, quick_recipe, golden_tokens)
    job = Job("small", small_base, quick_recipe, data="package:austen", eval_context=64, eval_windows=4, sizes=(1.0, 0.7, 0.4))
    rungs = Rungs(job, base.model, Heldout.of(job, base), lambda reports, state: None, measure_rungs=True)  # type: ignore[arg-type]

    def facts(state: CalibrationState) -> list[Any]:
        return [(getattr(layer, "rank", 0), [module.training for module in layer.modules()]) for layer in state.layers.values()]

    def observe(step_reports: list[StepReport], state: CalibrationState) -> None:
        before = facts(state)
        rungs(step_reports, state)
        assert facts(state) == before

    calibration = calibrate(base.model, TokenBatches(golden_tokens, quick_recipe.batch_size), quick_recipe, observe=observe)
    assert [report["share"] for report in reports] == [1, 2, 4] and all(report["area"] > 0 for report in reports)
    assert calibration.history == calibrated[1].history
    assert torch.equal(calibration.scores.score, calibrated[1].scores.score)


# ---- choosing, without Ray


def outcome(name: str, losses: Sequence[float], share: int = 8, error: str | None = None) -> Outcome:
    rows = [{"asked": size, "got": size, "loss": loss} for size, loss in zip((1.0, 0.7, 0.4), losses, strict=False)]
    return Outcome(Trial(name, {}, Job("a", "b/c")), rows, share, Cost(1.0, 1.0), error, None)


def test_the_winner_and_the_front() -> None:
    a, b = outcome("a", (2.0, 2.1, 3.0)), outcome("b", (2.0, 2.2, 2.5))
    worse, early, failed = outcome("worse", (2.0, 2.2, 3.1)), outcome("early", (2.0, 2.0, 2.0), share=4), outcome("failed", (), 0, "no")
    everyone = [worse, early, failed, a, b]
    assert winner(everyone) is b
    assert front(everyone) == [a, b], "what ended early or failed can't win"
    assert winner([early, failed]) is None
    assert front([a, outcome("equal", (2.0, 2.1, 3.0))])[0] is a


def test_what_no_sweep_can_do_is_refused_before(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("space: {stop_ratio: [0.4, 0.6]}")
    space = Space.load(tmp_path / "space.yaml")
    job = Job("a", "b/c")
    assert Sweep.plan(job, space).trunks == {}, "Fisher scores prune nothing"
    with pytest.raises(AcipError, match="num_workers 2"):
        Sweep.plan(replace(job, num_workers=2), space)
    with pytest.raises(AcipError, match=r"needs 1\.0"):
        Sweep.plan(replace(job, sizes=(0.9, 0.4)), space)
