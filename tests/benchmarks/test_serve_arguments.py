"""The benchmarks of serving refuse arguments that they cannot honor before they prepare a model."""

import sys

import pytest

from tests.benchmarks import serve, start


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (serve, ["--overload", "--artifact", "missing"], "--artifact is missing, which is not the folder of an artifact"),
        (serve, ["--prefill"], "--prefill, --wide and --compiled need --engine vllm"),
        (start, ["--artifact", "missing"], "--artifact is missing, which is not the folder of an artifact"),
    ],
)
def test_arguments_that_cannot_be_honored_are_errors(
    script: object, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        script.main()  # type: ignore[attr-defined]
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
