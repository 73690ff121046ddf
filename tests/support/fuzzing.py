"""Fuzzing: what comes from outside may be anything, and ends in a correct result or in an error of ours, in bounded time.

    @fuzz(st.text())                     as hypothesis' @given; `share` of the profile's cases, where one case takes long
    def test_budgets(text): ...

Profiles: quick (the same cases every time) by default; thorough by `infra/test --all`, i.e. `pytest --hypothesis-profile thorough`.
How many cases there were is counted as they end, and said at the end of the run.
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

CASES: Counter[str] = Counter()  # that came to their end, by test
LIMIT_S = 30.0  # of one case: the longest takes a second on a quiet machine, but two cores may be shared

settings.register_profile("quick", max_examples=100, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=600, print_blob=True)


def fuzz(*strategies: Any, share: float = 1.0, **named: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with drawn arguments; each case has `LIMIT_S`, and is counted when it passed."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def case(*args: Any, **kwargs: Any) -> None:
            with bounded():
                test(*args, **kwargs)
            CASES[f"{test.__module__}.{test.__name__}"] += 1

        cases = max(10, round(settings().max_examples * share))
        unhurried = settings(
            max_examples=cases, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        )
        fuzzed: Callable[..., None] = unhurried(given(*strategies, **named)(case))
        return fuzzed

    return decorate


@contextmanager
def bounded() -> Iterator[None]:
    """An AssertionError after `LIMIT_S`, even where what runs would swallow it."""
    late = False

    def ring(_signal: int, _frame: FrameType | None) -> None:
        nonlocal late
        late = True
        raise AssertionError(f"not done after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not late, f"not done after {LIMIT_S} s"


# ---- what a file or a body may hold

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308, -1e-308])
WORDS = st.text(max_size=12) | st.sampled_from(
    ["", "../../etc/passwd", "/etc/passwd", "..", "a/b", "\0", "\n", "'", '"; --', "\ud800", "%s{}", "a" * 5000, "٣", "-", "~", "s3://x"]
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested dicts and lists."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def harmed(draw: st.DrawFn, whole: Any, anything: st.SearchStrategy[Any] = JSON, most: int = 3) -> Any:
    """A copy of `whole`, nested dicts and lists, with anything in one or some of its places, or keys that don't belong there."""
    changed = _copy(whole)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(sorted(places(changed), key=repr)))
        if not path:
            if draw(st.integers(0, 9)) == 0:  # the whole: seldom, as little is left then
                changed = draw(anything)
            continue
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        what = draw(st.integers(0, 9))
        if what == 0:
            del inner[path[-1]]
        elif what == 1 and isinstance(inner, dict):
            inner[draw(WORDS)] = draw(anything)
        else:
            inner[path[-1]] = draw(anything)
    return changed


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
