"""The text engine without Ray, on the small artifact: sizes, texts, limits, seeds and stops."""

import gc
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from acip_platform.serve.engine.errors import ContextTooLongError, InvalidTokensError, ModelUnloadedError
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.http.answers import Answer
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.http.requests import CompletionRequest
from acip_platform.serve.recorded_samples import Recorder
from acip_platform.serve.size_facts import model_card
from acip_platform.serve.text.events import TextEvent
from acip_platform.serve.text_engine import TextEngine
from acip_platform.tracking.registry import ModelVersion
from transformers import AutoModelForCausalLM

from acip.artifact.artifact import Artifact
from acip.errors import AcipError, BudgetError
from acip.layers.mixed_sizes import padded
from tests.support.engines import ENGINE, Resident, embedded_only
from tests.support.near_ties import assert_greedy_text, same_text
from tests.support.waiting import PATIENCE_S, until

PROMPT = "It was a bright cold day and "

Ask = Callable[..., dict[str, Any]]


def whole_answer(engine: TextEngine, served: ResidentModel, request: Any) -> dict[str, Any]:
    """Return the whole answer, built from the engine's events as the HTTP layer builds it."""
    received: list[TextEvent] = []
    done = threading.Event()

    def collect(events: list[TextEvent]) -> None:
        received.extend(events)
        if received[-1].kind in ("done", "error"):
            done.set()

    ticket = engine.submit(served, request, collect)
    assert done.wait(PATIENCE_S), "the engine does not answer"
    if received[-1].kind == "error":
        raise RequestError(received[-1].data["body"]["error"]["message"], status=received[-1].data["status"])
    answer = Answer(request)
    for event in (ticket.head(), *received):
        list(answer.add(event))
    return answer.complete_body()


def batch_of(model: ResidentModel) -> Any:
    """Return the batch of a model. Its attributes depend on the engine."""
    return model.batch


@pytest.fixture(scope="module")
def ask(engine: TextEngine, served: ResidentModel) -> Ask:
    def complete(**fields: Any) -> dict[str, Any]:
        return whole_answer(engine, served, CompletionRequest.parse({"prompt": PROMPT, "temperature": 0, **fields}))

    return complete


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["text"]


def first_logprob(answer: dict[str, Any]) -> float:
    """Return the highest log probability at the first token, which differs between sizes even if the texts agree."""
    return max(answer["choices"][0]["logprobs"]["top_logprobs"][0].values())


