"""The benchmarks of serving and streaming refuse arguments that they cannot honor before they prepare a model."""

import sys

import pytest

from tests.benchmarks import serve, start, streaming


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (serve, ["--overload", "--artifact", "missing"], "--artifact is missing, which is not the folder of an artifact"),
        (serve, ["--prefill"], "--prefill, --wide and --compiled need --engine vllm"),
        (start, ["--artifact", "missing"], "--artifact is missing, which is not the folder of an artifact"),
        (streaming, ["--size-gb", "0.01"], "--size-gb is 0.01; it must be at least 0.12, for 2 blocks"),
        (streaming, ["--size-gb", "-1"], "'-1' is not allowed; give a number above 0"),
        (streaming, ["--limit-gb", "nan"], "'nan' is not allowed; give a number above 0"),
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
