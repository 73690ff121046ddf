"""Wait in tests, with time limits that only end hanging tests and report the awaited condition.

The limits are long, so that a load of 20 on two cores does not fail a test.
"""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

PATIENCE_S = 600.0  # for a condition
JOB_S = 3000.0  # for a whole job: a calibration, a sweep, a fleet
T = TypeVar("T")


def until(condition: Callable[[], T | None], message: str | Callable[[], str], within_s: float = PATIENCE_S, every_s: float = 0.1) -> T:
    """Call `condition` until it returns a true value, and return that value. After `within_s`, fail with `message` or its result."""
    deadline = time.monotonic() + within_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            text = message if isinstance(message, str) else message()
            raise AssertionError(f"waited for {within_s:g} s: {text}")
        time.sleep(every_s)
    return result


def exit_code(process: "subprocess.Popen[Any]", log: Path, within_s: float = JOB_S) -> int:
    """Wait for the end of a process that writes `log`, and return its exit code."""
    try:
        return process.wait(within_s)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"waited for {within_s:g} s, and {process.args!r} still runs:\n{log.read_text()}") from error


def stop(process: "subprocess.Popen[Any]") -> None:
    """Terminate a process that may still run, and kill it if it does not end within a minute."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
