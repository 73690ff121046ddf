"""The steps of a new user with a small model: infra/demo, `ray job submit`, MLflow, the endpoint over HTTP.

All processes use their own ports and folders and are stopped by pid.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from acip_platform.scheduling.fleet import Fleet
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Tracking
from peft import PeftModel
from ray.job_submission import JobSubmissionClient
from transformers import AutoModelForCausalLM

from acip.artifact.artifact import Artifact
from tests.infra.test_readme import RUN_BY_TEST_JOBS, blocks
from tests.support.ports import free_port
from tests.support.waiting import JOB_S, PATIENCE_S, until

ROOT = Path(__file__).parents[2]
RECIPE_FIELDS = (
    "{sample_windows: 64, adapter_rank: 4, adapter_alpha: 4.0, dtype: float32, batch_size: 4, seq_len: 64, lr: 3.0e-3, "
    "lambda_factor: 1.2, post_tune_steps: 30}"
)


class DemoHome:
    """A home folder and a Ray head for these tests, with the commands of a user."""

    def __init__(self, folder: Path, base: str) -> None:
        self.home, self.base = folder / "home", base
        self.fleet = folder / "fleet.yaml"
        self.write_fleet(f"- {{name: tiny, base: {base}}}")
        self.ray_temp = tempfile.mkdtemp(prefix="r")  # it holds sockets, whose paths must be short
        self.dashboard = free_port()
        options = f"--temp-dir={self.ray_temp} --num-cpus=2 --ray-client-server-port={free_port()}"
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "ACIP_HOME": str(self.home),
            "ACIP_RAY_PORT": str(free_port()),
            "ACIP_DASHBOARD_PORT": str(self.dashboard),
            "ACIP_RAY_START": options,
            "RAY_worker_niceness": "0",
        }
        self.settings = Settings.from_env(self.env)

    def write_fleet(self, models: str, file: Path | None = None) -> None:
        defaults = "defaults:\n  data: package:wikipedia\n  eval_context: 64\n  eval_windows: 32\n"
        defaults += f"  domains: [package:code]\n  set: {RECIPE_FIELDS}\n"
        (file or self.fleet).write_text(f"name: small\n{defaults}models:\n{models}\n")

    def demo(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "infra" / "demo"), *args]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=JOB_S, check=False)


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory, small_base: str) -> Iterator[DemoHome]:
    demo_home = DemoHome(tmp_path_factory.mktemp("jobs"), small_base)
    yield demo_home
    demo_home.demo("stop")
    shutil.rmtree(demo_home.ray_temp, ignore_errors=True)


@pytest.fixture(scope="module")
def first_run(demo_home: DemoHome) -> subprocess.CompletedProcess[str]:
    """Return the result of the first run of infra/demo."""
    result = demo_home.demo("--fleet", str(demo_home.fleet))
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_demo_stops_no_other_process_that_has_the_number_of_its_ray(tmp_path: Path) -> None:
    """After a restart of the machine, the number in the file may belong to another process."""
    with subprocess.Popen(["sleep", "1000"]) as other:
        try:
            (tmp_path / "ray.pid").write_text(str(other.pid))
            command, env = ["bash", str(ROOT / "infra" / "demo"), "stop"], {**os.environ, "ACIP_HOME": str(tmp_path)}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout) == (0, "no Ray of the demo is running\n")
            assert other.poll() is None
        finally:
            other.kill()


def test_screen_output(first_run: subprocess.CompletedProcess[str], demo_home: DemoHome) -> None:
    out = " ".join(first_run.stdout.split())
    for expected in (
        " job ",
        " dashboard http://",
        f" artifacts {demo_home.settings.store} ",
        "run tiny",
        "trial step at full shape: loss",
        "ETA",
        "tok/s",
    ):
        assert expected in out, f"{expected!r} is not on the screen:\n{out}"
    for asked in ("1.00", "0.90", "0.60", "0.40"):
        assert f"│ {asked} │" in out
    assert "1 of 1 models are calibrated" in out
    assert "jobs/serve.py" in out
    assert "\x1b[" not in out.split("acip: fleet")[1].split("ask at 0.6")[0], "no control characters without a terminal"


def test_ray_listens_only_on_loopback(first_run: subprocess.CompletedProcess[str], demo_home: DemoHome) -> None:
    """The Ray of the demo has no token, so it listens only on loopback addresses."""
    listening = set()
    for process in psutil.Process(int((demo_home.home / "ray.pid").read_text())).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a worker of the finished job
            listening |= {each.laddr.ip for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_second_run_skips_finished_models(first_run: subprocess.CompletedProcess[str], demo_home: DemoHome) -> None:
    result = demo_home.demo("--fleet", str(demo_home.fleet))
    assert result.returncode == 0, result.stdout
    assert "already done: version 1 is the champion" in result.stdout
    assert "trial step" not in result.stdout
    assert Registry(demo_home.settings).resolve("tiny").version == "1"


def test_a_failed_model_does_not_stop_the_others(first_run: subprocess.CompletedProcess[str], demo_home: DemoHome) -> None:
    demo_home.write_fleet(f"- {{name: broken, base: /no/such/model}}\n- {{name: tiny, base: {demo_home.base}}}")
    result = demo_home.demo("--fleet", str(demo_home.fleet))
    assert result.returncode == 1, result.stdout
    assert "[broken] FAILED: base '/no/such/model' is neither a local folder" in result.stdout
    assert "1 of 2 models are calibrated" in result.stdout
    bad = demo_home.demo("--fleet", str(demo_home.fleet), "--only", "tinny")
    assert bad.returncode != 0
    assert "--only names 'tinny' (did you mean 'tiny'?); the fleet has broken, tiny" in bad.stdout


def test_a_stopped_job_leaves_a_checkpoint(first_run: subprocess.CompletedProcess[str], demo_home: DemoHome, tmp_path: Path) -> None:
    """`ray job stop` ends a calibration that has written no checkpoint yet. The same command resumes it there."""
    fleet = demo_home.fleet.with_name("long.yaml")
    demo_home.write_fleet(f"- {{name: long, base: {demo_home.base}, set: {{post_tune_steps: 100000}}}}", fleet)
    env = demo_home.env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{demo_home.dashboard}", "RAY_AUTH_MODE": "disabled"}
    runtime_env = json.dumps({"env_vars": {"ACIP_HOME": str(demo_home.home), "ACIP_CHECKPOINT_S": "86400"}})
    client = JobSubmissionClient(env["RAY_API_SERVER_ADDRESS"])

    def ray_job(*arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "job", *arguments]
        subprocess.run(command, env=env, capture_output=True, timeout=JOB_S, check=True)

    def submit(id: str) -> None:
        python = [sys.executable, str(ROOT / "jobs" / "calibrate_all.py"), "--fleet", str(fleet)]
        ray_job("submit", "--no-wait", "--submission-id", id, "--runtime-env-json", runtime_env, "--", *python)

    def log(id: str) -> str:
        return " ".join(client.get_job_logs(id).split())

    submit("first")
    until(lambda: "post_tune step" in log("first"), lambda: log("first"), JOB_S)
    ray_job("stop", "first")
    stopped = re.search(r"the job stops: writing a checkpoint of step (\d+)", log("first"))
    assert stopped and "interrupted. Finished work is kept" in log("first"), log("first")
    assert client.get_job_status("first") == "STOPPED"
    (checkpoint,) = (demo_home.home / "runs").glob("long-*/step_*")
    assert checkpoint.name.startswith(f"step_{int(stopped[1]):06d}-")
    submit("second")
    until(lambda: f"resuming from checkpoint {checkpoint.name}" in log("second"), lambda: log("second"), JOB_S)
    ray_job("stop", "second")


def test_mlflow_run_holds_the_results(first_run: subprocess.CompletedProcess[str], demo_home: DemoHome) -> None:
    tracking = Tracking(demo_home.settings, "acip/small")
    (run,) = tracking.client.search_runs([tracking.experiment_id], "tags.model = 'tiny'")
    assert run.info.status == "FINISHED"
    assert run.data.params["basis"] == "fisher"
    steps = tracking.client.get_metric_history(run.info.run_id, "loss_nats")
    assert [metric.step for metric in steps] == list(range(1, len(steps) + 1))
    curve = {metric.step: metric.value for metric in tracking.client.get_metric_history(run.info.run_id, "tradeoff/perplexity")}
    assert set(curve) == {100, 90, 80, 70, 60, 50, 40}
    version = Registry(demo_home.settings).resolve("tiny")
    assert run.data.tags["artifact_uri"] == version.uri
    artifact = Artifact.open(version.uri, verify=True)
    assert {round(row["asked"] * 100): row["perplexity"] for row in artifact.curve} == pytest.approx(curve)
    assert version.tags["verdict"] == run.data.tags["verdict"] == "champion: the first of tiny"
    source = tracking.client.get_logged_model(version.model_id)
    assert (source.name, source.source_run_id, source.tags["artifact_uri"]) == ("tiny", run.info.run_id, version.uri)
    models = tracking.client.search_logged_models(
        [tracking.experiment_id], "params.model = 'tiny' AND params.size = '60 percent of numbers'"
    )
    assert [metric.value for model in models for metric in model.metrics or () if metric.key == "perplexity"] == pytest.approx([curve[60]])
    assert f"Version 1 of tiny, {version.tags['verdict']}." in run.data.tags["mlflow.note.content"]
    files = {item.path for item in tracking.client.list_artifacts(run.info.run_id)}
    expected_files = {"tradeoff.png", "score_map.png", "kept_ranks_60.png", "samples.json", "adapter_at_40"}
    assert expected_files | {"recipe.json", "provenance.json"} <= files
    folder = tracking.client.download_artifacts(run.info.run_id, "adapter_at_40")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo_home.base), folder)
    B = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight")
    assert torch.count_nonzero(B) > 0
    assert not list(Path(folder).parent.rglob("factors*")), "weights never pass through MLflow"


def test_the_endpoint_serves_the_champion(first_run: subprocess.CompletedProcess[str], demo_home: DemoHome) -> None:
    port = free_port()
    env = demo_home.env | {"RAY_ADDRESS": f"127.0.0.1:{demo_home.env['ACIP_RAY_PORT']}", "RAY_AUTH_MODE": "disabled"}
    log = (demo_home.home / "serve.log").open("w")
    server = subprocess.Popen([sys.executable, str(ROOT / "jobs" / "serve.py"), "--port", str(port)], env=env, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        models = wait_for(f"{url}/v1/models", server, Path(log.name))
        assert [model["id"] for model in models["data"]] == ["tiny"]
        body: dict[str, Any] = {"model": "tiny", "size_ratio": 0.6, "prompt": "It is a truth", "max_tokens": 12, "temperature": 0}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).json()
        assert response["size"]["asked"] == 0.6
        assert 0.55 < response["size"]["got"] <= 0.6
        assert response["usage"]["completion_tokens"] <= 12
        by_name = httpx.post(f"{url}/v1/completions", json={**body, "model": "tiny@0.6", "size_ratio": None}, timeout=PATIENCE_S).json()
        assert by_name["choices"][0]["text"] == response["choices"][0]["text"]
        bad = httpx.post(f"{url}/v1/completions", json={**body, "size_ratio": 1.6}, timeout=PATIENCE_S)
        assert bad.status_code == 400
        assert set(bad.json()["error"]) == {"message", "type", "param", "code"}
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            server.kill()
            pytest.fail(f"the server did not stop:\n{Path(log.name).read_text()}")
        finally:
            log.close()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> Any:
    def get_json() -> Any:
        assert server.poll() is None, f"the server exited:\n{log.read_text()}"
        with suppress(httpx.TransportError):
            response = httpx.get(url, timeout=PATIENCE_S)
            return response.json() if response.status_code == 200 else None
        return None

    return until(get_json, lambda: f"{url} does not respond:\n{log.read_text()}")


@pytest.fixture
def readme_home(first_run: subprocess.CompletedProcess[str], demo_home: DemoHome, tmp_path: Path) -> Path:
    """Return a folder like a checkout after infra/demo. Its `smollm2-135m` is the small model, registered with the demo's fingerprint."""
    (job,) = Fleet.load(ROOT / "jobs" / "fleets" / "demo.yaml").jobs
    registry, tiny = Registry(demo_home.settings), Registry(demo_home.settings).resolve("tiny")
    (run,) = (str(each.run_id) for each in registry.client.search_model_versions("name = 'tiny'"))
    copy = shutil.copytree(tiny.uri, demo_home.home / "artifacts" / job.name, dirs_exist_ok=True)
    registry.set_alias(registry.register(job.name, str(copy), run, {**tiny.tags, "fingerprint": job.fingerprint}))
    for name in ("acip", "infra", "jobs", "platform"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".acip").symlink_to(demo_home.home)
    return tmp_path


