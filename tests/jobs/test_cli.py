"""The shared command line of all jobs: old option names, argument types, exit codes."""

import argparse
import importlib
from collections.abc import Callable

import pytest
from acip_platform import cli

from acip.errors import AcipError
from acip.renamed import OPTIONS

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # raised by the import of Ray

JOBS = ("arena", "calibrate_all", "evaluate", "finetune", "import_published", "materialize", "promote", "report", "serve", "sweep")


def parse(*names: str, argv: list[str], **options: object) -> argparse.Namespace:
    parser = cli.parser("A job.")
    for name in names:
        parser.add_argument(name, **options)  # type: ignore[arg-type]
    return cli.parse(parser, argv)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_has_a_main_function_with_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = importlib.import_module(f"jobs.{name}")
    with pytest.raises(SystemExit) as caught:
        job.main(["--help"])
    assert caught.value.code == 0
    assert "Exit codes: 0 " in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        job.main(["--no-such-option"])
    assert caught.value.code == cli.REFUSED


# ---- old option names


@pytest.mark.parametrize("old", sorted(OPTIONS))
def test_an_old_option_works_and_names_the_new_one(old: str) -> None:
    new = OPTIONS[old]
    with pytest.warns(FutureWarning, match=rf"{old} is now called {new};"):
        args = parse("--size", "--other", new, argv=["--other", "x", *old.split(), *([] if " " in old else ["0.5"])], nargs="?", const="on")
    assert getattr(args, new.removeprefix("--").replace("-", "_")) == ("on" if " " in old else "0.5")
    assert args.other == "x" and args.size is None


@pytest.mark.parametrize(
    ("argv", "new", "value"),
    [(["--distill=0.5"], "--distill-weight", "0.5"), (["--size=any"], "--all-sizes", "on")],
)
def test_an_old_option_accepts_an_equals_sign(argv: list[str], new: str, value: str) -> None:
    with pytest.warns(FutureWarning, match=f"is now called {new};"):
        args = parse("--size", new, argv=argv, nargs="?", const="on")
    assert getattr(args, new.removeprefix("--").replace("-", "_")) == value


def test_other_arguments_are_not_renamed() -> None:
    parser = cli.parser("A job.")
    parser.add_argument("--size")
    parser.add_argument("--quantize")
    for argv in (["--size", "any"], ["--size", "0.5", "--", "--quantise"], ["--back"], ["--quantise-all"]):
        assert cli.current_options(parser, argv) == argv


@pytest.mark.parametrize(
    ("job", "argv", "options"),
    [
        ("promote", ["small", "--back"], {"rollback": True}),
        ("evaluate", ["--base", "x", "--data", "y", "--whole"], {"all_documents": True}),
        ("evaluate", ["--model", "x", "--quantise", "nf4", "int8"], {"quantize": ["nf4", "int8"]}),
        ("finetune", ["x", "--size", "0.5", "--recompute", "--distill", "0.5"], {"gradient_checkpointing": True, "distill_weight": 0.5}),
        ("finetune", ["x", "--size", "0.5", "--quantise", "nf4"], {"quantize": "nf4"}),
        ("materialize", ["x", "--size", "any", "--out", "y"], {"all_sizes": True, "size": None}),
        ("materialize", ["x", "--size", "0.5", "--quantise", "int8", "--out", "y"], {"quantize": "int8"}),
    ],
)
def test_jobs_accept_their_old_options(job: str, argv: list[str], options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Old options reach `run` under their new names."""
    module, calls = importlib.import_module(f"jobs.{job}"), list[argparse.Namespace]()
    monkeypatch.setattr(module, "run", lambda args, *_: calls.append(args))
    with pytest.warns(FutureWarning, match="is now called"):
        assert module.main(argv) == 0
    assert vars(calls[0]).items() >= options.items()


# ---- argument types


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (cli.whole_number(1), "3", 3),
        (cli.whole_number(0), "0", 0),
        (cli.whole_number(1, 65535), "65535", 65535),
        (cli.positive_number, "1e-4", 1e-4),
        (cli.number_from_zero, "0", 0.0),
        (cli.ratio, "0.6", 0.6),
        (cli.ratio, "60%", 0.6),
        (cli.node_pool, "2xGPU:1,CPU:14", [{"GPU": 1.0, "CPU": 14.0}] * 2),
    ],
)
def test_argument_types(kind: Callable[[str], object], text: str, value: object) -> None:
    assert parse("--x", argv=["--x", text], type=kind).x == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (cli.whole_number(1), "0", "'0' is not allowed; give a whole number of at least 1."),
        (cli.whole_number(1), "1.5", "whole number"),
        (cli.whole_number(1, 65535), "65536", "from 1 to 65535"),
        (cli.positive_number, "0", "a number above 0"),
        (cli.positive_number, "inf", "a number above 0"),
        (cli.positive_number, "nan", "a number above 0"),
        (cli.number_from_zero, "-1", "at least 0"),
        (cli.ratio, "half", "is not a budget"),
        (cli.ratio, "8GB", "is not a size ratio"),
        (cli.ratio, "1.5", "size ratio is 1.5"),
        (cli.node_pool, "many", "8xGPU:1,CPU:14"),
        (cli.node_pool, "2xTPU:1", "8xGPU:1,CPU:14"),
    ],
)
def test_values_out_of_range_are_refused(
    kind: Callable[[str], object], text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--x", argv=[f"--x={text}"], type=kind)
    assert caught.value.code == cli.REFUSED
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["evaluate", "--base", ""], ["materialize", "x", "--size", "0.5", "--out="], ["promote", "small", ""]])
def test_empty_arguments_of_jobs_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """They come from variables that are not set: a base model "" is none, a folder "" the current one, a version "" no choice."""
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"jobs.{argv[0]}").main(argv[1:])
    assert caught.value.code == cli.REFUSED
    assert "an argument is empty (" in capsys.readouterr().err


def test_an_unknown_name_is_refused() -> None:
    cli.check_only(None, ["small"], "fleet")
    cli.check_only(["small"], ["small"], "fleet")
    with pytest.raises(AcipError, match=r"--only names 'smal' \(did you mean 'small'\?\); the fleet has small, large\."):
        cli.check_only(["small", "smal"], ["small", "large"], "fleet")


# ---- exit codes


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 0, 0, ""),
        (lambda: cli.FAILED, 1, ""),
        (raising(AcipError("lr is -1.")), 2, "error: lr is -1.\n"),
        (raising(FileNotFoundError(2, "No such file", "x.yaml")), 2, "error: [Errno 2] No such file: 'x.yaml'\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted."),
    ],
)
def test_exit_codes(
    work: Callable[[], int | None], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.shutdown", lambda: print("Ray has ended"))
    assert cli.exit_code(work) == code
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and (printed.err == "") == (message == "")
    assert printed.out == "Ray has ended\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.exit_code(raising(ZeroDivisionError()))
