"""README.md is short. The commands, files, and links on all README pages exist, and programs accept the arguments of the commands.

tests/jobs/test_jobs.py runs the commands of README.md; `RUN_ELSEWHERE` lists the others.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from acip_platform import cli
from acip_platform.evaluation.method_comparison import Arena
from acip_platform.scheduling.fleet import Fleet
from acip_platform.serve.http.requests import CompletionRequest
from acip_platform.training.sweep_space import Space
from mlflow.cli import server as mlflow_server
from ray.dashboard.modules.job.cli import job_cli_group

from acip.artifact import Artifact

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "acip/README.md", "platform/README.md", "infra/README.md", "jobs/README.md", "tests/benchmarks/README.md")
RUN_BY_TEST_JOBS = (  # tests/jobs/test_jobs.py runs them as they are, except for the ports
    "ray job submit -- python jobs/calibrate_all.py",
    "python jobs/calibrate_all.py --dry-run",
    "mlflow server --backend-store-uri sqlite:///$PWD/.acip/mlflow.db --port 5000 --workers 1",
    "python jobs/report.py smollm2-135m --out report.html",
    "python jobs/serve.py",
    "curl -s http://127.0.0.1:8000/v1/completions",
)
RUN_ELSEWHERE = {  # commands that take hours or need GPUs, and those that call the tests
    "bash infra/demo": "tests/jobs/test_jobs.py, with a smaller fleet",
    "bash infra/test": "this suite",
    "ray job submit -- python jobs/calibrate_all.py --fleet jobs/fleets/paper.yaml": "tests/jobs/test_calibrate_job.py plans it",
    "ray job submit -- python jobs/sweep.py --fleet jobs/fleets/demo.yaml --space jobs/spaces/demo.yaml": "tests/platform/training/"
    "test_sweep.py, with a smaller model",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def commands(page: str) -> list[list[str]]:
    """Return the words of each command in the shell blocks of a page, without comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_command_of_the_readme_is_run() -> None:
    known = [*RUN_BY_TEST_JOBS, *RUN_ELSEWHERE]
    texts = [shlex.join(words).replace("'", "").partition(" -H ")[0] for words in commands("README.md")]
    assert sorted(texts) == sorted(known)


@pytest.mark.parametrize("page", PAGES)
def test_programs_accept_the_arguments_of_commands(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "exit_code", lambda work: 0)  # parse the arguments only
    for words in commands(page):
        assert accepted(words, monkeypatch), f"{shlex.join(words)} on {page}"


def accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:  # noqa: PLR0912
    """Return whether a program accepts its arguments. Nothing is run; a program that can't be asked is looked up."""
    if "&&" in words:
        at = words.index("&&")
        return accepted(words[:at], monkeypatch) and accepted(words[at + 1 :], monkeypatch)
    match words:
        case ["python", script, *arguments] if script.startswith("jobs/"):
            job = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            for name in ("_stop_by_signal", "model_kind"):  # signal handlers, and the check that vLLM is installed
                monkeypatch.setattr(job, name, lambda *_: None, raising=False)
            return job.main(arguments) == 0
        case ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "FOLDER"] | ["vllm", "serve", _]:
            return True  # tests/vllm/test_engine.py loads exports, and artifacts in folders, on S3 and in the registry
        case ["ray", "job", name, *arguments]:
            entrypoint = job_cli_group.commands[name].make_context(name, arguments).params.get("entrypoint")
            return entrypoint is None or accepted([*entrypoint], monkeypatch)
        case ["mlflow", "server", *arguments]:
            return isinstance(mlflow_server.make_context("server", arguments), click.Context)
        case ["bash", script, *_]:
            return (ROOT / script).is_file()
        case ["pip", "install" | "uninstall", *arguments]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            return {extra for word in arguments for extra in re.findall(r"(?:\.|acip)\[(.+)\]", word)} <= extras.keys()
        case ["docker", "compose" | "build", *arguments] | [_, "docker", "compose" | "build", *arguments]:
            services = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
            files = [arguments[i + 1] for i, word in enumerate(arguments) if word == "-f"]
            if "exec" in arguments:
                service, *command = arguments[arguments.index("exec") + 1 :]
                return service in services and accepted(command, monkeypatch)
            return all((ROOT / file).is_file() for file in files)
        case ["docker", "push", _] | ["llama-cli", *_]:
            return True
        case ["kubectl", "apply", "-k", folder]:
            kubectl = shutil.which("kubectl")
            return (ROOT / folder / "kustomization.yaml").is_file() and (
                kubectl is None or not subprocess.run([kubectl, "kustomize", ROOT / folder], capture_output=True, check=False).returncode
            )
        case ["kubectl", "create" | "apply", "-n", "acip", "-f", file]:
            return (ROOT / file).is_file()
        case ["kubectl", "create", "secret", *_] | ["kubectl", "port-forward", *_]:
            return True
        case ["curl", *_]:
            return True  # tests/jobs/test_jobs.py and tests/serve/test_http.py send such requests
    return False


def test_example_files_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fleets, spaces and arenas in jobs/, and those in jobs/README.md. tests/infra and tests/serve check the files in infra/."""
    example, mixture = blocks("jobs/README.md", "yaml")
    (tmp_path / "fleet.yaml").write_text(example)
    (tmp_path / "mixture.yaml").write_text(f"models:\n  - name: a\n    base: b/c\n{mixture}")
    (tmp_path / "chats.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    for fleet in [*(ROOT / "jobs" / "fleets").iterdir(), tmp_path / "fleet.yaml", tmp_path / "mixture.yaml"]:
        assert Fleet.load(fleet).jobs
    for space in (ROOT / "jobs" / "spaces").iterdir():
        assert Space.load(space).trials(Fleet.load(ROOT / "jobs" / "fleets" / "demo.yaml").jobs[0])
    for arena in (ROOT / "jobs" / "arenas").iterdir():
        assert Arena.load(arena).methods


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_of_a_page_exist(page: str) -> None:
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all((folder / link).exists() for link in links), links
    files = re.findall(r"`((?:acip|platform|jobs|infra|tests)/[\w./-]+\.\w+)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_scripts_in_commands_exist(page: str) -> None:
    scripts = {word for words in commands(page) for word in words if re.fullmatch(r"(?:jobs|infra|tests)/[\w./-]+", word)}
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_each_fault_names_its_tests() -> None:
    """Each `-k` expression in infra/FAULTS.md selects a test of its file."""
    selections = re.findall(r"`([\w/]+/test_\w+\.py)(?: -k ('[^']+'|\w+))?`", (ROOT / "infra/FAULTS.md").read_text())
    assert len(selections) > 20
    for file, expression in selections:
        names = re.findall(r"def (test_\w+)", (ROOT / "tests" / file).read_text())
        words = [word for word in re.findall(r"\w+", expression) if word != "or"]
        assert all(any(word in name for name in names) for word in words), (file, expression)


def test_python_example_runs(small_artifact: Artifact, tmp_path: Path) -> None:
    (code,) = blocks("README.md", "python")
    exec(code.replace("path/to/artifact", str(small_artifact.folder)).replace('"folder"', repr(str(tmp_path / "out"))), {})
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_example_request_is_valid() -> None:
    requests = [words for page in ("README.md", "jobs/README.md") for words in commands(page) if words[0] == "curl" and "-d" in words]
    first, *others = (CompletionRequest.parse(json.loads(request[request.index("-d") + 1])) for request in requests)
    assert (first.size_ratio, first.max_tokens) == (0.42, 24)
    assert len(others) == 3 and others[0].parts and others[1].min_size == 0.4 and others[2].speculative == "off"
