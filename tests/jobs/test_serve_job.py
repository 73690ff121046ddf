"""`python jobs/serve.py` refuses invalid input with exit code 2 before it starts."""

import importlib.util
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Tracking

from tests.support.server import JOB

# raised by the import of Ray
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")


@pytest.fixture
def job() -> Iterator[ModuleType]:
    """Return the job as a module, and restore the signal handlers that it replaces."""
    spec = importlib.util.spec_from_file_location("serve_job", JOB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("args", "keys", "message"),
    [
        (["--host", "0.0.0.0"], "", "'0.0.0.0'; without API keys only a loopback address (127.0.0.1) is allowed"),
        (["--port", "70000"], "", "argument --port: '70000' is not allowed; give a whole number from 1 to 65535."),
        (["--port", "0"], "", "argument --port: '0' is not allowed; give a whole number from 1 to 65535."),
        ([], "short", "ACIP_API_KEYS: key 1 has 5 characters; a key has at least 16"),
    ],
)
def test_invalid_arguments_are_refused(
    job: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], keys: str, message: str
) -> None:
    monkeypatch.setenv("ACIP_API_KEYS", keys)
    with pytest.raises(SystemExit) as caught:
        job.main(args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing registered", "nothing to serve. Calibrate some with `python jobs/calibrate_all.py`"),
        ("unknown model", "no model 'smal' in the registry (did you mean 'small'?)"),
        ("unknown alias", "has no version or alias 'winner'"),
        ("unused alias", "has the alias 'winner': there is nothing to serve. Choose another --alias (small has champion"),
        ("two versions", "small is requested at versions 1 and 2; choose one."),
        ("a bad setting", "ACIP_LEASE_S is 'soon'; it must be a number of seconds above 0."),
        ("artifact gone", "where there is no artifact. Was it moved or deleted?"),
        ("port taken", "Address already in use). Stop the program that uses the port, or choose another --port"),
    ],
)
def test_the_error_states_why_a_model_cannot_be_served(
    job: ModuleType,
    served_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
    message: str,
) -> None:
    monkeypatch.setenv("ACIP_HOME", str(tmp_path if case in ("nothing registered", "two versions") else served_home))
    args = {
        "unknown model": ["--model", "smal"],
        "unknown alias": ["--model", "small", "--alias", "winner"],
        "unused alias": ["--alias", "winner"],
        "two versions": ["--model", "small@1", "--model", "small@2"],
    }.get(case, [])
    if case == "a bad setting":
        monkeypatch.setenv("ACIP_LEASE_S", "soon")
    if case == "two versions":
        for uri in ("a", "b"):
            Registry(Settings.from_env()).register("small", uri, "", {})
    if case == "artifact gone":
        registry = Registry(Settings.from_env())
        version = registry.register("lost", str(tmp_path / "lost"), Tracking(Settings.from_env(), "test").start("lost", "g", {}).run_id, {})
        registry.set_alias(version, "lost")
        args = ["--model", "lost", "--alias", "lost"]
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        assert job.main(["--port", str(occupied.getsockname()[1]), *args]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert message in output
