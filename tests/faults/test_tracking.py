"""MLflow going away and coming back, and clocks that jump: every step is in the run, once."""

import contextlib
import importlib
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.storage.checkpoints import Checkpoints
from acip_platform.tracking.runs import Run, Tracking
from acip_platform.training.worker import Observer
from mlflow.tracking import MlflowClient

from acip.base import load_base
from acip.calibration.loop import Calibration, calibrate
from acip.calibration.parametrize import parametrize
from acip.calibration.state import CalibrationState, StepReport
from acip.data import TokenBatches
from acip.recipe import Recipe
from tests.support.server import free_port
from tests.support.waiting import PATIENCE_S, until


class Mlflow:
    """A real tracking server that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            str(Path(sys.executable).with_name("mlflow")), "server", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--artifacts-destination", str(self.folder / "files"),
        ]  # fmt: skip
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        log_path, process = self.folder / "log", self.process

        def answers() -> bool:
            assert process.poll() is None, f"MLflow's server ended:\n{log_path.read_text()}"
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/health", timeout=PATIENCE_S).status_code == 200
            return False

        until(answers, lambda: f"MLflow's server does not answer:\n{log_path.read_text()}")

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[Mlflow]:
    server = Mlflow(tmp_path)
    server.start()
    yield server
    server.stop()


def calibrated_with(observe: Any, base: str, recipe: Recipe, tokens: torch.Tensor) -> Calibration:
    loaded = load_base(base, recipe.dtype)
    parametrize(loaded.model, recipe, tokens)
    return calibrate(loaded.model, TokenBatches(tokens, recipe.batch_size), recipe, observe=observe)


def observer(run: Run, recipe: Recipe, said: list[str], checkpoints: Checkpoints | None = None) -> Observer:
    def say(kind: str, **facts: Any) -> None:
        if kind == "stage":
            said.append(facts["text"])

    return Observer(Job("small", "base", recipe), run, say, torch.device("cpu"), checkpoints)


def logged(run: Run, key: str = "loss_nats") -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, key)]


@pytest.mark.slow
def test_mlflow_down_for_a_while_drops_nothing(
    mlflow: Mlflow, tmp_path: Path, small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle and started again; killed again before the end, and started when all is done."""
    monkeypatch.setattr("acip_platform.training.worker.REPORT_EVERY_S", 0.0)
    monkeypatch.setattr("acip_platform.training.worker.MLFLOW_REST_S", 1.0)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": mlflow.url})
    run, said = Tracking(settings, "fleet").start("small", "down", {}), list[str]()
    watching = observer(run, quick_recipe, said)
    during: list[int] = []

    def observe(reports: list[StepReport], state: CalibrationState) -> None:
        if state.step in (10, 70):
            mlflow.stop()
        if state.step == 40:
            during.extend(step for step, _ in watching.rows)
            mlflow.start()
            time.sleep(1.1)
        watching(reports, state)

    with run.system_metrics():
        calibration = calibrated_with(observe, small_base, quick_recipe, golden_tokens)
        assert {step for step, _ in watching.rows} == set(range(70, len(calibration.history) + 1))
        started = threading.Timer(2.0, mlflow.start)
        started.start()
        watching.catch_up()
        started.join()
        beats = len(logged(run, "system/cpu_utilization_percentage"))
        until(lambda: len(logged(run, "system/cpu_utilization_percentage")) > beats, "the machine's metrics don't go on")
    assert during == list(range(10, 40)), "they waited"
    assert logged(run) == [(report.step, report.loss) for report in calibration.history]
    assert any("MLflow can't be reached" in text for text in said)


