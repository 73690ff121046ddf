"""The engine for requests in text, a layer between HTTP and the token engine.

parsed request -> chat template, tokenizer -> GenerationRequest -> engine
TokenEvents of the engine -> detokenizers, stop texts -> TextEvents
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from acip_platform.serve.engine.engine import TIMEOUT_S, ActiveRequest, Engine
from acip_platform.serve.engine.events import (
    PromptScored,
    RequestDone,
    RequestFailed,
    RequestStarted,
    SequenceEnded,
    TokenEvent,
    TokenSampled,
    stream,
)
from acip_platform.serve.engine.request import DEFAULT_MAX_TOKENS, GenerationRequest, SizePart
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import SampledToken, SamplingParams
from acip_platform.serve.http.errors import logged_response
from acip_platform.serve.http.requests import DEFAULT_SIZE, ChatRequest, CompletionRequest, naming_field
from acip_platform.serve.size_facts import size_facts
from acip_platform.serve.text.detokenizer import Detokenizer
from acip_platform.serve.text.events import TextEvent
from acip_platform.serve.text.model_text import ModelText, stop_texts
from acip_platform.serve.text.prompt_logprobs import Echo, wants_echo
from acip_platform.serve.text.token_logprobs import scored

MAX_TOKEN_BYTES = 16  # of most tokens

log = logging.getLogger("ray.serve")


class SequenceText:
    """The text of one sequence, which grows with its tokens. A stop text ends the sequence."""

    def __init__(self, detokenizer: Detokenizer, echo: Echo | None) -> None:
        self.detokenizer, self.echo = detokenizer, echo
        self._added: deque[tuple[str, int]] = deque()  # text and offset of each token whose event is pending

    def take(self, token: SampledToken) -> bool:
        """Add a sampled token. Return whether a stop text is complete."""
        text = self.detokenizer.add(token.token)
        self._added.append((text, self.detokenizer.offset))
        return self.detokenizer.stopped

    def prompt(self, index: int, event: PromptScored | None) -> Iterator[TextEvent]:
        """Yield the prompt, once, if the answer repeats it."""
        if self.echo is not None:
            echo, self.echo = self.echo, None
            yield TextEvent("text", index, echo.text, echo.logprobs(event.tokens) if event is not None else None)

    def token(self, index: int, token: SampledToken) -> Iterator[TextEvent]:
        """Yield the text that became certain with a token, with the token's log-probability if it was requested."""
        text, offset = self._added.popleft()
        logprobs = None if token.logprob is None else [scored(self.detokenizer.bytes, token, offset)]
        if text or logprobs:
            yield TextEvent("text", index, text, logprobs, {"drafted": True} if token.drafted else {})

    def end(self, index: int, reason: str) -> TextEvent:
        """Return the last event of the sequence, with the text that was held back."""
        return TextEvent("end", index, self.detokenizer.end(), data={"finish_reason": reason})


