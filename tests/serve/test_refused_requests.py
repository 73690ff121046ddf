"""Invalid requests: each gets an error in OpenAI's format, which names the received value and the allowed values."""

import json
from typing import Any

import pytest

from tests.support.server import Server

Request = tuple[str, str, Any]  # method, path, body


def ask(**fields: Any) -> Request:
    """Return a completion request that is valid except for these fields."""
    return "POST", "/v1/completions", {"model": "small", "prompt": "a", **fields}


def chat(**fields: Any) -> Request:
    return "POST", "/v1/chat/completions", {"model": "small", "messages": [{"role": "user", "content": "a"}], **fields}


def raw(body: bytes) -> Request:
    return "POST", "/v1/completions", body


def load(**fields: str) -> Request:
    return "POST", "/v1/models/small/load", fields


VALUE, SIZE, JSON = "invalid_value", "invalid_size", "invalid_json"
LONG, NO_MODEL, NO_ROUTE = "context_length_exceeded", "model_not_found", "unknown_route"
# request, status, code, param, parts of the message
REFUSED: dict[str, tuple[Request, int, str | None, str | None, list[str]]] = {
    "ratio above 1": (ask(size_ratio=1.2), 400, VALUE, "size_ratio", ["1.2", "above 0 and up to 1"]),
    "ratio 0": (ask(size_ratio=0), 400, VALUE, "size_ratio", ["size_ratio is 0", "above 0 and up to 1"]),
    "ratio as text": (ask(size_ratio="0.6"), 400, VALUE, "size_ratio", ["'0.6'", "a number above 0 and up to 1"]),
    "ratio true": (ask(size_ratio=True), 400, VALUE, "size_ratio", ["True", "a number above 0 and up to 1"]),
    "ratio NaN": (raw(b'{"prompt": "a", "size_ratio": NaN}'), 400, JSON, None, ["NaN is not a JSON number"]),
    "ratio endless": (raw(b'{"prompt": "a", "size_ratio": 1e999}'), 400, VALUE, "size_ratio", ["inf", "above 0 and up to 1"]),
    "ratio too small": (ask(size_ratio=1e-4), 400, SIZE, "size_ratio", ["can't be reached: the smallest is 0.0"]),
    "ratio in the name": (ask(model="small@big"), 400, SIZE, "model", ["'big'", "as in small@0.6"]),
    "ratio in the name above 1": (ask(model="small@60"), 400, SIZE, "model", ["'60'", "above 0 and up to 1"]),
    "a context of nothing": (ask(model="small@fit:8GB@much"), 400, SIZE, "model", ["small@fit:8GB@4096 at this context"]),
    "a size of many digits": (ask(model=f"small@fit:{'9' * 900}GB"), 400, SIZE, "model", ["the memory to fit into"]),
    "a long name": (ask(model="small@" + "9" * 100_000), 400, VALUE, "model", ["the name of a served model"]),
    "two ratios": (ask(model="small@0.5", size_ratio=0.6), 400, "size_twice", "size_ratio", ["0.5", "0.6", "give one"]),
    "no model": (ask(model=None), 400, "model_required", "model", ["several models are served", "small, talker"]),
    "unknown model": (ask(model="smal"), 404, NO_MODEL, "model", ["'smal'", "did you mean 'small'?", "NAME@RATIO"]),
    "unknown model with size": (ask(model="gpt-4@0.5"), 404, NO_MODEL, "model", ["'gpt-4@0.5'", "served: small, talker"]),
    "over-long prompt": (ask(prompt="a" * 600), 400, LONG, "prompt", ["600 tokens", "512 tokens", "shorten the prompt to 496 tokens"]),
    "over-long stream": (ask(prompt="a" * 600, stream=True), 400, LONG, "prompt", ["600 tokens"]),
    "too many tokens": (ask(max_tokens=5000), 400, LONG, "max_tokens", ["5000", "512", "at most 511 tokens"]),
    "no tokens": (ask(max_tokens=0), 400, VALUE, "max_tokens", ["max_tokens is 0", "at least 1"]),
    "half a token": (ask(max_tokens=1.5), 400, VALUE, "max_tokens", ["1.5", "whole number"]),
    "no prompt": (raw(b'{"size_ratio": 0.6}'), 400, "missing_field", "prompt", ["prompt is missing", "a text, a list"]),
    "no such token": (ask(prompt=[1, 2, 300]), 400, VALUE, "prompt", ["token 300", "tokens 0 to 255"]),
    "texts and tokens": (ask(prompt=["a", 2]), 400, VALUE, "prompt", ["['a', 2]", "a list of texts, or token ids"]),
    "too many prompts": (ask(prompt=["a"] * 129), 400, VALUE, "prompt", ["129 prompts times n = 1 is more than 128 answers"]),
    "too many answers": (ask(prompt=["a"] * 65, n=2), 400, VALUE, "n", ["65 prompts times n = 2", "more than 128 answers"]),
    "half a character": (raw(b'{"prompt": "\\ud800"}'), 400, VALUE, "prompt", ["\\ud800", "a text"]),
    "typo": (ask(size_ration=0.6), 400, "unknown_field", "size_ration", ["unknown field", "did you mean 'size_ratio'?", "max_tokens"]),
    "temperature": (ask(temperature=2.5), 400, VALUE, "temperature", ["2.5", "from 0 (greedy) to 2"]),
    "top_p": (ask(top_p=0), 400, VALUE, "top_p", ["top_p is 0", "above 0 and up to 1"]),
    "top_k": (ask(top_k=10**20), 400, VALUE, "top_k", ["0 = all"]),
    "seed": (ask(seed=-1), 400, VALUE, "seed", ["-1", "whole number from 0"]),
    "five stops": (ask(stop=list("abcde")), 400, VALUE, "stop", ["up to 4 texts"]),
    "empty stop": (ask(stop=""), 400, VALUE, "stop", ["none empty"]),
    "n": (ask(n=17), 400, VALUE, "n", ["n is 17", "from 1 to 16"]),
    "stream": (ask(stream="yes"), 400, VALUE, "stream", ["must be true or false"]),
    "stream options": (ask(stream_options=3), 400, VALUE, "stream_options", ['like {"include_usage": true}']),
    "bias": (ask(logit_bias={"x": 1}), 400, VALUE, "logit_bias", ["token ids with biases from -100 to 100"]),
    "echo": (ask(echo="yes"), 400, VALUE, "echo", ["must be true", "or false"]),
    "logprobs": (ask(logprobs=9), 400, VALUE, "logprobs", ["logprobs is 9", "0 to 5"]),
    "penalty": (ask(presence_penalty=2.5), 400, VALUE, "presence_penalty", ["2.5", "from -2 to 2"]),
    "no messages": (chat(messages=[]), 400, VALUE, "messages", ["a list like"]),
    "a role": (chat(messages=[{"role": "bot", "content": "a"}]), 400, VALUE, "messages[0].role", ['"system", "developer", "user"']),
    "an image": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, VALUE, "messages[0].content[0].type", ["text only"]),
    "tools": (chat(model="talker", tools=[{"type": "function", "function": {"name": "f"}}]), 400, "no_tools", "tools", ["has no tools"]),
    "chat without a template": (chat(), 400, "no_chat", "messages", ["use POST /v1/completions"]),
    "a strange quantizer": (("POST", "/v1/materializations", {"quantize": "int3"}), 400, VALUE, "quantize", ['"nf4", "fp4", "int8"']),
    "no such materialization": (
        ("GET", "/v1/materializations/mat-1", b""), 404, "materialization_not_found", "id", ["no materialization 'mat-1'"]),
    "load nothing": (load(), 400, VALUE, "version", ['give exactly one of "version"']),
    "load two": (load(version="1", alias="champion"), 400, VALUE, "version", ['give exactly one of "version"']),
    "load a name as version": (load(version="new"), 400, VALUE, "version", ["a version number as a text"]),
    "load what is not there": (load(version="99"), 404, NO_MODEL, "model", ["no version or alias '99'"]),
    "broken JSON": (raw(b'{"prompt": "a"'), 400, JSON, None, ["not JSON", "delimiter"]),
    "an array": (raw(b"[1]"), 400, JSON, None, ["send a JSON object like", "size_ratio"]),
    "no body": (raw(b""), 400, JSON, None, ["send a JSON object like", "Content-Type: application/json"]),
    "not UTF-8": (raw(b'{"prompt": "\xff"}'), 400, JSON, None, ["JSON object in UTF-8"]),
    "a huge body": (raw(b'{"prompt": "' + b"a" * (5 << 20) + b'"}'), 413, "body_too_large", None, ["4,194,304 bytes"]),
    "wrong method": (("GET", "/v1/completions", b""), 405, NO_ROUTE, None, ["no route GET /v1/completions", "POST /v1/completions"]),
    "unknown route": (("POST", "/v1/embeddings", {}), 404, NO_ROUTE, None, ["no route POST /v1/embeddings", "POST /v1/completions"]),
    "unknown model's card": (("GET", "/v1/models/tiny", b""), 404, NO_MODEL, "model", ["no model 'tiny'", "served: small, talker"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_request_gets_an_error_with_the_allowed_values(server: Server, case: str) -> None:
    (method, path, body), status, code, param, parts = REFUSED[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    message = error.pop("message")
    assert error == {"type": "invalid_request_error", "param": param, "code": code}
    for part in parts:
        assert part in message


def test_error_for_a_form_names_the_json_header(server: Server) -> None:
    response = server.client.post("/v1/completions", data={"prompt": "a"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]
