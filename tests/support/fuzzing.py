"""Fuzzing: any input from outside ends in a correct result or in one of acip's own errors, in bounded time.

    @fuzz(st.text())                     like hypothesis' @given; `share` reduces the number of cases for slow tests
    def test_budgets(text): ...

Profiles: quick (the same cases every time) is the default. `infra/test --all` uses thorough (`pytest --hypothesis-profile thorough`).
Passed cases are counted, and the end of the run prints the count.
"""

import functools
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES: Counter[str] = Counter()  # passed cases, by test
LIMIT_S = 300.0  # per case: the longest takes a second on an idle machine, but two cores may be shared

settings.register_profile("quick", max_examples=100, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=600, print_blob=True)


def fuzz(*strategies: Any, share: float = 1.0, **named: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a test that runs with drawn arguments. Each case has a limit of `LIMIT_S` and is counted if it passes."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def case(*args: Any, **kwargs: Any) -> None:
            with time_limit():
                test(*args, **kwargs)
            CASES[f"{test.__module__}.{test.__name__}"] += 1

        cases = max(10, round(settings().max_examples * share))
        fuzz_settings = settings(
            max_examples=cases, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        )
        fuzzed: Callable[..., None] = fuzz_settings(given(*strategies, **named)(case))
        return fuzzed

    return decorate


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise an AssertionError after `LIMIT_S`, and again at the end if the code inside swallowed it."""
    expired = False

    def on_alarm(_signal: int, _frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise AssertionError(f"the case still ran after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not expired, f"the case still ran after {LIMIT_S} s"


# ---- values for files and request bodies

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308, -1e-308])
WORDS = st.text(max_size=12) | st.sampled_from(
    ["", "../../etc/passwd", "/etc/passwd", "..", "a/b", "\0", "\n", "'", '"; --', "\ud800", "%s{}", "a" * 5000, "٣", "-", "~", "s3://x"]
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested dicts and lists."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(inner, (*path, key))


@st.composite
def harmed(draw: st.DrawFn, whole: Any, anything: st.SearchStrategy[Any] = JSON, most: int = 3) -> Any:
    """Draw a copy of `whole`, which is nested dicts and lists, with up to `most` values replaced or removed, or keys added."""
    changed = _copy(whole)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(sorted(paths(changed), key=repr)))
        if not path:
            if draw(st.integers(0, 9)) == 0:  # replace the root in few cases, because nothing of the original remains
                changed = draw(anything)
            continue
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        change = draw(st.integers(0, 9))
        if change == 0:
            del inner[path[-1]]
        elif change == 1 and isinstance(inner, dict):
            inner[draw(WORDS)] = draw(anything)
        else:
            inner[path[-1]] = draw(anything)
    return changed


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