def test_commands_of_the_readme_work(readme_home: Path, demo_home: DemoHome) -> None:
    """The commands run in the order of README.md, with free ports."""
    ports = {"5000": str(free_port()), "8000": str(free_port())}
    env = demo_home.env | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_ADDRESS": f"127.0.0.1:{demo_home.env['ACIP_RAY_PORT']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{demo_home.dashboard}", "RAY_AUTH_MODE": "disabled",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }  # fmt: skip
    log = readme_home / "log"

    def start(command: str) -> subprocess.Popen[bytes]:
        with log.open("w") as output:
            bash = ["bash", "-c", f"exec {command}"]
            return subprocess.Popen(bash, env=env, cwd=readme_home, stdout=output, stderr=output, start_new_session=True)

    def output(command: str) -> str:
        assert start(command).wait(JOB_S) == 0, log.read_text()
        return log.read_text()

    @contextmanager
    def serving(command: str, url: str) -> Iterator[None]:
        server = start(command)

        def answers() -> bool:
            assert server.poll() is None, log.read_text()
            with suppress(httpx.TransportError):
                return httpx.get(url, timeout=PATIENCE_S).status_code == 200
            return False

        try:
            until(answers, lambda: f"{url} does not respond:\n{log.read_text()}")
            yield
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(PATIENCE_S)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)

    lines = "\n".join(blocks("README.md", "bash")).replace("\\\n", " ").splitlines()
    submit, plan, mlflow, report, serve, curl = (
        next(line for line in lines if shlex.join(shlex.split(line, comments=True)).replace("'", "").startswith(command))
        for command in RUN_BY_TEST_JOBS
    )
    for command in (submit, plan):
        assert "1 already done" in output(command)
    with serving(mlflow.replace("5000", ports["5000"]), f"http://127.0.0.1:{ports['5000']}/health"):
        output(report)
        assert "smollm2-135m" in (readme_home / "report.html").read_text()
    with serving(serve.replace("serve.py", f"serve.py --port {ports['8000']}"), f"http://127.0.0.1:{ports['8000']}/ready"):
        _, _, url, _, header, _, body = shlex.split(curl.replace("8000", ports["8000"]))  # sent without curl, which may be missing
        answer = httpx.post(url, content=body, headers=[tuple(header.split(": "))], timeout=PATIENCE_S)  # type: ignore[arg-type]
        assert answer.json()["size"]["asked"] == 0.42


def test_plan_and_forecast_without_a_running_ray(demo_home: DemoHome, first_run: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    """`python jobs/calibrate_all.py --rehearse` works without a running Ray. It prints the plan and writes no artifact."""
    command = [sys.executable, str(ROOT / "jobs" / "calibrate_all.py"), "--fleet", str(demo_home.fleet), "--only", "tiny", "--rehearse"]
    env = demo_home.env | {"ACIP_HOME": str(tmp_path)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=JOB_S, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[tiny]" in result.stdout and "GB per worker" in result.stdout
    assert "fisher scores, sizes down to 0.4 (linear)" in result.stdout
    assert re.search(r"\[tiny\] \S+ on \d+ threads of a CPU, predicted from a few blocks", result.stdout), result.stdout
    assert re.search(r"  artifact +0\.0\d GB", result.stdout), result.stdout
    assert json.dumps(sorted(path.name for path in tmp_path.rglob("factors*"))) == "[]"
