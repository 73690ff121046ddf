"""The messages of a chat, as OpenAI's clients send them: users' own, and assistants' answers that are sent back as history.

In a message, whatever is null or empty says nothing, so it is accepted under any name; other clients of other servers send many.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _encodable(text: str) -> str:
    """JSON may hold half a character (a lone surrogate), which no tokenizer takes. UnicodeEncodeError is a ValueError."""
    text.encode()
    return text


def _says_nothing(value: Any) -> bool:
    """Whether a value is null or empty, or holds only such values."""
    if isinstance(value, dict | list):
        return all(map(_says_nothing, value.values() if isinstance(value, dict) else value))
    return value is None or value == ""


Text = Annotated[str, AfterValidator(_encodable)]
Unused = Annotated[Any, BeforeValidator(lambda _: None), Field(description="anything: it changes no text")]


class _Lenient(BaseModel):
    """A part of a history: unknown fields are accepted where they say nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if name in cls.model_fields or not _says_nothing(value)}


class Part(_Lenient):
    """A part of a message's content."""

    type: Literal["text", "refusal"] = Field(description='"text": this server reads text only')
    text: Text | None = Field(default=None, description="a text")
    refusal: Text | None = Field(default=None, description="a text")
    annotations: Unused = None
    cache_control: Unused = None
    prompt_cache_breakpoint: Unused = None

    @model_validator(mode="after")
    def _complete(self) -> "Part":
        if getattr(self, self.type) is None:
            raise _missing(self.type)
        return self

    @property
    def told(self) -> str:
        return str(getattr(self, self.type))


class Message(_Lenient):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description='"system", "developer", "user", "assistant" or "tool"'
    )
    content: Text | Annotated[list[Part], Field(min_length=1)] | None = Field(
        default=None, description='a text, or a list like [{"type": "text", "text": "Hello"}]'
    )
    name: Text | None = Field(default=None, description="a text")
    refusal: Text | None = Field(default=None, description="a text")
    tool_calls: list[dict[str, Any]] | None = Field(
        default=None, description='a list like [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]'
    )
    tool_call_id: Text | None = Field(default=None, description="a text")
    id: Unused = None
    cache_control: Unused = None
    annotations: Unused = None
    provider_specific_fields: Unused = None

    @model_validator(mode="after")
    def _complete(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise _missing("content")
        return self

    @property
    def told(self) -> dict[str, Any]:
        """The message as chat templates take it: its content is a text, an assistant's null is an empty one."""
        said = self.content if self.content is not None else self.refusal or ""
        told: dict[str, Any] = {
            "role": {"developer": "system", "function": "tool"}.get(self.role, self.role),
            "content": said if isinstance(said, str) else "".join(part.told for part in said),
        }
        if self.tool_calls:
            told["tool_calls"] = [_decoded(call) for call in self.tool_calls]
        if told["role"] == "tool":
            told |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        return told


def _decoded(call: dict[str, Any]) -> dict[str, Any]:
    """A tool's call with its arguments as an object, which templates take; clients send them as JSON in a text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        return call


def _missing(field: str) -> PydanticCustomError:
    return PydanticCustomError("missing", "missing", {"field": field})
