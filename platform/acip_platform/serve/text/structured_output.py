"""Answers that follow a form: `response_format`, and `tools` with `tool_choice`.

    request -> Form: a grammar, and how calls of tools are parsed from the text -> Constraint of each sequence

A form is made and compiled before the request joins the engine's batch.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from acip_platform.serve.text.errors import InvalidRequestError
from acip_platform.serve.text.grammar import ANY_OBJECT, Constraint, Grammars, json_rule
from acip_platform.serve.text.tools import TEXT, NamedTool, Tool, ToolFormat, has_tools, parameters


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(description="a text")
    description: str | None = Field(default=None, description="a text")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="a JSON schema")
    strict: bool | None = Field(default=None, description="true or false: the answer follows the schema in any case")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text", "json_object", "json_schema"] = Field(description='"text", "json_object" or "json_schema"')
    json_schema: JsonSchema | None = Field(default=None, description='an object like {"name": "a", "schema": {"type": "object"}}')

    @property
    def rule(self) -> str | None:
        """The Lark expression of the answer; None: any text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return json_rule(ANY_OBJECT, "response_format")
        if self.json_schema is None or self.json_schema.schema_ is None:
            message = (
                'response_format has no schema; it must be like {"type": "json_schema", "json_schema": {"name": "a", "schema": {...}}}.'
            )
            raise InvalidRequestError(message, "response_format", "missing_field")
        return json_rule(self.json_schema.schema_, "response_format")


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer must be like. `shown`: special tokens that are part of its text, for the parser of tools."""

    grammars: Grammars
    grammar: str
    param: str
    tools: ToolFormat | None = None
    shown: frozenset[int] = frozenset()

    def constraint(self) -> Constraint:
        return self.grammars.constraint(self.grammar, self.param)


class AnswerFormats:
    """The forms that one model can answer in."""

    def __init__(self, name: str, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.grammars = Grammars(tokenizer, vocabulary, ends)

    def tools(self, request: Any) -> list[Tool] | None:
        """The tools that the template shows the model; None without. Raise an InvalidRequestError where the template can't."""
        choice = request.tool_choice
        if not request.tools:
            if choice not in (None, "none", "auto"):
                raise InvalidRequestError("tool_choice asks for a tool, and tools has none.", "tool_choice")
            return None
        if choice == "none":
            return None
        if not has_tools(self.tokenizer.chat_template):
            message = (
                f"the chat template of {self.name} has no tools, so the model can't be told of any; leave tools out, or ask for JSON "
                "with response_format."
            )
            raise InvalidRequestError(message, "tools", "no_tools")
        names = [tool.function.name for tool in request.tools]
        if len(set(names)) < len(names):
            raise InvalidRequestError(f"tools has two functions of one name: {', '.join(sorted(names))}.", "tools")
        if other := [tool.function.name for tool in request.tools if parameters(tool)["type"] != "object"]:
            raise InvalidRequestError(f"the parameters of {other[0]} are of another type than object.", "tools", "invalid_schema")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            message = f"tool_choice names {choice.function.name!r}; the tools are {', '.join(names)}."
            raise InvalidRequestError(message, "tool_choice")
        return list(request.tools)

    def of(self, request: Any) -> AnswerFormat | None:
        """The form of a request's answers; None: any text. Raise an InvalidRequestError where it can't be had."""
        wanted = getattr(request, "response_format", None)
        rule = wanted.rule if wanted is not None else None
        tools = self.tools(request) if hasattr(request, "tools") else None
        if rule is None and tools is None:
            return None
        if request.ignore_eos:
            raise InvalidRequestError(
                "ignore_eos can't be true beside response_format or tools: an answer ends where its form does.", "ignore_eos"
            )
        if tools is None:
            return AnswerFormat(self.grammars, f"%llguidance {{}}\nstart: {rule}", "response_format")
        choice, form = request.tool_choice, self._format
        optional = choice in (None, "auto")
        if optional and form is None:
            message = f'the chat template of {self.name} writes calls of tools in a form that is not JSON; set tool_choice to "required".'
            raise InvalidRequestError(message, "tool_choice", "no_tools")
        form = form or ToolFormat()
        if optional and rule is not None and not form.marker:
            message = (
                f"{self.name} does not mark calls of tools, so response_format can't be told from them; set tool_choice or leave one out."
            )
            raise InvalidRequestError(message, "response_format")
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        parallel = request.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
        grammar = form.grammar(self.grammars, tools, parallel, (rule or TEXT) if optional else None)
        table = self.grammars.table
        written = form.marker + form.open + form.close + form.suffix
        shown = frozenset(id for id in table.special if table[id] and table[id].decode(errors="replace") in written)
        return AnswerFormat(self.grammars, grammar, "tools", replace(form, always=not optional), shown)

    @functools.cached_property
    def _format(self) -> ToolFormat | None:
        def render(messages: list[dict[str, Any]], tools: list[Any], prompt: bool) -> str:
            return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))

        table = self.grammars.table
        return ToolFormat.of(render, [table[id].decode(errors="replace") for id in table.special if len(table[id]) > 1])