def assert_same_texts(answers: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Assert that more than 70 % of the texts agree: others may differ after a near tie."""
    agreements = [same_text(answer["choices"][0], other["choices"][0]) for answer, other in zip(answers, others, strict=True)]
    assert sum(agreements) > 0.7 * len(agreements)


def test_full_size_gives_the_text_of_the_base_model(ask: Ask, small_base: str, served: ResidentModel) -> None:
    base = AutoModelForCausalLM.from_pretrained(small_base).eval()
    tokenizer = served.tokenizer
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    generated = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=2)
    answer = ask(max_tokens=64, logprobs=2)
    assert_greedy_text(answer, tokenizer.decode(generated[0, ids.shape[1] :]))
    assert answer["size"]["got"] == 1.0
    assert answer["usage"] == {"prompt_tokens": ids.shape[1], "completion_tokens": 64, "total_tokens": ids.shape[1] + 64}


def test_smaller_size_gives_the_text_of_the_materialized_model(ask: Ask, small_artifact: Artifact) -> None:
    any_size = small_artifact.load()
    any_size.resize(0.5)
    plain: Any = any_size.materialize()
    tokenizer = small_artifact.tokenizer()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    generated = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=2)
    half, whole = (ask(size_ratio=size, max_tokens=32, logprobs=2) for size in (0.5, 1.0))
    assert_greedy_text(half, tokenizer.decode(generated[0, ids.shape[1] :]))
    assert first_logprob(half) != first_logprob(whole)


def test_size_in_the_name_equals_size_ratio(ask: Ask) -> None:
    named, given, both = ask(model="small@0.6"), ask(model="small", size_ratio=0.6), ask(model="small@0.6", size_ratio=0.6)
    assert text(named) == text(given) == text(both)
    assert named["size"] == given["size"] == both["size"]
    assert named["model"] == "small"
    assert named["version"] == "7"


@pytest.mark.parametrize("ratio", [1.0, 0.83, 0.6, 0.4, 0.31])
def test_actual_size_never_exceeds_the_requested_size(ask: Ask, small_artifact: Artifact, ratio: float) -> None:
    size = ask(size_ratio=ratio, max_tokens=1)["size"]
    assert size["asked"] == ratio
    assert ratio - 0.01 < size["got"] <= ratio
    assert size["convention"] == "linear"
    assert size["extrapolated"] is (ratio < small_artifact.recipe.stop_ratio)
    table = small_artifact.table()
    assert size["params"] == round(size["got"] * table.dense_params) + table.rest_params


def test_concurrent_sizes_give_the_texts_of_sequential_requests(ask: Ask) -> None:
    requests = [
        {"size_ratio": ratio, "max_tokens": 24, "seed": 1, "temperature": t, "logprobs": 3}
        for ratio in (1.0, 0.7, 0.5, 0.3)
        for t in (0, 1)
    ] * 3
    one_by_one = [ask(**request) for request in requests]
    assert len({first_logprob(answer) for answer in one_by_one[::2]}) == 4, "the sizes must differ for this test to mean anything"
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda request: ask(**request), requests))
    assert_same_texts(together, one_by_one)


def test_seed_reproduces_the_text(ask: Ask) -> None:
    first = ask(temperature=1, seed=5, max_tokens=32)
    assert text(ask(temperature=1, seed=5, max_tokens=32)) == text(first)
    assert text(ask(temperature=1, seed=6, max_tokens=32)) != text(first)
    drawn = ask(temperature=1, max_tokens=32)
    assert text(ask(temperature=1, max_tokens=32)) != text(drawn)
    assert text(ask(temperature=1, max_tokens=32, seed=drawn["seed"])) == text(drawn)


def test_omitted_settings_default_to_the_models_then_to_openais(ask: Ask, served: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    own = served.settings.config
    free = {"seed": 3, "max_tokens": 32}
    assert text(ask(**free, temperature=None)) == text(ask(**free, temperature=1, top_p=1))
    monkeypatch.setattr(own, "temperature", 0.7)
    monkeypatch.setattr(own, "top_p", 0.8)
    stated = text(ask(**free, temperature=None))
    assert stated == text(ask(**free, temperature=0.7, top_p=0.8))
    assert stated != text(ask(**free, temperature=1, top_p=1))
    assert text(ask(temperature=1e-9)) == text(ask(temperature=0))


def test_list_of_prompts_is_answered_in_order(ask: Ask) -> None:
    answer = ask(prompt=["One ", "Two "], max_tokens=12, logprobs=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice, prompt in zip(answer["choices"], ("One ", "Two "), strict=True):
        assert_greedy_text(ask(prompt=prompt, max_tokens=12, logprobs=2), choice["text"])
    assert answer["usage"]["completion_tokens"] == 24
    samples = ask(prompt=["One ", "One "], max_tokens=24, temperature=1, seed=4)["choices"]
    assert samples[0]["text"] != samples[1]["text"]


def test_answer_ends_before_the_stop_text(ask: Ask) -> None:
    whole = text(ask(max_tokens=64))
    stop = whole[20:23]
    answer = ask(max_tokens=64, stop=["not in the text", stop])
    assert text(answer) == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == whole.index(stop) + len(stop)  # one token per byte
    assert ask(max_tokens=64)["choices"][0]["finish_reason"] == "length"


def test_end_token_ends_the_answer(ask: Ask, served: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = text(ask(max_tokens=32))
    monkeypatch.setattr(served.settings.config, "eos_token_id", ord(whole[9]))
    answer = ask(max_tokens=32)
    assert text(answer) == whole[: whole.index(whole[9])]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == whole.index(whole[9]) + 1
    assert text(ask(max_tokens=32, ignore_eos=True)) == whole


def test_request_may_fill_but_not_exceed_the_context(ask: Ask) -> None:
    assert ask(prompt="a" * 500, max_tokens=12)["usage"]["total_tokens"] == 512
    with pytest.raises(ContextTooLongError, match=r"513.*context of small is 512 tokens: shorten the prompt to 500 tokens, or.*at most 11"):
        ask(prompt="a" * 501, max_tokens=12)


def test_empty_prompt_is_replaced_by_a_start_token(ask: Ask) -> None:
    assert ask(prompt="")["usage"]["prompt_tokens"] == 1


def test_error_for_an_unreachable_size_names_the_smallest(ask: Ask, served: ResidentModel) -> None:
    smallest = model_card(served)["size"]["smallest"]
    with pytest.raises(BudgetError, match=r"smallest is 0\.\d{4}") as refused:
        ask(size_ratio=smallest / 2)
    named = float(re.findall(r"smallest is (0\.\d+)", str(refused.value))[0])
    assert smallest <= ask(size_ratio=named)["size"]["got"] <= named
    assert ask(size_ratio=smallest * 1.01)["size"]["got"] <= smallest * 1.01


def test_canceled_request_frees_its_slots(engine: TextEngine, served: ResidentModel) -> None:
    received: list[TextEvent] = []
    canceled = Event()

    def receive(events: Any) -> None:
        received.extend(events)
        if len(batch_of(served).active) == 32:
            assert canceled.wait(PATIENCE_S), "the engine pauses until the request is canceled"

    ticket = engine.submit(served, CompletionRequest.parse({"prompt": ["a"] * 16, "n": 2, "max_tokens": 511, "ignore_eos": True}), receive)
    wait_until(lambda: len(batch_of(served).active) == 32, "fewer than 32 sequences are running")
    assert engine.sequences == 32
    engine.cancel(ticket)
    canceled.set()
    wait_until(lambda: engine.sequences == 0 and engine.open == 0, "the slots of a canceled request are not free")
    assert received[-1].kind == "text"
    wait_until(lambda: ENGINE != "acip" or not batch_of(served).cache.keys, "the keys of a canceled request are not free")


@pytest.fixture
def limited(small_artifact: Artifact) -> ResidentModel:
    """Return another copy of the model: two engines must not have the same one."""
    return Resident(ModelVersion("small", "7", str(small_artifact.folder), ("champion",), {}), small_artifact)


@pytest.fixture
def zero_timeout_engine(limited: ResidentModel) -> Iterator[TextEngine]:
    """Yield an engine in which every request exceeds its deadline after the first step."""
    engine = TextEngine(timeout_s=0.0)
    engine.add(limited)
    yield engine
    engine.close()


def test_deadline_ends_the_answer_with_the_tokens_so_far(zero_timeout_engine: TextEngine, limited: ResidentModel) -> None:
    answer = whole_answer(
        zero_timeout_engine, limited, CompletionRequest.parse({"prompt": ["a"] * 4, "max_tokens": 500, "ignore_eos": True})
    )
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 4
    assert 4 <= answer["usage"]["completion_tokens"] < 4 * 500
    assert answer["timed_out"] is True
    assert answer["max_tokens"] == 500
    wait_until(lambda: not limited.batch, "the slots of a request that reached its deadline are not free")


@embedded_only
def test_deadline_before_the_first_token_is_an_error(zero_timeout_engine: TextEngine, limited: ResidentModel) -> None:
    with pytest.raises(RequestError, match=r"no token within 0 s") as caught:
        whole_answer(
            zero_timeout_engine, limited, CompletionRequest.parse({"prompt": "a" * 400, "max_tokens": 1})
        )  # prefilled in several steps
    assert caught.value.status == 408
    wait_until(lambda: not limited.batch, "the slots of a request without an answer are not free")


@embedded_only
def test_failed_step_fails_only_its_own_requests(
    engine: TextEngine, served: ResidentModel, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = text(ask(max_tokens=8))

    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("password in /etc")

    with monkeypatch.context() as patched:
        patched.setattr(served.batch, "_forward", broken)
        with pytest.raises(RequestError, match="the reason is in its log") as caught:
            ask(max_tokens=8)
    assert caught.value.status == 500
    assert "password" not in str(caught.value)
    assert text(ask(max_tokens=8)) == usual


def test_sizes_in_one_batch_give_the_texts_of_single_requests(ask: Ask, served: ResidentModel) -> None:
    """Requests of many sizes and lengths join and leave a batch of up to 32 sequences."""
    kinds = [
        {"size_ratio": size, "max_tokens": 8 + 5 * i, "prompt": PROMPT[: 8 + i], "logprobs": 3}
        for i, size in enumerate((1.0, 0.9, 0.7, 0.5, 0.4, 0.3))
    ]
    alone = [ask(**kind) for kind in kinds]
    largest_batch = 0

    def complete(i: int) -> dict[str, Any]:
        nonlocal largest_batch
        time.sleep(0.01 * (i % 7))
        answer = ask(**kinds[i % len(kinds)])
        largest_batch = max(largest_batch, len(batch_of(served).active))
        return answer

    with ThreadPoolExecutor(40) as pool:
        together = list(pool.map(complete, range(120)))
    assert_same_texts(together, [alone[i % len(kinds)] for i in range(120)])
    assert largest_batch > 8


@embedded_only
def test_long_prompt_is_prefilled_in_chunks_between_decoding_steps(ask: Ask, engine: TextEngine, served: ResidentModel) -> None:
    counts: list[int] = []  # tokens of each forward pass, with padding

    def count(_module: torch.nn.Module, _args: Any, fields: dict[str, Any]) -> None:
        counts.append(fields["input_ids"].shape[1])

    hook = batch_of(served).model.register_forward_pre_hook(count, with_kwargs=True)
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(ask, max_tokens=450)  # it lasts until the long prompt arrives, also if this thread pauses
        wait_until(lambda: len(counts) > 5, "the short request is not running")
        long = pool.submit(ask, prompt="b" * 490, max_tokens=4)
        assert long.result()["usage"]["prompt_tokens"] == 490
        assert short.result()["usage"]["completion_tokens"] == 450
    hook.remove()
    assert max(counts) <= padded(128 + 1), "a step has at most one chunk of the long prompt and one token of the short request"
    chunks = [i for i, count in enumerate(counts) if count > 64]
    assert len(chunks) == 4, "490 tokens must be read in chunks of 128"


@embedded_only
def test_prompts_are_prefilled_in_several_chunks_at_once_while_nothing_decodes(ask: Ask, served: ResidentModel) -> None:
    counts: list[int] = []  # tokens of each forward pass, with padding

    def count(_module: torch.nn.Module, _args: Any, fields: dict[str, Any]) -> None:
        counts.append(fields["input_ids"].shape[1])

    hook = batch_of(served).model.register_forward_pre_hook(count, with_kwargs=True)
    ask(prompt="b" * 490, max_tokens=1)
    ask(prompt="b" * 490, max_tokens=1, echo=True, logprobs=1)
    hook.remove()
    assert counts[:3] == [256, 128, padded(490 - 3 * 128)], "two full chunks, one, and the rest"
    assert counts[3:] == [128, 128, 128, padded(490 - 3 * 128)], "scores of a prompt need memory for each of its tokens"


@pytest.mark.parametrize("size", [1.0, 0.5])
def test_prefill_chunk_size_does_not_change_the_text(ask: Ask, monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    prompt = (PROMPT * 20)[:450]
    whole = ask(prompt=prompt, max_tokens=24, size_ratio=size, logprobs=2)
    monkeypatch.setattr("acip_platform.serve.engine.batch.PREFILL_CHUNK_TOKENS", 37)
    assert_greedy_text(whole, text(ask(prompt=prompt, max_tokens=24, size_ratio=size)))


@embedded_only
def test_memory_for_keys_and_values_is_bounded(small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = Resident(ModelVersion("small", "7", "here", (), {}), small_artifact, kv_tokens=1024)
    engine = TextEngine()
    engine.add(limited)
    cached_tokens: list[int] = []
    step = limited.batch.step

    def recorded_step() -> None:
        step()
        cached_tokens.append(batch_of(limited).cache.count * batch_of(limited).cache.length)

    monkeypatch.setattr(limited.batch, "step", recorded_step)
    request = CompletionRequest.parse({"prompt": ["a" * 200] * 12, "max_tokens": 50, "ignore_eos": True, "temperature": 0})
    answer = whole_answer(engine, limited, request)
    engine.close()
    assert max(cached_tokens) == 1024
    assert len({choice["text"] for choice in answer["choices"]}) == 1, "all twelve answers, computed four at a time, must be equal"


@embedded_only
def test_cache_of_a_long_request_is_shortened_for_many_short_requests(small_artifact: Artifact) -> None:
    batch = batch_of(Resident(ModelVersion("small", "7", "here", (), {}), small_artifact))
    batch.cache.room(2, 4096)
    batch.cache.room(32, 100)
    assert (batch.cache.count, batch.cache.length) == (32, 128)


def test_long_stop_text_takes_linear_time(ask: Ask) -> None:
    usual = text(ask(max_tokens=32))
    assert text(ask(max_tokens=32, stop="x" * 1_000_000)) == usual  # within PATIENCE_S: quadratic work takes hours


def test_unloaded_model_is_garbage_collected(small_artifact: Artifact, tmp_path: Path) -> None:
    engine = TextEngine()
    served = Resident(ModelVersion("small", "7", "here", (), {}), small_artifact)
    recorder = Recorder(engine, tmp_path)
    engine.add(served)
    recorder.add(served)
    whole_answer(engine, served, CompletionRequest.parse({"prompt": "a", "max_tokens": 2}))
    reference = weakref.ref(served)
    holder = [served]
    del served
    wait_until(lambda: engine.remove(holder[0]), "the recorder still uses the model")
    holder.clear()
    wait_until(lambda: gc.collect() >= 0 and reference() is None, "the unloaded model is still referenced")
    engine.close()


def test_log_probabilities_equal_those_of_the_base_model(ask: Ask, small_base: str, served: ResidentModel) -> None:
    answer = ask(max_tokens=6, logprobs=3)
    logprobs = answer["choices"][0]["logprobs"]
    base = AutoModelForCausalLM.from_pretrained(small_base).eval()
    ids = served.tokenizer(PROMPT + text(answer))["input_ids"]
    with torch.no_grad():
        expected = base(torch.tensor([ids])).logits[0].log_softmax(-1)
    for i in range(6):
        position = len(PROMPT) - 1 + i
        assert logprobs["token_logprobs"][i] == pytest.approx(float(expected[position, ids[position + 1]]), abs=1e-4)
        assert list(logprobs["top_logprobs"][i].values()) == pytest.approx(expected[position].topk(3).values.tolist(), abs=1e-4)
    assert "".join(logprobs["tokens"]) == text(answer)
    assert logprobs["text_offset"] == list(range(6))


def test_penalties_and_biases_change_the_tokens(ask: Ask) -> None:
    usual = text(ask(max_tokens=48))
    assert text(ask(max_tokens=48, frequency_penalty=2.0)) != usual
    assert text(ask(max_tokens=4, logit_bias={str(ord("Q")): 100})) == "QQQQ"
    assert "e" not in text(ask(max_tokens=48, logit_bias={str(ord("e")): -100}))
    with pytest.raises(InvalidTokensError, match="names token 999"):
        ask(logit_bias={"999": 1})


def test_n_answers_are_sampled_independently(ask: Ask) -> None:
    answer = ask(n=3, temperature=1, seed=4, max_tokens=24, logprobs=3)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    same_text(answer["choices"][0], ask(temperature=1, seed=4, max_tokens=24, logprobs=3)["choices"][0])
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]


def test_prompt_may_be_token_ids(ask: Ask) -> None:
    assert text(ask(prompt=list(PROMPT.encode()))) == text(ask())
    with pytest.raises(InvalidTokensError, match=r"token 300; small has tokens 0 to 255"):
        ask(prompt=[[1, 300]])


def test_model_is_removed_only_if_no_request_uses_it(engine: TextEngine, served: ResidentModel) -> None:
    tried = Event()
    endless = CompletionRequest.parse({"prompt": "a", "max_tokens": 500, "ignore_eos": True})
    ticket = engine.submit(served, endless, lambda _: tried.wait(PATIENCE_S))
    assert not engine.remove(served)
    engine.cancel(ticket)
    tried.set()
    wait_until(lambda: engine.open == 0, "the canceled request is still open")
    assert engine.remove(served)
    with pytest.raises(ModelUnloadedError, match="was unloaded"):
        engine.submit(served, CompletionRequest.parse({"prompt": "a"}), lambda _: None)
    engine.add(served)


@embedded_only
def test_model_that_ignores_position_ids_is_refused(small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a batch would mix in an architecture that ignores `position_ids`."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    forward = LlamaRotaryEmbedding.forward

    def ignore_positions(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return forward(self, x, torch.arange(position_ids.shape[1])[None])

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", ignore_positions)
    with pytest.raises(AcipError, match="small: LlamaForCausalLM can't be served: "):
        Resident(ModelVersion("small", "7", "here", (), {}), small_artifact)


def wait_until(condition: Callable[[], bool], message: str) -> None:
    until(condition, message, every_s=0.005)
