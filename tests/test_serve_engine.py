"""The engine without Ray: sizes, texts, limits, seeds, stops; on the small artifact."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from acip_platform.serve.engine import Cancelled, Engine
from acip_platform.serve.errors import RequestError
from acip_platform.serve.request import CompletionRequest
from acip_platform.serve.routes import routes
from acip_platform.serve.served import Served
from acip_platform.tracking import ModelVersion
from transformers import AutoModelForCausalLM

from acip.artifact import Artifact
from acip.errors import BudgetError

PROMPT = "It was a bright cold day and "

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def engine(small_artifact: Artifact) -> Engine:
    version = ModelVersion("small", "7", str(small_artifact.folder), ("champion",), {})
    engine = Engine([Served(version, small_artifact)])
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def ask(engine: Engine) -> Ask:
    def complete(**fields: Any) -> dict[str, Any]:
        return engine.complete(CompletionRequest.parse({"prompt": PROMPT, "temperature": 0, **fields}))

    return complete


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["text"]


def test_full_size_is_the_base_model(ask: Ask, small_base: str, engine: Engine) -> None:
    base = AutoModelForCausalLM.from_pretrained(small_base).eval()
    tokenizer = engine.models["small"].tokenizer
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    made = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=2)
    answer = ask(max_tokens=64)
    assert text(answer) == tokenizer.decode(made[0, ids.shape[1] :])
    assert answer["size"]["got"] == 1.0
    assert answer["usage"] == {"prompt_tokens": ids.shape[1], "completion_tokens": 64, "total_tokens": ids.shape[1] + 64}


def test_a_smaller_size_is_what_materialise_makes(ask: Ask, small_artifact: Artifact) -> None:
    any_size = small_artifact.load()
    any_size.resize(0.5)
    plain: Any = any_size.materialise()
    tokenizer = small_artifact.tokenizer()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    made = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=2)
    assert text(ask(size_ratio=0.5, max_tokens=32)) == tokenizer.decode(made[0, ids.shape[1] :])
    assert text(ask(size_ratio=0.5, max_tokens=32)) != text(ask(max_tokens=32))


def test_the_size_may_be_in_the_name(ask: Ask) -> None:
    named, given, both = ask(model="small@0.6"), ask(model="small", size_ratio=0.6), ask(model="small@0.6", size_ratio=0.6)
    assert text(named) == text(given) == text(both)
    assert named["size"] == given["size"] == both["size"]
    assert named["model"] == "small"
    assert named["version"] == "7"


@pytest.mark.parametrize("ratio", [1.0, 0.83, 0.6, 0.4, 0.31])
def test_got_never_exceeds_asked(ask: Ask, small_artifact: Artifact, ratio: float) -> None:
    size = ask(size_ratio=ratio, max_tokens=1)["size"]
    assert size["asked"] == ratio
    assert ratio - 0.01 < size["got"] <= ratio
    assert size["convention"] == "linear"
    assert size["extrapolated"] is (ratio < small_artifact.recipe.stop_ratio)
    table = small_artifact.table()
    assert size["params"] == round(size["got"] * table.dense_params) + table.rest_params


def test_sizes_interleaved_from_threads_give_the_texts_of_one_after_the_other(ask: Ask) -> None:
    requests = [{"size_ratio": ratio, "max_tokens": 24, "seed": 1, "temperature": t} for ratio in (1.0, 0.7, 0.5, 0.3) for t in (0, 1)] * 3
    one_by_one = [text(ask(**request)) for request in requests]
    assert len(set(one_by_one)) >= 6, "the sizes must differ for this test to mean anything"
    with ThreadPoolExecutor(6) as pool:
        together = [text(answer) for answer in pool.map(lambda request: ask(**request), requests)]
    assert together == one_by_one


def test_the_seed_reproduces(ask: Ask) -> None:
    first = ask(temperature=1, seed=5, max_tokens=32)
    assert text(ask(temperature=1, seed=5, max_tokens=32)) == text(first)
    assert text(ask(temperature=1, seed=6, max_tokens=32)) != text(first)
    drawn = ask(temperature=1, max_tokens=32)
    assert text(ask(temperature=1, max_tokens=32)) != text(drawn)
    assert text(ask(temperature=1, max_tokens=32, seed=drawn["seed"])) == text(drawn)


def test_settings_that_are_left_out_are_the_models_own_else_openais(ask: Ask, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine.models["small"].stated
    free = {"seed": 3, "max_tokens": 32}
    assert text(ask(**free, temperature=None)) == text(ask(**free, temperature=1, top_p=1))
    monkeypatch.setattr(own, "temperature", 0.7)
    monkeypatch.setattr(own, "top_p", 0.8)
    stated = text(ask(**free, temperature=None))
    assert stated == text(ask(**free, temperature=0.7, top_p=0.8))
    assert stated != text(ask(**free, temperature=1, top_p=1))
    assert text(ask(temperature=1e-9)) == text(ask(temperature=0))


def test_what_a_model_states_about_length_or_beams_does_not_overrule_the_request(
    ask: Ask, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = text(ask(max_tokens=32))
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    for name, value in {"max_length": 8, "num_beams": 3, "return_dict_in_generate": True, "temperature": 0.6}.items():
        monkeypatch.setattr(engine.models["small"].stated, name, value)
    assert text(ask(max_tokens=32)) == usual
    assert caplog.messages == []


def test_a_list_of_prompts_is_answered_in_order(ask: Ask) -> None:
    answer = ask(prompt=["One ", "Two "], max_tokens=12)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["text"] for choice in answer["choices"]] == [text(ask(prompt=prompt, max_tokens=12)) for prompt in ("One ", "Two ")]
    assert answer["usage"]["completion_tokens"] == 24
    samples = ask(prompt=["One ", "One "], max_tokens=24, temperature=1, seed=4)["choices"]
    assert samples[0]["text"] != samples[1]["text"]


def test_a_stop_text_ends_the_answer_before_it(ask: Ask) -> None:
    whole = text(ask(max_tokens=64))
    stop = whole[20:23]
    answer = ask(max_tokens=64, stop=["never there", stop])
    assert text(answer) == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == whole.index(stop) + len(stop)  # a byte a token
    assert ask(max_tokens=64)["choices"][0]["finish_reason"] == "length"


def test_the_end_token_ends_the_answer(ask: Ask, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = text(ask(max_tokens=32))
    monkeypatch.setattr(engine.models["small"].stated, "eos_token_id", ord(whole[9]))
    answer = ask(max_tokens=32)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == whole.index(whole[9]) + 1


def test_the_context_may_be_filled_but_not_overrun(ask: Ask) -> None:
    assert ask(prompt="a" * 500, max_tokens=12)["usage"]["total_tokens"] == 512
    with pytest.raises(RequestError, match=r"513.*context of small is 512 tokens: shorten the prompt to 500 tokens, or.*at most 11"):
        ask(prompt="a" * 501, max_tokens=12)


def test_an_empty_prompt_starts_from_the_models_first_token(ask: Ask) -> None:
    assert ask(prompt="")["usage"]["prompt_tokens"] == 1


def test_a_size_that_cannot_be_reached_says_what_is_the_smallest(ask: Ask, engine: Engine) -> None:
    smallest = engine.models["small"].card()["size"]["smallest"]
    with pytest.raises(BudgetError, match=f"smallest is {smallest:.4f}"):
        ask(size_ratio=smallest / 2)
    assert ask(size_ratio=smallest * 1.01)["size"]["got"] <= smallest * 1.01


def test_who_is_gone_does_not_keep_the_engine(engine: Engine) -> None:
    long = CompletionRequest.parse({"prompt": ["a"] * 16, "max_tokens": 511})
    gone = threading.Event()
    timer = threading.Timer(0.3, gone.set)
    began = time.monotonic()
    timer.start()
    with pytest.raises(Cancelled):
        engine.complete(long, gone)
    assert 0.3 <= time.monotonic() - began < 2, "stops at the next token, not after 8,176 of them"


def test_an_answer_that_takes_too_long_is_given_up(engine: Engine) -> None:
    hasty = Engine(list(engine.models.values()), timeout_s=0.2)
    with pytest.raises(RequestError, match=r"within 0\.2 s") as caught:
        hasty.complete(CompletionRequest.parse({"prompt": ["a"] * 16, "max_tokens": 511}))
    assert caught.value.status == 408


def test_several_models_need_a_name(engine: Engine, small_artifact: Artifact) -> None:
    served = engine.models["small"]
    other = Served(ModelVersion("other", "1", served.version.uri, (), {}), small_artifact)
    both = Engine([served, other])
    assert both.complete(CompletionRequest(prompt="a", model="other@0.5"))["model"] == "other"
    with pytest.raises(RequestError, match="model must be given: small, other"):
        both.complete(CompletionRequest(prompt="a"))


def test_an_unexpected_failure_is_a_500_that_leaks_nothing() -> None:
    async def broken(*_: object) -> Any:
        raise RuntimeError("password in /etc")

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(routes(broken, broken, broken), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/completions", json={"prompt": "a"})

    response = asyncio.run(get())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "password" not in response.text
