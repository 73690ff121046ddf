"""Variables that MLflow reads are set for a block of code, in several threads at a time."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from acip_platform.tracking.registry import RETRY_LIMITS, environment, few_retries

from tests.support.waiting import PATIENCE_S

RETRIES, TIMEOUT = RETRY_LIMITS


def test_variables_are_set_in_the_block_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "before")
    monkeypatch.delenv("TWO", raising=False)
    with environment({"ONE": "1", "TWO": "2"}):
        assert (os.environ["ONE"], os.environ["TWO"]) == ("1", "2")
    assert os.environ["ONE"] == "before" and "TWO" not in os.environ
    with pytest.raises(KeyError), environment({"ONE": "1", "TWO": "2"}):
        raise KeyError
    assert os.environ["ONE"] == "before" and "TWO" not in os.environ


def test_limits_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RETRIES, "7")
    monkeypatch.delenv(TIMEOUT, raising=False)
    with few_retries():
        assert (os.environ[RETRIES], os.environ[TIMEOUT]) == ("7", RETRY_LIMITS[TIMEOUT])
    assert os.environ[RETRIES] == "7" and TIMEOUT not in os.environ


def test_the_last_of_several_threads_restores_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """None waits for another one. The first thread leaves while the second one is inside."""
    for name in RETRY_LIMITS:
        monkeypatch.delenv(name, raising=False)
    entered, left = threading.Event(), threading.Event()

    def second() -> dict[str, str | None]:
        with few_retries():
            entered.set()
            assert left.wait(PATIENCE_S)
            return {name: os.environ.get(name) for name in RETRY_LIMITS}

    with ThreadPoolExecutor(1) as pool:
        with few_retries():
            found = pool.submit(second)
            assert entered.wait(PATIENCE_S)
        left.set()
        assert found.result() == RETRY_LIMITS
    assert not any(name in os.environ for name in RETRY_LIMITS)
