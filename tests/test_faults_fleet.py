"""Whole calibrations, struck: drivers and workers killed, memory short, nodes taken away, S3 failing. The result is the undisturbed one.

Each runs `jobs/calibrate_all.py`, or Ray Train on a cluster of nodes, and compares every tensor of the artifact, bit for bit (CPU).
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
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from acip_platform.fleet import Fleet
from acip_platform.inbox import open_inbox
from acip_platform.schedule import Share
from acip_platform.settings import Settings
from acip_platform.store import Store
from acip_platform.tracking import Registry, Tracking
from acip_platform.train import run_job
from ray.cluster_utils import Cluster

from acip.artifact import Artifact
from tests.conftest import write_fleet
from tests.faulty import proxy

ROOT = Path(__file__).parents[1]
STEPS = 300
pytestmark = pytest.mark.slow


class Submission:
    """`jobs/calibrate_all.py`, as a process of its own with a Ray of its own."""

    def __init__(self, fleet: Path, home: Path, log: Path, **env: str) -> None:
        self.env = {**os.environ, "ACIP_HOME": str(home), "ACIP_CHECKPOINT_S": "1", "ACIP_LEASE_S": "6", "RAY_ADDRESS": "local", **env}
        self.settings, self.log = Settings.from_env(self.env), log
        with log.open("w") as out:
            command = [sys.executable, str(ROOT / "jobs" / "calibrate_all.py"), "--fleet", str(fleet)]
            self.process = subprocess.Popen(command, env=self.env, stdout=out, stderr=out)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, true: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 240
        while not (found := true()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.1)
        return found

    def end(self) -> int:
        return self.process.wait(timeout=300)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)

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
        return [int(step) for step in re.findall(rf"\[{name}\] going on from the last checkpoint, step_(\d+)", self.text)]

    def steps(self, name: str) -> list[int]:
        """As they are in MLflow."""
        tracking = Tracking(self.settings, "acip/small")
        (run,) = tracking.client.search_runs([tracking.experiment_id], f"tags.model = '{name}'")
        return [metric.step for metric in tracking.client.get_metric_history(run.info.run_id, "loss_nats")]

    def artifact(self, name: str) -> Artifact:
        version = Registry(self.settings).resolve(name)
        assert version.version == "1", "registered once"
        return Store(self.settings.store, self.settings.home / "cache").open(version.uri)


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., Submission]]:
    began: list[Submission] = []

    def submit(fleet: Path, **env: str) -> Submission:
        began.append(Submission(fleet, tmp_path / "home", tmp_path / f"log-{len(began)}", **env))
        return began[-1]

    yield submit
    for submission in began:
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


def assert_same(one: Artifact, two: Artifact) -> None:
    for file in ("order", "factors", "dense", "adapters"):
        ours, theirs = one.tensors(file), two.tensors(file)
        assert ours.entries.keys() == theirs.entries.keys()
        a, b = ours.read(list(ours.entries)), theirs.read(list(theirs.entries))
        assert all(torch.equal(a[key], b[key]) for key in a), file
    assert one.curve[0]["loss"] == two.curve[0]["loss"]


def test_a_fleet_is_submitted_twice_and_its_driver_is_killed(
    submit: Callable[..., Submission], small_base: str, undisturbed: Artifact, tmp_path: Path
) -> None:
    """The second says who has it. After the first is killed, a third goes on where that was, and repeats nothing."""
    file = fleet(tmp_path, small_base, "one", "two")
    first = submit(file)
    first.wait_for(lambda: first.has_checkpoint("one") or first.has_checkpoint("two"))
    second = submit(file)
    assert second.end() == 1, second.text
    for name in ("one", "two"):
        assert re.search(rf"\[{name}\] FAILED: .*process {first.process.pid} is working on it", second.text), second.text
    assert "one real step" not in second.text
    first.wait_for(lambda: "version 1" in first.text or (first.has_checkpoint("one") and first.has_checkpoint("two")))
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    third = submit(file)
    assert third.end() == 0, third.text
    assert f"process {first.process.pid} began it; looking for up to 6 s" in third.text
    assert all(step > 0 for step in third.resumed_at("one") + third.resumed_at("two")) and "going on from the last checkpoint" in third.text
    for name in ("one", "two"):
        assert third.steps(name) == list(range(1, STEPS + 1)), "each once"
        assert_same(third.artifact(name), undisturbed)
    fourth = submit(file)
    assert fourth.end() == 0 and fourth.text.count("done already: version 1") == 2, fourth.text


def test_a_worker_that_runs_out_of_memory(
    submit: Callable[..., Submission], small_base: str, undisturbed: Artifact, tmp_path: Path
) -> None:
    """Its limit is lowered to what it has: what it asks for next is refused. The next worker has room again."""
    job = submit(fleet(tmp_path, small_base, "hungry"))
    job.wait_for(lambda: job.has_checkpoint("hungry"))
    worker = job.wait_for(lambda: job.worker("hungry"))
    worker.rlimit(resource.RLIMIT_AS, (worker.memory_info().vms // 2,) * 2)
    assert job.end() == 0, job.text
    assert len(job.resumed_at("hungry")) == 1 and job.resumed_at("hungry")[0] > 0
    assert job.steps("hungry") == list(range(1, STEPS + 1))
    assert_same(job.artifact("hungry"), undisturbed)


def test_a_worker_that_is_terminated(submit: Callable[..., Submission], small_base: str, undisturbed: Artifact, tmp_path: Path) -> None:
    """SIGTERM to the process itself, which Ray ends at once: as if it were killed. Twice, the second time as soon as it is back."""
    job = submit(fleet(tmp_path, small_base, "ended"))
    for i in range(2):
        job.wait_for(lambda i=i: job.has_checkpoint("ended") and len(job.resumed_at("ended")) == i)
        worker = job.wait_for(lambda: job.worker("ended"))
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
    assert job.end() == 0, job.text
    assert len(job.resumed_at("ended")) == 2
    assert_same(job.artifact("ended"), undisturbed)


def test_everything_through_a_bad_s3(
    submit: Callable[..., Submission], s3_server: dict[str, str], small_base: str, undisturbed: Artifact, tmp_path: Path
) -> None:
    """Artifacts, checkpoints, leases and Ray Train's own files. Requests fail one in ten; for some seconds, all of them."""
    faults = ("500", "503", "reset", "cut", "slow")
    away = threading.Event()
    with proxy(s3_server["AWS_ENDPOINT_URL"]) as server:
        server.choose = lambda method, path, before: (
            "503" if away.is_set() else (faults[before % 5] if hash((path, before)) % 10 == 0 else "")
        )
        place = f"s3://models/{tmp_path.name}"
        env = {**s3_server, "AWS_ENDPOINT_URL": server.url, "ACIP_STORE": f"{place}/artifacts", "ACIP_RUNS": f"{place}/runs"}
        job = submit(fleet(tmp_path, small_base, "far"), **env)
        job.wait_for(lambda: any("/runs/far-" in path and "state.json" in path for _, path in list(server.seen)))
        away.set()
        time.sleep(10)
        away.clear()
        assert job.end() == 0, job.text
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**s3_server, "AWS_ENDPOINT_URL": s3_server["AWS_ENDPOINT_URL"]}.items():
                patch.setenv(name, value)
            assert_same(job.artifact("far"), undisturbed)
    assert job.steps("far") == list(range(1, STEPS + 1))
    assert sum(server.done.values()) > 20
    assert s3_server["AWS_SECRET_ACCESS_KEY"] not in job.text


