"""Every field of an OpenAI request, and of messages in its history, is honored, accepted if neutral, or refused by name."""

import json
import typing
from collections.abc import Iterator
from shutil import copytree
from typing import Any

import httpx
import openai
import pytest
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.http.requests import ChatRequest, CompletionRequest
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionMessage,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_create_params

from acip.artifact.artifact import Artifact
from tests.support.application import Application
from tests.support.server import give_template
from tests.support.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
HELLO = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def app(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder = tmp_path_factory.mktemp("fields")
    artifact = Artifact.open(copytree(small_artifact.folder, folder / "small"))
    give_template(artifact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACIP_HOME", str(folder / "home"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        app = Application(folder / "home", Artifact.open(artifact.folder))
        until(lambda: app.ask("GET", "/ready")[0] == 200, "the model is not loaded")
        yield app
        app.close()


def chat(app: Application, *messages: Any, **fields: Any) -> tuple[int, Any]:
    return app.post("/v1/chat/completions", **{"messages": list(messages) or [HELLO], "max_tokens": 1, **fields})


def complete(app: Application, **fields: Any) -> tuple[int, Any]:
    return app.post("/v1/completions", **{"prompt": "a", "max_tokens": 1, **fields})


# ---- history


def test_official_client_can_send_our_answers_back(app: Application) -> None:
    async def chat_in_turns() -> list[int]:
        http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(app.app), base_url="http://here", timeout=120)
        client = openai.AsyncOpenAI(base_url="http://here/v1", api_key="none", http_client=http, max_retries=0)
        messages: list[Any] = [HELLO]
        prompt_tokens = []
        for _ in range(3):
            answer = await client.chat.completions.create(model="small@0.6", messages=messages, max_tokens=3)
            messages += [answer.choices[0].message, answer.choices[0].message.model_dump(), HELLO]
            prompt_tokens.append(answer.usage.prompt_tokens if answer.usage else 0)
        return prompt_tokens

    prompt_tokens = app.runner.run(chat_in_turns())
    assert prompt_tokens[0] < prompt_tokens[1] < prompt_tokens[2], "the prompt must contain the whole history"


def test_all_forms_of_an_answer_give_the_same_prompt(app: Application) -> None:
    plain = chat(app, HELLO, {"role": "assistant", "content": "Hi"}, HELLO)[1]["usage"]["prompt_tokens"]
    as_parts: list[Any] = [{"type": "text", "text": "H", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "i"}]
    forms: list[dict[str, Any]] = [
        {"content": "Hi", "refusal": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": [], "id": "msg-1"},
        {"content": "Hi", "tool_calls": [], "provider_specific_fields": {"refusal": None}, "of_another_server": {"a": [None, ""]}},
        {"content": as_parts},
        {"content": None, "refusal": "Hi"},
        {"content": [{"type": "refusal", "refusal": "Hi"}], "name": "me"},
    ]
    for form in forms:
        status, body = chat(app, HELLO, {"role": "assistant", **form}, HELLO)
        assert status == 200, body
        assert body["usage"]["prompt_tokens"] == plain


def test_developer_role_is_treated_as_system(app: Application) -> None:
    tokens = [chat(app, {"role": role, "content": "Be kind."}, HELLO)[1]["usage"]["prompt_tokens"] for role in ("developer", "system")]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("kind", [ChatCompletionMessage, ChatCompletionAssistantMessageParam, ChatCompletionUserMessageParam])
def test_every_field_of_a_message_may_be_null(kind: Any) -> None:
    fields = dict.fromkeys(getattr(kind, "model_fields", None) or typing.get_type_hints(kind)) | {"role": "assistant", "content": "a"}
    assert ChatRequest.parse({"messages": [fields]}).template_messages == [{"role": "assistant", "content": "a"}]


def test_tool_calls_are_converted_for_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    result = dict.fromkeys(typing.get_type_hints(ChatCompletionToolMessageParam)) | {"role": "tool", "content": "2", "tool_call_id": "1"}
    request = ChatRequest.parse({"messages": [HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result]})
    assert request.template_messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert request.template_messages[1]["content"] == ""
    assert request.template_messages[2] == {"role": "tool", "content": "2", "tool_call_id": "1"}
    assert request.has_tools


def test_tool_message_is_refused_if_the_template_has_no_tools(app: Application) -> None:
    status, body = chat(app, HELLO, {"role": "tool", "content": "2", "tool_call_id": "1"})
    assert (status, body["error"]["code"]) == (400, "no_tools")


@pytest.mark.parametrize(
    ("message", "field", "error"),
    [
        ({"role": "robot", "content": "a"}, "messages[1].role", "is 'robot'; it must be \"system\""),
        ({"content": "a"}, "messages[1].role", "is missing"),
        ({"role": "user", "content": None}, "messages[1].content", "is missing; it must be a text, or a list"),
        ({"role": "user", "content": 3}, "messages[1].content", "is 3"),
        ({"role": "user", "content": []}, "messages[1].content", "is []"),
        ({"role": "user", "content": ["a"]}, "messages[1].content[0]", "is 'a'; it must be an object like"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text", "is missing; it must be a text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, "messages[1].content[0].type", "text only"),
        ({"role": "assistant", "content": "a", "audio": {"id": "1"}}, "messages[1].audio", "unknown field 'messages[1].audio'"),
        ({"role": "user", "contents": "a", "content": "b"}, "messages[1].contents", "did you mean 'content'?"),
        ("a", "messages[1]", "is 'a'; it must be an object like"),
    ],
)
def test_error_names_its_field(message: Any, field: str, error: str) -> None:
    with pytest.raises(RequestError) as refused:
        ChatRequest.parse({"messages": [HELLO, message]})
    assert refused.value.param == field
    assert error in str(refused.value)


@pytest.mark.parametrize("field", ["stored_bytes", "params", "memory_mb", "max_perplexity", "max_loss_increase", "max_kl", "max_flops"])
def test_error_of_a_size_says_what_is_allowed(field: str) -> None:
    with pytest.raises(
        RequestError, match=rf"^{field} is -1; it must be (a whole number|the memory|the largest) .*\(instead of size_ratio\)"
    ):
        ChatRequest.parse({"messages": [HELLO], field: -1})


# ---- fields of the request

REQUIRED: dict[str, Any] = {"messages": [HELLO], "prompt": "a", "model": "small"}
KINDS: list[tuple[Any, Any]] = [
    (ChatRequest, chat_create_params.CompletionCreateParamsBase), (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), KINDS)
def test_every_field_of_the_official_client_is_known_and_may_be_null(ours: Any, theirs: Any) -> None:
    names = list(typing.get_type_hints(theirs))
    assert len(names) > 15
    fields = {name: REQUIRED.get(name) for name in names} | {"stream": None}
    assert ours.parse(fields).model == "small"


NEUTRAL: dict[str, list[Any]] = {
    "store": [True, False], "metadata": [{"a": "b"}, {"a": {"b": {"c": [1]}}}], "parallel_tool_calls": [True, False], "user": ["me"],
    "service_tier": ["auto", "default"], "stream_options": [{}, {"include_usage": True, "include_obfuscation": False}], "stop": [[], "z"],
    "logit_bias": [{}], "n": [1], "response_format": [{"type": "text"}], "tools": [[]], "tool_choice": ["none", "auto"],
    "functions": [[]], "function_call": ["none"], "reasoning_effort": ["medium"], "verbosity": ["medium"], "modalities": [["text"]],
    "prediction": [{"type": "content", "content": "a"}], "prompt_cache_key": ["a"], "safety_identifier": ["a"], "seed": [0],
    "prompt_cache_retention": ["24h"], "top_logprobs": [0], "temperature": [1], "top_p": [1],
}  # fmt: skip


@pytest.mark.parametrize("field", NEUTRAL)
def test_neutral_values_are_accepted(app: Application, field: str) -> None:
    for value in NEUTRAL[field]:
        status, body = chat(app, **{field: value})
        assert status == 200, body


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]), ("modalities", ["text", "audio"]), ("audio", {"voice": "a"}), ("web_search_options", {}),
        ("reasoning_effort", "high"), ("verbosity", "low"), ("moderation", {"model": "a"}), ("top_logprobs", 2),
    ],
)  # fmt: skip
def test_unsupported_values_are_refused_by_name(app: Application, field: str, value: Any) -> None:
    status, body = chat(app, **{field: value})
    assert status == 400
    assert body["error"]["param"] == field


