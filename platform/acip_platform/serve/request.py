"""What may be asked: OpenAI's completion and chat requests, and `size_ratio`.

A field's description says what it may be, and is the text of the error when it is something else. Fields of OpenAI's
that this server can't honour are accepted at their neutral value only; those that change no text are accepted and unused.

    model      NAME, NAME@0.6, NAME@60%, NAME@fit:8GB (bytes of the weights), NAME@fit:8GB@4096 (memory at this context)
"""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from acip.budget import MEGA, Budget
from acip.errors import BudgetError, cited
from acip.recipe import did_you_mean
from acip_platform.serve.errors import RequestError

MAX_PROMPTS = 16
MAX_CHOICES = 16
MAX_ANSWERS = 32  # prompts times n
DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions


def _encodable(text: str) -> str:
    """JSON may hold half a character (a lone surrogate), which no tokenizer takes. UnicodeEncodeError is a ValueError."""
    text.encode()
    return text


def _tokens(bias: dict[str, float]) -> dict[str, float]:
    if not all(key.isdecimal() and key.isascii() and len(key) < 10 and -100 <= value <= 100 for key, value in bias.items()):
        raise ValueError
    return bias


T = TypeVar("T")
Prompts = Annotated[list[T], Field(min_length=1, max_length=MAX_PROMPTS)]
Text = Annotated[str, AfterValidator(_encodable)]
SomeText = Annotated[Text, Field(min_length=1)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
SomeTokens = Annotated[list[Token], Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool | None = None


class Sized(BaseModel):
    """Which model, at which size."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # fmt: off
    model: str | None = Field(default=None, max_length=1000,
        description="the name of a served model, NAME@RATIO or NAME@fit:8GB; not needed if only one is served")
    size_ratio: float | None = Field(default=None, gt=0, le=1,
        description="a number above 0 and up to 1 (1.0 = the base model, the default)")
    # fmt: on

    def name_and_budget(self, names: Sequence[str]) -> tuple[str, Budget]:
        """Which of the served models, and how large: `size_ratio`, what is behind the @ in the name, or 1.0."""
        name, budget = split_name(self.model, names)
        if budget is not None and self.size_ratio is not None and budget.ratio != self.size_ratio:
            message = f"model {self.model!r} asks for one size and size_ratio for {self.size_ratio}; give one of them."
            raise RequestError(message, "size_ratio", "size_twice")
        return name, budget or Budget(ratio=self.size_ratio or 1.0)


class MaterializationRequest(Sized):
    quantize: Literal["nf4", "fp4", "int8"] | None = Field(
        default=None, description='"nf4", "fp4", "int8" or null (the model\'s own dtype)'
    )


class Asked(Sized):
    """What both ways to generate have in common."""

    # fmt: off
    temperature: float | None = Field(default=None, ge=0, le=2, description="a number from 0 (greedy) to 2")
    top_p: float | None = Field(default=None, gt=0, le=1, description="a number above 0 and up to 1")
    top_k: int | None = Field(default=None, ge=0, lt=2**31, description="a whole number of most likely tokens, 0 = all")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description=f"a whole number from 1 to {MAX_CHOICES}")
    stop: SomeText | Annotated[list[SomeText], Field(max_length=4)] | None = Field(default=None,
        description="a text, or a list of up to 4 texts; none empty")
    presence_penalty: Penalty | None = Field(default=None, description="a number from -2 to 2")
    frequency_penalty: Penalty | None = Field(default=None, description="a number from -2 to 2")
    logit_bias: Annotated[dict[str, float], AfterValidator(_tokens), Field(max_length=300)] | None = Field(default=None,
        description="an object of up to 300 token ids with biases from -100 to 100")
    stream: bool | None = Field(default=None, description="true or false")
    stream_options: StreamOptions | None = Field(default=None, description='an object like {"include_usage": true}')
    ignore_eos: bool | None = Field(default=None, description="true (generate max_tokens whatever comes) or false")
    # fmt: on

    # no influence on the text
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Any:
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise explain(error.errors(), fields, cls) from error

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Asked):
    # fmt: off
    prompt: Text | Prompts[Text] | SomeTokens | Prompts[SomeTokens] = Field(
        description=f"a text, a list of 1 to {MAX_PROMPTS} texts, or token ids instead of texts")
    max_tokens: int | None = Field(default=None, ge=0,
        description=f"a whole number of tokens, at least 1 (default {DEFAULT_MAX_TOKENS}), or 0 with echo true")
    logprobs: int | None = Field(default=None, ge=0, le=5, description="how many of the most likely tokens are told with each, 0 to 5")

    echo: bool | None = Field(default=None, description="true (the prompt is repeated, and scored with logprobs) or false")

    # not offered: the neutral value only
    best_of: Literal[1] | None = Field(default=None, description="1: take the best of n yourself")
    suffix: Literal[""] | None = Field(default=None, description="left out: text is only continued, not filled in")
    # fmt: on

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[return-value]

    @property
    def limit(self) -> int | None:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def told_logprobs(self) -> int | None:
        return self.logprobs


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None


class ChatRequest(Asked):
    # fmt: off
    messages: Annotated[list[Message], Field(min_length=1)] = Field(
        description='a list like [{"role": "user", "content": "Hello"}]; roles system, developer, user, assistant; contents text')
    max_tokens: int | None = Field(default=None, ge=1, description="a whole number of tokens, at least 1")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="a whole number of tokens, at least 1")
    logprobs: bool | None = Field(default=None, description="true or false")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="a whole number from 0 to 20, with logprobs true")

    # not offered: the neutral value only
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(default=None, description="left out: tools are not offered")
    tool_choice: Literal["none", "auto"] | None = Field(default=None, description='left out, "none" or "auto": tools are not offered')
    response_format: dict[Literal["type"], Literal["text"]] | None = Field(default=None, description='left out or {"type": "text"}')
    # fmt: on

    @property
    def told(self) -> list[dict[str, str]]:
        """The messages as templates want them."""
        messages = []
        for message in self.messages:
            content = message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
            messages.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        return messages

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def told_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def split_name(model: str | None, names: Sequence[str]) -> tuple[str, Budget | None]:
    """(served name, budget or None) of "NAME" or "NAME@SIZE"; None is the only model there is."""
    have = ", ".join(names)
    if model is None:
        if len(names) == 1:
            return names[0], None
        raise RequestError(f"several models are served, so model must be given: {have}.", "model", "model_required")
    if model in names:
        return model, None
    name = max((name for name in names if model.startswith(f"{name}@")), key=len, default=None)
    if name is None:
        guess = did_you_mean(model.partition("@")[0], list(names))
        message = f"no model {cited(model)}{guess}; served: {have}, each at any size, as NAME@RATIO."
        raise RequestError(message, "model", "model_not_found", 404)
    return name, size_of(name, model[len(name) + 1 :])


def size_of(name: str, written: str) -> Budget:
    """What is behind the @."""
    allowed = f"a ratio above 0 and up to 1, as in {name}@0.6, or what must hold it: {name}@fit:8GB, {name}@fit:8GB@4096 at this context."
    budget, _, context = written.partition("@")
    try:
        asked = Budget.parse(budget)
        if not context:
            return asked
        tokens = re.fullmatch(r"(\d{1,9})([kK]?)", context)
        if tokens is None or asked.stored_bytes is None:
            raise BudgetError("")
        return Budget(memory_mb=asked.stored_bytes / MEGA, context=int(tokens[1]) * (1024 if tokens[2] else 1), batch=1)
    except (BudgetError, ValueError, OverflowError) as error:  # numbers of thousands of digits are neither
        raise RequestError(f"the size behind {name}@ is {cited(written)}; it must be {allowed}", "model", "invalid_size") from error


def explain(errors: Sequence[Any], fields: Any, kind: type[BaseModel]) -> RequestError:
    """The first of pydantic's errors in our words. FastAPI's errors have "body" before the field."""
    first = errors[0]
    where = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return RequestError(f"the body is not JSON: {reason} (at character {where[0] if where else 0}).", code="invalid_json")
    if not where or not isinstance(fields, Mapping):
        example = {"prompt": "Once upon a time"} if kind is CompletionRequest else {}
        if kind is ChatRequest:
            example = {"messages": [{"role": "user", "content": "Hello"}]}  # type: ignore[dict-item]
        shown = json.dumps({**example, "size_ratio": 0.6})
        return RequestError(f"send a JSON object like {shown}, with the header 'Content-Type: application/json'.", code="invalid_json")
    name = str(where[0])
    known = kind.model_fields
    if name not in known:
        return RequestError(f"unknown field {name!r}{did_you_mean(name, list(known))}. Allowed: {', '.join(known)}.", name, "unknown_field")
    allowed = known[name].description or "left out"
    if first["type"] == "missing" and len(where) == 1:
        return RequestError(f"{name} is missing; it must be {allowed}.", name, "missing_field")
    return RequestError(f"{name} is {reprlib.repr(fields[name])}; it must be {allowed}.", name)
