"""The GPU check runs on a CPU with tiny shapes, so that its code keeps working without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.check import LIMITS_S, ROOT
from tests.gpu.report import Part, Report, rows_of, table

LOWEST = "5.16.0"  # lowest version of transformers that pyproject.toml allows


def dry_run(out: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run the check with tiny shapes on a CPU, and return its results.json."""
    command = [sys.executable, "tests/gpu/check.py", "--dry", "--slow", "8", "--out", str(out), *arguments]
    finished = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=1800
    )
    assert (out / "results.json").is_file(), finished.stderr
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert finished.returncode == 0, (out / "table.md").read_text()
    return results


def assert_all_passed(results: dict[str, Any], out: Path) -> None:
    assert {part["name"]: part["status"] for part in results["parts"]} == dict.fromkeys(LIMITS_S, "passed")
    shown = (out / "table.md").read_text()
    for part in results["parts"]:
        assert f"**{part['name']}**: passed" in shown
        for row in part["rows"]:
            assert row["value"], f"{part['name']}: {row['name']} has no value"
            assert f"| {row['name']} |" in shown


def test_every_part_passes(tmp_path: Path) -> None:
    assert_all_passed(dry_run(tmp_path), tmp_path)


@pytest.mark.slow
def test_every_part_passes_with_the_lowest_transformers(tmp_path: Path) -> None:
    """A folder with the lowest versions precedes the installed packages on PYTHONPATH."""
    packages = tmp_path / "packages"
    requirements = [f"transformers=={LOWEST}", "huggingface_hub>=1.5,<2"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *requirements], check=True, timeout=900
    )
    results = dry_run(tmp_path / "out", PYTHONPATH=str(packages))
    assert results["machine"]["transformers"] == LOWEST
    assert_all_passed(results, tmp_path / "out")


def test_pyproject_allows_the_lowest_transformers() -> None:
    assert f'"transformers>={LOWEST.removesuffix(".0")},<6"' in (ROOT / "pyproject.toml").read_text()


def test_a_failed_part_is_recorded(tmp_path: Path) -> None:
    """A part that is stopped keeps its rows. A row that raises has a traceback, and later rows are still recorded."""
    report = Report(tmp_path / "rows", 60)
    with report.row("measured") as row:
        row.show("7 tokens/s", "of 9", tokens_per_s=7)
    with report.row("broken"):
        raise RuntimeError("no such kernel\nsecond line")
    with report.row("wrong") as row:
        row.require(True, "first")
        row.require(False, "second")
        row.require(True, "third")
    with (tmp_path / "rows").open("a") as file:
        file.write('{"name": "half')
    rows = rows_of(tmp_path / "rows")
    assert [(row["name"], row["ok"]) for row in rows] == [("measured", None), ("broken", False), ("wrong", False)]
    assert "RuntimeError: no such kernel" in rows[1]["error"]
    assert rows[2]["value"] == "second"
    for exit_code, rest, status in (
        (None, rows[:1], "failed: stopped after 9 s, its time limit"), (0, rows, "failed: broken, wrong"), (0, rows[:1], "passed"),
        (1, rows[:1], "failed: exit code 1 after 1 rows"), (0, [], "failed: exit code 0 after 0 rows"),
    ):  # fmt: skip
        part = Part("decoding", limit_s=9, rows=rest)
        part.set_status(exit_code)
        assert part.status == status
        assert f"**decoding**: {status}" in table({"date": "today"}, [part])


def test_a_time_limit_stops_one_part_and_the_next_still_runs(tmp_path: Path) -> None:
    """Both parts end at their time limits of one second, which is too short to load PyTorch."""
    options = ["--only", "correctness", "--only", "serving"]
    command = [sys.executable, "tests/gpu/check.py", "--dry", "--slow", "0.01", *options, "--out", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 1
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [part["status"] for part in parts] == ["failed: stopped after 1 s, its time limit"] * 2


def test_a_missing_gpu_is_reported(tmp_path: Path) -> None:
    """The error names a missing nvidia-smi, or a PyTorch without CUDA."""
    for tool in ("bash", "dirname", "sed", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    env = {**os.environ, "PATH": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    bash = shutil.which("bash") or ""
    finished = subprocess.run([bash, "infra/gpu"], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 1
    assert "nvidia-smi finds no GPU" in finished.stderr
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: fake'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "sh").symlink_to(shutil.which("sh") or "")
    finished = subprocess.run([bash, "infra/gpu"], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 1
    assert "finds no CUDA device" in finished.stderr