def test_completions_accept_neutral_values(app: Application) -> None:
    for fields in ({"best_of": 1}, {"best_of": 2, "n": 2}, {"suffix": ""}, {"echo": False}, {"prompt": None}, {"logprobs": 0}):
        status, body = complete(app, **fields)
        assert status == 200, (fields, body)
    assert complete(app, best_of=3, n=2)[1]["error"]["param"] == "best_of"
    assert complete(app, suffix="b")[1]["error"]["param"] == "suffix"


def test_unused_fields_are_dropped() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    request = ChatRequest.parse({"messages": [HELLO], "metadata": deep, "user": "me", "store": True})
    assert (request.metadata, request.user, request.store) == (None, None, None)


def test_number_of_answers_is_limited(app: Application) -> None:
    status, body = complete(app, prompt=["a"] * 20)
    assert status == 200
    assert [choice["index"] for choice in body["choices"]] == list(range(20))
    status, body = complete(app, prompt=["a"] * 129)
    assert (status, body["error"]["param"]) == (400, "prompt")
    assert complete(app, prompt=["a"] * 128, max_tokens=1)[0] == 200
    assert complete(app, prompt=["a"] * 65, n=2)[1]["error"]["param"] == "n"


def test_chat_without_max_tokens_reports_its_default(app: Application) -> None:
    app.replica.engine.default_max_tokens = 5
    try:
        _, body = chat(app, max_tokens=None, ignore_eos=True)
        assert (body["max_tokens"], body["usage"]["completion_tokens"]) == (5, 5)
        assert body["choices"][0]["finish_reason"] == "length"
        assert chat(app, max_tokens=7, ignore_eos=True)[1]["usage"]["completion_tokens"] == 7
        long = {"role": "user", "content": "a" * 460}
        app.replica.engine.default_max_tokens = 1024
        _, body = chat(app, long, max_tokens=None, ignore_eos=True)
        assert body["usage"]["total_tokens"] == 512, "the answer may fill the rest of the context"
    finally:
        app.replica.engine.default_max_tokens = 1024


def test_deadline_ends_a_stream_with_reason_length(app: Application) -> None:
    app.replica.engine.timeout_s = 0.0
    try:
        body = json.dumps({"messages": [HELLO], "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()

        def stream_with_tokens() -> bytes | None:
            """Return the stream; None if the deadline was checked before the first token, as a busy engine may do."""
            _, answered = app.ask("POST", "/v1/chat/completions", body)
            return None if b'"error"' in answered else answered

        answered = until(stream_with_tokens, "no stream had a token at its deadline")
    finally:
        app.replica.engine.timeout_s = 60
    assert b'"finish_reason":"length"' in answered
    assert answered.endswith(b"data: [DONE]\n\n")
