"""The request schemas: OpenAI's completions and chats, with `size_ratio`.

Every field of OpenAI's API is in one of three groups:

    supported        it works as in OpenAI's reference
    unused           it does not change the text (`Unused`): any value is accepted and dropped
    not supported    only null and OpenAI's default are accepted; other values result in status 400

A null is the same as a missing field. The description of a field states its valid values, and is part of the error message for an
invalid value. An error names its field by path: messages[1].content[0].type.

    model      NAME, NAME@0.6, NAME@60%, NAME@fit:8GB (bytes of the weights), NAME@fit:8GB@4096 (memory at this context)

A size ratio without `convention` is in the convention of the model (`CutTable.convention`): bytes, or, for a model without coded layers,
linear. Therefore a request becomes a budget only where the model is known (`name_and_budget`).
"""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from acip.errors import BudgetError, cited
from acip.sizing.budget import MEGA, UNITS, Budget, Convention
from acip.utils.coerce import did_you_mean
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.http.messages import Message, Part, Text, Unused
from acip_platform.serve.text.structured_output import ResponseFormat
from acip_platform.serve.text.tools import NamedTool, ToolChoice, Tools

MAX_CHOICES = 16
MAX_PARTS = 8  # of a text, with sizes of their own
DEFAULT_SIZE = "1.0"
DEFAULT_MAX_TOKENS = 16  # of completions, as in OpenAI's API


def _tokens(bias: dict[str, float]) -> dict[str, float]:
    """Return logit biases. Raise ValueError if a key is not a token id or a bias is out of range."""
    if not all(key.isdecimal() and key.isascii() and len(key) < 10 and -100 <= value <= 100 for key, value in bias.items()):
        raise ValueError
    return bias


