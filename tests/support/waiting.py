"""Waiting in tests: time limits only end what hangs, and say what was awaited. A load of 20 on two cores must not fail a test."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

PATIENCE_S = 600.0  # for a condition
JOB_S = 3000.0  # for a whole job: a calibration, a sweep, a fleet
T = TypeVar("T")


def until(look: Callable[[], T | None], otherwise: str | Callable[[], str], within_s: float = PATIENCE_S, every_s: float = 0.1) -> T:
    """Call `look` until it returns something true, and return that. Fails with `otherwise`, a message or what makes one."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        if time.monotonic() > deadline:
            said = otherwise if isinstance(otherwise, str) else otherwise()
            raise AssertionError(f"waited for {within_s:g} s: {said}")
        time.sleep(every_s)
    return found


def exit_code(process: "subprocess.Popen[Any]", log: Path, within_s: float = JOB_S) -> int:
    """Wait for the end of a process that writes `log`, and return its exit code."""
    try:
        return process.wait(within_s)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"waited for {within_s:g} s, and {process.args!r} still runs:\n{log.read_text()}") from error


def stop(process: "subprocess.Popen[Any]") -> None:
    """End a process that may have ended: ask it to, and kill it where it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
