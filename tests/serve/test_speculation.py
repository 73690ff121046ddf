"""Speculative decoding: drafts of a small size change the speed of an answer, but not its tokens."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from acip_platform.serve.engine.engine import Engine
from acip_platform.serve.engine.events import RequestDone, RequestFailed, SequenceEnded, TokenSampled
from acip_platform.serve.engine.request import GenerationRequest
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import SampledToken, Sampler, SamplingParams
from acip_platform.serve.engine.speculation import DRAFTS, MAX_SEQUENCES, RETRY_STEPS, Speculation
from transformers import AutoModelForCausalLM

from acip.artifact.artifact import Artifact
from acip.layers.mixed_sizes import Size
from acip.sizing.budget import Budget
from tests.support.near_ties import TIE
from tests.support.waiting import until

DRAFTED = 3  # tokens in each step of `Always`
NO_END: frozenset[int] = frozenset()
TEXT = b"It was a bright cold day in April, and the clocks were striking thirteen. " * 12


class Always(Speculation):
    """Drafts in every step that allows it."""

    def count(self, size: Size, sequences: int, most: int) -> int:
        return min(DRAFTED, most)


def load_model(artifact: Artifact) -> ResidentModel:
    version: Any = SimpleNamespace(name="small", version="7", uri="here")
    return ResidentModel(version, artifact)


@pytest.fixture(scope="module")
def model(small_artifact: Artifact) -> ResidentModel:
    return load_model(small_artifact)


@pytest.fixture(scope="module")
def coded(coded_artifact: Artifact) -> ResidentModel:
    return load_model(coded_artifact)


@pytest.fixture(scope="module")
def engine(model: ResidentModel, coded: ResidentModel) -> Iterator[Engine]:
    engine = Engine()
    engine.add(model)
    engine.add(coded)
    yield engine
    engine.close()


def drafting(model: ResidentModel, draft: str) -> None:
    """Make `model` draft in every step, with integers or with a size in ranks."""
    batch: Any = model.batch
    if draft == "integers":
        assert model.weights.draft() is not None or model.weights.load_draft()
        size = model.weights.draft()
        assert size is not None
    else:
        cut = model.cut(Budget(ratio=float(draft)))
        size = Size(cut.key, cut.ranks, cut.versions)
    batch.draft = lambda: size
    batch.speculation = Always(size)


def generate(engine: Engine, model: ResidentModel, request: GenerationRequest) -> tuple[list[list[SampledToken]], RequestDone]:
    """Return (the tokens of each sequence, the last event)."""
    tokens: list[list[SampledToken]] = [[] for _ in range(len(request.prompts) * request.choices)]
    for event in engine.events(model, request):
        assert not isinstance(event, RequestFailed), event
        if isinstance(event, TokenSampled):
            tokens[event.index].append(event.token)
    assert isinstance(event, RequestDone)
    return tokens, event


def prompts(count: int, generator: torch.Generator) -> list[list[int]]:
    """Return pieces of text of 5 to 40 tokens."""
    starts = torch.randint(len(TEXT) - 40, (count,), generator=generator).tolist()
    lengths = torch.randint(5, 41, (count,), generator=generator).tolist()
    return [list(TEXT[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def assert_same_tokens(plain: list[SampledToken], other: list[SampledToken]) -> None:
    """Assert that greedy tokens are equal up to a near tie of the two most likely ones."""
    for token, drafted in zip(plain, other, strict=True):
        if token.token != drafted.token:
            assert token.top[0][1] - token.top[1][1] < TIE
            return


@pytest.mark.parametrize(("kind", "draft", "size"), [
    ("ranks", "integers", Budget(ratio=1.0)), ("ranks", "0.4", Budget(ratio=1.0)), ("ranks", "0.4", Budget(ratio=0.7)),
    ("codes", "integers", Budget(ratio=1.0, convention="bytes")), ("codes", "integers", Budget(ratio=0.4, convention="bytes")),
])  # fmt: skip
def test_greedy_tokens_are_those_of_plain_decoding(
    engine: Engine, model: ResidentModel, coded: ResidentModel, kind: str, draft: str, size: Budget
) -> None:
    served = model if kind == "ranks" else coded
    drafting(served, draft)
    generator, drafted, accepted = torch.Generator().manual_seed(0), 0, 0
    texts = prompts(200, generator)
    for batch in (texts[i : i + 8] for i in range(0, 200, 8)):
        fields: dict[str, Any] = {"max_tokens": 20, "sampling": SamplingParams(temperature=0.0, logprobs=2), "end_tokens": NO_END}
        plain, without = generate(engine, served, GenerationRequest(batch, size, speculative=False, **fields))
        tokens, done = generate(engine, served, GenerationRequest(batch, size, **fields))
        for pair in zip(plain, tokens, strict=True):
            assert_same_tokens(*pair)
        assert without.drafted_tokens == 0
        assert done.accepted_tokens == sum(token.drafted for sequence in tokens for token in sequence)
        drafted, accepted = drafted + done.drafted_tokens, accepted + done.accepted_tokens
    assert 0 < accepted < drafted


SETTINGS: dict[str, dict[str, Any]] = {
    "seed": {"sampling": SamplingParams(temperature=1.0)},
    "top_p": {"sampling": SamplingParams(temperature=0.8, top_p=0.9)},
    "top_k": {"sampling": SamplingParams(temperature=1.3, top_k=5)},
    "penalties": {"sampling": SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.7)},
    "bias": {"sampling": SamplingParams(temperature=1.0, logit_bias={101: 4.0, 32: -100.0})},
}


@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_sampled_tokens_are_those_of_plain_decoding(engine: Engine, model: ResidentModel, setting: str) -> None:
    drafting(model, "0.7")
    fields: dict[str, Any] = {"choices": 16, "max_tokens": 24, "seed": 11, "end_tokens": NO_END, **SETTINGS[setting]}
    plain, _ = generate(engine, model, GenerationRequest([list(TEXT[:30])], speculative=False, **fields))
    tokens, done = generate(engine, model, GenerationRequest([list(TEXT[:30])], **fields))
    same = sum([token.token for token in first] == [token.token for token in second] for first, second in zip(plain, tokens, strict=True))
    assert same >= 15, "one may differ by a near tie"
    assert done.accepted_tokens > 0


class Letters:
    """A constraint that allows a given number of capital letters."""

    error = None

    def __init__(self, count: int) -> None:
        self.left = count

    @property
    def done(self) -> bool:
        return self.left == 0

    def limit(self, logits_V: torch.Tensor) -> None:
        logits_V[: ord("A")] = -math.inf
        logits_V[ord("Z") + 1 :] = -math.inf

    def take(self, token: int) -> None:
        self.left -= 1


def test_constraints_and_ends_hold_within_a_step(engine: Engine, model: ResidentModel) -> None:
    drafting(model, "integers")
    request = GenerationRequest([list(TEXT[:30])], max_tokens=40, end_tokens=NO_END, sampling=SamplingParams(temperature=0.0))
    usual, _ = generate(engine, model, request)
    ids = [token.token for token in usual[0]]
    for length in range(1, 8):
        tokens, _ = generate(engine, model, GenerationRequest(
            request.prompts, max_tokens=length, end_tokens=NO_END, sampling=request.sampling
        ))  # fmt: skip
        assert [token.token for token in tokens[0]] == ids[:length]
    end = ids[10]
    stopped, done = generate(engine, model, GenerationRequest(
        request.prompts, max_tokens=40, end_tokens=frozenset({end}), sampling=request.sampling
    ))  # fmt: skip
    assert [token.token for token in stopped[0]] == ids[: ids.index(end)] and done.completion_tokens == ids.index(end) + 1
    letters, _ = generate(engine, model, GenerationRequest(
        request.prompts, max_tokens=40, end_tokens=NO_END, sampling=request.sampling, constraint=lambda: Letters(9)
    ))  # fmt: skip
    assert len(letters[0]) == 9 and all(ord("A") <= token.token <= ord("Z") for token in letters[0])


def test_sequences_that_begin_and_end_at_other_times_keep_their_tokens(engine: Engine, model: ResidentModel) -> None:
    drafting(model, "integers")
    fields: dict[str, Any] = {"sampling": SamplingParams(temperature=0.0, logprobs=2), "end_tokens": NO_END}
    lengths = (5, 40, 17, 33, 9, 26)
    requests = [GenerationRequest([list(TEXT[i : i + 10 + 30 * i])], max_tokens=n, **fields) for i, n in enumerate(lengths)]
    alone = [generate(engine, model, request)[0][0] for request in requests]
    received: list[list[Any]] = [[] for _ in requests]
    for events, request in zip(received, requests, strict=True):
        engine.submit(model, request, events.extend)
    until(lambda: engine.open == 0, "the requests do not end")
    for events, expected in zip(received, alone, strict=True):
        assert_same_tokens(expected, [event.token for event in events if isinstance(event, TokenSampled)])
        assert SequenceEnded(0, "length") in events


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected).square() / expected).sum())


def test_sampled_tokens_have_the_probabilities_of_the_requested_size(engine: Engine, model: ResidentModel, small_base: str) -> None:
    """The first token, and the second one, which is drafted and verified, against exact probabilities: chi-square of 64 cells."""
    drafting(model, "0.4")
    letters = torch.tensor(list(b"aeinorst"))
    prompt = list(TEXT[:20])
    sampling = SamplingParams(temperature=1.0, logit_bias={int(letter): 60.0 for letter in letters})  # no other token is ever sampled
    counts = torch.zeros(8, 8)
    place = {int(letter): i for i, letter in enumerate(letters)}
    for seed in range(0, 1600, 32):
        tokens, _ = generate(engine, model, GenerationRequest(
            [[*prompt, int(letters[0])]], choices=32, max_tokens=5, seed=seed, sampling=sampling, end_tokens=NO_END
        ))  # fmt: skip
        for sequence in tokens:
            counts[place[sequence[0].token], place[sequence[1].token]] += 1

    def exact(model: Any) -> torch.Tensor:
        rows = [[*prompt, int(letters[0]), int(letter)] for letter in letters]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(rows)).logits[:, -2:, letters].float()
        return logits[:1, 0].softmax(-1).T * logits[:, 1].softmax(-1)

    base = AutoModelForCausalLM.from_pretrained(small_base).eval()
    assert chi_square(counts, exact(base)) < 130, "63 degrees of freedom: a larger value has a probability of 1e-6"
    small = model.artifact.load()
    small.resize(0.4)
    assert chi_square(counts, exact(small.materialize())) > 200, "the test must be able to see a difference"


def test_drafts_share_random_numbers_with_the_tokens() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0), seed=5)
    first = sampler.noise(1000, torch.device("cpu"))
    copy = sampler.for_drafts()
    assert torch.equal(copy.noise(1000, torch.device("cpu")), first)
    copy.position += 1
    assert not torch.equal(copy.noise(1000, torch.device("cpu")), first) and sampler.position == 0


# ---- the decision


def decided(
    speculation: Speculation, size: Size, plain: float, draft: float, right: float, steps: int, sequences: int = 1, most: int = 99
) -> list[int]:
    """Return how many tokens were drafted in each of `steps` steps, if passes take these times. A row more in a pass is free."""
    counts = []
    total = 0.0
    for _ in range(steps):
        count = speculation.count(size, sequences, most)
        correct = 0
        while correct < count and (total := total + right) >= 1:
            total -= 1
            correct += 1
        total %= 1
        speculation.measured(size, sequences, count, [correct] * sequences, draft * count, plain)
        counts.append(count)
    return counts


SIZE, DRAFT = Size((0, 0), {}), Size((2, 0), {})


def test_drafts_are_made_where_they_are_faster() -> None:
    counts = decided(Speculation(DRAFT), SIZE, plain=1.0, draft=0.3, right=0.9, steps=400)
    assert sum(count > 1 for count in counts) > 350
    assert 0 in counts[-100:], "plain decoding is measured again"


@pytest.mark.parametrize(("draft", "right"), [(1.2, 0.95), (0.6, 0.3)], ids=["slow drafts", "wrong drafts"])
def test_drafts_that_do_not_pay_are_tried_rarely(draft: float, right: float) -> None:
    speculation = Speculation(DRAFT)
    counts = decided(speculation, SIZE, plain=1.0, draft=draft, right=right, steps=10 * RETRY_STEPS)
    later = counts[RETRY_STEPS:]
    assert sum(count > 0 for count in later) <= 12 and max(later) == DRAFTS[0]
    cost = sum(count * draft for count in later) / len(later)
    assert cost < 0.02, "of the time of plain decoding"


def test_drafts_are_not_made_by_the_size_itself_nor_for_many_sequences() -> None:
    speculation = Speculation(DRAFT)
    assert set(decided(speculation, DRAFT, 1.0, 0.1, 1.0, 50)) == {0}
    assert set(decided(speculation, SIZE, 1.0, 0.1, 1.0, 500, MAX_SEQUENCES + 1)) == {0}


def test_no_more_tokens_are_drafted_than_an_answer_may_have() -> None:
    assert set(decided(Speculation(DRAFT), SIZE, 1.0, 0.1, 1.0, 500, most=0)) == {0}
    assert max(decided(Speculation(DRAFT), SIZE, 1.0, 0.1, 1.0, 500, most=4)) == 3


# ---- the copies that draft


def test_copies_that_draft_are_made_in_the_background_and_leave_with_the_packed_ones(small_artifact: Artifact) -> None:
    served = load_model(small_artifact)
    engine = Engine()
    engine.add(served)
    try:
        request = GenerationRequest([list(TEXT[:9])], max_tokens=4, end_tokens=NO_END)
        generate(engine, served, GenerationRequest(request.prompts, max_tokens=4, end_tokens=NO_END, speculative=False))
        assert served.weights.draft() is None and served.drafts
        before = served.weights.packed_bytes
        generate(engine, served, request)
        until(lambda: served.weights.draft() is not None, "no copies are made")
        assert served.weights.packed_bytes > before
        served.weights.unpack()
        assert served.weights.draft() is None and not served.drafts and served.weights.packed_bytes == 0
        assert generate(engine, served, request)[1].drafted_tokens == 0
    finally:
        engine.close()
