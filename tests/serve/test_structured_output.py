"""Answers in a form: JSON, JSON schemas and calls of tools, through the official client and the routes with a real engine behind them."""

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
ASK: list[Any] = [{"role": "user", "content": "a"}]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else an object may have more members, and small models never stop adding some
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


def asked(application: Application, ask: Callable[[AsyncOpenAI], Coroutine[Any, Any, Any]]) -> Any:
    """What the official client gets."""

    async def go() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=application.app), timeout=120) as transport:
            client: Any = transport
            return await ask(AsyncOpenAI(base_url="http://here/v1", api_key="none", http_client=client, max_retries=0))

    return application.runner.run(go())


def chat(application: Application, **fields: Any) -> Any:
    fields = {"model": "small", "messages": ASK, "temperature": 0, "max_tokens": 120, **fields}
    return asked(application, lambda client: client.chat.completions.create(**fields))


def chunks(application: Application, **fields: Any) -> list[Any]:
    fields = {"model": "small", "messages": ASK, "temperature": 0, "max_tokens": 120, **fields}

    async def read(client: AsyncOpenAI) -> list[Any]:
        return [chunk async for chunk in await client.chat.completions.create(**fields, stream=True)]

    return list(asked(application, read))


def schema_of(schema: Any, name: str = "answer") -> Any:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_the_official_client_parses_an_answer_into_a_model(plain: Application, ratio: float) -> None:
    for seed in range(4):
        fields: Any = {"model": f"small@{ratio}", "messages": ASK, "temperature": 1.5, "seed": seed, "max_tokens": 200, "logprobs": True}

        def ask(client: AsyncOpenAI, fields: Any = fields) -> Any:
            return client.chat.completions.parse(**fields, response_format=Person)

        got = asked(plain, ask)
        choice = got.choices[0]
        assert isinstance(choice.message.parsed, Person)
        assert choice.finish_reason == "stop"
        assert len(choice.logprobs.content) == got.usage.completion_tokens
        said = bytes(byte for token in choice.logprobs.content for byte in token.bytes)
        assert said.decode() == choice.message.content


def test_any_object_ends_where_its_brace_closes(plain: Application) -> None:
    got = chat(plain, response_format={"type": "json_object"}, logit_bias={str(ord("}")): 100})
    assert got.choices[0].message.content == "{}"
    assert got.choices[0].finish_reason == "stop" and got.usage.completion_tokens == 2
    assert chat(plain, response_format={"type": "text"}).choices[0].message.content == chat(plain).choices[0].message.content


def test_constrained_answers_beside_free_ones(plain: Application) -> None:
    import asyncio

    free = {"model": "small", "messages": ASK, "temperature": 1, "seed": 5, "max_tokens": 40}
    bound = free | {"response_format": schema_of(Person.model_json_schema()), "n": 4, "max_tokens": 200}

    async def together(client: AsyncOpenAI) -> Any:
        return await asyncio.gather(*(client.chat.completions.create(**fields) for fields in (free, bound, free | {"seed": 6})))  # type: ignore[call-overload]

    alone = chat(plain, **free)
    first, forms, _ = asked(plain, together)
    assert first.choices[0].message.content == alone.choices[0].message.content
    texts = [choice.message.content for choice in forms.choices]
    assert len(texts) == 4 and len(set(texts)) > 1
    assert all(Person.model_validate_json(text) for text in texts)
    streamed = chunks(plain, **bound)
    for index, text in enumerate(texts):
        assert "".join(c.delta.content or "" for chunk in streamed for c in chunk.choices if c.index == index) == text


def test_a_root_that_is_a_number_ends_at_the_end_token(plain: Application) -> None:
    got = chat(plain, response_format=schema_of({"type": "integer"}), logit_bias={"2": 100, str(ord("7")): 90})
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == ("7", "stop")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "sun"}}])
def test_a_tool_is_called_and_its_answer_goes_back(tooled: Application, choice: Any) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "temperature": 1, "seed": 3}
    got = chat(tooled, **fields).choices[0]
    (call,) = got.message.tool_calls
    assert got.message.content is None
    assert got.finish_reason == ("tool_calls" if choice == "required" else "stop")
    schema = next(one["function"]["parameters"] for one in TOOLS if one["function"]["name"] == call.function.name)
    Draft202012Validator(schema).validate(json.loads(call.function.arguments))
    assert choice == "required" or call.function.name == "sun"

    streamed = [c for chunk in chunks(tooled, **fields) for c in chunk.choices]
    deltas = [delta for c in streamed for delta in c.delta.tool_calls or []]
    assert not any(c.delta.content for c in streamed)
    assert deltas[0].function.name == call.function.name and deltas[0].id and deltas[0].type == "function"
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    assert streamed[-1].finish_reason == got.finish_reason

    history = [*ASK, got.message, {"role": "tool", "tool_call_id": call.id, "content": "wet"}]
    assert chat(tooled, messages=history, tools=TOOLS, max_tokens=4).choices[0].message is not None


