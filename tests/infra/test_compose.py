"""infra/compose.yaml and infra/Dockerfile pass their own validators, expose ports only locally, and refer only to existing things.

Each check is a function that returns complaints: none for the files in the repository, and some for each planted error.
"""

import copy
import fnmatch
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from jsonschema import Draft202012Validator
from mlflow.cli import server as mlflow_server
from ray.scripts.scripts import start as ray_start

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
Compose = dict[str, Any]


@pytest.fixture
def compose() -> Compose:
    return copy.deepcopy(yaml.safe_load((INFRA / "compose.yaml").read_text()))


def invalid(compose: Compose) -> list[str]:
    """Return the violations of the Compose specification's schema."""
    schema = json.loads(importlib.resources.files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text())
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(compose)]


def dangling(compose: Compose) -> list[str]:
    """Return the references of services to missing things. Files in .secrets count as present, because infra/secrets creates them."""
    secret_files = {f"../.secrets/{name}" for name in re.findall(r"^put (\S+)", (INFRA / "secrets").read_text(), re.M)}
    complaints, services = [], compose["services"]
    for name, service in services.items():
        complaints += [
            f"{name} waits for {dependency}, which has no healthcheck"
            for dependency in service.get("depends_on", ())
            if "healthcheck" not in services.get(dependency, ())
        ]
        if "build" in service:
            dockerfile = (INFRA.parent / service["build"]["dockerfile"]).read_text()
            complaints += [f"{name}: no ARG {arg}" for arg in service["build"]["args"] if f"\nARG {arg}=" not in dockerfile]
        complaints += [f"{name}: no {file}" for file in service.get("env_file", ()) if file not in secret_files]
        complaints += [f"{name}: no secret {secret}" for secret in service.get("secrets", ()) if secret not in compose["secrets"]]
        for source in (volume.split(":")[0] for volume in service.get("volumes", ())):
            if not (INFRA / source).is_file() if source.startswith(".") else source not in compose["volumes"]:
                complaints.append(f"{name}: no {source}")
        texts = " ".join([*service.get("command", ()), *service.get("environment", {}).values()])
        aliases = {alias for each in services.values() for alias in each.get("networks", {}).get("default", {}).get("aliases", ())}
        hosts = {host for host, _ in re.findall(r"(?:^|//|@|=|,| )([a-z-]+):(\d{4,5})\b", texts)} - {"localhost"}
        complaints += [f"{name}: no host {host}" for host in hosts - services.keys() - aliases]
    return complaints + [f"no {each['file']}" for each in compose["secrets"].values() if each["file"] not in secret_files]


def open_to_the_network(compose: Compose) -> list[str]:
    """Return the published ports that are not bound to 127.0.0.1."""
    ports = {name: service.get("ports", ()) for name, service in compose["services"].items()}
    return [f"{name}: {port}" for name in ports for port in ports[name] if not port.startswith("127.0.0.1:")]


def wrong_commands(compose: Compose) -> list[str]:
    """Return the options that the parser of each program refuses."""
    complaints = []
    weed = subprocess.run([Path(sys.executable).with_name("weed"), "help", "mini"], capture_output=True, text=True, check=False)
    options = set(re.findall(r"^\s+-([\w.]+)", weed.stdout + weed.stderr, re.M))
    for name, service in compose["services"].items():
        words = service.get("command", [])
        parser = {("ray", "start"): ray_start, ("mlflow", "server"): mlflow_server}.get(tuple(words[:2]))
        if parser is not None:
            try:
                parser.make_context(words[1], words[2:])
            except click.ClickException as error:
                complaints.append(f"{name}: {error.format_message()}")
        if words[:1] == ["mini"]:
            complaints += [f"{name}: no {word}" for word in words[1:] if word.lstrip("-").split("=")[0] not in options]
        if "python" in words:
            script = words[words.index("python") + 1 :]
            source = (ROOT / script[0]).read_text()
            complaints += [
                f"{name}: {script[0]} has no {word}" for word in script[1:] if word.startswith("-") and f'"{word}"' not in source
            ]
    return complaints


CHECKS = (invalid, dangling, open_to_the_network, wrong_commands)


@pytest.mark.parametrize("check", CHECKS)
def test_compose_file_is_valid(compose: Compose, check: Callable[[Compose], list[str]]) -> None:
    assert check(compose) == []


def test_gpu_compose_file_is_valid(compose: Compose) -> None:
    gpu_compose = yaml.safe_load((INFRA / "compose.gpu.yaml").read_text())
    assert invalid(gpu_compose) == []
    assert gpu_compose["services"].keys() <= compose["services"].keys()


