"""The next token, and text as it grows."""

from collections import Counter
from typing import Any

import pytest
import torch
from acip_platform.serve.engine.sampling import Sampler, SamplingParams, sample
from acip_platform.serve.text.detokenizer import Detokenizer

from tests.conftest import byte_tokenizer

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])


def drawn(count: int = 4000, **settings: Any) -> list[float]:
    """Shares of the tokens in `count` draws."""
    sampler = Sampler(SamplingParams(**settings), seed=1)
    counts = Counter(sample(PROBABILITIES.log()[None], [sampler])[0].token for _ in range(count))
    return [counts[token] / count for token in range(len(PROBABILITIES))]


def test_tokens_come_as_often_as_they_are_likely() -> None:
    assert drawn() == pytest.approx(PROBABILITIES.tolist(), abs=0.03)
    hot = (PROBABILITIES.log() / 2).softmax(0)
    assert drawn(temperature=2.0) == pytest.approx(hot.tolist(), abs=0.03)


def test_top_p_keeps_the_fewest_tokens_that_make_it_and_top_k_so_many() -> None:
    assert drawn(top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=0.03)
    assert drawn(top_p=0.5) == [1, 0, 0, 0, 0]
    assert drawn(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=0.03)
    assert drawn(top_p=1e-6, temperature=2.0) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
def test_top_p_over_a_large_vocabulary_is_exact(top_p: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 5000)
    probabilities, order = logits[0].softmax(0).sort(descending=True)
    allowed = set(order[: int((probabilities.cumsum(0) - probabilities < top_p).sum())].tolist())
    sampler = Sampler(SamplingParams(top_p=top_p), seed=2)
    seen = {sample(logits, [sampler])[0].token for _ in range(400)}
    assert seen <= allowed
    assert len(seen) > min(len(allowed), 40) / 2


def test_what_others_do_changes_nothing() -> None:
    def chosen(*others: Sampler) -> list[int]:
        torch.manual_seed(3)
        mine = Sampler(SamplingParams(temperature=1.3), seed=7)
        return [sample(torch.randn(8, 50)[: 1 + len(others)], [mine, *others])[0].token for _ in range(20)]

    others = (SamplingParams(temperature=0), SamplingParams(top_p=0.3), SamplingParams(frequency_penalty=2.0))
    assert chosen() == chosen(*(Sampler(params, seed) for seed, params in enumerate(others)))


def test_penalties_count_what_was_generated() -> None:
    greedy = Sampler(SamplingParams(temperature=0, presence_penalty=1.0, frequency_penalty=0.5))
    tokens = [sample(PROBABILITIES.log()[None].clone(), [greedy])[0].token for _ in range(4)]
    scores, expected = PROBABILITIES.log().tolist(), []
    seen: Counter[int] = Counter()
    for _ in range(4):
        best = max(range(5), key=lambda token: scores[token] - (token in seen) * 1.0 - 0.5 * seen[token])
        expected.append(best)
        seen[best] += 1
    assert tokens == expected
    assert len(set(tokens)) > 1


def said(text: str, *stops: str, prompt: str = "") -> tuple[list[str], bool]:
    """What is said after each byte of `text`, and at the end."""
    growing = Detokenizer(byte_tokenizer(), list(prompt.encode()), stops)
    pieces = []
    for byte in text.encode():
        pieces.append(growing.add(byte))
        if growing.stopped:
            break
    return [*pieces, growing.end()], growing.stopped


def test_characters_are_said_whole() -> None:
    pieces, _ = said("añ€🙂b")
    assert [piece for piece in pieces if piece] == ["a", "ñ", "€", "🙂", "b"]


def test_half_a_character_at_the_end_is_said_at_last() -> None:
    growing = Detokenizer(byte_tokenizer(), [], [])
    assert [growing.add(byte) for byte in "ab€".encode()[:-1]] == ["a", "b", "", ""]
    assert growing.end() == "�"


def test_what_may_become_a_stop_text_waits() -> None:
    pieces, stopped = said("one STONE STOP two", "STOP", "TOAD")
    assert stopped
    assert "".join(pieces) == "one STONE "
    assert "ST" not in pieces, "held back until it was no stop text"
    pieces, stopped = said("ends with STO", "STOP")
    assert not stopped and "".join(pieces) == "ends with STO"


def test_the_first_of_two_stop_texts_counts() -> None:
    assert "".join(said("a, b. c", ". ", ", ")[0]) == "a"