def test_tools_may_be_left_alone(tooled: Application) -> None:
    choices: list[dict[str, Any]] = [{"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {}]
    auto, none, without = (chat(tooled, **fields, max_tokens=20).choices[0] for fields in choices)
    assert none.message.content == without.message.content, "the model is not told of them"
    assert auto.message.content and not auto.message.tool_calls and auto.finish_reason == without.finish_reason


def test_tools_and_a_response_format(tooled: Application) -> None:
    form = {"tools": TOOLS, "response_format": schema_of(Person.model_json_schema())}
    answer = chat(tooled, **form, logit_bias={str(ord("{")): 100}).choices[0]
    assert Person.model_validate_json(answer.message.content) and answer.finish_reason == "stop"
    called = chat(tooled, **form, parallel_tool_calls=False, logit_bias={str(ord("<")): 50}).choices[0]
    assert called.message.tool_calls and called.finish_reason == "tool_calls"


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
    "itself": ({"$ref": "#"}, ["nothing fits"]),
    "required": ({"type": "object", "required": "a"}, ["schema.required"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SCHEMAS)
def test_a_schema_that_cannot_be_followed_is_refused(tooled: Application, case: str) -> None:
    schema, says = BAD_SCHEMAS[case]
    for param, fields in (
        ("response_format", {"response_format": schema_of(schema)}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}),
    ):
        if param == "tools" and case in ("nothing fits", "a format", "a regex", "not supported", "a reference", "a type", "itself"):
            continue  # roots of arguments are objects
        with pytest.raises(BadRequestError) as refused:
            chat(tooled, **fields)
        assert refused.value.param == param and refused.value.code == "invalid_schema"
        for words in says:
            assert words in refused.value.message


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
def test_what_cannot_be_asked_is_told(tooled: Application, case: str) -> None:
    fields, param, says = REFUSED[case]
    with pytest.raises(BadRequestError) as refused:
        chat(tooled, **fields)
    assert str(refused.value.param).startswith(param)
    for words in says:
        assert words in refused.value.message


def test_a_template_without_tools_says_so(plain: Application) -> None:
    with pytest.raises(BadRequestError, match="has no tools") as refused:
        chat(plain, tools=TOOLS)
    assert (refused.value.param, refused.value.code) == ("tools", "no_tools")
    assert chat(plain, tools=TOOLS, tool_choice="none", max_tokens=2).choices[0].message.content is not None
    assert has_tools({"default": NO_TOOLS, "tool_use": HERMES}) and not has_tools(NO_TOOLS)


# ---- forms and vocabularies


def bpe() -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"], show_progress=False
    )
    core.train_from_iterator(['{"name": "Ada", "age": 36, "tags": [true, false]}', Path(__file__).read_text()] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.mark.parametrize("make", [byte_tokenizer, bpe, llama])
def test_whatever_is_drawn_follows_the_schema_with_each_kind_of_vocabulary(make: Callable[[], Any]) -> None:
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
FORMS = {
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


def form_of(tokenizer: Any) -> ToolFormat | None:
    def render(messages: Any, tools: Any, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))

    return ToolFormat.of(render, ["[TOOL_CALLS]", "<|eot|>"])


@pytest.mark.parametrize("template", FORMS, ids=["hermes", "mistral", "llama", "bare", "xml"])
def test_calls_are_written_as_the_template_writes_them(template: str) -> None:
    assert form_of(tooled_tokenizer(template)) == FORMS[template]


def follows(grammars: Grammars, grammar: str, ids: list[int]) -> bool:
    """Whether a grammar allows these tokens, and an end after them."""
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
def test_grammar_and_parser_of_each_form(template: str) -> None:
    tokenizer = tooled_tokenizer(template)
    form = form_of(tokenizer)
    assert form is not None
    grammars = Grammars(tokenizer, len(tokenizer), {tokenizer.eos_token_id})
    tools = [Tool.model_validate(one) for one in TOOLS]
    arguments = ['{"town": "Köln", "days": 3}', '{"on": true}']
    one, two = (f"{form.before}{name}{form.between}{said}{form.after}" for name, said in zip(("rain", "sun"), arguments, strict=True))
    single = form.marker + form.open + one + form.close + form.suffix
    texts = {"Hello {there}": 0, "": 0, single: 1}
    if form.open:
        texts[form.marker + form.open + one + ", " + two + form.close + form.suffix] = 2
    elif form.marker:
        texts[single + "\n" + form.marker + two + form.suffix] = 2
    if form.marker:
        texts["Let me see. " + single] = 1
    auto, required, alone = (form.grammar(grammars, tools, *asked) for asked in ((True, TEXT), (True, None), (False, None)))
    for text, count in texts.items():
        ids = tokenizer(text)["input_ids"]
        assert follows(grammars, auto, ids)
        assert follows(grammars, required, ids) is (count > 0 and not text.startswith("Let"))
        assert follows(grammars, alone, ids) is (count == 1 and not text.startswith("Let"))
        for step in (1, 3, 1000):
            parser = ToolParser(form)
            parts = [parser.add(text[i : i + step]) for i in range(0, len(text), step)]
            content = "".join(said for said, _ in parts) + parser.end()
            deltas = [delta for _, calls in parts for delta in calls]
            assert content == (text[: text.index(form.marker + form.open + form.before)] if count else text)
            assert parser.calls == count
            for index in range(count):
                said = "".join(delta["function"]["arguments"] for delta in deltas if delta["index"] == index)
                assert said == arguments[index]
    assert not follows(grammars, required, tokenizer(single.replace("3", "0"))["input_ids"])


def test_a_schema_without_end_is_refused() -> None:
    schema: Any = {"type": "integer"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InvalidRequestError, match=r"can't be read|nested deeper"):
        json_rule(schema, "response_format")
