"""After a worker is killed during calibration, another one resumes, and the result equals an undisturbed run bit for bit."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Tracking
from safetensors.torch import load_file

from tests.conftest import write_fleet
from tests.support.waiting import PATIENCE_S, exit_code, stop, until

ROOT = Path(__file__).parents[3]


def test_a_killed_worker_loses_nothing(tmp_path: Path, small_base: str) -> None:
    models = (f"name: {name}, base: {small_base}" for name in ("killed", "undisturbed"))
    fleet = write_fleet(tmp_path / "fleet.yaml", "lr: 3.0e-3, lambda_factor: 1.2, post_tune_steps: 150", *models)
    env = {**os.environ, "ACIP_HOME": str(tmp_path / "home"), "ACIP_CHECKPOINT_S": "0.3", "RAY_ADDRESS": "local"}
    settings = Settings.from_env(env)
    log = tmp_path / "log"
    with log.open("w") as out:
        command = [sys.executable, str(ROOT / "jobs" / "calibrate_all.py"), "--fleet", str(fleet)]
        job = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        try:
            victim = worker_of("killed", job, Path(settings.runs), log)
            victim.send_signal(signal.SIGKILL)
            assert exit_code(job, log) == 0, log.read_text()
        finally:
            stop(job)
    text = log.read_text()
    assert "[killed] resuming from checkpoint" in text
    assert "[undisturbed] resuming" not in text
    killed, undisturbed = (Path(Registry(settings).resolve(name).uri) for name in ("killed", "undisturbed"))
    tracking = Tracking(settings, "acip/small")
    for run in tracking.client.search_runs([tracking.experiment_id], "tags.model LIKE '%'"):
        steps = [metric.step for metric in tracking.client.get_metric_history(run.info.run_id, "loss_nats")]
        assert steps == list(range(1, 151)), f"{run.info.run_name}: some steps are missing or logged twice"
    for file in ("order", "factors", "adapters"):
        a, b = load_file(killed / f"{file}.safetensors"), load_file(undisturbed / f"{file}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), file


def test_ctrl_c_ends_a_fleet_at_once(tmp_path: Path, small_base: str) -> None:
    """The worker ends as well, and the saved checkpoints stay."""
    fleet = write_fleet(
        tmp_path / "fleet.yaml", "lr: 3.0e-3, lambda_factor: 1.2, post_tune_steps: 100000", f"name: long, base: {small_base}"
    )
    env = {**os.environ, "ACIP_HOME": str(tmp_path / "home"), "ACIP_CHECKPOINT_S": "0.3", "RAY_ADDRESS": "local"}
    log = tmp_path / "log"
    with log.open("w") as out, interruptible():
        job = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "calibrate_all.py"), "--fleet", str(fleet)], env=env, stdout=out, stderr=out
        )
        try:
            worker = worker_of("long", job, Path(Settings.from_env(env).runs), log)
            job.send_signal(signal.SIGINT)
            assert exit_code(job, log) == 130, log.read_text()
            assert psutil.wait_procs([worker], timeout=PATIENCE_S)[1] == [], "the worker still runs"
        finally:
            stop(job)
    assert "interrupted. Finished work is kept" in log.read_text()
    assert list(Path(Settings.from_env(env).runs).glob("long-*/step_*"))


@contextmanager
def interruptible() -> Iterator[None]:
    """Processes started inside handle Ctrl-C, even if a shell started this process in the background, where SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def worker_of(name: str, job: subprocess.Popen[bytes], runs: Path, log: Path) -> psutil.Process:
    """Wait for a complete checkpoint of `name`, and return the process that calibrates it."""
    known: set[Path] = set()

    def find() -> psutil.Process | None:
        assert job.poll() is None, f"the job ended before {name} had a checkpoint:\n{log.read_text()}"
        current = set(runs.glob(f"{name}-*/step_*"))
        deleted = known - current  # the controller deletes the oldest checkpoint after it has registered two newer ones
        known.update(current)
        for process in psutil.Process(job.pid).children(recursive=True) if deleted else ():
            with suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()) and f"{os.sep}{name}-" in process.cwd():
                    return process
        return None

    return until(find, lambda: f"no worker of {name} with a checkpoint:\n{log.read_text()}")