def test_what_mlflow_missed_at_the_end_is_in_the_last_checkpoint(
    tmp_path: Path, small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker ends before MLflow is back: whoever comes next finds the artifact, and the steps in the checkpoint of the last step."""
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None)  # there is no Ray here
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home"), "ACIP_CHECKPOINT_S": "1e6"})
    tracking, said = Tracking(settings, "fleet"), list[str]()
    run = tracking.start("small", "missed", {})
    checkpoints = Checkpoints(settings, "small-0123")
    away = Run(MlflowClient(tracking_uri="http://127.0.0.1:9"), run.run_id)  # nothing listens there
    lost = observer(away, quick_recipe, said, checkpoints)
    calibration = calibrated_with(lost, small_base, quick_recipe, golden_tokens)
    assert lost.rows and checkpoints.names()[0][:11] == f"step_{len(calibration.history):06d}"
    late = observer(run, quick_recipe, said, checkpoints)
    with checkpoints.newest() as folder:
        late.recall(folder)
    late.catch_up()
    assert logged(run) == [(report.step, report.loss) for report in calibration.history]


@pytest.mark.parametrize(
    ("job", "args"),
    [
        ("promote", ["small"]),
        ("report", ["small"]),
        ("materialize", ["small", "--size", "0.5", "--out", "x"]),
        ("evaluate", ["--model", "small"]),
        ("finetune", ["small", "--size", "0.5"]),
    ],
)
def test_a_job_says_in_a_line_that_the_registry_is_away(
    job: str, args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it only asks for a version: that is not taken for a version that isn't there."""
    away = {"MLFLOW_TRACKING_URI": "http://me:hunter2@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # nothing listens there
    for name, value in {**away, "ACIP_HOME": str(tmp_path), "ACIP_ARTIFACT_URI": "s3://models/x"}.items():
        monkeypatch.setenv(name, value)
    assert importlib.import_module(f"jobs.{job}").main(args) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert "error: the registry at http://me:***@127.0.0.1:9 can't be reached: " in said and "hunter2" not in said


def test_the_end_of_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it says itself, FAILED where something is raised, and only said where MLflow can't be told."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = Tracking(Settings.from_env({"ACIP_HOME": str(tmp_path)}), "fleet").start("small", "end", {})

    def status() -> str:
        return str(run.client.get_run(run.run_id).info.status)

    with pytest.raises(KeyboardInterrupt), run.ending():
        raise KeyboardInterrupt
    assert status() == "FAILED"
    with run.ending():
        pass
    assert status() == "FINISHED"
    with run.ending(lambda: "KILLED"):
        pass
    assert status() == "KILLED"
    with pytest.raises(ValueError, match="the work's own"), Run(MlflowClient(tracking_uri="http://127.0.0.1:9"), run.run_id).ending():
        raise ValueError("the work's own")
    assert f"could not record the end of run {run.run_id}" in caplog.text


def test_clocks_that_jump_change_nothing(
    tmp_path: Path, small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, calibrated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each step the wall clock jumps, to and fro, by up to a day."""
    monkeypatch.setattr("acip_platform.training.worker.REPORT_EVERY_S", 0.0)
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    run, said, shown, real = Tracking(settings, "fleet").start("small", "clock", {}), list[str](), list[dict[str, Any]](), time.time
    jumps = iter(range(10**6))

    def jumping() -> float:
        return real() + 86400 * math.sin(next(jumps))

    watching = observer(run, quick_recipe, said)
    watching.emit = lambda kind, **facts: shown.append(facts) if kind == "step" else None
    monkeypatch.setattr(time, "time", jumping)
    calibration = calibrated_with(watching, small_base, quick_recipe, golden_tokens)
    watching.catch_up()
    monkeypatch.undo()
    assert calibration.history == calibrated[1].history
    assert sorted(logged(run)) == [(report.step, report.loss) for report in calibration.history]
    assert run.client.get_run(run.run_id).data.metrics["loss_nats"] == calibration.history[-1].loss, "MLflow's last is the last step's"
    assert run.last_step("loss_nats") == len(calibration.history)
    assert all(facts["tokens_per_s"] > 0 and 0 <= (facts["eta_s"] or 0) < 7200 for facts in shown)
