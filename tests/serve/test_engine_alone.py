"""The engine as a library: token ids in, token events out, without HTTP, text or a server."""

import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from acip_platform.serve import engine as package
from acip_platform.serve.engine.engine import Engine
from acip_platform.serve.engine.errors import (
    ContextTooLongError,
    DeadlineExceededError,
    InvalidTokensError,
    ModelUnloadedError,
    NotFiniteError,
)
from acip_platform.serve.engine.events import (
    PromptScored,
    RequestDone,
    RequestFailed,
    RequestStarted,
    SequenceEnded,
    TokenEvent,
    TokenSampled,
)
from acip_platform.serve.engine.request import GenerationRequest
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import SampledToken, SamplingParams
from transformers import AutoModelForCausalLM

from acip.artifact.artifact import Artifact
from acip.errors import BudgetError
from acip.sizing.budget import Budget
from tests.support.waiting import PATIENCE_S, until

PROMPT = list(b"It was a bright cold day and ")
GREEDY = SamplingParams(temperature=0.0)
NO_END: frozenset[int] = frozenset()


def load_model(artifact: Artifact) -> ResidentModel:
    version: Any = SimpleNamespace(name="small", version="7", uri="here")
    return ResidentModel(version, artifact)


@pytest.fixture(scope="module")
def model(small_artifact: Artifact) -> ResidentModel:
    return load_model(small_artifact)


@pytest.fixture(scope="module")
def engine(model: ResidentModel) -> Iterator[Engine]:
    engine = Engine()
    engine.add(model)
    yield engine
    engine.close()


def greedy(*prompts: list[int], **fields: Any) -> GenerationRequest:
    return GenerationRequest(list(prompts) or [PROMPT], **{"max_tokens": 12, "sampling": GREEDY, "end_tokens": NO_END, **fields})


def generate(engine: Engine, model: ResidentModel, request: GenerationRequest) -> tuple[dict[int, list[int]], list[TokenEvent]]:
    """Return (the tokens of each sequence, all events)."""
    events = list(engine.events(model, request))
    tokens: dict[int, list[int]] = {i: [] for i in range(len(request.prompts) * request.choices)}
    for event in events:
        if isinstance(event, TokenSampled):
            tokens[event.index].append(event.token.token)
    return tokens, events


