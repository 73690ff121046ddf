"""README.md is short. The commands, files, and links on all README pages exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
from acip_platform.serve.http.requests import CompletionRequest

from acip.artifact import Artifact

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "acip/README.md", "platform/README.md", "infra/README.md", "jobs/README.md", "tests/benchmarks/README.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def commands(page: str) -> list[list[str]]:
    """Return the words of each command in the shell blocks of a page, without comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


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
