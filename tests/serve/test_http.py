"""The HTTP API of a running server: models, sizes, texts, streams, OpenAI's client, and materializations."""

import hashlib
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from acip_platform.serve.http.requests import CompletionRequest
from transformers import AutoModelForCausalLM

from acip.artifact.artifact import Artifact
from tests.support.near_ties import assert_greedy_text, same_text
from tests.support.server import PROMPT, Server, text
from tests.support.waiting import PATIENCE_S, until


def test_curl_commands_printed_at_start_work(server: Server) -> None:
    """The test splits each curl line like a shell and sends it with httpx, so it does not need curl."""
    commands = [shlex.split(line) for line in server.log.read_text().splitlines() if line.strip().startswith("curl")]
    answers: list[Any] = []
    for _, silent, url, *rest in commands:
        assert silent == "-s"
        options = dict(zip(rest[::2], rest[1::2], strict=True))
        name, _, value = options.get("-H", "Accept: */*").partition(": ")
        assert options.keys() <= {"-H", "-d"}
        method = "POST" if "-d" in options else "GET"
        response = httpx.request(method, url, headers={name: value}, content=options.get("-d"), timeout=PATIENCE_S)
        streamed = response.headers["content-type"].startswith("text/event-stream")
        answers.append(chunks(response.text)[0] if streamed else response.json())
    assert [model["id"] for model in answers[0]["data"]] == ["small", "talker"]
    assert [answer["size"]["asked"] for answer in answers[1:]] == [0.6, 0.6]


def test_model_cards_describe_the_served_models(server: Server, served_home: Path, small_artifact: Artifact) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    card, talker = listed["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("small", "model", "acip")
    assert card["max_model_len"] == 512
    assert card["version"] == "1"
    assert card["artifact"] == str(served_home / "small")
    assert card["base"] == small_artifact.manifest["base"]
    assert card["size"]["calibrated_to"] == small_artifact.recipe.stop_ratio
    assert 0 < card["size"]["smallest"] < card["size"]["calibrated_to"]
    assert server.client.get("/v1/models/small").json() == card
    assert server.client.get("/v1/models/talker").json() == talker
    half = server.client.get("/v1/models/small@0.5").json()
    assert half["id"] == "small@0.5"
    assert half["got"]["got"] <= 0.5
    fitting = server.client.get(f"/v1/models/small@fit:{half['got']['bytes']}bytes").json()["got"]
    assert fitting["bytes"] <= half["got"]["bytes"] == fitting["asked"]
    assert server.client.get("/health").json() == {"status": "ok"}
    ready = until(lambda: (answer := server.client.get("/ready")).status_code == 200 and answer.json(), "the server is not ready")
    assert ready == {"status": "ready", "models": ["small", "talker"]}


def test_tradeoff_lists_sizes_ranks_and_memory(server: Server, small_artifact: Artifact) -> None:
    tradeoff = server.client.get("/v1/models/small/tradeoff").json()
    table = small_artifact.table()
    assert [row["asked"] for row in tradeoff["sizes"][:3]] == [1.0, 0.99, 0.98]
    assert all(row["got"] <= row["asked"] for row in tradeoff["sizes"])
    assert tradeoff["sizes"][0]["params"] == table.dense_params + table.rest_params
    assert tradeoff["heatmap"]["ranks"]["1.0"] == tradeoff["heatmap"]["full"]
    half, full = tradeoff["heatmap"]["ranks"]["0.5"], tradeoff["heatmap"]["full"]
    assert sum(map(sum, half)) < sum(map(sum, full))
    assert tradeoff["memory"]["kv_bytes_per_token"] > 0


def test_recorded_completion_is_the_models_answer(server: Server) -> None:
    def recorded() -> dict[str, Any]:
        return server.client.get("/v1/models/small/tradeoff").json()["recorded"][0]

    until(lambda: len(recorded()["completions"]) >= 3, "no completions were recorded in idle time")
    first = recorded()
    completion = first["completions"][1]
    assert completion["size"] < 1
    assert_greedy_text(
        server.ask(prompt=first["prompt"], size_ratio=completion["size"], max_tokens=first["max_tokens"], logprobs=2), completion["text"]
    )


def test_size_may_be_a_budget(server: Server) -> None:
    fit = server.ask(model="small@fit:300KB", max_tokens=2)["size"]
    assert (fit["asked"], fit["unit"]) == (300_000, "bytes")
    assert fit["bytes"] <= 300_000
    assert server.ask(model="small@60%", max_tokens=2)["size"]["got"] == server.ask(model="small@0.6", max_tokens=2)["size"]["got"]
    memory = server.ask(model="small@fit:300MB@256", max_tokens=2)["size"]
    assert (memory["asked"], memory["unit"]) == (300.0, "MB")


def chunks(body: str) -> list[dict[str, Any]]:
    """Return the chunks of a stream, which must consist of server-sent events to the last byte."""
    lines = body.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_stream_adds_up_to_the_answer(server: Server) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "temperature": 1, "seed": 3, "max_tokens": 40, "size_ratio": 0.6, "n": 2}
    whole = server.post(**fields).json()
    response = server.post(**fields, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    streamed = chunks(response.text)
    assert len({(chunk["id"], chunk["model"], chunk["created"]) for chunk in streamed}) == 1
    assert streamed[0]["size"] == whole["size"]
    assert streamed[-1]["choices"] == []
    assert streamed[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in streamed[:-1])
    for choice in whole["choices"]:
        parts = [part for chunk in streamed for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]
    assert len(streamed) > 6, "the stream must have several chunks"


def test_stream_starts_before_the_answer_is_complete(server: Server) -> None:
    with server.generating(prompt=[PROMPT] * 16, max_tokens=400, ignore_eos=True) as lines:
        assert next(lines).startswith("data: {")
        assert sum(1 for _ in lines) > 20


def test_metrics_count_requests_and_tokens(server: Server) -> None:
    labels = 'model="talker",size="0.85"'  # no other test requests it
    server.ask(model="talker", max_tokens=7, size_ratio=0.85, ignore_eos=True)
    until(lambda: server.metric("acip_generated_tokens_total", labels) == 7, "the tokens are not counted")
    until(lambda: server.metric("acip_time_to_first_token_seconds_count", labels) == 1, "the time of the first token is not counted")
    until(lambda: server.metric("acip_requests_total", 'model="talker",status="200"') >= 1, "the request is not counted")
    until(lambda: server.open == 0, "the request is still counted as open")


def test_answer_reports_requested_and_actual_size(server: Server) -> None:
    answer = server.ask(model="small", size_ratio=0.6, max_tokens=8)
    assert answer["object"] == "text_completion"
    assert answer["version"] == "1"
    assert answer["usage"] == {"prompt_tokens": len(PROMPT), "completion_tokens": 8, "total_tokens": len(PROMPT) + 8}
    assert answer["size"]["asked"] == 0.6
    assert 0.59 < answer["size"]["got"] <= 0.6
    assert answer["timings"]["generate_s"] >= answer["timings"]["first_token_s"] > 0


def test_size_may_be_in_the_body_or_in_the_name(server: Server) -> None:
    named, given = server.ask(model="small@0.6"), server.ask(model="small", size_ratio=0.6)
    assert text(named) == text(given)
    assert named["size"] == given["size"]
    assert server.ask()["size"]["got"] == 1.0


def test_name_of_the_only_model_may_be_omitted() -> None:
    named, bare = CompletionRequest(prompt="a", model="small@0.6"), CompletionRequest(prompt="a", size_ratio=0.6)
    assert bare.name_and_budget(["small"]) == named.name_and_budget(["small"])


def test_concurrent_sizes_give_the_texts_of_sequential_requests(server: Server) -> None:
    sizes = [1.0, 0.7, 0.5, 0.3] * 3

    def ask(size: float) -> dict[str, Any]:
        return server.ask(size_ratio=size, max_tokens=32, logprobs=3)

    one_by_one = [ask(size) for size in sizes]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, sizes))
    for sequential, concurrent in zip(one_by_one, together, strict=True):
        assert_greedy_text(sequential, text(concurrent))
        same_text(sequential["choices"][0], concurrent["choices"][0])
    logprobs = {max(answer["choices"][0]["logprobs"]["top_logprobs"][0].values()) for answer in one_by_one[:4]}
    assert len(logprobs) == 4, "the sizes must differ for this test to mean anything"


