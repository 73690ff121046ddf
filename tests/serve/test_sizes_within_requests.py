"""Several sizes within a request: parts of its text, and a smaller size while other requests wait."""

import asyncio
from collections.abc import Iterator
from functools import partial
from threading import Event
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from acip_platform.serve.engine import batch
from acip_platform.serve.engine.engine import Engine
from acip_platform.serve.engine.errors import SizePartsError
from acip_platform.serve.engine.events import RequestDone, TokenSampled
from acip_platform.serve.engine.request import GenerationRequest, SizePart
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import SampledToken, SamplingParams
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.http.requests import ChatRequest, CompletionRequest
from transformers import DynamicCache

from acip.artifact.artifact import Artifact
from acip.sizing.budget import Budget
from tests.support.engines import ENGINE
from tests.support.near_ties import TIE
from tests.support.server import Server
from tests.support.waiting import PATIENCE_S, until

PROMPT = list(b"It was a bright cold day in April, and the clocks were ")
GREEDY = SamplingParams(temperature=0.0, logprobs=2)
TOKENS = 12


@pytest.fixture(scope="module")
def model(small_artifact: Artifact) -> ResidentModel:
    version: Any = SimpleNamespace(name="small", version="7", uri="here")
    return ResidentModel(version, small_artifact)


@pytest.fixture(scope="module")
def engine(model: ResidentModel) -> Iterator[Engine]:
    engine = Engine()
    engine.add(model)
    yield engine
    engine.close()


def request(*parts: SizePart, prompt: list[int] = PROMPT, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        [prompt], **{"parts": parts, "max_tokens": TOKENS, "sampling": GREEDY, "end_tokens": frozenset(), "speculative": False, **fields}
    )


def part(ratio: float, tokens: int | None = None, **fields: Any) -> SizePart:
    return SizePart(Budget(ratio=ratio), tokens, **fields)


def generate(engine: Engine, model: ResidentModel, request: GenerationRequest) -> tuple[list[SampledToken], RequestDone]:
    events = list(engine.events(model, request))
    assert isinstance(events[-1], RequestDone), events[-1]
    return [event.token for event in events if isinstance(event, TokenSampled)], events[-1]


def by_size(done: RequestDone) -> dict[float, int]:
    return {float(cut.asked): tokens for cut, tokens in done.tokens_by_size}


def reference(artifact: Artifact, passes: list[tuple[float, int]]) -> list[int]:
    """Return the greedy answer of transformers with one cache: each pass is (size, tokens that it processes)."""
    any_size = artifact.load()
    ids, cache = list(PROMPT), DynamicCache()
    for size, count in passes:
        any_size.resize(size)
        start = cache.get_seq_length()
        with torch.no_grad():
            logits = any_size.model(input_ids=torch.tensor([ids[start : start + count]]), past_key_values=cache, use_cache=True).logits
        if start + count == len(ids):
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("case", ["prompt", "tokens", "marker"])
def test_each_part_is_computed_at_its_size_and_the_cache_carries_over(
    engine: Engine, model: ResidentModel, small_artifact: Artifact, case: str
) -> None:
    read = len(PROMPT)
    if case == "prompt":
        parts, passes = [part(1.0, 0), part(0.5)], [(1.0, read - 1), *[(0.5, 1)] * TOKENS]
        expected = {1.0: 0, 0.5: TOKENS}
    elif case == "tokens":
        parts, passes = [part(0.5, 4), part(1.0, 3), part(0.6)], [(0.5, read), *[(0.5, 1)] * 3, *[(1.0, 1)] * 3, *[(0.6, 1)] * 5]
        expected = {0.5: 4, 1.0: 3, 0.6: 5}
    else:
        first, _ = generate(engine, model, request(part(0.5)))
        marker = first[2].token
        at = next(i for i, token in enumerate(first) if token.token == marker) + 1
        parts = [part(0.5, ends=lambda ids: ids[-1] == marker), part(1.0)]
        passes, expected = [(0.5, read), *[(0.5, 1)] * (at - 1), *[(1.0, 1)] * (TOKENS - at)], {0.5: at, 1.0: TOKENS - at}
    tokens, done = generate(engine, model, request(*parts))
    assert by_size(done) == expected
    for token, other in zip(tokens, reference(small_artifact, passes), strict=True):
        if token.token != other:
            assert token.top[0][1] - token.top[1][1] < TIE
            break


def test_prompt_of_one_token_and_long_prompts_have_parts(engine: Engine, model: ResidentModel) -> None:
    for prompt in (PROMPT[:1], (PROMPT * 6)[:300]):
        tokens, done = generate(engine, model, request(part(1.0, 0), part(0.5), prompt=prompt, prompt_logprobs=0))
        assert len(tokens) == TOKENS and by_size(done) == {1.0: 0, 0.5: TOKENS}


def test_engine_without_changes_of_size_refuses_parts(engine: Engine, model: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "changes_sizes", False)
    with pytest.raises(SizePartsError, match="one size"):
        generate(engine, model, request(part(1.0, 0), part(0.5)))


# ---- a smaller size while others wait