PLANTED: dict[str, tuple[Callable[[Compose], list[str]], Callable[[dict[str, Any]], Any]]] = {
    "a misspelt field": (invalid, lambda s: s["mlflow"].update(healthchek={})),
    "a wrong type": (invalid, lambda s: s["mlflow"].update(restart=["always"])),
    "a service that is not there": (dangling, lambda s: s["mlflow"]["depends_on"].update(postgresql={"condition": "service_healthy"})),
    "a file that is not there": (dangling, lambda s: s["grafana"]["volumes"].append("./monitoring/dash.json:/x:ro")),
    "a host that is not there": (dangling, lambda s: s["ray-worker"]["environment"].update(AWS_ENDPOINT_URL="http://minio:9000")),
    "a build argument that is not there": (dangling, lambda s: s["ray-head"]["build"]["args"].update(VLM="yes")),
    "a port for everyone": (open_to_the_network, lambda s: s["ray-head"]["ports"].append("8265:8265")),
    "no option of ray's": (wrong_commands, lambda s: s["ray-head"]["command"].append("--gpus=1")),
    "no option of mlflow's": (wrong_commands, lambda s: s["mlflow"]["command"].append("--no-serve-artefacts")),
    "no option of weed's": (wrong_commands, lambda s: s["storage"]["command"].append("-s3.prot=1")),
    "no option of the endpoint's": (wrong_commands, lambda s: s["endpoint"]["command"].append("--hots")),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found(compose: Compose, error: str) -> None:
    check, plant = PLANTED[error]
    plant(compose["services"])
    assert check(compose)


# ---- the image


def wrong_image(dockerfile: str, folder: Path) -> list[str]:
    """Return hadolint's findings, missing or ignored COPY sources, a USER that is not a number above 0, a wrong torch, unknown extras."""
    (folder / "Dockerfile").write_text(dockerfile)
    command = [str(Path(sys.executable).with_name("hadolint")), "--no-color", str(folder / "Dockerfile")]
    complaints = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    included = [line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    for sources in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M):
        for source in sources.split():
            if not (ROOT / source).exists() or not any(fnmatch.fnmatch(source, pattern) for pattern in included):
                complaints.append(f"COPY {source}: the file is missing, or .dockerignore excludes it")
    users = re.findall(r"^USER (.+)$", dockerfile, re.M)
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        complaints.append(f"USER {users}: runAsNonRoot of Kubernetes needs a number above 0")
    (torch,) = re.findall(r"torch==([\d.]+)", (INFRA / "venv").read_text())
    if f"ARG TORCH={torch}\n" not in dockerfile:
        complaints.append(f"torch is not {torch}, the version in infra/venv")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extras,) = re.findall(r'"\.\[(.+)\]"', dockerfile)
    return complaints + [f"no extra {extra}" for extra in re.sub(r"\${VLLM:\+(.+)}", r"\1", extras).split(",") if extra not in known]


def test_secrets_are_complete_also_if_the_first_attempt_failed(tmp_path: Path) -> None:
    """The stub stands for openssl: it is missing at first, and then makes a key."""
    (tmp_path / "infra").mkdir()
    shutil.copy(INFRA / "secrets", tmp_path / "infra")
    openssl = tmp_path / "openssl"
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    results = []
    for script in ("exit 127", f"echo {'5' * 48}"):
        openssl.write_text(f"#!/bin/sh\n{script}\n")
        openssl.chmod(0o755)
        results.append(subprocess.run(["bash", tmp_path / "infra" / "secrets"], env=env, check=False).returncode)
    assert results == [127, 0]
    for file in (tmp_path / ".secrets").iterdir():
        for line in file.read_text().splitlines():
            assert line.endswith("5" * 48) or line == "AWS_ACCESS_KEY_ID=acip", file
    assert len(list((tmp_path / ".secrets").iterdir())) == 6


def test_dockerfile_is_valid(tmp_path: Path) -> None:
    assert wrong_image((INFRA / "Dockerfile").read_text(), tmp_path) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("RUN if", "RUNN if"),
        ("COPY jobs jobs", "COPY job job"),
        ("USER 1000:1000", "USER acip"),
        ("USER 1000:1000\n", ""),
        ("TORCH=2", "TORCH=1"),
        (",vllm}", ",vlm}"),
    ],
)
def test_a_planted_dockerfile_error_is_found(tmp_path: Path, right: str, wrong: str) -> None:
    assert wrong_image((INFRA / "Dockerfile").read_text().replace(right, wrong), tmp_path)