def test_official_client_lists_models_and_completes_prompts(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["small", "talker"]
    assert client.models.retrieve("small").model_extra["max_model_len"] == 512  # type: ignore[index]
    by_name = client.completions.create(model="small@0.6", prompt=PROMPT, seed=3, max_tokens=24, user="me", n=1, stream=False)
    by_field = client.completions.create(model="small", prompt=PROMPT, seed=3, max_tokens=24, extra_body={"size_ratio": 0.6})
    assert by_name.choices[0].text == by_field.choices[0].text
    assert by_name.choices[0].finish_reason == "length"
    assert by_name.usage is not None and by_name.usage.completion_tokens == 24
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="smalll", prompt=PROMPT)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    stream = client.completions.create(
        model="small@0.6", prompt=PROMPT, seed=3, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(part.choices[0].text for part in parts if part.choices) == by_name.choices[0].text
    assert parts[-1].usage is not None and parts[-1].usage.completion_tokens == 24
    assert client.completions.create(model="small", prompt=PROMPT, logprobs=2, max_tokens=2).choices[0].logprobs is not None
    with pytest.raises(openai.BadRequestError, match="no chat template; use POST /v1/completions"):
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "Hello"}])


def test_official_client_chats_with_a_model_that_has_a_template(server: Server) -> None:
    """Answers come whole, as a stream, and with log probabilities."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    fields: Any = {"model": "talker@0.6", "messages": messages, "seed": 1, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**fields)
    rendered = "<system>Be short.<user>Hello<assistant>"
    bare = server.ask(model="talker@0.6", prompt=rendered, temperature=None, seed=1, max_tokens=12)
    assert whole.choices[0].message.content == text(bare)
    assert whole.object == "chat.completion"
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 12
    assert all(len(token.top_logprobs) == 2 for token in logprobs.content)
    parts = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert parts[-1].usage is not None and parts[-1].usage.completion_tokens == 12


def test_size_is_materialized_once_in_the_background(server: Server) -> None:
    response = server.client.post("/v1/materializations", json={"model": "small@0.6"})
    assert response.status_code == 202, response.text
    record = response.json()
    assert record["status"] in ("queued", "running")
    assert record["size"] == server.ask(model="small@0.6", max_tokens=1)["size"], "the server must answer meanwhile"

    def current() -> dict[str, Any]:
        latest = server.client.get(f"/v1/materializations/{record['id']}").json()
        assert latest["status"] != "failed", latest
        return latest

    until(lambda: current()["status"] == "succeeded", "the materialization does not succeed")
    finished = current()
    assert hashlib.sha256((Path(finished["uri"]) / "provenance.json").read_bytes()).hexdigest() == finished["sha256"]
    assert AutoModelForCausalLM.from_pretrained(finished["uri"]).config.acip["layers"]
    again = server.client.post("/v1/materializations", json={"model": "small", "size_ratio": 0.6})
    assert (again.status_code, again.json()) == (200, finished)
    assert [row for row in server.client.get("/v1/materializations").json()["data"] if row["id"] == finished["id"]] == [finished]
