"""The engine: resident any-size models, and one thread that steps them.

    request -> which size, which tokens -> sequences in the model's batch -> [thread: step, step, ...] -> events, as they come

Every size of a model is served from one copy of its sorted factors, and sizes share a step
(`acip.layers.mixed_sizes`), so nothing is loaded, moved or switched between requests. Models take turns, a step each.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from secrets import randbits
from typing import TYPE_CHECKING, Any

from acip.layers.mixed_sizes import Size
from acip.sizing.cut_table import Cut
from acip_platform.serve.engine.batch import Sequence
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import SampledToken
from acip_platform.serve.http.errors import RequestError, as_response
from acip_platform.serve.text.detokenizer import Detokenizer
from acip_platform.serve.text.prompt_logprobs import Echo, wanted
from acip_platform.serve.text.structured_output import AnswerFormat
from acip_platform.serve.text.token_logprobs import scored

DEFAULT_CHAT_TOKENS = 1024  # of a chat that does not say max_tokens: small models loop, and would fill the context

if TYPE_CHECKING:  # they are pydantic's; the engine itself works where only acip's own dependencies are installed
    from acip_platform.serve.http.requests import ChatRequest, CompletionRequest

MAX_ANSWERS = 32  # prompts times n

log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Event:
    """What happened to a request: its `head`, `start` once it has a slot, `text` of a choice, its `end`, and `done` or `error` at last."""

    kind: str
    index: int = 0
    text: str = ""
    logprobs: list[dict[str, Any]] | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class ActiveRequest:
    """A request on its way. Events are handed to `hear` in the engine's thread, those of a step together."""

    served: ResidentModel
    cut: Cut
    seed: int
    deadline: float  # seconds of time.monotonic
    timeout_s: float
    hear: Callable[[list[Event]], object]
    received: float
    max_tokens: int = 0  # of each sequence
    prompt_tokens: int = 0
    sequences: list[Sequence] = field(default_factory=list)  # that have not ended
    made: int = 0  # tokens
    began: float = 0.0
    first: float = 0.0
    finished: bool = False
    timed_out: bool = False
    canceled: bool = False  # set from any thread
    events: list[Event] = field(default_factory=list)
    form: AnswerFormat | None = None  # what the answers must be like
    echoed: set[int] = field(default_factory=set)  # answers whose prompt was told

    @property
    def gone(self) -> bool:
        return self.canceled or self.finished

    def head(self) -> Event:
        """What is known before anything is generated."""
        version = self.served.version
        return Event("head", data={
            "model": version.name, "version": version.version, "seed": self.seed, "size": self.served.size(self.cut),
            "max_tokens": self.max_tokens, "tools": self.form.tools if self.form is not None else None,
        })  # fmt: skip

    def say(self, event: Event) -> None:
        self.events.append(event)

    def flush(self) -> None:
        if self.events:
            events, self.events = self.events, []
            self.hear(events)

    def error(self, error: Exception) -> None:
        if not self.finished:
            request_id = uuid.uuid4().hex
            status, body = as_response(error, request_id)
            if status >= 500:
                log.error("request %s failed", request_id, exc_info=error)
            self.finished = True
            self.say(Event("error", data={"status": status, "body": body}))

    # what a sequence calls

    def token(self, sequence: Sequence, choice: SampledToken, text: str) -> None:
        self._start(sequence)
        self.made += 1
        told = None
        if choice.logprob is not None:
            told = [scored(sequence.text.bytes, choice.token, sequence.text.offset, choice.logprob, choice.top)]
        if text or told:
            self.say(Event("text", sequence.index, text, told))

    def ended(self, sequence: Sequence, text: str, reason: str) -> None:
        self._start(sequence)
        self.made += bool(sequence.made) and sequence.ids[-1] in sequence.ends  # the token that ended it
        self.say(Event("end", sequence.index, text, data={"finish_reason": reason}))
        self.sequences.remove(sequence)
        if not self.sequences:
            self.finished = True
            timed_out = {"timed_out": True} if self.timed_out else {}
            self.say(Event("done", data={"usage": self.usage(), "timings": self.timings(), **timed_out}))

    def stop_at_deadline(self) -> None:
        """End with what is there: the sequences that go on end as if max_tokens were reached. Without a token, it is an error."""
        if not self.made or any(sequence.echo is not None and not sequence.made for sequence in self.sequences):  # prompts half scored
            self.error(_too_slow(self.timeout_s))
            return
        self.timed_out = True
        for sequence in list(self.sequences):
            self.ended(sequence, sequence.text.end(), "length")

    def failed(self, sequence: Sequence, error: str) -> None:
        size = self.served.size(self.cut)["got"]
        self.error(RequestError(f"{self.served.version.name} gave no token at size {size:.4g}: {error}.", code="not_finite", status=500))

    def _start(self, sequence: Sequence) -> None:
        if not self.first:
            self.first, self.began = time.monotonic(), sequence.began
            self.say(Event("start", data={"queued_s": self.began - self.received}))
        if sequence.echo is not None and sequence.index not in self.echoed:
            self.echoed.add(sequence.index)
            self.say(Event("text", sequence.index, sequence.echo.text, sequence.echo.told))

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.made, "total_tokens": self.prompt_tokens + self.made}

    def timings(self) -> dict[str, float]:
        now = time.monotonic()
        return {
            "queued_s": self.began - self.received,
            "first_token_s": self.first - self.began,
            "generate_s": now - self.began,
            "tokens_per_s": self.made / max(now - self.began, 1e-9),
        }


