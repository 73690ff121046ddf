"""Structured answers: `response_format`, and `tools` with `tool_choice`.

    request -> AnswerFormat: a grammar, and a parser of tool calls -> Constraint of each sequence

The grammar is compiled before the request joins the engine's batch.
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
        """The Lark expression of the answer, or None if any text is allowed."""
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
    """The format of an answer. `shown` are special tokens that are part of its text, because the parser of tool calls needs them."""

    grammars: Grammars
    grammar: str
    param: str
    tools: ToolFormat | None = None
    shown: frozenset[int] = frozenset()

    def constraint(self) -> Constraint:
        return self.grammars.constraint(self.grammar, self.param)


class AnswerFormats:
    """The answer formats of one model."""

    def __init__(self, name: str, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.grammars = Grammars(tokenizer, vocabulary, ends)

    def tools(self, request: Any) -> list[Tool] | None:
        """Return the tools that the chat template receives, or None. Raise an InvalidRequestError if they are invalid or not supported."""
        choice = request.tool_choice
        if not request.tools:
            if choice not in (None, "none", "auto"):
                raise InvalidRequestError("tool_choice requires a tool, but tools has none.", "tool_choice")
            return None
        if choice == "none":
            return None
        if not has_tools(self.tokenizer.chat_template):
            message = (
                f"the chat template of {self.name} has no tools, so the model cannot use any; leave tools out, or set response_format "
                "to get JSON."
            )
            raise InvalidRequestError(message, "tools", "no_tools")
        names = [tool.function.name for tool in request.tools]
        if len(set(names)) < len(names):
            raise InvalidRequestError(f"tools has two functions of one name: {', '.join(sorted(names))}.", "tools")
        if other := [tool.function.name for tool in request.tools if parameters(tool)["type"] != "object"]:
            raise InvalidRequestError(f"the parameters of {other[0]} are of another type than object.", "tools", "invalid_schema")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            message = f"tool_choice names {choice.function.name!r}, which is not in tools; they are {', '.join(names)}."
            raise InvalidRequestError(message, "tool_choice")
        return list(request.tools)

    def of(self, request: Any) -> AnswerFormat | None:
        """Return the format of a request's answers, or None if any text is allowed. Raise an InvalidRequestError if it is not possible."""
        response_format = getattr(request, "response_format", None)
        rule = response_format.rule if response_format is not None else None
        tools = self.tools(request) if hasattr(request, "tools") else None
        if rule is None and tools is None:
            return None
        if request.ignore_eos:
            raise InvalidRequestError(
                "ignore_eos can't be true together with response_format or tools, which determine where an answer ends.", "ignore_eos"
            )
        if tools is None:
            return AnswerFormat(self.grammars, f"%llguidance {{}}\nstart: {rule}", "response_format")
        choice, form = request.tool_choice, self._tool_format
        optional = choice in (None, "auto")
        if optional and form is None:
            message = f'the chat template of {self.name} writes tool calls in a form that is not JSON; set tool_choice to "required".'
            raise InvalidRequestError(message, "tool_choice", "no_tools")
        form = form or ToolFormat()
        if optional and rule is not None and not form.marker:
            message = (
                f"{self.name} does not mark tool calls, so they cannot be distinguished from response_format; set tool_choice, or leave "
                "one of tools and response_format out."
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
    def _tool_format(self) -> ToolFormat | None:
        def render(messages: list[dict[str, Any]], tools: list[Any], prompt: bool) -> str:
            return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))

        table = self.grammars.table
        return ToolFormat.of(render, [table[id].decode(errors="replace") for id in table.special if len(table[id]) > 1])
