"""The method works without the platform: `pip install .` installs neither Ray nor MLflow."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml
from ray.runtime_env import RuntimeEnv

from acip.artifact import Artifact

ROOT = Path(__file__).parents[2]
PLATFORM = ("ray", "mlflow", "boto3", "fastapi", "bitsandbytes", "lm_eval")
SCRIPT = """
import importlib.util, json, sys
import acip
from acip.artifact import Artifact

elastic = Artifact.open(sys.argv[1]).load()
cut = elastic.resize(0.6)
ids = elastic.model.generate(input_ids=__import__("torch").tensor([[65, 66]]), max_new_tokens=4, do_sample=False)
installed = [name for name in sys.argv[2:] if importlib.util.find_spec(name) is not None]
print(json.dumps({"file": acip.__file__, "got": cut.got, "tokens": ids.shape[1], "installed": installed}))
"""


def dependencies() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def test_runtime_env_installs_the_pinned_versions() -> None:
    env = yaml.safe_load((ROOT / "infra" / "runtime_env.yaml").read_text())
    checksum, constraints, project = RuntimeEnv(**env)["pip"]["packages"]
    content = (ROOT / "infra" / "constraints.txt").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    assert checksum == f"# {hashlib.sha256(content).hexdigest()[:12]}", "Ray would keep the old versions: write the new checksum"
    prefix = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"
    assert constraints == f"-c {prefix}/infra/constraints.txt"
    assert project.removeprefix(prefix).strip("[]") in dependencies()


def test_the_method_does_not_depend_on_the_platform() -> None:
    names = {re.split(r"[\[<>=]", requirement)[0].lower().replace("-", "_") for requirement in dependencies()[""]}
    assert names.isdisjoint(PLATFORM)


def test_every_declared_dependency_is_pinned() -> None:
    pins = {line.split("==")[0].lower().replace("-", "_") for line in (ROOT / "infra" / "constraints.txt").read_text().split()}
    names = {re.split(r"[\[<>=]", item)[0].lower().replace("-", "_") for items in dependencies().values() for item in items}
    assert names - pins - {"acip", "torch"} == set()


def test_infra_test_installs_the_same_pytorch_for_vllm() -> None:
    versions = [set(re.findall(r"torch==([\d.]+)", (ROOT / "infra" / name).read_text())) for name in ("venv", "test")]
    assert versions[0] == versions[1] != set()


@pytest.mark.slow
def test_the_method_alone_opens_an_artifact_and_generates(small_artifact: Artifact, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "torch==2.13.0"], check=True, timeout=1800)
    subprocess.run([*pip, "-c", str(ROOT / "infra" / "constraints.txt"), str(ROOT)], check=True, timeout=1800)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), "-c", SCRIPT, str(small_artifact.folder), *PLATFORM]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout.splitlines()[-1])
    assert report["installed"] == []
    assert report["file"].startswith(str(tmp_path / "venv"))
    assert report["got"] <= 0.6
    assert report["tokens"] == 6, sys.version