def reference_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return the greedy continuation by transformers."""
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return list(generated[0, len(prompt) :].tolist())


def test_engine_imports_no_server_packages() -> None:
    modules = [f"{package.__name__}.{file.stem}" for file in Path(package.__path__[0]).glob("*.py") if file.stem != "__init__"]
    absent = ("ray", "mlflow", "boto3", "fastapi", "starlette", "pydantic", "llguidance", "jsonschema", "uvicorn")
    code = (
        f"import sys, importlib; sys.modules.update(dict.fromkeys({absent!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "outside = [name for name in sys.modules if name.startswith('acip_platform.serve.') and '.engine' not in name]\n"
        "assert not outside, outside"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr


def test_concurrent_sizes_give_the_tokens_of_each_model(
    engine: Engine, model: ResidentModel, small_base: str, small_artifact: Artifact
) -> None:
    any_size = small_artifact.load()
    any_size.resize(0.5)
    half: Any = any_size.materialize()
    expected = {
        1.0: reference_tokens(AutoModelForCausalLM.from_pretrained(small_base).eval(), PROMPT, 12),
        0.5: reference_tokens(half, PROMPT, 12),
    }
    events: dict[int, list[TokenEvent]] = {}
    ratios = (1.0, 0.5, 1.0, 0.5)
    for i, ratio in enumerate(ratios):
        engine.submit(model, greedy(budget=Budget(ratio=ratio)), events.setdefault(i, []).extend)
    until(lambda: engine.open == 0, "the requests do not end")
    for i, ratio in enumerate(ratios):
        assert [event.token.token for event in events[i] if isinstance(event, TokenSampled)] == expected[ratio]


def test_request_emits_its_events_in_order(engine: Engine, model: ResidentModel) -> None:
    request = greedy(PROMPT, PROMPT[:9], choices=2, max_tokens=3)
    tokens, events = generate(engine, model, request)
    assert isinstance(events[0], RequestStarted) and isinstance(events[-1], RequestDone)
    assert [len(tokens[i]) for i in range(4)] == [3] * 4
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]
    ended = [event for event in events if isinstance(event, SequenceEnded)]
    assert sorted(event.index for event in ended) == [0, 1, 2, 3] and {event.reason for event in ended} == {"length"}
    done = events[-1]
    assert (done.prompt_tokens, done.completion_tokens, done.timed_out) == (len(PROMPT) + 9, 12, False)


def test_seed_determines_the_tokens_of_each_sequence(engine: Engine, model: ResidentModel) -> None:
    def sampled_tokens(**fields: Any) -> dict[int, list[int]]:
        return generate(engine, model, greedy(sampling=SamplingParams(temperature=1.0), **fields))[0]

    three = sampled_tokens(seed=5, choices=3)
    assert sampled_tokens(seed=5, choices=3) == three
    assert sampled_tokens(seed=6)[0] == three[1], "sequence i has seed + i"
    assert len({tuple(tokens) for tokens in three.values()}) == 3
    assert sampled_tokens() != sampled_tokens(), "None is a random seed"


def test_log_probabilities_equal_those_of_the_base_model(engine: Engine, model: ResidentModel, small_base: str) -> None:
    request = greedy(max_tokens=2, prompt_logprobs=2, sampling=SamplingParams(temperature=0.0, logprobs=1))
    tokens, events = generate(engine, model, request)
    (prompt,) = [event.tokens for event in events if isinstance(event, PromptScored)]
    sampled = [event.token for event in events if isinstance(event, TokenSampled)]
    ids = PROMPT + tokens[0]
    with torch.no_grad():
        logprobs = AutoModelForCausalLM.from_pretrained(small_base).eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [token.token for token in (*prompt, *sampled)] == ids
    assert prompt[0].logprob is None
    for position, token in enumerate((*prompt[1:], *sampled)):
        assert token.logprob == pytest.approx(float(logprobs[position, token.token]), abs=1e-3)
        assert token.top[0][1] == pytest.approx(float(logprobs[position].max()), abs=1e-3)
    only_scored = generate(engine, model, greedy(max_tokens=0, prompt_logprobs=0))[1]
    assert [type(event) for event in only_scored] == [RequestStarted, PromptScored, SequenceEnded, RequestDone]


def test_end_token_ends_the_sequence(engine: Engine, model: ResidentModel) -> None:
    usual = generate(engine, model, greedy())[0][0]
    end = usual[4]
    tokens, events = generate(engine, model, greedy(end_tokens=frozenset({end})))
    assert tokens[0] == usual[: usual.index(end)], "the end token must not be an event"
    assert SequenceEnded(0, "stop") in events
    done = events[-1]
    assert isinstance(done, RequestDone) and done.completion_tokens == len(tokens[0]) + 1


class Letters:
    """A constraint that allows a given number of capital letters."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.left, self.error = count, error

    @property
    def done(self) -> bool:
        return self.left == 0

    def limit(self, logits_V: torch.Tensor) -> None:
        logits_V[: ord("A")] = -math.inf
        logits_V[ord("Z") + 1 :] = -math.inf

    def take(self, token: int) -> None:
        self.left -= 1


def test_constraint_limits_the_tokens_and_ends_the_sequence(engine: Engine, model: ResidentModel) -> None:
    tokens, events = generate(engine, model, greedy(choices=2, constraint=lambda: Letters(5)))
    for index in (0, 1):
        assert len(tokens[index]) == 5 and all(ord("A") <= token <= ord("Z") for token in tokens[index])
        assert SequenceEnded(index, "stop") in events
    failed = generate(engine, model, greedy(constraint=lambda: Letters(5, OSError("too complex"))))[1][-1]
    assert isinstance(failed, RequestFailed) and isinstance(failed.error, OSError)


class StopsAfter:
    """A consumer that ends its sequence after a given number of tokens."""

    def __init__(self, count: int) -> None:
        self.count, self.tokens, self.threads = count, list[int](), set[str]()

    def take(self, token: SampledToken) -> bool:
        self.tokens.append(token.token)
        self.threads.add(threading.current_thread().name)
        return len(self.tokens) == self.count