T = TypeVar("T")
Prompts = Annotated[list[T], Field(min_length=1)]
SomeText = Annotated[Text, Field(min_length=1)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
SomeTokens = Annotated[list[Token], Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool | None = None


class ModelSizeRequest(BaseModel):
    """A model and a size."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # fmt: off
    model: str | None = Field(default=None, max_length=1000,
        description="the name of a served model, NAME@RATIO or NAME@fit:8GB; not needed if only one is served")
    size_ratio: float | None = Field(default=None, gt=0, le=1,
        description="a number above 0 and up to 1 (1.0 = the base model, the default)")
    convention: Convention | None = Field(default=None,
        description='what a size ratio counts: "bytes" (stored bytes; the default for a model with coded layers), "linear" (numbers of the '
        'compressed layers; the default for others), "model" (all numbers) or "paper" (numbers without adapters)')
    stored_bytes: int | None = Field(default=None, ge=1,
        description="a whole number of bytes that the stored weights may take, at least 1 (instead of size_ratio)")
    params: int | None = Field(default=None, ge=1, description="a whole number of parameters, at least 1 (instead of size_ratio)")
    memory_mb: float | None = Field(default=None, gt=0,
        description="the memory in MB (1e6 bytes) for weights and the cache of `context` tokens (instead of size_ratio)")
    context: int | None = Field(default=None, ge=1, description="with memory_mb: a whole number of tokens per sequence")
    batch: int | None = Field(default=None, ge=1, description="with memory_mb: a whole number of sequences at a time (default 1)")
    max_perplexity: float | None = Field(default=None, ge=1,
        description="the largest perplexity, a number of at least 1, by the model's measured curve (instead of size_ratio)")
    max_loss_increase: float | None = Field(default=None, ge=0,
        description="the largest increase of the loss in nats per token, at least 0, by the model's measured curve (instead of size_ratio)")
    max_kl: float | None = Field(default=None, ge=0,
        description="the largest KL divergence from the base model in nats, at least 0, by the measured curve (instead of size_ratio)")
    max_flops: int | None = Field(default=None, ge=1,
        description="a whole number of floating-point operations per token, without attention, at least 1 (instead of size_ratio)")
    # fmt: on

    def name_and_budget(self, names: Sequence[str], convention: Convention = "linear", default: str = DEFAULT_SIZE) -> tuple[str, Budget]:
        """Return the name of the served model, and the size: a field, the size after the @ in the name, or `default`.

        `convention` is that of a ratio if the request names none. Raise a RequestError if the size is given twice.
        """
        convention = self.convention or convention
        name, written = split_name(self.model, names, convention)
        given = [kind for kind in UNITS if self._limit(kind) is not None]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(map(_field, given))} are different sizes; give one of them.", _field(given[1]), "size_twice")
        with_memory = self.memory_mb is not None
        if not with_memory and (self.context or self.batch):
            raise RequestError("context and batch belong to memory_mb; give it, or leave them out.", "memory_mb")
        if with_memory and self.context is None:
            raise RequestError("memory_mb needs context, the number of tokens per sequence.", "context", "missing_field")
        budget = written
        if given:
            beside: dict[str, Any] = {"context": self.context, "batch": self.batch or 1} if with_memory else {}
            beside |= {"convention": convention} if given == ["ratio"] else {}
            budget = Budget(**{given[0]: self._limit(given[0])}, **beside)
            if written is not None and written != budget:
                message = f"model {self.model!r} and {_field(given[0])} {self._limit(given[0])} are different sizes; give one of them."
                raise RequestError(message, _field(given[0]), "size_twice")
        budget = budget or Budget.parse(default, convention)
        if self.convention is not None and budget.ratio is None:
            raise RequestError(f"convention says what a size ratio counts; leave it out with {budget.kind}.", "convention")
        return name, budget

    def _limit(self, kind: str) -> Any:
        value = getattr(self, _field(kind))
        return value[0].ratio if isinstance(value, list) else value


def _field(kind: str) -> str:
    """Return the field of a request for a kind of budget."""
    return "size_ratio" if kind == "ratio" else kind


class UnavailableSizeError(BudgetError):
    """A size that the model does not have. `field` is the field of the request."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


@contextmanager
def naming_field(budget: Budget, field: str | None = None) -> Iterator[None]:
    """Add the field of the request to a BudgetError for `budget`; None = the field for this kind of budget."""
    try:
        yield
    except BudgetError as error:
        raise UnavailableSizeError(str(error), field or _field(budget.kind)) from error


class MaterializationRequest(ModelSizeRequest):
    quantize: Literal["nf4", "fp4", "int8"] | None = Field(
        default=None, description='"nf4", "fp4", "int8" or null (the model\'s own dtype)'
    )


class SizePartRequest(BaseModel):
    """A part of a text with a size of its own."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    ratio: float = Field(gt=0, le=1)
    tokens: int | None = Field(default=None, ge=0)
    until: SomeText | None = None


Ratio = Annotated[float, Field(gt=0, le=1)]
SizeParts = Annotated[list[SizePartRequest], Field(min_length=1, max_length=MAX_PARTS)]


class OpenAIRequest(ModelSizeRequest):
    """The common fields of completions and chats."""

    # fmt: off
    size_ratio: Ratio | SizeParts | None = Field(default=None,  # type: ignore[assignment]
        description='a number above 0 and up to 1 (1.0 = the base model, the default), or a list of parts like [{"ratio": 1.0, '
        '"tokens": 0}, {"ratio": 0.4, "until": "</think>"}, {"ratio": 1.0}]: each part but the last ends after so many "tokens" of the '
        'answer (0 = the first part is the prompt alone) or behind the text "until"')
    min_size: float | None = Field(default=None, gt=0, le=1,
        description="a size ratio of at most size_ratio, at which the server may compute while other requests wait")
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
    ignore_eos: bool | None = Field(default=None, description="true (generate max_tokens tokens, also after an end token) or false")
    speculative: Literal["auto", "off"] | None = Field(default=None,
        description='"auto" (a small size drafts tokens where that is faster; the text stays that of the requested size) or "off"')
    # fmt: on

    user: Unused = None
    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_options: Unused = None
    prompt_cache_retention: Unused = None

    @field_validator("size_ratio")
    @classmethod
    def _check_parts(cls, size_ratio: Any) -> Any:
        """Refuse parts that never end, except the last one, which must not end."""
        parts = size_ratio if isinstance(size_ratio, list) else []
        ending = [part.tokens is not None or part.until is not None for part in parts]
        empty = any(part.tokens == 0 for part in parts[1:])
        return size_ratio if not parts or (all(ending[:-1]) and not ending[-1] and not empty) else _refuse()

    @property
    def parts(self) -> list[SizePartRequest]:
        """The parts of the text, if it has several."""
        return self.size_ratio if isinstance(self.size_ratio, list) else []

    def min_budget(self, budget: Budget, convention: Convention) -> Budget | None:
        """Return the size of `min_size`, or None. `convention` is that of a ratio if the request names none.

        Raise a RequestError if it is larger than the requested size.
        """
        if self.min_size is None:
            return None
        least = min([part.ratio for part in self.parts] or [budget.ratio if budget.ratio is not None else 1.0])
        if self.min_size > least:
            raise RequestError(f"min_size is {self.min_size:g}; it must be at most the size ratio, {least:g}.", "min_size")
        return Budget(ratio=self.min_size, convention=self.convention or convention)

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Any:
        """Return the request with these fields. Raise a RequestError if one is invalid."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            located = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            raise explain(located, fields, cls) from error

    @property
    def named_tool(self) -> bool:
        """Whether the answer must be a call of one given tool. Its finish_reason is then "stop" in OpenAI's API, else "tool_calls"."""
        return isinstance(getattr(self, "tool_choice", None), NamedTool)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(OpenAIRequest):
    # fmt: off
    prompt: Text | Prompts[Text] | SomeTokens | Prompts[SomeTokens] | None = Field(
        description="a text, a list of texts, or token ids instead of texts; null or an empty text = the start of a text")
    max_tokens: int | None = Field(default=None, ge=0,
        description=f"a whole number of tokens, at least 1 (default {DEFAULT_MAX_TOKENS}), or 0 with echo true")
    logprobs: int | None = Field(default=None, ge=0, le=5, description="the number of most likely tokens to return with each token, 0 to 5")

    echo: bool | None = Field(default=None, description="true (the prompt is repeated, and scored with logprobs) or false")

    # not supported: only the default is accepted
    best_of: int | None = Field(default=None, ge=1, description="left out, 1 or n: this server returns every generated completion")
    suffix: Literal[""] | None = Field(default=None, description="left out: filling in text is not supported")
    # fmt: on

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        return best_of if best_of in (None, 1, info.data.get("n")) else _refuse()

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if self.prompt is None:
            return [""]
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else self.prompt  # type: ignore[return-value]

    @property
    def limit(self) -> int | None:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs


class ChatRequest(OpenAIRequest):
    # fmt: off
    messages: Annotated[list[Message], Field(min_length=1)] = Field(
        description='a list like [{"role": "user", "content": "Hello"}]')
    max_tokens: int | None = Field(default=None, ge=1, description="a whole number of tokens, at least 1")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="a whole number of tokens, at least 1")
    logprobs: bool | None = Field(default=None, description="true or false")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="a whole number from 0 to 20, with logprobs true")

    tools: Tools | None = Field(default=None,
        description='a list like [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]')
    tool_choice: ToolChoice | None = Field(default=None,
        description='"none", "auto", "required" or {"type": "function", "function": {"name": "f"}}')
    parallel_tool_calls: bool | None = Field(default=None, description="true or false")
    response_format: ResponseFormat | None = Field(default=None,
        description='{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"name": "a", "schema": {...}}}')
    prediction: Unused = None

    # not supported: only the default is accepted
    functions: Annotated[list[Any], Field(max_length=0)] | None = Field(default=None, description="left out: functions are unsupported")
    function_call: Literal["none", "auto"] | None = Field(default=None, description='left out, "none" or "auto": functions are unsupported')
    reasoning_effort: Literal["none", "medium"] | None = Field(default=None,
        description='left out, "none" or "medium": other efforts are not supported')
    verbosity: Literal["medium"] | None = Field(default=None, description='left out or "medium": other verbosities are not supported')
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = Field(default=None,
        description='left out or ["text"]: answers are text')
    audio: None = Field(default=None, description="left out: answers are text")
    moderation: None = Field(default=None, description="left out: moderation is not supported")
    web_search_options: None = Field(default=None, description="left out: web search is not supported")
    # fmt: on

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, top: int | None, info: ValidationInfo) -> int | None:
        return top if not top or info.data.get("logprobs") else _refuse()

    @property
    def template_messages(self) -> list[dict[str, Any]]:
        """The messages in the format of chat templates."""
        return [message.for_template for message in self.messages]

    @property
    def has_tools(self) -> bool:
        """Whether a message is a call of a tool or the result of one."""
        return any(message.tool_calls or message.role in ("tool", "function") for message in self.messages)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def split_name(model: str | None, names: Sequence[str], convention: Convention = "linear") -> tuple[str, Budget | None]:
    """Return the served name and the budget of "NAME" or "NAME@SIZE". The budget of "NAME" is None.

    A model of None stands for the only served model. `convention` is that of a ratio.
    """
    served = ", ".join(names)
    if model is None:
        if len(names) == 1:
            return names[0], None
        raise RequestError(f"several models are served, so model must be given: {served}.", "model", "model_required")
    if model in names:
        return model, None
    name = max((name for name in names if model.startswith(f"{name}@")), key=len, default=None)
    if name is None:
        guess = did_you_mean(model.partition("@")[0], list(names))
        message = f"no model {cited(model)}{guess}; served: {served}, each at any size, as NAME@RATIO."
        raise RequestError(message, "model", "model_not_found", 404)
    return name, size_of(name, model[len(name) + 1 :], convention)


