"""Sampling of tokens, and incremental detokenization."""

from collections import Counter
from typing import Any

import pytest
import torch
from acip_platform.serve.engine.sampling import Sampler, SamplingParams, sample
from acip_platform.serve.text.detokenizer import Detokenizer

from tests.conftest import byte_tokenizer

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])


def token_shares(count: int = 4000, **settings: Any) -> list[float]:
    """Return the share of each token in `count` samples."""
    sampler = Sampler(SamplingParams(**settings), seed=1)
    counts = Counter(sample(PROBABILITIES.log()[None], [sampler])[0].token for _ in range(count))
    return [counts[token] / count for token in range(len(PROBABILITIES))]


def test_token_shares_match_the_probabilities() -> None:
    assert token_shares() == pytest.approx(PROBABILITIES.tolist(), abs=0.03)
    hot = (PROBABILITIES.log() / 2).softmax(0)
    assert token_shares(temperature=2.0) == pytest.approx(hot.tolist(), abs=0.03)


def test_top_p_and_top_k_keep_the_most_probable_tokens() -> None:
    assert token_shares(top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=0.03)
    assert token_shares(top_p=0.5) == [1, 0, 0, 0, 0]
    assert token_shares(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=0.03)
    assert token_shares(top_p=1e-6, temperature=2.0) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
def test_top_p_over_a_large_vocabulary_is_exact(top_p: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 5000)
    probabilities, order = logits[0].softmax(0).sort(descending=True)
    allowed = set(order[: int((probabilities.cumsum(0) - probabilities < top_p).sum())].tolist())
    sampler = Sampler(SamplingParams(top_p=top_p), seed=2)
    sampled = {sample(logits, [sampler])[0].token for _ in range(400)}
    assert sampled <= allowed
    assert len(sampled) > min(len(allowed), 40) / 2


def test_other_sequences_do_not_change_the_tokens() -> None:
    def chosen(*others: Sampler) -> list[int]:
        torch.manual_seed(3)
        sampler = Sampler(SamplingParams(temperature=1.3), seed=7)
        return [sample(torch.randn(8, 50)[: 1 + len(others)], [sampler, *others])[0].token for _ in range(20)]

    others = (SamplingParams(temperature=0), SamplingParams(top_p=0.3), SamplingParams(frequency_penalty=2.0))
    assert chosen() == chosen(*(Sampler(params, seed) for seed, params in enumerate(others)))


def test_penalties_count_generated_tokens() -> None:
    greedy = Sampler(SamplingParams(temperature=0, presence_penalty=1.0, frequency_penalty=0.5))
    tokens = [sample(PROBABILITIES.log()[None].clone(), [greedy])[0].token for _ in range(4)]
    scores, expected = PROBABILITIES.log().tolist(), []
    counts: Counter[int] = Counter()
    for _ in range(4):
        best = max(range(5), key=lambda token: scores[token] - (token in counts) * 1.0 - 0.5 * counts[token])
        expected.append(best)
        counts[best] += 1
    assert tokens == expected
    assert len(set(tokens)) > 1


def pieces_of(text: str, *stops: str, prompt: str = "") -> tuple[list[str], bool]:
    """Return (the text emitted after each byte of `text` and at the end, whether a stop text was found)."""
    detokenizer = Detokenizer(byte_tokenizer(), list(prompt.encode()), stops)
    pieces = []
    for byte in text.encode():
        pieces.append(detokenizer.add(byte))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.end()], detokenizer.stopped


def test_characters_are_emitted_whole() -> None:
    pieces, _ = pieces_of("añ€🙂b")
    assert [piece for piece in pieces if piece] == ["a", "ñ", "€", "🙂", "b"]


def test_incomplete_character_is_emitted_at_the_end() -> None:
    detokenizer = Detokenizer(byte_tokenizer(), [], [])
    assert [detokenizer.add(byte) for byte in "ab€".encode()[:-1]] == ["a", "b", "", ""]
    assert detokenizer.end() == "�"


def test_possible_stop_text_is_held_back() -> None:
    pieces, stopped = pieces_of("one STONE STOP two", "STOP", "TOAD")
    assert stopped
    assert "".join(pieces) == "one STONE "
    assert "ST" not in pieces, "the beginning of a stop text must be held back"
    pieces, stopped = pieces_of("ends with STO", "STOP")
    assert not stopped and "".join(pieces) == "ends with STO"


def test_first_of_two_stop_texts_ends_the_text() -> None:
    assert "".join(pieces_of("a, b. c", ". ", ", ")[0]) == "a"
