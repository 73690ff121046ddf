"""Answers that were computed in two ways, alone and in a batch or whole and in pieces, and must be the same.

The last bits of a logit depend on the way and on the CPU. Where two tokens are equally likely within `TIE`, either may be chosen, and
what follows is another text. So answers are compared by what the model says of each token, up to the first one that was open.
"""

from bisect import bisect_right
from itertools import takewhile
from typing import Any

import pytest
from torch import Tensor

TIE = 1e-3  # nats; the errors of float32 are below 1e-4 here


def assert_says(answer: dict[str, Any], text: str) -> None:
    """`text` is this greedy answer, which was asked for with `logprobs` of at least 2, up to a near tie."""
    (choice,) = answer["choices"]
    if choice["text"] == text:
        return
    at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(choice["text"], text, strict=False)))
    told = choice["logprobs"]
    assert at < len(choice["text"]), f"{text!r} goes on after {choice['text']!r}"
    top = told["top_logprobs"][bisect_right(told["text_offset"], at) - 1]
    best, second = sorted(top.values(), reverse=True)[:2]
    assert best - second < TIE, f"{text!r} leaves {choice['text']!r} at character {at}, where the model is sure: {top}"


def assert_writes(logits_TV: Tensor, ids: list[int], others: list[int], start: int) -> None:
    """Two greedy continuations of `ids[:start]` are the same up to a near tie in the logits that the model has for `ids`."""
    for at in range(start, len(ids)):
        if ids[at] != others[at]:
            best, second = logits_TV[at - 1].topk(2).values.tolist()
            assert best - second < TIE, f"token {at} is {ids[at]} and {others[at]}, where the model is sure by {best - second:.3g}"
            return


def assert_as_far(values: dict[str, float], expected: dict[str, float], rel: float, tokens: int) -> None:
    """Two divergences agree; the tokens whose first choice is the base's may differ by two, which are near ties."""
    key = "same_top_share"
    assert values[key] == pytest.approx(expected[key], abs=2.5 / tokens)
    assert {**values, key: 0} == pytest.approx({**expected, key: 0}, rel=rel, abs=1e-9)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two choices, asked for with `logprobs`, have the same text. Fails where the model says different things of the same text."""
    ours, theirs = one["logprobs"], other["logprobs"]
    for i, (token, its) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=False)):
        tops = [sorted(told["top_logprobs"][i].values()) for told in (ours, theirs)]
        assert tops[0] == pytest.approx(tops[1], abs=TIE), f"token {i} after {one['text']!r} and {other['text']!r}"
        if token != its:
            return False
    return bool(one["text"] == other["text"])