def test_preempted_twice(small_base: str, undisturbed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to `ray start --block`, as a pod's first process gets it: its worker writes a checkpoint at once. There are no others."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "12")
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home"), "ACIP_CHECKPOINT_S": "1e6"})
    (job,) = Fleet.load(fleet(tmp_path, small_base, "spot")).jobs
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20, "resources": {"head": 1}})
    pods: list[subprocess.Popen[bytes]] = []
    log = (tmp_path / "pods").open("w")

    def pod() -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", f"--address={cluster.address}", "--block", "--num-cpus=2",
                   f"--object-store-memory={80 << 20}"]  # fmt: skip
        pods.append(subprocess.Popen(command, stdout=log, stderr=log))

    try:
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": settings.worker_env()})
        tracking = Tracking(settings, "acip/small")
        run, inbox = tracking.start("spot", "spot", {}), open_inbox()
        said: list[str] = []
        outcome: dict[str, Any] = {}

        def calibrate() -> None:
            try:
                outcome.update(run_job(job, Share(0, 2), settings, run, "spot", inbox))
            except BaseException as error:
                outcome["error"] = error

        def heard(text: str, times: int) -> bool:
            said.extend(event["text"] for event in ray.get(inbox.take.remote()) if event["kind"] == "stage")
            return sum(text in each for each in said) >= times

        def wait_for(text: str, times: int) -> None:
            deadline = time.monotonic() + 150
            while not heard(text, times):
                assert time.monotonic() < deadline and thread.is_alive(), (said, outcome, (tmp_path / "pods").read_text())
                time.sleep(0.2)

        pod()
        thread = threading.Thread(target=calibrate)
        thread.start()
        for time_ in (1, 2):
            wait_for("one real step", time_)
            time.sleep(2)
            pods[-1].send_signal(signal.SIGTERM)
            pod()
            wait_for("a node is being taken away", time_)
        thread.join(300)
        heard("", 0)
        assert "error" not in outcome and outcome["version"] == "1", (outcome, said)
        left = [int(step) for text in said for step in re.findall(r"taken away: a checkpoint of step (\d+)", text)]
        back = [int(step) for text in said for step in re.findall(r"going on from the last checkpoint, step_(\d+)", text)]
        assert left == back and len(left) == 2, said
        assert_same(Artifact.open(outcome["uri"]), undisturbed)
        assert [metric.step for metric in run.client.get_metric_history(run.run_id, "loss_nats")] == list(range(1, STEPS + 1))
    finally:
        ray.shutdown()
        for process in pods:
            process.terminate()
        for process in pods:
            process.wait(60)
        cluster.shutdown()
        log.close()