def test_consumer_receives_each_token_in_the_engine_thread_and_may_stop(engine: Engine, model: ResidentModel) -> None:
    consumers = [StopsAfter(3), StopsAfter(100)]
    tokens, events = generate(engine, model, greedy(choices=2, consumer=consumers.__getitem__))
    assert [consumer.tokens for consumer in consumers] == [tokens[0], tokens[1]]
    assert (len(tokens[0]), len(tokens[1])) == (3, 12)
    assert SequenceEnded(0, "stop") in events and SequenceEnded(1, "length") in events
    assert consumers[0].threads == {"engine"}


def test_failing_step_or_consumer_ends_only_its_requests(engine: Engine, model: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = generate(engine, model, greedy())[0]

    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(model.batch, "_forward", broken)
        assert "out of luck" in str(failure(engine, model, greedy()))
    with monkeypatch.context() as patched:
        patched.setattr(StopsAfter, "take", broken)
        assert isinstance(failure(engine, model, greedy(consumer=lambda _: StopsAfter(1))), RuntimeError)
    engine.submit(model, greedy(), broken)
    until(lambda: engine.open == 0 and not model.batch, "the request whose events can't be delivered is still running")
    assert generate(engine, model, greedy())[0] == usual


def failure(engine: Engine, model: ResidentModel, request: GenerationRequest) -> Exception:
    """Return the error of a request that must fail."""
    last = list(engine.events(model, request))[-1]
    assert isinstance(last, RequestFailed)
    return last.error


def test_logits_that_are_not_finite_fail_the_request(engine: Engine, model: ResidentModel) -> None:
    embeddings: Any = model.any_size.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, args, out: out.masked_fill((args[0] == 1)[..., None], math.nan))
    try:
        assert isinstance(failure(engine, model, greedy([*PROMPT, 1, 2])), NotFiniteError)
        assert isinstance(generate(engine, model, greedy())[1][-1], RequestDone)
    finally:
        hook.remove()


def test_deadline_ends_a_request(engine: Engine, model: ResidentModel) -> None:
    long = greedy([97] * 400, timeout_s=0.0)  # is prefilled in several steps
    assert isinstance(failure(engine, model, long), DeadlineExceededError)

    def with_tokens() -> list[Any] | None:
        """Return the events; None if the deadline was checked before the first token."""
        events = list(engine.events(model, greedy(max_tokens=400, timeout_s=0.0)))
        return None if isinstance(events[-1], RequestFailed) else events

    events = until(with_tokens, "no request had a token at its deadline")
    done = events[-1]
    assert isinstance(done, RequestDone) and done.timed_out
    assert 1 <= sum(isinstance(event, TokenSampled) for event in events) < 400 and SequenceEnded(0, "length") in events


def test_invalid_requests_are_refused_on_submission(engine: Engine, model: ResidentModel) -> None:
    for request in (greedy([1, 256]), greedy([-1]), greedy([]), greedy(sampling=SamplingParams(logit_bias={256: 1.0}))):
        with pytest.raises(InvalidTokensError):
            engine.submit(model, request, print)
    with pytest.raises(ContextTooLongError) as refused:
        engine.submit(model, greedy([97] * 500, max_tokens=13), print)
    assert refused.value.field == "prompts"
    with pytest.raises(ContextTooLongError) as refused:
        engine.submit(model, greedy(max_tokens=512), print)
    assert refused.value.field == "max_tokens"
    with pytest.raises(BudgetError):
        engine.submit(model, greedy(budget=Budget(ratio=0.001)), print)
    other = load_model(model.artifact)
    with pytest.raises(ModelUnloadedError):
        engine.submit(other, greedy(), print)
    assert engine.open == 0


def test_request_without_max_tokens_gets_the_default(engine: Engine, model: ResidentModel) -> None:
    assert len(generate(engine, model, greedy(max_tokens=None, default_max_tokens=7))[0][0]) == 7


def test_canceled_request_is_dropped(engine: Engine, model: ResidentModel) -> None:
    events = engine.events(model, greedy(max_tokens=400))
    assert isinstance(next(events), RequestStarted)
    assert isinstance(next(events), TokenSampled)
    events.close()  # type: ignore[attr-defined]
    until(lambda: engine.open == 0 and not model.batch, "the canceled request is still running")