class Engine:
    """Steps the batches of resident models in a thread of its own until `close`."""

    def __init__(self, timeout_s: float = 300.0, default_max_tokens: int = DEFAULT_CHAT_TOKENS) -> None:
        self.timeout_s, self.default_max_tokens = timeout_s, default_max_tokens
        self._served: list[ResidentModel] = []
        self._tickets: set[ActiveRequest] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self._thread.start()

    # ---- from any thread

    def add(self, served: ResidentModel) -> None:
        with self._changed:
            self._served.append(served)

    def remove(self, served: ResidentModel) -> bool:
        """Forget a model, unless somebody uses it."""
        with self._changed:
            if any(ticket.served is served for ticket in self._tickets) or served not in self._served:
                return False
            self._served.remove(served)
            return True

    @property
    def open(self) -> int:
        """Requests that are being answered, or wait for it."""
        return len(self._tickets)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(
        self,
        served: ResidentModel,
        request: "CompletionRequest | ChatRequest",
        hear: Callable[[list[Event]], object],
        received: float | None = None,
    ) -> ActiveRequest:
        """Begin to answer. Raises RequestError or BudgetError for what can't be answered; later errors are events."""
        received = time.monotonic() if received is None else received
        _, budget = request.name_and_budget([served.version.name])
        cut = served.cut(budget)
        echo_wanted = wanted(request)
        encoded = served.encode(request)
        form = served.form(request)
        choices = request.n or 1
        max_tokens = served.fit(encoded, request.limit, self.default_max_tokens)
        seed = randbits(63) if request.seed is None else request.seed
        ticket = ActiveRequest(served, cut, seed, received + self.timeout_s, self.timeout_s, hear, received, max_tokens)
        size, ends = Size(cut.removed, cut.ranks), served.ends(request)
        sequences = []
        for index in range(len(encoded) * choices):
            ids = list(encoded[index // choices])
            shown = form.shown if form is not None else ()
            text = Detokenizer(served.tokenizer, [] if echo_wanted else ids, served.stops(request), shown)
            echo = Echo.of(request, text, served.tokenizer, ids, index // choices)
            sampler = served.sampler(request, (seed + index) % 2**63, ids, max_tokens)
            sampler.constraint = form.constraint() if form is not None else None
            sequences.append(Sequence(ids, size, sampler, text, max_tokens, ends, ticket, index, echo))
        ticket.form = form
        ticket.sequences, ticket.prompt_tokens = list(sequences), sum(map(len, encoded))
        with self._changed:
            if served not in self._served:
                raise RequestError(f"{served.version.name} was unloaded; ask again.", "model", "unloaded", 503)
            self._tickets.add(ticket)
            served.batch.waiting.extend(sequences)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: ActiveRequest) -> None:
        """Nobody waits for it any more: its sequences leave before the next step."""
        ticket.canceled = True
        with self._changed:
            self._changed.notify()

    def events(self, served: ResidentModel, request: "CompletionRequest | ChatRequest") -> Iterator[Event]:
        """Answer in the calling thread: events until the last."""
        heard: SimpleQueue[list[Event]] = SimpleQueue()
        ticket = self.submit(served, request, heard.put)
        try:
            while True:
                for event in heard.get():
                    yield event
                    if event.kind in ("done", "error"):
                        return
        finally:
            self.cancel(ticket)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # ---- in the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or any(served.batch for served in self._served))
                if self._closed:
                    return
                ready = [served for served in self._served if served.batch]
            for served in ready:
                try:
                    served.batch.step()
                except Exception as error:
                    served.batch.fail()
                    with self._changed:
                        lost = [ticket for ticket in self._tickets if ticket.served is served]
                    for ticket in lost:
                        ticket.error(error)
                    del lost, ticket
            self._after()
            del ready, served  # a model that is removed while this thread sleeps must not stay for its sake

    def _after(self) -> None:
        """Deadlines, and who has heard the last of it."""
        now = time.monotonic()
        with self._changed:
            tickets = list(self._tickets)
        for ticket in tickets:
            if now > ticket.deadline and not ticket.gone:
                ticket.stop_at_deadline()
            ticket.flush()
            if ticket.gone:
                with self._changed:
                    self._tickets.discard(ticket)


def _too_slow(timeout_s: float) -> RequestError:
    message = f"no token within {timeout_s:g} s, waiting included; ask for fewer max_tokens or prompts, or later."
    return RequestError(message, code="timeout", status=408)
