"""Comparisons of two computations of the same answer, for example alone and in a batch, or whole and in pieces.

The last bits of a logit depend on the order of computation and on the CPU. If two tokens are equally likely within `TIE`, either may be
chosen, and the text after it differs. These functions therefore compare the model's log-probabilities up to the first near tie.
"""

from bisect import bisect_right
from itertools import takewhile
from typing import Any

import pytest
from torch import Tensor

TIE = 1e-3  # nats; the errors of float32 are below 1e-4 here


def assert_greedy_text(answer: dict[str, Any], text: str) -> None:
    """Assert that `text` equals a greedy answer up to a near tie. The answer needs `logprobs` of at least 2."""
    (choice,) = answer["choices"]
    if choice["text"] == text:
        return
    at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(choice["text"], text, strict=False)))
    logprobs = choice["logprobs"]
    assert at < len(choice["text"]), f"{text!r} continues after {choice['text']!r}"
    top = logprobs["top_logprobs"][bisect_right(logprobs["text_offset"], at) - 1]
    best, second = sorted(top.values(), reverse=True)[:2]
    assert best - second < TIE, f"{text!r} differs from {choice['text']!r} at character {at}, which is not a near tie: {top}"


def assert_greedy_ids(logits_TV: Tensor, ids: list[int], others: list[int], start: int) -> None:
    """Assert that two greedy continuations of `ids[:start]` are equal up to a near tie in the model's logits for `ids`."""
    for at in range(start, len(ids)):
        if ids[at] != others[at]:
            best, second = logits_TV[at - 1].topk(2).values.tolist()
            assert best - second < TIE, f"token {at} is {ids[at]} and {others[at]}, but their logits differ by {best - second:.3g}"
            return


def assert_close_divergence(values: dict[str, float], expected: dict[str, float], rel: float, tokens: int) -> None:
    """Assert that two divergences agree. The number of tokens with the base's first choice may differ by two, for near ties."""
    shares = {"same_top_share": 0.0, "same_top_share_stderr": 0.0}
    for key in shares.keys() & expected.keys():
        assert values[key] == pytest.approx(expected[key], abs=2.5 / tokens)
    assert {**values, **shares} == pytest.approx({**expected, **shares}, rel=rel, abs=1e-7)


def same_text(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two choices with `logprobs` have the same text. Fail if the log-probabilities of an equal prefix differ."""
    for i, (token, other) in enumerate(zip(first["logprobs"]["tokens"], second["logprobs"]["tokens"], strict=False)):
        tops = [sorted(choice["logprobs"]["top_logprobs"][i].values()) for choice in (first, second)]
        assert tops[0] == pytest.approx(tops[1], abs=TIE), f"token {i} after {first['text']!r} and {second['text']!r}"
        if token != other:
            return False
    return bool(first["text"] == second["text"])
