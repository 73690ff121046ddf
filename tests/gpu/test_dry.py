"""The check of one GPU runs on a CPU with tiny shapes, so that nothing in it rots while no GPU is at hand."""

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

LOWEST = "5.16.0"  # of transformers; pyproject.toml allows it


def dry_run(out: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run the check with tiny shapes on a CPU, and return what it wrote."""
    command = [sys.executable, "tests/gpu/check.py", "--dry", "--slow", "8", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=1800)
    assert (out / "results.json").is_file(), done.stderr
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert done.returncode == 0, (out / "table.md").read_text()
    return results


def assert_whole(results: dict[str, Any], out: Path) -> None:
    assert {part["name"]: part["status"] for part in results["parts"]} == dict.fromkeys(LIMITS_S, "passed")
    shown = (out / "table.md").read_text()
    for part in results["parts"]:
        assert f"**{part['name']}**: passed" in shown
        for row in part["rows"]:
            assert row["value"], f"{part['name']}: {row['name']} says nothing"
            assert f"| {row['name']} |" in shown


def test_every_part_passes(tmp_path: Path) -> None:
    assert_whole(dry_run(tmp_path), tmp_path)


@pytest.mark.slow
def test_every_part_passes_with_the_lowest_transformers(tmp_path: Path) -> None:
    """The packages go into a folder that comes before the installed ones."""
    packages = tmp_path / "packages"
    wanted = [f"transformers=={LOWEST}", "huggingface_hub>=1.5,<2"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *wanted], check=True, timeout=900)
    results = dry_run(tmp_path / "out", PYTHONPATH=str(packages))
    assert results["machine"]["transformers"] == LOWEST
    assert_whole(results, tmp_path / "out")


def test_the_lowest_transformers_is_what_the_package_asks_for() -> None:
    assert f'"transformers>={LOWEST.removesuffix(".0")},<6"' in (ROOT / "pyproject.toml").read_text()


def test_a_part_that_fails_is_recorded_and_the_next_runs(tmp_path: Path) -> None:
    """A part that is cut off keeps the rows that it has; a row that raises has its traceback, and the rows after it are there."""
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
        part.judge(exit_code)
        assert part.status == status
        assert f"**decoding**: {status}" in table({"date": "today"}, [part])


def test_time_that_is_up_stops_a_part_and_the_others_still_run(tmp_path: Path) -> None:
    """Within two seconds nothing can be checked: PyTorch is not even loaded."""
    parts = ["--only", "correctness", "--only", "serving"]
    command = [sys.executable, "tests/gpu/check.py", "--dry", "--slow", "0.01", *parts, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    found = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [part["status"] for part in found] == ["failed: stopped after 1 s, its time limit"] * 2


def test_without_a_gpu_the_user_is_told(tmp_path: Path) -> None:
    """Without nvidia-smi on the path, and with it but with a PyTorch for CPUs."""
    for tool in ("bash", "dirname", "sed", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    env = {**os.environ, "PATH": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    bash = shutil.which("bash") or ""
    done = subprocess.run([bash, "infra/gpu"], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "nvidia-smi finds no GPU" in done.stderr
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: a fake one'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "sh").symlink_to(shutil.which("sh") or "")
    done = subprocess.run([bash, "infra/gpu"], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "finds no CUDA device" in done.stderr
