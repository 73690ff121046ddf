"""The messages of a chat in OpenAI's format: user messages, and assistant messages that clients send back as history.

Unknown fields of a message are accepted if they are null or empty, because many clients send fields of other servers.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _encodable(text: str) -> str:
    """Reject lone surrogates, which JSON allows and tokenizers do not. UnicodeEncodeError is a ValueError."""
    text.encode()
    return text


def _is_empty(value: Any) -> bool:
    """Return whether a value is null or empty, or contains only such values."""
    if isinstance(value, dict | list):
        return all(map(_is_empty, value.values() if isinstance(value, dict) else value))
    return value is None or value == ""


Text = Annotated[str, AfterValidator(_encodable)]
Unused = Annotated[Any, BeforeValidator(lambda _: None), Field(description="any value; it is ignored")]


class _Lenient(BaseModel):
    """A part of a history, which accepts unknown fields if they are empty."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if name in cls.model_fields or not _is_empty(value)}


class Part(_Lenient):
    """A part of a message's content."""

    type: Literal["text", "refusal"] = Field(description='"text": this server accepts text only')
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
    def content(self) -> str:
        """The text of the part, from the field that `type` names."""
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
    def for_template(self) -> dict[str, Any]:
        """The message in the format of chat templates. Its content is one text; null becomes an empty text."""
        content = self.content if self.content is not None else self.refusal or ""
        fields: dict[str, Any] = {
            "role": {"developer": "system", "function": "tool"}.get(self.role, self.role),
            "content": content if isinstance(content, str) else "".join(part.content for part in content),
        }
        if self.tool_calls:
            fields["tool_calls"] = [_decoded(call) for call in self.tool_calls]
        if fields["role"] == "tool":
            fields |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        return fields


def _decoded(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as chat templates expect. Clients send them as a JSON text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        return call


def _missing(field: str) -> PydanticCustomError:
    return PydanticCustomError("missing", "missing", {"field": field})