def test_sequences_are_smaller_while_others_wait(engine: Engine, model: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_SEQUENCES", 2)
    received: list[list[Any]] = [[] for _ in range(6)]
    submitted = Event()

    def receive(i: int, events: Any) -> None:
        received[i].extend(events)
        assert submitted.wait(PATIENCE_S), "the engine pauses until all requests are submitted"

    for i in range(6):
        fields: dict[str, Any] = {} if i == 1 else {"min_budget": Budget(ratio=0.4)}
        engine.submit(model, request(budget=Budget(ratio=1.0), max_tokens=20 + i, **fields), partial(receive, i))
    submitted.set()
    until(lambda: engine.open == 0, "the requests do not end")
    counts = [by_size(events[-1]) for events in received]
    assert counts[1] == {1.0: 21}, "a request without a smallest size keeps its size"
    assert counts[0][0.4] > 0 and counts[2][0.4] > 0
    assert counts[5][1.0] > 0, "the size returns when none wait"
    assert [sum(count.values()) for count in counts] == [20 + i for i in range(6)]
    assert by_size(generate(engine, model, request(budget=Budget(ratio=1.0), min_budget=Budget(ratio=0.4)))[1]) == {1.0: TOKENS, 0.4: 0}


embedded_only = pytest.mark.skipif(ENGINE != "acip", reason="vLLM keeps the size of a request")


@embedded_only
def test_server_accepts_twice_its_capacity_of_requests_with_a_smallest_size(server: Server) -> None:
    """128 requests at once, where 64 with one size are accepted: none is refused, and each states the tokens at each size."""

    async def send() -> list[httpx.Response]:
        body = {"model": "small", "prompt": "It was", "size_ratio": 1.0, "min_size": 0.4, "max_tokens": 24, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=httpx.Limits(max_connections=200)) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(128)))

    answers = asyncio.run(send())
    assert {answer.status_code for answer in answers} == {200}
    sizes = [{size["asked"]: size["tokens"] for size in answer.json()["sizes"]} for answer in answers]
    assert all(sum(counts.values()) == 24 and counts.keys() == {1.0, 0.4} for counts in sizes)
    assert sum(counts[0.4] for counts in sizes) > 0
    alone = server.ask(prompt="It was", min_size=0.4, max_tokens=5, ignore_eos=True)
    assert {size["asked"]: size["tokens"] for size in alone["sizes"]} == {1.0: 5, 0.4: 0}


@embedded_only
def test_server_answers_in_parts_and_streams_the_sizes(server: Server) -> None:
    parts = [{"ratio": 1.0, "tokens": 0}, {"ratio": 0.5, "tokens": 3, "until": "never in the text"}, {"ratio": 0.8}]
    body = {"model": "small", "prompt": "It was a bright", "size_ratio": parts, "max_tokens": 8, "ignore_eos": True}
    answer = server.client.post("/v1/completions", json=body).json()
    assert [(size["asked"], size["tokens"]) for size in answer["sizes"]] == [(1.0, 0), (0.5, 3), (0.8, 5)]
    assert answer["size"]["asked"] == 1.0 and answer["speculation"]["mode"] == "auto"
    last = server.client.post("/v1/completions", json={**body, "stream": True}).text.split("data: ")[-2]
    assert '"tokens":5' in last


# ---- invalid requests


@pytest.mark.parametrize("size_ratio", [
    [], [{"ratio": 0.5, "tokens": 3}], [{"ratio": 0.5}, {"ratio": 1.0}], [{"ratio": 1.5, "tokens": 3}, {"ratio": 1.0}],
    [{"ratio": 0.5, "token": 3}, {"ratio": 1.0}], [{"tokens": 3}, {"ratio": 1.0}], [{"ratio": 0.5, "tokens": -1}, {"ratio": 1.0}],
    [{"ratio": 0.5, "tokens": 1}, {"ratio": 0.4, "tokens": 0}, {"ratio": 1.0}], [{"ratio": 0.5, "until": ""}, {"ratio": 1.0}],
    [0.5, 1.0], [{"ratio": 0.5, "tokens": 1}] * 8 + [{"ratio": 1.0}],
])  # fmt: skip
def test_invalid_parts_are_refused_with_the_form_of_parts(size_ratio: Any) -> None:
    with pytest.raises(RequestError, match=r"size_ratio is .*it must be .*a list of parts like") as raised:
        CompletionRequest.parse({"prompt": "a", "size_ratio": size_ratio})
    assert raised.value.param == "size_ratio"


def test_smallest_size_must_not_exceed_the_size() -> None:
    chat = ChatRequest.parse({"messages": [{"role": "user", "content": "a"}], "size_ratio": 0.5, "min_size": 0.6})
    _, budget = chat.name_and_budget(["small"])
    with pytest.raises(RequestError, match=r"min_size is 0\.6; it must be at most the size ratio, 0\.5"):
        chat.min_budget(budget, "linear")
    with pytest.raises(RequestError, match="min_size is 2; it must be a size ratio of at most size_ratio"):
        ChatRequest.parse({"messages": [{"role": "user", "content": "a"}], "min_size": 2})