def size_of(name: str, written: str, convention: Convention = "linear") -> Budget:
    """Return the budget that follows the @ in a model's name."""
    allowed = (
        f"a ratio above 0 and up to 1, as in {name}@0.6, or the memory to fit into: {name}@fit:8GB, {name}@fit:8GB@4096 at this context."
    )
    budget, _, context = written.partition("@")
    try:
        parsed = Budget.parse(budget, convention)
        if not context:
            return parsed
        tokens = re.fullmatch(r"(\d{1,9})([kK]?)", context)
        if tokens is None or parsed.stored_bytes is None:
            raise BudgetError("")
        return Budget(memory_mb=parsed.stored_bytes / MEGA, context=int(tokens[1]) * (1024 if tokens[2] else 1), batch=1)
    except (BudgetError, ValueError, OverflowError) as error:  # ValueError and OverflowError: numbers of thousands of digits
        raise RequestError(f"the size behind {name}@ is {cited(written)}; it must be {allowed}", "model", "invalid_size") from error


def _refuse() -> Any:
    """Raise the error for a value that is invalid in combination with the other fields."""
    raise PydanticCustomError("refused", "refused")


def explain(errors: Sequence[Any], fields: Any, kind: type[BaseModel]) -> RequestError:
    """Convert the first error of pydantic to a RequestError. The `loc` of every error begins with "body", as in FastAPI."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason, at = first.get("ctx", {}).get("error", ""), first["loc"][-1]
        character = f" (at character {at})" if isinstance(at, int) and at >= 0 else ""
        return RequestError(f"the body is not JSON: {reason}{character}.", code="invalid_json")
    if len(first["loc"]) < 2 or not isinstance(fields, Mapping):
        example = {"prompt": "Once upon a time"} if kind is CompletionRequest else {}
        if kind is ChatRequest:
            example = {"messages": [{"role": "user", "content": "Hello"}]}  # type: ignore[dict-item]
        shown = json.dumps({**example, "size_ratio": 0.6})
        return RequestError(f"send a JSON object like {shown}, with the header 'Content-Type: application/json'.", code="invalid_json")
    # a value of a union has an error for each type; the deepest one belongs to the type that the client most likely meant
    error: Any = max((error for error in errors if error["loc"][1] == first["loc"][1]), key=lambda error: len(_place(error, fields)))
    place = _place(error, fields)
    inside = place[0] != "messages" and len(place) > 1
    if inside:  # other fields have one description for the complete value
        place = place[:1]
    name, path = str(place[-1]), _written(place)
    if error["type"] == "extra_forbidden" and not inside:
        known = Message.model_fields if len(place) > 1 else kind.model_fields
        return RequestError(f"unknown field {path!r}{did_you_mean(name, list(known))}. Allowed: {', '.join(known)}.", path, "unknown_field")
    models = (Message, Part) if len(place) > 1 else (kind,)
    allowed = next((model.model_fields[name].description for model in models if name in model.model_fields), None)
    if isinstance(place[-1], int):
        object_like = {"type": "text", "text": "Hello"} if "content" in place else {"role": "user", "content": "Hello"}
        allowed = f"an object like {json.dumps(object_like)}"
    if error["type"] == "missing" and not inside:
        return RequestError(f"{path} is missing; it must be {allowed or 'left out'}.", path, "missing_field")
    value: Any = fields
    for part in place:
        value = value[part]
    return RequestError(f"{path} is {reprlib.repr(value)}; it must be {allowed or 'left out'}.", path)


def _place(error: Any, fields: Any) -> list[str | int]:
    """Return the path to the value of an error, without the names that pydantic adds for the types of a union."""
    place: list[str | int] = []
    inside = fields
    parts = list(error["loc"][1:])
    if field := error.get("ctx", {}).get("field"):
        parts.append(field)
    for at, part in enumerate(parts):
        last = at == len(parts) - 1 and error["type"] == "missing"
        if (isinstance(inside, Mapping) and (part in inside or last)) or (isinstance(inside, list) and isinstance(part, int)):
            place.append(part)
            inside = inside.get(part) if isinstance(inside, Mapping) else inside[part]
    return place


def _written(place: Sequence[str | int]) -> str:
    """Return a path as text, for example messages[1].content."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
