"""Events of a request, in the order in which they happen.

    RequestStarted -> for each sequence: PromptScored, if requested -> TokenSampled, ... -> SequenceEnded -> RequestDone

`RequestFailed` may take the place of any of them; nothing follows it or `RequestDone`. Events of different sequences are interleaved.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal, TypeVar

from acip.sizing.cut_table import Cut
from acip_platform.serve.engine.sampling import SampledToken, ScoredToken

EndReason = Literal["stop", "length"]
Request = TypeVar("Request")
Event = TypeVar("Event")


@dataclass(frozen=True)
class RequestStarted:
    """The first sequence of the request has got its first token."""

    queued_s: float


@dataclass(frozen=True)
class PromptScored:
    """The log-probabilities of a sequence's prompt. The first token has none, because nothing comes before it."""

    index: int
    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class TokenSampled:
    """The next token of a sequence. The end token of a sequence is not among them."""

    index: int
    token: SampledToken


@dataclass(frozen=True)
class SequenceEnded:
    """The end of a sequence: "stop" by an end token, the constraint or the consumer, "length" by max_tokens or the deadline."""

    index: int
    reason: EndReason


@dataclass(frozen=True)
class RequestDone:
    """All sequences have ended. Times are in seconds; `completion_tokens` include end tokens."""

    prompt_tokens: int
    completion_tokens: int
    queued_s: float
    first_token_s: float  # from the first slot to the first token
    generate_s: float  # from the first slot to the end
    timed_out: bool = False  # the deadline ended it
    drafted_tokens: int = 0  # that a smaller size has drafted
    accepted_tokens: int = 0  # drafted ones that the requested size has accepted; end tokens are not among them
    tokens_by_size: tuple[tuple[Cut, int], ...] = ()  # the sizes of the request, each with the tokens that were generated at it


@dataclass(frozen=True)
class RequestFailed:
    """The request ended with an error: an `EngineError`, the error of a constraint, or an error of a forward pass."""

    error: Exception


TokenEvent = RequestStarted | PromptScored | TokenSampled | SequenceEnded | RequestDone | RequestFailed


def stream(
    submit: Callable[[Callable[[list[Event]], object]], Request], cancel: Callable[[Request], object], is_last: Callable[[Event], bool]
) -> Iterator[Event]:
    """Submit a request, and yield its events until the last. Closing the iterator cancels the request."""
    queue: SimpleQueue[list[Event]] = SimpleQueue()
    request = submit(queue.put)
    try:
        while True:
            for event in queue.get():
                yield event
                if is_last(event):
                    return
    finally:
        cancel(request)
