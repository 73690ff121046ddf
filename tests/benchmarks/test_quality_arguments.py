"""The quality benchmark refuses arguments that it cannot honor before it measures anything, and writes the files that it is asked for."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import quality


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "x.png"], "--plot needs --price"),
        (["--price", "--plot", "x.txt"], "must end with .png"),
        (["--price", "--plot", "missing/x.png"], "its folder does not exist"),
        (["--json", "missing/x.json"], "its folder does not exist"),
        (["--json", "."], "which is a folder"),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--steps", "60"], "--steps does not apply to the small model"),
        (["--model", "smollm2", "--steps", "0"], "--steps is 0; it must be at least 5"),
        (["--text", "code"], "--text does not apply to the small model"),
        (["--model", "smollm2", "--text", "code", "code"], "--text names a source twice: code code"),
        (["--model", "smollm2", "--text", "novels"], "invalid choice: 'novels'"),
        (["--model", "smollm2", "--quick"], "--quick is for the small model"),
    ],
)
def test_arguments_that_cannot_be_honored_are_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(arguments, monkeypatch, capsys)


@pytest.mark.parametrize("content", ['{"small, ours: ', "[1]", '{"a": 1}', '{"a": {"label": "ours"}}'])
def test_a_damaged_file_of_runs_is_an_error(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs.json"
    file.write_text(content)
    assert f"--json: {file}" in refused(["--json", str(file)], monkeypatch, capsys)
    assert file.read_text() == content


def test_finished_runs_are_kept_and_plotted_without_diverged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def result(label: str, excess: float, **facts: Any) -> dict[str, Any]:
        by_size = {str(size): 0.0 if size == 1.0 else excess for size in quality.ALL_SIZES}
        return {"label": label, "seed": 0, "base": {"austen": 1.0}, "excess": {"austen": by_size}, "seconds": 1, **facts}

    results = {
        "a": result("paper", 1.0, steps=360, stop_step=100),
        "b": result("ours", 0.01, steps=360, stop_step=0),
        "c": result("ours, 72 steps", 0.02, steps=72, stop_step=0),
        "d": result("ours, 144 steps", math.nan, error="the loss is not finite"),
    }

    def runs(setting: Any, seeds: int, ablation: bool, price: bool, finished: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for key, each in results.items():
            finished[key] = each
            yield each

    monkeypatch.setattr(quality, "runs", runs)
    file, picture = tmp_path / "runs.json", tmp_path / "price.png"
    monkeypatch.setattr(sys, "argv", ["quality.py", "--quick", "--check", "--price", "--plot", str(picture), "--json", str(file)])
    assert quality.main() == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(file.read_text()).keys() == quality.read_runs(file).keys() == results.keys()


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error of a call, which must measure nothing."""
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    monkeypatch.setattr(quality, "runs", lambda *args: pytest.fail("a run was started"))
    with pytest.raises(SystemExit) as exit_:
        quality.main()
    assert exit_.value.code == 2
    return capsys.readouterr().err
