"""Structured output: JSON, JSON schemas and tool calls, through the official client and the routes with a real engine."""

import json
import random
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any, Literal

import httpx
import pytest
import torch
from acip_platform.serve.text.errors import InvalidRequestError
from acip_platform.serve.text.grammar import Grammars, json_rule
from acip_platform.serve.text.tools import TEXT, Tool, ToolFormat, ToolParser, has_tools
from jsonschema import Draft202012Validator
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from acip.artifact.artifact import Artifact
from tests.conftest import byte_tokenizer
from tests.serve.test_detokenizer import llama
from tests.support.application import Application
from tests.support.server import give_template

HERMES = """\
{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\
{% for c in m.tool_calls or [] %}<tool_call>
{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}
</tool_call>{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
NO_TOOLS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
MESSAGES: list[Any] = [{"role": "user", "content": "a"}]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")  # otherwise small models never stop adding members
    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=99)
    kind: Literal["cat", "dog"]
    tags: list[bool] = Field(max_length=2)


def tool(name: str, **properties: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    tool("rain", town={"enum": ["Bonn", "Köln"]}, days={"type": "integer", "minimum": 1, "maximum": 9}),
    tool("sun", on={"type": "boolean"}),
]


def application(small: Artifact, home: Path, template: str) -> Iterator[Application]:
    """Start an application with a copy of the small artifact that has this chat template."""
    artifact = Artifact.open(copytree(small.folder, home / "model"))
    give_template(artifact, template)
    running = Application(home, artifact)
    yield running
    running.close()


@pytest.fixture(scope="module")
def tooled(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    yield from application(small_artifact, tmp_path_factory.mktemp("tooled"), HERMES)


@pytest.fixture(scope="module")
def plain(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    yield from application(small_artifact, tmp_path_factory.mktemp("plain"), NO_TOOLS)


def with_client(application: Application, call: Callable[[AsyncOpenAI], Coroutine[Any, Any, Any]]) -> Any:
    """Return the result of a call of the official client."""

    async def go() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=application.app), timeout=120) as transport:
            client: Any = transport
            return await call(AsyncOpenAI(base_url="http://here/v1", api_key="none", http_client=client, max_retries=0))

    return application.runner.run(go())


def chat(application: Application, **fields: Any) -> Any:
    fields = {"model": "small", "messages": MESSAGES, "temperature": 0, "max_tokens": 120, **fields}
    return with_client(application, lambda client: client.chat.completions.create(**fields))


def chunks(application: Application, **fields: Any) -> list[Any]:
    fields = {"model": "small", "messages": MESSAGES, "temperature": 0, "max_tokens": 120, **fields}

    async def read(client: AsyncOpenAI) -> list[Any]:
        return [chunk async for chunk in await client.chat.completions.create(**fields, stream=True)]

    return list(with_client(application, read))


def schema_of(schema: Any, name: str = "answer") -> Any:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_official_client_parses_an_answer_into_a_model(plain: Application, ratio: float) -> None:
    for seed in range(4):
        sampling = {"temperature": 1.5, "seed": seed, "max_tokens": 200, "logprobs": True}
        fields: Any = {"model": f"small@{ratio}", "messages": MESSAGES, **sampling}

        def parse(client: AsyncOpenAI, fields: Any = fields) -> Any:
            return client.chat.completions.parse(**fields, response_format=Person)

        answer = with_client(plain, parse)
        choice = answer.choices[0]
        assert isinstance(choice.message.parsed, Person)
        assert choice.finish_reason == "stop"
        assert len(choice.logprobs.content) == answer.usage.completion_tokens
        content = bytes(byte for token in choice.logprobs.content for byte in token.bytes)
        assert content.decode() == choice.message.content


def test_json_object_ends_at_its_closing_brace(plain: Application) -> None:
    answer = chat(plain, response_format={"type": "json_object"}, logit_bias={str(ord("}")): 100})
    assert answer.choices[0].message.content == "{}"
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == 2
    assert chat(plain, response_format={"type": "text"}).choices[0].message.content == chat(plain).choices[0].message.content


def test_constrained_and_free_requests_share_a_batch(plain: Application) -> None:
    import asyncio

    free = {"model": "small", "messages": MESSAGES, "temperature": 1, "seed": 5, "max_tokens": 40}
    constrained = free | {"response_format": schema_of(Person.model_json_schema()), "n": 4, "max_tokens": 200}

    async def together(client: AsyncOpenAI) -> Any:
        requests: list[Any] = [free, constrained, free | {"seed": 6}]
        return await asyncio.gather(*(client.chat.completions.create(**fields) for fields in requests))

    alone = chat(plain, **free)
    first, structured, _ = with_client(plain, together)
    assert first.choices[0].message.content == alone.choices[0].message.content
    texts = [choice.message.content for choice in structured.choices]
    assert len(texts) == 4 and len(set(texts)) > 1
    assert all(Person.model_validate_json(text) for text in texts)
    streamed = chunks(plain, **constrained)
    for index, text in enumerate(texts):
        assert "".join(c.delta.content or "" for chunk in streamed for c in chunk.choices if c.index == index) == text


def test_number_at_the_root_ends_at_the_end_token(plain: Application) -> None:
    answer = chat(plain, response_format=schema_of({"type": "integer"}), logit_bias={"2": 100, str(ord("7")): 90})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("7", "stop")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "sun"}}])
def test_tool_is_called_and_its_result_is_accepted(tooled: Application, choice: Any) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "temperature": 1, "seed": 3}
    answer = chat(tooled, **fields).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.message.content is None
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
    schema = next(entry["function"]["parameters"] for entry in TOOLS if entry["function"]["name"] == call.function.name)
    Draft202012Validator(schema).validate(json.loads(call.function.arguments))
    assert choice == "required" or call.function.name == "sun"

    streamed = [c for chunk in chunks(tooled, **fields) for c in chunk.choices]
    deltas = [delta for c in streamed for delta in c.delta.tool_calls or []]
    assert not any(c.delta.content for c in streamed)
    assert deltas[0].function.name == call.function.name and deltas[0].id and deltas[0].type == "function"
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    assert streamed[-1].finish_reason == answer.finish_reason

    history = [*MESSAGES, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "wet"}]
    assert chat(tooled, messages=history, tools=TOOLS, max_tokens=4).choices[0].message is not None


def test_tool_calls_are_optional(tooled: Application) -> None:
    choices: list[dict[str, Any]] = [{"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {}]
    auto, none, without = (chat(tooled, **fields, max_tokens=20).choices[0] for fields in choices)
    assert none.message.content == without.message.content, "the prompt must not contain the tools"
    assert auto.message.content and not auto.message.tool_calls and auto.finish_reason == without.finish_reason


def test_tools_can_be_combined_with_a_response_format(tooled: Application) -> None:
    fields = {"tools": TOOLS, "response_format": schema_of(Person.model_json_schema())}
    answer = chat(tooled, **fields, logit_bias={str(ord("{")): 100}).choices[0]
    assert Person.model_validate_json(answer.message.content) and answer.finish_reason == "stop"
    calling = chat(tooled, **fields, parallel_tool_calls=False, logit_bias={str(ord("<")): 50}).choices[0]
    assert calling.message.tool_calls and calling.finish_reason == "tool_calls"


BAD_SCHEMAS: dict[str, tuple[Any, list[str]]] = {
    "a type": ({"type": "strin"}, ["schema.type", "'strin'"]),
    "a keyword": ({"type": "object", "propertees": {}}, ["'propertees'", "did you mean 'properties'"]),
    "a keyword inside": ({"type": "object", "properties": {"a": {"anyOf": [{"typ": "string"}]}}}, ["properties.a.anyOf[0]", "'typ'"]),
    "not supported": ({"type": "array", "uniqueItems": True}, ["uniqueItems"]),
    "not supported inside": ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, ["not"]),
    "a way around": ({"x-guidance": {"lenient": True}, "not": {}}, ["x-guidance"]),
    "nothing fits": ({"type": "integer", "minimum": 5, "maximum": 3}, ["minimum (5)"]),
    "a reference": ({"$ref": "#/$defs/x"}, ["/$defs/x"]),
    "a format": ({"type": "string", "format": "bogus"}, ["bogus"]),
    "a regex": ({"type": "string", "pattern": "(?=a)b"}, ["look"]),
    "itself": ({"$ref": "#"}, ["no text matches"]),
    "required": ({"type": "object", "required": "a"}, ["schema.required"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SCHEMAS)
def test_invalid_or_unsupported_schema_is_refused(tooled: Application, case: str) -> None:
    schema, parts = BAD_SCHEMAS[case]
    for param, fields in (
        ("response_format", {"response_format": schema_of(schema)}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}),
    ):
        if param == "tools" and case in ("nothing fits", "a format", "a regex", "not supported", "a reference", "a type", "itself"):
            continue  # the root of arguments must be an object
        with pytest.raises(BadRequestError) as refused:
            chat(tooled, **fields)
        assert refused.value.param == param and refused.value.code == "invalid_schema"
        for part in parts:
            assert part in refused.value.message


REFUSED: dict[str, tuple[Any, str, list[str]]] = {
    "no schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format", ["no schema"]),
    "a tool that is not there": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "snow"}}}, "tool_choice", ["'snow'", "rain, sun"]),
    "a choice of nothing": ({"tool_choice": "required"}, "tool_choice", ["tools has none"]),
    "twins": ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", ["two functions of one name"]),
    "a text as parameters": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools", ["of another type"]),
    "no end": ({"tools": TOOLS, "extra_body": {"ignore_eos": True}}, "ignore_eos", ["can't be true"]),
    "a name": ({"tools": [tool("a b")]}, "tools", ["it must be a list like"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_fields_are_refused(tooled: Application, case: str) -> None:
    fields, param, parts = REFUSED[case]
    with pytest.raises(BadRequestError) as refused:
        chat(tooled, **fields)
    assert str(refused.value.param).startswith(param)
    for part in parts:
        assert part in refused.value.message


def test_tools_are_refused_if_the_template_has_none(plain: Application) -> None:
    with pytest.raises(BadRequestError, match="has no tools") as refused:
        chat(plain, tools=TOOLS)
    assert (refused.value.param, refused.value.code) == ("tools", "no_tools")
    assert chat(plain, tools=TOOLS, tool_choice="none", max_tokens=2).choices[0].message.content is not None
    assert has_tools({"default": NO_TOOLS, "tool_use": HERMES}) and not has_tools(NO_TOOLS)


# ---- tool formats and vocabularies


def bpe() -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"], show_progress=False
    )
    core.train_from_iterator(['{"name": "Ada", "age": 36, "tags": [true, false]}', Path(__file__).read_text()] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.mark.parametrize("make", [byte_tokenizer, bpe, llama])
def test_random_allowed_tokens_follow_the_schema_with_each_vocabulary(make: Callable[[], Any]) -> None:
    tokenizer = make()
    size = len(tokenizer) + 7  # embeddings are often padded
    ends = {tokenizer.eos_token_id} - {None}
    grammars = Grammars(tokenizer, size, ends)
    schema = Person.model_json_schema()
    for seed in range(10):
        draw = random.Random(seed)
        ids: list[int] = []
        constraint = grammars.constraint(f"%llguidance {{}}\nstart: {json_rule(schema, 'response_format')}", "response_format")
        while not constraint.done:
            logits = torch.zeros(size)
            constraint.limit(logits)
            allowed = (logits == 0).nonzero().flatten().tolist()
            assert allowed and len(ids) < 300
            ids.append(draw.choice(allowed))
            constraint.take(ids[-1])
            assert constraint.error is None
        text = b"".join(grammars.table[id] for id in ids if id not in ends).decode()
        assert Person.model_validate_json(text)


MISTRAL = """\
{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ {"name": c.function.name, "arguments": \
c.function.arguments} | tojson }}{% endfor %}]{{ eos_token }}{% else %}[{{ tools }}]{{ m.content }}{% endif %}{% endfor %}"""
LLAMA = """\
{{ tools }}{% for m in messages %}<|{{ m.role }}|>\n\n{% if m.tool_calls %}{"name": "{{ m.tool_calls[0].function.name }}", \
"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"""
XML = """\
{{ tools }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>{% for k, v in \
c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</function>{% endfor %}{% endfor %}"""
TOOL_FORMATS = {
    HERMES: ToolFormat(marker="<tool_call>\n", suffix="\n</tool_call>"),
    MISTRAL: ToolFormat(marker="[TOOL_CALLS] ", open="[", close="]"),
    LLAMA: ToolFormat(between='", "parameters": '),
    "{{ tools }}" + NO_TOOLS: ToolFormat(),
    XML: None,
}


def tooled_tokenizer(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "<|eot|>"]})
    tokenizer.eos_token = "<|eot|>"
    tokenizer.chat_template = template
    return tokenizer


