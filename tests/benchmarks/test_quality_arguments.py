"""The quality benchmark refuses arguments that it cannot honor before it measures anything."""

import sys
from pathlib import Path

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


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error of a call, which must measure nothing."""
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    monkeypatch.setattr(quality, "runs", lambda *args: pytest.fail("a run was started"))
    with pytest.raises(SystemExit) as exit_:
        quality.main()
    assert exit_.value.code == 2
    return capsys.readouterr().err
