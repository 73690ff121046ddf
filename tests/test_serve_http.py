"""`python jobs/serve.py` as its users meet it: started as a program, asked over HTTP, stopped by Ctrl-C."""

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import openai
import psutil
import pytest
from acip_platform.settings import Settings
from acip_platform.tracking import Registry, Tracking
from transformers import AutoModelForCausalLM

from acip.artifact import Artifact
from tests.server import JOB, PROMPT, Server, running

# of Ray's import
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")


@pytest.fixture(scope="module")
def home(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ACIP_HOME whose registry holds the small artifact as champion."""
    home = tmp_path_factory.mktemp("home")
    settings = Settings.from_env({"ACIP_HOME": str(home)})
    run = Tracking(settings, "test").start("small", "f", {})
    registry = Registry(settings)
    registry.set_alias(registry.register("small", str(small_artifact.folder), run.run_id, {}))
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with running(home) as server:
        yield server


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["text"]


def test_the_first_screens_commands_work_as_they_are(server: Server) -> None:
    """Each curl line, split as a shell would and sent as curl would: a machine without curl checks them too."""
    commands = [shlex.split(line) for line in server.log.read_text().splitlines() if line.strip().startswith("curl")]
    answers: list[Any] = []
    for _, silent, url, *rest in commands:
        options = dict(zip(rest[::2], rest[1::2], strict=True))
        name, _, value = options.get("-H", "Accept: */*").partition(": ")
        method = "POST" if "-d" in options else "GET"
        response = httpx.request(method, url, headers={name: value}, content=options.get("-d"), timeout=60)
        streamed = response.headers["content-type"].startswith("text/event-stream")
        answers.append(chunks(response.text)[0] if streamed else response.json())
        assert silent == "-s"
        assert options.keys() <= {"-H", "-d"}
    assert answers[0]["data"][0]["id"] == "small"
    assert [answer["size"]["asked"] for answer in answers[1:]] == [0.6, 0.6]


def test_models_say_what_is_served(server: Server, small_artifact: Artifact) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("small", "model", "acip")
    assert card["max_model_len"] == 512
    assert card["version"] == "1"
    assert card["artifact"] == str(small_artifact.folder)
    assert card["base"] == small_artifact.manifest["base"]
    assert card["size"]["calibrated_to"] == small_artifact.recipe.stop_ratio
    assert 0 < card["size"]["smallest"] < card["size"]["calibrated_to"]
    assert server.client.get("/v1/models/small").json() == card
    half = server.client.get("/v1/models/small@0.5").json()
    assert half["id"] == "small@0.5"
    assert half["got"]["got"] <= 0.5
    fitting = server.client.get(f"/v1/models/small@fit:{half['got']['bytes']}bytes").json()["got"]
    assert fitting["bytes"] <= half["got"]["bytes"] == fitting["asked"]
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.client.get("/ready").json() == {"status": "ready", "models": ["small"]}


def test_the_trade_off_is_told(server: Server, small_artifact: Artifact) -> None:
    told = server.client.get("/v1/models/small/tradeoff").json()
    table = small_artifact.table()
    assert [row["asked"] for row in told["sizes"][:3]] == [1.0, 0.99, 0.98]
    assert all(row["got"] <= row["asked"] for row in told["sizes"])
    assert told["sizes"][0]["params"] == table.dense_params + table.rest_params
    assert told["heatmap"]["ranks"]["1.0"] == told["heatmap"]["full"]
    half, full = told["heatmap"]["ranks"]["0.5"], told["heatmap"]["full"]
    assert sum(map(sum, half)) < sum(map(sum, full))
    assert told["memory"]["kv_bytes_per_token"] > 0
    deadline = time.monotonic() + 60
    while len((recorded := server.client.get("/v1/models/small/tradeoff").json()["recorded"])[0]["completions"]) < 3:
        assert time.monotonic() < deadline, "recordings are made in idle time"
        time.sleep(0.5)
    first = recorded[0]
    at = first["completions"][1]
    live = server.ask(prompt=first["prompt"], size_ratio=at["size"], max_tokens=first["max_tokens"])
    assert text(live) == at["text"], "a recording is what the model says"


def test_a_budget_may_be_the_size(server: Server) -> None:
    fit = server.ask(model="small@fit:300KB", max_tokens=2)["size"]
    assert (fit["asked"], fit["unit"]) == (300_000, "bytes")
    assert fit["bytes"] <= 300_000
    assert server.ask(model="small@60%", max_tokens=2)["size"]["got"] == server.ask(model="small@0.6", max_tokens=2)["size"]["got"]
    memory = server.ask(model="small@fit:300MB@256", max_tokens=2)["size"]
    assert (memory["asked"], memory["unit"]) == (300.0, "MB")


def chunks(body: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which must be server-sent events to the last byte."""
    lines = body.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    asked = {"prompt": PROMPT, "temperature": 1, "seed": 3, "max_tokens": 40, "size_ratio": 0.6, "n": 2}
    whole = server.client.post("/v1/completions", json=asked).json()
    response = server.client.post("/v1/completions", json={**asked, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    told = chunks(response.text)
    assert len({(chunk["id"], chunk["model"], chunk["created"]) for chunk in told}) == 1
    assert told[0]["size"] == whole["size"]
    assert told[-1]["choices"] == []
    assert told[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in told[:-1])
    for choice in whole["choices"]:
        parts = [part for chunk in told for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]
    assert len(told) > 6, "it came in pieces"


def test_a_stream_comes_while_it_is_made(server: Server) -> None:
    times = []
    asked = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=asked) as response:
        for line in response.iter_lines():
            if line:
                times.append(time.monotonic())
    assert len(times) > 20
    assert times[len(times) // 2] - times[0] > 0.2 * (times[-1] - times[0])


def test_what_a_stream_cannot_answer_is_a_status(server: Server) -> None:
    response = server.client.post("/v1/completions", json={"prompt": "a" * 600, "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_metrics_count_what_was_answered(server: Server) -> None:
    def told(name: str) -> float:
        lines = [line for line in server.client.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = told("acip_generated_tokens_total"), told("acip_time_to_first_token_seconds_count")
    server.ask(max_tokens=7, size_ratio=0.5, ignore_eos=True)
    assert told("acip_generated_tokens_total") == before[0] + 7
    assert told("acip_time_to_first_token_seconds_count") == before[1] + 1
    assert 'acip_generated_tokens_total{model="small",size="0.50"}' in server.client.get("/metrics").text
    assert told("acip_requests_running") == told("acip_requests_waiting") == 0


def test_asked_and_got(server: Server) -> None:
    answer = server.ask(model="small", size_ratio=0.6, max_tokens=8)
    assert answer["object"] == "text_completion"
    assert answer["version"] == "1"
    assert answer["usage"] == {"prompt_tokens": len(PROMPT), "completion_tokens": 8, "total_tokens": len(PROMPT) + 8}
    assert answer["size"]["asked"] == 0.6
    assert 0.59 < answer["size"]["got"] <= 0.6
    assert answer["timings"]["generate_s"] >= answer["timings"]["first_token_s"] > 0


def test_the_size_may_be_in_the_body_or_in_the_name_and_the_model_left_out(server: Server) -> None:
    named, given, bare = server.ask(model="small@0.6"), server.ask(model="small", size_ratio=0.6), server.ask(size_ratio=0.6)
    assert text(named) == text(given) == text(bare)
    assert named["size"] == given["size"] == bare["size"]
    assert server.ask()["size"]["got"] == 1.0


def test_sizes_asked_for_at_once_give_the_texts_of_one_after_the_other(server: Server) -> None:
    sizes = [1.0, 0.7, 0.5, 0.3] * 3
    one_by_one = [text(server.ask(size_ratio=size, max_tokens=32)) for size in sizes]
    assert len(set(one_by_one)) == 4, "the sizes must differ for this test to mean anything"
    with ThreadPoolExecutor(8) as pool:
        together = [text(answer) for answer in pool.map(lambda size: server.ask(size_ratio=size, max_tokens=32), sizes)]
    assert together == one_by_one


def test_openais_client_works(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").model_extra["max_model_len"] == 512  # type: ignore[index]
    one = client.completions.create(model="small@0.6", prompt=PROMPT, seed=3, max_tokens=24, user="me", n=1, stream=False)
    two = client.completions.create(model="small", prompt=PROMPT, seed=3, max_tokens=24, extra_body={"size_ratio": 0.6})
    assert one.choices[0].text == two.choices[0].text
    assert one.choices[0].finish_reason == "length"
    assert one.usage is not None and one.usage.completion_tokens == 24
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="smalll", prompt=PROMPT)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    stream = client.completions.create(
        model="small@0.6", prompt=PROMPT, seed=3, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(part.choices[0].text for part in parts if part.choices) == one.choices[0].text
    assert parts[-1].usage is not None and parts[-1].usage.completion_tokens == 24
    assert client.completions.create(model="small", prompt=PROMPT, logprobs=2, max_tokens=2).choices[0].logprobs is not None
    with pytest.raises(openai.BadRequestError, match="no chat template; ask POST /v1/completions"):
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "Hello"}])


ASK = ("POST", "/v1/completions")
CHAT = ("POST", "/v1/chat/completions")
LOAD = ("POST", "/v1/models/small/load")
JSON = {"content-type": "application/json"}
# request, status, param, what the message says
BAD: dict[str, tuple[tuple[str, str], Any, int, str | None, list[str]]] = {
    "ratio above 1": (ASK, {"prompt": "a", "size_ratio": 1.2}, 400, "size_ratio", ["1.2", "above 0 and up to 1"]),
    "ratio 0": (ASK, {"prompt": "a", "size_ratio": 0}, 400, "size_ratio", ["size_ratio is 0", "above 0 and up to 1"]),
    "ratio as text": (ASK, {"prompt": "a", "size_ratio": "0.6"}, 400, "size_ratio", ["'0.6'", "a number above 0 and up to 1"]),
    "ratio true": (ASK, {"prompt": "a", "size_ratio": True}, 400, "size_ratio", ["True", "a number above 0 and up to 1"]),
    "ratio NaN": (ASK, b'{"prompt": "a", "size_ratio": NaN}', 400, "size_ratio", ["nan", "above 0 and up to 1"]),
    "ratio too small": (ASK, {"prompt": "a", "size_ratio": 1e-4}, 400, "size_ratio", ["can't be reached: the smallest is 0.0"]),
    "ratio in the name": (ASK, {"prompt": "a", "model": "small@big"}, 400, "model", ["'big'", "as in small@0.6"]),
    "ratio in the name above 1": (ASK, {"prompt": "a", "model": "small@60"}, 400, "model", ["'60'", "above 0 and up to 1"]),
    "a context of nothing": (ASK, {"prompt": "a", "model": "small@fit:8GB@much"}, 400, "model", ["small@fit:8GB@4096 at this context"]),
    "two ratios": (ASK, {"prompt": "a", "model": "small@0.5", "size_ratio": 0.6}, 400, "size_ratio", ["0.5", "0.6", "give one"]),
    "unknown model": (ASK, {"prompt": "a", "model": "smal"}, 404, "model", ["'smal'", "did you mean 'small'?", "NAME@RATIO"]),
    "unknown model with size": (ASK, {"prompt": "a", "model": "gpt-4@0.5"}, 404, "model", ["'gpt-4@0.5'", "served: small"]),
    "over-long prompt": (ASK, {"prompt": "a" * 600}, 400, "prompt", ["600 tokens", "512 tokens", "shorten the prompt to 496 tokens"]),
    "too many tokens": (ASK, {"prompt": "a", "max_tokens": 5000}, 400, "max_tokens", ["5000", "512", "at most 511 tokens"]),
    "no tokens": (ASK, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", ["max_tokens is 0", "at least 1"]),
    "half a token": (ASK, {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens", ["1.5", "whole number"]),
    "no prompt": (ASK, {"size_ratio": 0.6}, 400, "prompt", ["prompt is missing", "a text, a list"]),
    "no such token": (ASK, {"prompt": [1, 2, 300]}, 400, "prompt", ["token 300", "tokens 0 to 255"]),
    "texts and tokens": (ASK, {"prompt": ["a", 2]}, 400, "prompt", ["['a', 2]", "a list of 1 to 16 texts, or token ids"]),
    "too many prompts": (ASK, {"prompt": ["a"] * 17}, 400, "prompt", ["a list of 1 to 16 texts"]),
    "half a character": (ASK, b'{"prompt": "\\ud800"}', 400, "prompt", ["\\ud800", "a text"]),
    "typo": (ASK, {"prompt": "a", "size_ration": 0.6}, 400, "size_ration", ["unknown field", "did you mean 'size_ratio'?", "max_tokens"]),
    "temperature": (ASK, {"prompt": "a", "temperature": 2.5}, 400, "temperature", ["2.5", "from 0 (greedy) to 2"]),
    "top_p": (ASK, {"prompt": "a", "top_p": 0}, 400, "top_p", ["top_p is 0", "above 0 and up to 1"]),
    "seed": (ASK, {"prompt": "a", "seed": -1}, 400, "seed", ["-1", "whole number from 0"]),
    "top_k": (ASK, {"prompt": "a", "top_k": 10**20}, 400, "top_k", ["0 = all"]),
    "a size of many digits": (ASK, {"prompt": "a", "model": f"small@fit:{'9' * 5000}GB"}, 400, "model", ["what must hold it"]),
    "five stops": (ASK, {"prompt": "a", "stop": list("abcde")}, 400, "stop", ["up to 4 texts"]),
    "empty stop": (ASK, {"prompt": "a", "stop": ""}, 400, "stop", ["none empty"]),
    "n": (ASK, {"prompt": "a", "n": 17}, 400, "n", ["n is 17", "from 1 to 16"]),
    "stream": (ASK, {"prompt": "a", "stream": "yes"}, 400, "stream", ["must be true or false"]),
    "stream options": (ASK, {"prompt": "a", "stream_options": 3}, 400, "stream_options", ['like {"include_usage": true}']),
    "bias": (ASK, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", ["token ids with biases from -100 to 100"]),
    "no messages": (CHAT, {"messages": []}, 400, "messages", ["a list like", "roles system, developer, user, assistant"]),
    "a role": (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages", ["roles system, developer, user, assistant"]),
    "an image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", ["contents text"]),
    "tools": (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools", ["not offered"]),
    "chat without a template": (CHAT, {"messages": [{"role": "user", "content": "a"}]}, 400, "messages", ["ask POST /v1/completions"]),
    "a strange quantiser": (("POST", "/v1/materializations"), {"quantize": "int3"}, 400, "quantize", ['"nf4", "fp4", "int8"']),
    "no such materialization": (("GET", "/v1/materializations/mat-1"), b"", 404, "id", ["no materialization 'mat-1'"]),
    "load nothing": (LOAD, {}, 400, "version", ['give either "version"']),
    "load a name as version": (LOAD, {"version": "new"}, 400, "version", ["a version number as a text"]),
    "load what is not there": (LOAD, {"version": "99"}, 404, "model", ["no version or alias '99'"]),
    "echo": (ASK, {"prompt": "a", "echo": True}, 400, "echo", ["must be false"]),
    "logprobs": (ASK, {"prompt": "a", "logprobs": 9}, 400, "logprobs", ["logprobs is 9", "0 to 5"]),
    "penalty": (ASK, {"prompt": "a", "presence_penalty": 2.5}, 400, "presence_penalty", ["2.5", "from -2 to 2"]),
    "broken JSON": (ASK, b'{"prompt": "a"', 400, None, ["not JSON", "delimiter"]),
    "an array": (ASK, [1], 400, None, ["send a JSON object like", "size_ratio"]),
    "no body": (ASK, b"", 400, None, ["send a JSON object like", "Content-Type: application/json"]),
    "not UTF-8": (ASK, b'{"prompt": "\xff"}', 400, None, ["JSON object in UTF-8"]),
    "a huge body": (ASK, b'{"prompt": "' + b"a" * (5 << 20) + b'"}', 413, None, ["4,194,304 bytes"]),
    "wrong method": (("GET", "/v1/completions"), b"", 405, None, ["no GET /v1/completions", "POST /v1/completions"]),
    "unknown route": (("POST", "/v1/embeddings"), {}, 404, None, ["no POST /v1/embeddings", "POST /v1/completions"]),
    "unknown model's card": (("GET", "/v1/models/tiny"), b"", 404, "model", ["no model 'tiny'", "served: small"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_answered_says_what_is_allowed(server: Server, case: str) -> None:
    (method, path), body, status, param, says = BAD[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client.request(method, path, content=content, headers=JSON)
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    for words in says:
        assert words in error["message"]


def test_json_without_its_header_is_told_so(server: Server) -> None:
    response = server.client.post("/v1/completions", data={"prompt": "a"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_a_full_queue_is_429_and_who_leaves_makes_room(server: Server) -> None:
    long = {"prompt": ["a"] * 16, "max_tokens": 500, "stop": "never there", "ignore_eos": True}  # seconds of work each

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=100)) as client:
            asked = [asyncio.create_task(client.post("/v1/completions", json={**long, "stream": i % 2 == 0})) for i in range(90)]
            done, waiting = await asyncio.wait(asked, timeout=4)
            ready = await client.get("/ready")
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            return [ready, *(task.result() for task in done)]

    ready, *refused = asyncio.run(flood())
    assert ready.status_code == 200, "busy is not broken"
    refused = [response for response in refused if response.status_code != 200]
    assert len(refused) == 90 - 64
    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"] == {
            "message": "the server is busy and its queue is full; try again in a moment.",
            "type": "rate_limit_error", "param": None, "code": "queue_full",
        }  # fmt: skip
    began = time.monotonic()
    server.ask(max_tokens=1)
    assert time.monotonic() - began < 10, "the others are gone, and so is their work"
    deadline = time.monotonic() + 10
    while sum(float(line.rpartition(" ")[2]) for line in server.client.get("/metrics").text.splitlines() if line.startswith(OPEN)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


OPEN = ("acip_requests_waiting", "acip_requests_running")


def test_who_does_not_read_holds_no_slot(server: Server) -> None:
    """Ten clients ask for streams and never read a byte: they are answered all the same, and others meanwhile."""
    body = json.dumps({"prompt": ["a"] * 16, "max_tokens": 300, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host, _, port = server.url.removeprefix("http://").partition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            client.sendall(head + body)
        server.ask(max_tokens=2)
        deadline = time.monotonic() + 90
        while sum(float(line.rpartition(" ")[2]) for line in server.client.get("/metrics").text.splitlines() if line.startswith(OPEN)):
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_a_killed_engine_is_replaced_and_its_requests_are_answered_or_told(server: Server) -> None:
    before = text(server.ask(size_ratio=0.5))
    (engine,) = [process for process in server.processes() if "Engine" in process.name() or "Engine" in "".join(process.cmdline())]
    long = {"prompt": ["a"] * 16, "max_tokens": 250, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.client.post, "/v1/completions", json=long)
        streamed = pool.submit(server.client.post, "/v1/completions", json={**long, "stream": True})
        time.sleep(1)
        engine.kill()
        *_, last = [line for line in streamed.result().text.split("\n\n") if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable", "a stream that has begun can't begin again"
        assert "being replaced" in error["message"]
        assert whole.result().status_code == 200, "asked again of the new engine"
        assert whole.result().json()["usage"]["completion_tokens"] == 16 * 250
    assert text(server.ask(size_ratio=0.5)) == before, "the same version"


def test_a_size_is_materialised_in_the_background_once(server: Server) -> None:
    began = server.client.post("/v1/materializations", json={"model": "small@0.6"})
    assert began.status_code == 202, began.text
    record = began.json()
    assert record["status"] in ("queued", "running")
    assert record["size"] == server.ask(model="small@0.6", max_tokens=1)["size"], "the server answers meanwhile"
    deadline = time.monotonic() + 90
    while (now := server.client.get(f"/v1/materializations/{record['id']}").json())["status"] != "succeeded":
        assert now["status"] != "failed" and time.monotonic() < deadline, now
        time.sleep(0.5)
    assert hashlib.sha256((Path(now["uri"]) / "provenance.json").read_bytes()).hexdigest() == now["sha256"]
    assert AutoModelForCausalLM.from_pretrained(now["uri"]).config.acip["layers"]
    again = server.client.post("/v1/materializations", json={"model": "small", "size_ratio": 0.6})
    assert (again.status_code, again.json()["id"], again.json()["uri"]) == (200, now["id"], now["uri"])
    assert [row["id"] for row in server.client.get("/v1/materializations").json()["data"]] == [now["id"]]


def chat(server: Server) -> None:
    """OpenAI's client talks to a model that has a template: whole, in pieces, with log-probabilities."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    asked: Any = {"model": "small@0.6", "messages": messages, "seed": 1, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    bare = server.ask(prompt="<system>Be short.<user>Hello<assistant>", temperature=None, seed=1, max_tokens=12, size_ratio=0.6)
    assert whole.choices[0].message.content == text(bare)
    assert whole.object == "chat.completion"
    told = whole.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == 12 and len(told.content[0].top_logprobs) == 2
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert parts[-1].usage is not None and parts[-1].usage.completion_tokens == 12


def test_another_version_is_served_without_a_restart(server: Server, home: Path, small_artifact: Artifact) -> None:
    settings = Settings.from_env({"ACIP_HOME": str(home)})
    copied = shutil.copytree(small_artifact.folder, home / "again")
    (copied / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    new = Registry(settings).register("small", str(copied), Tracking(settings, "test").start("again", "g", {}).run_id, {})
    Registry(settings).set_alias(new, "candidate")
    card = server.client.post("/v1/models/small/load", json={"alias": "candidate"}).json()
    assert (card["id"], card["version"], card["artifact"]) == ("small", new.version, str(copied))
    assert server.ask(max_tokens=2)["version"] == new.version
    assert server.client.get("/v1/models/small").json()["version"] == new.version
    chat(server)
    assert server.client.post("/v1/models/small/load", json={"version": "1"}).json()["version"] == "1"
    assert server.ask(max_tokens=2)["version"] == "1"


def test_ctrl_c_lets_answers_finish_and_leaves_nothing_behind(server: Server) -> None:
    everything = server.processes()
    assert len(everything) > 5
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, prompt=["a"] * 4, max_tokens=500, ignore_eos=True)
        time.sleep(1)
        server.process.send_signal(signal.SIGINT)
        assert asked.result()["usage"]["completion_tokens"] == 2000
    assert server.process.wait(60) == 0
    # Ray's own warnings about the machine may stand between or after
    said = [line for line in server.log.read_text().splitlines() if line in ("stopped.", "Traceback (most recent call last):")]
    assert said == ["stopped."]
    assert psutil.wait_procs(everything, timeout=10)[1] == []


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_job", JOB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_does_not_listen_to_the_world(job: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--host", "0.0.0.0"])
    with pytest.raises(SystemExit) as stopped:
        job.main()
    assert stopped.value.code == 2
    assert "'0.0.0.0'; without API keys only a loopback address (127.0.0.1) is allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("nothing registered", "nothing to serve. Calibrate some with `python jobs/calibrate_all.py`"),
        ("unknown model", "no model 'smal' in the registry (did you mean 'small'?)"),
        ("unknown alias", "has no version or alias 'winner'"),
        ("artifact gone", "where there is no artifact. Was it moved or deleted?"),
        ("port taken", "Address already in use). Stop what runs there, or choose another --port"),
    ],
)
def test_what_cannot_be_served_says_why(
    job: ModuleType, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str, says: str
) -> None:
    monkeypatch.setenv("ACIP_HOME", str(tmp_path if case == "nothing registered" else home))
    args = {"unknown model": ["--model", "smal"], "unknown alias": ["--model", "small", "--alias", "winner"]}.get(case, [])
    if case == "artifact gone":
        registry = Registry(Settings.from_env())
        lost = registry.register("lost", str(tmp_path / "lost"), Tracking(Settings.from_env(), "test").start("lost", "g", {}).run_id, {})
        registry.set_alias(lost, "lost")
        args = ["--model", "lost", "--alias", "lost"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(sys, "argv", ["serve.py", "--port", str(taken.getsockname()[1]), *args])
        assert job.main() == 1
    assert says in capsys.readouterr().err