def tool_format_of(tokenizer: Any) -> ToolFormat | None:
    def render(messages: Any, tools: Any, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))

    return ToolFormat.of(render, ["[TOOL_CALLS]", "<|eot|>"])


@pytest.mark.parametrize("template", TOOL_FORMATS, ids=["hermes", "mistral", "llama", "bare", "xml"])
def test_tool_format_is_derived_from_the_template(template: str) -> None:
    assert tool_format_of(tooled_tokenizer(template)) == TOOL_FORMATS[template]


def follows(grammars: Grammars, grammar: str, ids: list[int]) -> bool:
    """Return whether a grammar allows these tokens and an end after them."""
    constraint = grammars.constraint(grammar, "tools")
    for id in ids:
        logits = torch.zeros(grammars.vocabulary)
        constraint.limit(logits)
        if constraint.done or logits[id] != 0:
            return False
        constraint.take(id)
    logits = torch.zeros(grammars.vocabulary)
    if not constraint.done:
        constraint.limit(logits)
    return constraint.done or bool((logits[grammars.table.tokenizer.eos_token_id] == 0).item())


@pytest.mark.parametrize("template", [HERMES, MISTRAL, LLAMA], ids=["hermes", "mistral", "llama"])
def test_grammar_and_parser_agree_for_each_tool_format(template: str) -> None:
    tokenizer = tooled_tokenizer(template)
    tool_format = tool_format_of(tokenizer)
    assert tool_format is not None
    grammars = Grammars(tokenizer, len(tokenizer), {tokenizer.eos_token_id})
    tools = [Tool.model_validate(entry) for entry in TOOLS]
    arguments = ['{"town": "Köln", "days": 3}', '{"on": true}']
    rain, sun = (
        f"{tool_format.before}{name}{tool_format.between}{value}{tool_format.after}"
        for name, value in zip(("rain", "sun"), arguments, strict=True)
    )
    single = tool_format.marker + tool_format.open + rain + tool_format.close + tool_format.suffix
    texts = {"Hello {there}": 0, "": 0, single: 1}
    if tool_format.open:
        texts[tool_format.marker + tool_format.open + rain + ", " + sun + tool_format.close + tool_format.suffix] = 2
    elif tool_format.marker:
        texts[single + "\n" + tool_format.marker + sun + tool_format.suffix] = 2
    if tool_format.marker:
        texts["Let me see. " + single] = 1
    auto, required, alone = (tool_format.grammar(grammars, tools, *options) for options in ((True, TEXT), (True, None), (False, None)))
    for text, count in texts.items():
        ids = tokenizer(text)["input_ids"]
        assert follows(grammars, auto, ids)
        assert follows(grammars, required, ids) is (count > 0 and not text.startswith("Let"))
        assert follows(grammars, alone, ids) is (count == 1 and not text.startswith("Let"))
        for step in (1, 3, 1000):
            parser = ToolParser(tool_format)
            parts = [parser.add(text[i : i + step]) for i in range(0, len(text), step)]
            content = "".join(emitted for emitted, _ in parts) + parser.end()
            deltas = [delta for _, calls in parts for delta in calls]
            assert content == (text[: text.index(tool_format.marker + tool_format.open + tool_format.before)] if count else text)
            assert parser.calls == count
            for index in range(count):
                value = "".join(delta["function"]["arguments"] for delta in deltas if delta["index"] == index)
                assert value == arguments[index]
    assert not follows(grammars, required, tokenizer(single.replace("3", "0"))["input_ids"])


def test_deeply_nested_schema_is_refused() -> None:
    schema: Any = {"type": "integer"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InvalidRequestError, match=r"can't be read|nested deeper"):
        json_rule(schema, "response_format")