class TextRequest:
    """A submitted request in text. `on_event` receives its events in the engine's thread, those of one step together."""

    active: ActiveRequest  # set by `TextEngine.submit`

    def __init__(
        self,
        model: ResidentModel,
        request: CompletionRequest | ChatRequest,
        on_event: Callable[[list[TextEvent]], object],
        default_size: str = DEFAULT_SIZE,
    ) -> None:
        self.on_event = on_event
        text = ModelText.of(model)
        _, budget = request.name_and_budget([model.name], model.convention, default_size)
        min_budget = request.min_budget(budget, model.convention)
        parts = [
            SizePart(replace(budget, ratio=part.ratio), part.tokens, _contains(part.until, text.tokenizer) if part.until else None)
            for part in request.parts
        ]
        for each in (budget, *(part.budget for part in parts)):
            with naming_field(each):
                model.cut(each)  # raises BudgetError for an unavailable size before the prompts are encoded
        if min_budget is not None:
            with naming_field(min_budget, "min_size"):
                model.cut(min_budget)
        echo = wants_echo(request)
        prompts = text.encode(request)
        self.format = text.format_of(request)
        shown = self.format.shown if self.format is not None else ()
        self._choices = request.n or 1
        self._sequences: list[SequenceText] = []
        stops = stop_texts(model, request)

        def consumer(index: int) -> SequenceText:
            ids = prompts[index // self._choices]
            detokenizer = Detokenizer(text.tokenizer, [] if echo else ids, stops, shown)
            self._sequences.append(
                SequenceText(detokenizer, self._echo(request, detokenizer, text.tokenizer, ids, index) if echo else None)
            )
            return self._sequences[-1]

        self.generation = GenerationRequest(
            prompts,
            budget,
            parts=parts,
            min_budget=min_budget,
            choices=self._choices,
            max_tokens=request.limit,
            sampling=sampling_params(request),
            seed=request.seed,
            end_tokens=frozenset() if request.ignore_eos else None,
            prompt_logprobs=request.logprob_count if echo else None,
            speculative=request.speculative != "off",
            constraint=self.format.constraint if self.format is not None else None,
            consumer=consumer,
        )

    def _echo(self, request: Any, detokenizer: Detokenizer, tokenizer: Any, ids: list[int], index: int) -> Echo:
        prompt = request.prompts[index // self._choices]
        return Echo(detokenizer, tokenizer, ids, prompt if isinstance(prompt, str) else None)

    def head(self) -> TextEvent:
        """Return the first event, with the facts that are known before generation."""
        model, active = self.active.model, self.active
        return TextEvent("head", data={
            "model": model.name, "version": model.version.version, "seed": active.seed,
            "size": size_facts(active.cut, model.removed_at_stop), "max_tokens": active.max_tokens,
            "tools": self.format.tools if self.format is not None else None,
        })  # fmt: skip

    def on_tokens(self, events: list[TokenEvent]) -> None:
        """Convert the engine's events to text events, and pass them to `on_event`."""
        try:
            texts = [text for event in events for text in self._texts(event)]
        except Exception as error:  # the client must receive a last event
            texts = [_failed(error)]
        if texts:
            self.on_event(texts)

    def _texts(self, event: TokenEvent) -> Iterator[TextEvent]:
        match event:
            case RequestStarted():
                yield TextEvent("start", data={"queued_s": event.queued_s})
            case PromptScored():
                yield from self._sequences[event.index].prompt(event.index, event)
            case TokenSampled():
                sequence = self._sequences[event.index]
                yield from sequence.prompt(event.index, None)
                yield from sequence.token(event.index, event.token)
            case SequenceEnded():
                sequence = self._sequences[event.index]
                yield from sequence.prompt(event.index, None)
                yield sequence.end(event.index, event.reason)
            case RequestDone():
                mode = "off" if not self.generation.speculative else "auto" if self.active.model.drafts else "unavailable"
                yield TextEvent("done", data=_facts(event, mode) | self._sizes(event))
            case RequestFailed():
                yield _failed(event.error)

    def _sizes(self, done: RequestDone) -> dict[str, Any]:
        """Return the tokens at each size, if the request allowed several."""
        if len(done.tokens_by_size) < 2:
            return {}
        removed = self.active.model.removed_at_stop
        return {"sizes": [size_facts(cut, removed) | {"tokens": tokens} for cut, tokens in done.tokens_by_size]}


class TextEngine:
    """An engine for parsed requests in text. `tokens` is the token engine that it uses."""

    def __init__(
        self, timeout_s: float = TIMEOUT_S, default_max_tokens: int = DEFAULT_MAX_TOKENS, default_size: str = DEFAULT_SIZE
    ) -> None:
        self.timeout_s, self.default_max_tokens, self.default_size = timeout_s, default_max_tokens, default_size
        self.tokens = Engine(timeout_s)
        self.add, self.remove, self.close = self.tokens.add, self.tokens.remove, self.tokens.close

    @property
    def open(self) -> int:
        """The number of requests that are waiting or running."""
        return self.tokens.open

    @property
    def sequences(self) -> int:
        return self.tokens.sequences

    @property
    def alive(self) -> bool:
        return self.tokens.alive

    def submit(
        self,
        model: ResidentModel,
        request: CompletionRequest | ChatRequest,
        on_event: Callable[[list[TextEvent]], object],
        received: float | None = None,
    ) -> TextRequest:
        """Submit a request. Its timeout counts from `received`, in seconds of time.monotonic; None stands for now.

        Raise an InvalidRequestError, EngineError or BudgetError for an invalid request. Later errors are events.
        """
        received = time.monotonic() if received is None else received
        text_request = TextRequest(model, request, on_event, self.default_size)
        generation = replace(text_request.generation, timeout_s=self.timeout_s, default_max_tokens=self.default_max_tokens)
        text_request.active = self.tokens.submit(model, generation, text_request.on_tokens, received)
        return text_request

    def cancel(self, request: TextRequest) -> None:
        """Drop a request: its sequences leave the batch before the next step."""
        self.tokens.cancel(request.active)

    def events(self, model: ResidentModel, request: CompletionRequest | ChatRequest) -> Iterator[TextEvent]:
        """Submit a request, and yield its events until the last. Closing the iterator cancels the request."""
        return stream(lambda on_event: self.submit(model, request, on_event), self.cancel, lambda event: event.kind in ("done", "error"))


def _contains(text: str, tokenizer: Any) -> Callable[[Sequence[int]], bool]:
    """Return a function that says whether the last tokens of a sequence contain `text`. It is called after each token."""
    longest = len(text.encode()) + MAX_TOKEN_BYTES  # a token has at least one byte

    def contains(ids: Sequence[int]) -> bool:
        return text in tokenizer.decode(list(ids[-longest:]), skip_special_tokens=False)

    return contains


def sampling_params(request: CompletionRequest | ChatRequest) -> SamplingParams:
    """Return the sampling parameters of a request."""
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        logprobs=request.logprob_count,
    )


def _facts(done: RequestDone, speculative: str) -> dict[str, Any]:
    usage = {
        "prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }  # fmt: skip
    timings = {
        "queued_s": done.queued_s, "first_token_s": done.first_token_s, "generate_s": done.generate_s,
        "tokens_per_s": done.completion_tokens / max(done.generate_s, 1e-9),
    }  # fmt: skip
    drafts = {"mode": speculative, "drafted_tokens": done.drafted_tokens, "accepted_tokens": done.accepted_tokens}
    return {"usage": usage, "timings": timings, "speculation": drafts, **({"timed_out": True} if done.timed_out else {})}


def _failed(error: Exception) -> TextEvent:
    status, body = logged_response(error)
    return TextEvent("error", data={"status": status, "body": body})
