"""Faults during whole calibrations: killed drivers and workers, lack of memory, lost nodes, failing S3. The result does not change.

Each test runs `jobs/calibrate_all.py`, or Ray Train on a cluster of nodes, on the CPU, and compares
every tensor of the artifact bit for bit.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import psutil
import pytest
import ray
import torch
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.fleet import Fleet
from acip_platform.scheduling.job_queue import Resources
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Tracking
from acip_platform.training.worker import run_job
from ray.cluster_utils import Cluster

from acip.artifact.artifact import Artifact
from tests.conftest import write_fleet
from tests.support.faulty import proxy
from tests.support.waiting import JOB_S, PATIENCE_S, exit_code, stop, until

ROOT = Path(__file__).parents[2]
STEPS = 600
pytestmark = pytest.mark.slow


class Submission:
    """A process that runs `jobs/calibrate_all.py` with its own local Ray."""

    def __init__(self, fleet: Path, home: Path, log: Path, **env: str) -> None:
        self.env = {**os.environ, "ACIP_HOME": str(home), "ACIP_CHECKPOINT_S": "1", "ACIP_LEASE_S": "6", "RAY_ADDRESS": "local", **env}
        self.settings, self.log = Settings.from_env(self.env), log
        with log.open("w") as out:
            command = [sys.executable, str(ROOT / "jobs" / "calibrate_all.py"), "--fleet", str(fleet)]
            self.process = subprocess.Popen(command, env=self.env, stdout=out, stderr=out)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        def check() -> Any:
            assert self.process.poll() is None, f"the job ended before this: {what}\n{self.text}"
            return condition()

        return until(check, lambda: f"missing: {what}\n{self.text}")

    def end(self) -> int:
        return exit_code(self.process, self.log)

    def stop(self) -> None:
        stop(self.process)

    def has_checkpoint(self, name: str) -> bool:
        return bool(list(Path(self.settings.runs).glob(f"{name}-*/step_*")))

    def worker(self, name: str) -> psutil.Process | None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()) and f"{os.sep}{name}-" in process.cwd():
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    def resumed_at(self, name: str) -> list[int]:
        return [int(step) for step in re.findall(rf"\[{name}\] resuming from checkpoint step_(\d+)", self.text)]

    def has_resumed(self, name: str, times: int) -> bool:
        """Return whether the model has a checkpoint and was resumed `times` times."""
        return self.has_checkpoint(name) and len(self.resumed_at(name)) == times

    def steps(self, name: str) -> list[int]:
        """Return the steps that are logged in MLflow."""
        tracking = Tracking(self.settings, "acip/small")
        (run,) = tracking.client.search_runs([tracking.experiment_id], f"tags.model = '{name}'")
        return [metric.step for metric in tracking.client.get_metric_history(run.info.run_id, "loss_nats")]

    def artifact(self, name: str) -> Artifact:
        version = Registry(self.settings).resolve(name)
        assert version.version == "1", "the model is registered once"
        return Store(self.settings.store, self.settings.home / "cache").open(version.uri)


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., Submission]]:
    submissions: list[Submission] = []

    def submit(fleet: Path, **env: str) -> Submission:
        submissions.append(Submission(fleet, tmp_path / "home", tmp_path / f"log-{len(submissions)}", **env))
        return submissions[-1]

    yield submit
    for submission in submissions:
        submission.stop()


def fleet(path: Path, base: str, *names: str) -> Path:
    settings = f"lr: 3.0e-3, lambda_factor: 1.2, post_tune_steps: {STEPS}"
    return write_fleet(path / "fleet.yaml", settings, *(f"name: {name}, base: {base}" for name in names))


@pytest.fixture(scope="module")
def undisturbed(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("undisturbed")
    submission = Submission(fleet(folder, small_base, "undisturbed"), folder / "home", folder / "log")
    try:
        assert submission.end() == 0, submission.text
    finally:
        submission.stop()
    return submission.artifact("undisturbed")


def assert_same(first_artifact: Artifact, second_artifact: Artifact) -> None:
    for file in ("order", "factors", "dense", "adapters"):
        first_file, second_file = first_artifact.tensors(file), second_artifact.tensors(file)
        assert first_file.entries.keys() == second_file.entries.keys()
        a, b = first_file.read(list(first_file.entries)), second_file.read(list(second_file.entries))
        assert all(torch.equal(a[key], b[key]) for key in a), file
    assert first_artifact.curve[0]["loss"] == second_artifact.curve[0]["loss"]


def test_second_submission_names_the_owner_and_third_resumes_after_a_kill(
    submit: Callable[..., Submission], small_base: str, undisturbed: Artifact, tmp_path: Path
) -> None:
    """The second submission names the owner. After the first is killed, a third one resumes its work and repeats no step."""
    file = fleet(tmp_path, small_base, "one", "two")
    first = submit(file)
    first.wait_for(lambda: len(list(Path(first.settings.store).glob(".leases/*/1"))) == 2, "two leases")
    second = submit(file)
    assert second.end() == 1, second.text
    for name in ("one", "two"):
        assert re.search(rf"\[{name}\] FAILED: .*process {first.process.pid} is working on it", second.text), second.text
    assert "trial step" not in second.text
    first.wait_for(
        lambda: "version 1" in first.text or (first.has_checkpoint("one") and first.has_checkpoint("two")), "a checkpoint of both models"
    )
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    third = submit(file)
    assert third.end() == 0, third.text
    assert f"process {first.process.pid} started it; checking for up to 6 s" in third.text
    assert min(third.resumed_at("one") + third.resumed_at("two")) > 0
    for name in ("one", "two"):
        assert third.steps(name) == list(range(1, STEPS + 1)), "each step is logged once"
        assert_same(third.artifact(name), undisturbed)
    fourth = submit(file)
    assert fourth.end() == 0 and fourth.text.count("already done: version 1") == 2, fourth.text


def test_a_worker_that_runs_out_of_memory_is_resumed(
    submit: Callable[..., Submission], small_base: str, undisturbed: Artifact, tmp_path: Path
) -> None:
    """The worker's address space is limited below its current size, so its next allocation fails. The next worker has no limit."""
    job = submit(fleet(tmp_path, small_base, "hungry"))
    job.wait_for(lambda: job.has_checkpoint("hungry"), "a checkpoint")
    worker = job.wait_for(lambda: job.worker("hungry"), "a worker")
    worker.rlimit(resource.RLIMIT_AS, (worker.memory_info().vms // 2,) * 2)
    assert job.end() == 0, job.text
    assert len(job.resumed_at("hungry")) == 1 and job.resumed_at("hungry")[0] > 0
    assert job.steps("hungry") == list(range(1, STEPS + 1))
    assert_same(job.artifact("hungry"), undisturbed)


def test_a_terminated_worker_is_resumed(submit: Callable[..., Submission], small_base: str, undisturbed: Artifact, tmp_path: Path) -> None:
    """SIGTERM ends the worker process at once, like a kill. The test sends it twice, the second time as soon as the worker has resumed."""
    job = submit(fleet(tmp_path, small_base, "ended"))
    for times in range(2):
        job.wait_for(partial(job.has_resumed, "ended", times), "a resumed worker")
        worker = job.wait_for(lambda: job.worker("ended"), "a worker")
        worker.send_signal(signal.SIGTERM)
        worker.wait(PATIENCE_S)
    assert job.end() == 0, job.text
    assert len(job.resumed_at("ended")) == 2
    assert_same(job.artifact("ended"), undisturbed)


def test_calibration_survives_an_unreliable_s3(
    submit: Callable[..., Submission], s3_server: dict[str, str], small_base: str, undisturbed: Artifact, tmp_path: Path
) -> None:
    """Artifacts, checkpoints, leases, and Ray Train's own files are on S3. One request in ten fails, and all of them for ten seconds."""
    faults = ("500", "503", "reset", "cut", "slow")
    outage = threading.Event()
    with proxy(s3_server["AWS_ENDPOINT_URL"]) as server:
        server.choose = lambda method, path, before: (
            "503" if outage.is_set() else (faults[before % 5] if crc32(f"{path} {before}".encode()) % 10 == 0 else "")
        )
        prefix = f"s3://models/{tmp_path.name}"
        env = {
            **s3_server,
            "AWS_ENDPOINT_URL": server.url,
            "ACIP_ARTIFACT_URI": f"{prefix}/artifacts",
            "ACIP_CHECKPOINT_URI": f"{prefix}/runs",
        }
        job = submit(fleet(tmp_path, small_base, "far"), **env)
        job.wait_for(lambda: any("/runs/far-" in path and "state.json" in path for _, path in list(server.requests)), "a checkpoint on S3")
        outage.set()
        time.sleep(10)
        outage.clear()
        assert job.end() == 0, job.text
        with pytest.MonkeyPatch.context() as patch:
            for name, value in s3_server.items():
                patch.setenv(name, value)
            assert_same(job.artifact("far"), undisturbed)
    assert job.steps("far") == list(range(1, STEPS + 1))
    assert sum(server.injected.values()) > 20
    assert s3_server["AWS_SECRET_ACCESS_KEY"] not in job.text


class PreemptibleCluster:
    """A calibration on a cluster whose worker nodes run `ray start --block`, as pods do. SIGTERM gives them some seconds to leave."""

    def __init__(self, folder: Path, base: str) -> None:
        settings = Settings.from_env({"ACIP_HOME": str(folder / "home"), "ACIP_CHECKPOINT_S": "1e6"})  # no checkpoints by time
        (self.job,) = Fleet.load(fleet(folder, base, "spot")).jobs
        self.settings, self.log, self.node_processes = settings, (folder / "pods").open("w"), list[subprocess.Popen[bytes]]()
        self.messages, self.outcome = list[str](), dict[str, Any]()
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
        ray.init(address=self.cluster.address, log_to_driver=False, runtime_env={"env_vars": settings.worker_env()})
        self.run = Tracking(settings, "acip/small").start("spot", "spot", {})
        self.events = open_event_queue()
        self.thread = threading.Thread(target=self.calibrate)

    def add_node(self) -> None:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", f"--address={self.cluster.address}", "--block", "--num-cpus=1",
            f"--object-store-memory={80 << 20}",
        ]  # fmt: skip
        self.node_processes.append(subprocess.Popen(command, stdout=self.log, stderr=self.log))

    def calibrate(self) -> None:
        try:
            self.outcome.update(run_job(self.job, Resources(0, 1), self.settings, self.run, "spot", self.events))
        except BaseException as error:
            self.outcome["error"] = error

    def collect_events(self) -> None:
        self.messages.extend(event["text"] for event in ray.get(self.events.take.remote()) if event["kind"] == "stage")

    def wait_for(self, text: str, times: int) -> None:
        def failure_message() -> str:
            return f"expected {times} events with {text!r}: {self.messages}, {self.outcome}\n{Path(self.log.name).read_text()}"

        def check() -> bool:
            self.collect_events()
            assert self.thread.is_alive() or sum(text in message for message in self.messages) >= times, failure_message()
            return sum(text in message for message in self.messages) >= times

        until(check, failure_message)

    def numbers(self, pattern: str) -> list[int]:
        return [int(step) for text in self.messages for step in re.findall(pattern, text)]

    def stop(self) -> None:
        ray.shutdown()
        for process in self.node_processes:
            process.terminate()
        for process in self.node_processes:
            process.wait(PATIENCE_S)
        self.cluster.shutdown()
        self.log.close()


def test_two_preemptions_write_one_checkpoint_each(
    small_base: str, undisturbed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM to a node makes its worker write a checkpoint at once. No other checkpoints are written."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "12")
    cluster = PreemptibleCluster(tmp_path, small_base)
    try:
        cluster.add_node()
        cluster.thread.start()
        for times in (1, 2):
            cluster.wait_for("trial step", times)
            cluster.node_processes[-1].send_signal(signal.SIGTERM)
            cluster.add_node()
            cluster.wait_for("a node is about to be removed", times)
        cluster.thread.join(JOB_S)
        cluster.collect_events()
        assert not cluster.thread.is_alive(), f"the calibration still runs: {cluster.messages}"
        assert "error" not in cluster.outcome and cluster.outcome["version"] == "1", (cluster.outcome, cluster.messages)
        checkpoint_steps = cluster.numbers(r"removed: writing a checkpoint of step (\d+)")
        assert len(checkpoint_steps) == 2, cluster.messages
        assert cluster.numbers(r"resuming from checkpoint step_(\d+)") == checkpoint_steps, cluster.messages
        assert_same(Artifact.open(cluster.outcome["uri"]), undisturbed)
        steps = [metric.step for metric in cluster.run.client.get_metric_history(cluster.run.run_id, "loss_nats")]
        assert steps == list(range(1, STEPS + 1)), "each step is logged once"
    finally:
        cluster.stop()
