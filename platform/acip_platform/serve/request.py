"""What may be asked: OpenAI's completion request, and `size_ratio`.

A field's description says what it may be, and is the text of the error when it is something else. Fields of OpenAI's
that this server can't honour are accepted at their neutral value only; those that change no text are accepted and unused.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from acip.recipe import did_you_mean
from acip_platform.serve.errors import RequestError

MAX_PROMPTS = 16


def _encodable(text: str) -> str:
    """JSON may hold half a character (a lone surrogate), which no tokenizer takes. UnicodeEncodeError is a ValueError."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_encodable)]
SomeText = Annotated[Text, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]


class CompletionRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # fmt: off
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)] = Field(
        description=f"a text, or a list of 1 to {MAX_PROMPTS} texts")
    model: str | None = Field(default=None,
        description="the name of a served model, or NAME@RATIO; not needed if only one is served")
    size_ratio: float | None = Field(default=None, gt=0, le=1,
        description="a number above 0 and up to 1 (1.0 = the base model, the default)")
    max_tokens: int | None = Field(default=None, ge=1, description="a whole number of tokens, at least 1 (default 16)")
    temperature: float | None = Field(default=None, ge=0, le=2, description="a number from 0 (greedy) to 2")
    top_p: float | None = Field(default=None, gt=0, le=1, description="a number above 0 and up to 1")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")
    stop: SomeText | Annotated[list[SomeText], Field(max_length=4)] | None = Field(default=None,
        description="a text, or a list of up to 4 texts; none empty")

    # not offered: the neutral value only
    n: Literal[1] | None = Field(default=None, description="1: a prompt is answered once; for more answers repeat it in a list")
    best_of: Literal[1] | None = Field(default=None, description="1: a prompt is answered once")
    stream: Literal[False] | None = Field(default=None, description="false: streaming is not offered yet")
    echo: Literal[False] | None = Field(default=None, description="false: the prompt is not repeated")
    suffix: Literal[""] | None = Field(default=None, description="left out: text is only continued, not filled in")
    logprobs: None = Field(default=None, description="left out: log-probabilities are not offered")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(default=None,
        description="left out: biases are not offered")
    frequency_penalty: Zero | None = Field(default=None, description="0: penalties are not offered")
    presence_penalty: Zero | None = Field(default=None, description="0: penalties are not offered")
    # fmt: on

    # no influence on the text
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    stream_options: Any = None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> "CompletionRequest":
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise explain(error.errors(), fields) from error

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def name_and_size(self, names: Sequence[str]) -> tuple[str, float]:
        """Which of the served models, and how large: `size_ratio`, the @RATIO in the name, or 1.0."""
        name, size = split_name(self.model, names)
        if size is not None and self.size_ratio is not None and size != self.size_ratio:
            message = f"model {self.model!r} asks for size {size} and size_ratio for {self.size_ratio}; give one of them."
            raise RequestError(message, "size_ratio", "size_twice")
        return name, self.size_ratio or size or 1.0


def split_name(model: str | None, names: Sequence[str]) -> tuple[str, float | None]:
    """(served name, size or None) of "NAME" or "NAME@RATIO"; None is the only model there is."""
    have = ", ".join(names)
    if model is None:
        if len(names) == 1:
            return names[0], None
        raise RequestError(f"several models are served, so model must be given: {have}.", "model", "model_required")
    if model in names:
        return model, None
    name, _, written = model.rpartition("@")
    if name not in names:
        guess = did_you_mean(name or model, list(names))
        message = f"no model {name or model!r}{guess}; served: {have}, each at any size, as NAME@RATIO."
        raise RequestError(message, "model", "model_not_found", 404)
    try:
        size = float(written)
    except ValueError:
        size = 0.0
    if not 0 < size <= 1:
        message = f"the size in model {model!r} is {written!r}; it must be a number above 0 and up to 1, as in {name}@0.6."
        raise RequestError(message, "model", "invalid_size")
    return name, size


def explain(errors: Sequence[Any], fields: Any) -> RequestError:
    """The first of pydantic's errors in our words. FastAPI's errors have "body" before the field."""
    first = errors[0]
    where = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return RequestError(f"the body is not JSON: {reason} (at character {where[0] if where else 0}).", code="invalid_json")
    if not where or not isinstance(fields, Mapping):
        example = json.dumps({"prompt": "Once upon a time", "size_ratio": 0.6})
        return RequestError(f"send a JSON object like {example}, with the header 'Content-Type: application/json'.", code="invalid_json")
    name = str(where[0])
    known = CompletionRequest.model_fields
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown field {name!r}{did_you_mean(name, list(known))}. Allowed: {', '.join(known)}.", name, "unknown_field")
    allowed = known[name].description
    if first["type"] == "missing":
        return RequestError(f"{name} is missing; it must be {allowed}.", name, "missing_field")
    return RequestError(f"{name} is {reprlib.repr(fields[name])}; it must be {allowed}.", name)
