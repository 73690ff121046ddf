"""MLflow outages and wall clock jumps: the run holds every step exactly once."""

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
from tests.support.ports import free_port
from tests.support.waiting import PATIENCE_S, until


class MlflowServer:
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

        def is_healthy() -> bool:
            assert process.poll() is None, f"the MLflow server exited:\n{log_path.read_text()}"
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/health", timeout=PATIENCE_S).status_code == 200
            return False

        until(is_healthy, lambda: f"the MLflow server does not respond:\n{log_path.read_text()}")

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path)
    server.start()
    yield server
    server.stop()


def calibrate_with(observe: Any, base: str, recipe: Recipe, tokens: torch.Tensor) -> Calibration:
    loaded = load_base(base, recipe.dtype)
    parametrize(loaded.model, recipe, tokens)
    return calibrate(loaded.model, TokenBatches(tokens, recipe.batch_size), recipe, observe=observe)


def observer(run: Run, recipe: Recipe, messages: list[str], checkpoints: Checkpoints | None = None) -> Observer:
    def emit(kind: str, **facts: Any) -> None:
        if kind == "stage":
            messages.append(facts["text"])

    return Observer(Job("small", "base", recipe), run, emit, torch.device("cpu"), checkpoints)


def logged(run: Run, key: str = "loss_nats") -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, key)]


@pytest.mark.slow
def test_an_mlflow_outage_loses_no_steps(
    mlflow: MlflowServer,
    tmp_path: Path,
    small_base: str,
    quick_recipe: Recipe,
    golden_tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server is killed at step 10, restarted at step 40, killed again at step 70, and restarted after the calibration."""
    monkeypatch.setattr("acip_platform.training.worker.REPORT_EVERY_S", 0.0)
    monkeypatch.setattr("acip_platform.training.worker.MLFLOW_REST_S", 1.0)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": mlflow.url})
    run, messages = Tracking(settings, "fleet").start("small", "down", {}), list[str]()
    live_observer = observer(run, quick_recipe, messages)
    pending_steps: list[int] = []

    def observe(reports: list[StepReport], state: CalibrationState) -> None:
        if state.step in (10, 70):
            mlflow.stop()
        if state.step == 40:
            pending_steps.extend(step for step, _ in live_observer.rows)
            mlflow.start()
            time.sleep(1.1)
        live_observer(reports, state)

    with run.system_metrics():
        calibration = calibrate_with(observe, small_base, quick_recipe, golden_tokens)
        assert {step for step, _ in live_observer.rows} == set(range(70, len(calibration.history) + 1))
        restart = threading.Timer(2.0, mlflow.start)
        restart.start()
        live_observer.catch_up()
        restart.join()
        metric_count = len(logged(run, "system/cpu_utilization_percentage"))
        until(lambda: len(logged(run, "system/cpu_utilization_percentage")) > metric_count, "no more system metrics are logged")
    assert pending_steps == list(range(10, 40)), "the steps waited in memory"
    assert logged(run) == [(report.step, report.loss) for report in calibration.history]
    assert any("MLflow can't be reached" in text for text in messages)


def test_steps_that_mlflow_missed_are_in_the_last_checkpoint(
    tmp_path: Path, small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker ends while MLflow is down. The next worker logs the missing steps from the last checkpoint."""
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: None)  # the test runs without Ray
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home"), "ACIP_CHECKPOINT_S": "1e6"})
    tracking, messages = Tracking(settings, "fleet"), list[str]()
    run = tracking.start("small", "missed", {})
    checkpoints = Checkpoints(settings, "small-0123")
    unreachable_run = Run(MlflowClient(tracking_uri="http://127.0.0.1:9"), run.run_id)  # no server listens on this port
    lost_observer = observer(unreachable_run, quick_recipe, messages, checkpoints)
    calibration = calibrate_with(lost_observer, small_base, quick_recipe, golden_tokens)
    assert lost_observer.rows and checkpoints.names()[0][:11] == f"step_{len(calibration.history):06d}"
    late_observer = observer(run, quick_recipe, messages, checkpoints)
    with checkpoints.newest() as folder:
        late_observer.recall(folder)
    late_observer.catch_up()
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
def test_jobs_report_an_unreachable_registry_in_one_line(
    job: str, args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unreachable registry is not reported as a missing version."""
    uri = "http://me:hunter2@127.0.0.1:9"  # no server listens on this port
    registry = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    for name, value in {**registry, "ACIP_HOME": str(tmp_path), "ACIP_ARTIFACT_URI": "s3://models/x"}.items():
        monkeypatch.setenv(name, value)
    assert importlib.import_module(f"jobs.{job}").main(args) == 2
    output = " ".join("".join(capsys.readouterr()).split())
    assert "error: the registry at http://me:***@127.0.0.1:9 can't be reached: " in output and "hunter2" not in output


def test_run_status_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends with the given status, or FAILED after an exception. If MLflow is unreachable, a log line reports it."""
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
    with pytest.raises(ValueError, match="original error"), Run(MlflowClient(tracking_uri="http://127.0.0.1:9"), run.run_id).ending():
        raise ValueError("original error")
    assert f"could not record the end of run {run.run_id}" in caplog.text


def test_clock_jumps_do_not_change_the_result(
    tmp_path: Path, small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, calibrated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock jumps by up to a day in either direction at every reading."""
    monkeypatch.setattr("acip_platform.training.worker.REPORT_EVERY_S", 0.0)
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    run, real_time = Tracking(settings, "fleet").start("small", "clock", {}), time.time
    step_events: list[dict[str, Any]] = []
    jumps = iter(range(10**6))

    def jumping_time() -> float:
        return real_time() + 86400 * math.sin(next(jumps))

    live_observer = observer(run, quick_recipe, [])
    live_observer.emit = lambda kind, **facts: step_events.append(facts) if kind == "step" else None
    monkeypatch.setattr(time, "time", jumping_time)
    calibration = calibrate_with(live_observer, small_base, quick_recipe, golden_tokens)
    live_observer.catch_up()
    monkeypatch.undo()
    assert calibration.history == calibrated[1].history
    assert sorted(logged(run)) == [(report.step, report.loss) for report in calibration.history]
    latest = run.client.get_run(run.run_id).data.metrics["loss_nats"]
    assert latest == calibration.history[-1].loss, "the latest metric in MLflow is that of the last step"
    assert run.last_step("loss_nats") == len(calibration.history)
    assert all(facts["tokens_per_s"] > 0 and 0 <= (facts["eta_s"] or 0) < 7200 for facts in step_events)
