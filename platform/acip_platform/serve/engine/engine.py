"""The engine: resident models, and one thread that steps them.

    GenerationRequest -> sequences in the model's batch -> [thread: step, step, ...] -> TokenEvents, as they happen

Sizes of a model share a step (`acip.layers.mixed_sizes`), and nothing is moved or switched between requests. Weights that a request is the
first to need are loaded in the thread that submits it (`resident_weights`). Models take turns, one step each.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from secrets import randbits

from acip.layers.mixed_sizes import Size
from acip.sizing.cut_table import Cut
from acip_platform.serve.engine.batch import Sequence, SizeChange
from acip_platform.serve.engine.errors import DeadlineExceededError, ModelUnloadedError, NotFiniteError, SizePartsError
from acip_platform.serve.engine.events import (
    EndReason,
    PromptScored,
    RequestDone,
    RequestFailed,
    RequestStarted,
    SequenceEnded,
    TokenEvent,
    TokenSampled,
    stream,
)
from acip_platform.serve.engine.request import GenerationRequest, SizePart
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import SampledToken

TIMEOUT_S = 300.0

log = logging.getLogger("ray.serve")


@dataclass(eq=False)
class ActiveRequest:
    """A submitted request. `on_event` gets its events in the engine's thread, those of one step together."""

    model: ResidentModel
    cuts: dict[tuple[int, int], Cut]  # its sizes by key, that of the beginning first
    seed: int
    max_tokens: int  # of each sequence
    prompt_tokens: int
    timeout_s: float
    received: float  # seconds of time.monotonic
    on_event: Callable[[list[TokenEvent]], object]
    sequences: list[Sequence] = field(default_factory=list)  # that have not ended
    generated: int = 0  # tokens
    at: Counter[tuple[int, int]] = field(default_factory=Counter)  # tokens by the key of their size
    drafted: int = 0  # tokens that a smaller size has drafted
    accepted: int = 0  # those of them that became tokens of the answer
    started: float = 0.0  # when the first sequence got its slot
    first: float = 0.0  # when the first token was sampled
    finished: bool = False
    timed_out: bool = False
    canceled: bool = False  # set from any thread
    events: list[TokenEvent] = field(default_factory=list)  # that have not been handed over

    @property
    def cut(self) -> Cut:
        """The size at the beginning."""
        return next(iter(self.cuts.values()))

    @property
    def done(self) -> bool:
        return self.canceled or self.finished

    @property
    def deadline(self) -> float:
        return self.received + self.timeout_s

    def emit(self, event: TokenEvent) -> None:
        self.events.append(event)

    def flush(self) -> None:
        """Hand over the events of a step."""
        if not self.events:
            return
        events, self.events = self.events, []
        try:
            self.on_event(events)
        except Exception:  # of the caller's code; it must not end the engine's thread
            log.exception("a request is canceled because its on_event failed")
            self.canceled = True

    # ---- events of a sequence

    def on_prompt(self, sequence: Sequence) -> None:
        self._start(sequence)
        if sequence.prompt_logprobs is not None:
            self.emit(PromptScored(sequence.index, tuple(sequence.prompt_scores)))

    def on_token(self, sequence: Sequence, token: SampledToken) -> None:
        self.generated += 1
        self.accepted += token.drafted
        self.at[sequence.size.key] += 1
        self.emit(TokenSampled(sequence.index, token))

    def on_drafts(self, count: int) -> None:
        self.drafted += count

    def on_end(self, sequence: Sequence, reason: EndReason) -> None:
        self.generated += bool(sequence.generated) and sequence.ids[-1] in sequence.end_tokens  # an end token has no event of its own
        self._end(sequence, reason)

    def on_no_token(self, reason: str) -> None:
        size = f"{self.cut.asked:g} ({self.cut.convention})"
        self.on_error(NotFiniteError(f"{self.model.name} gave no token at size {size}: {reason}."))

    def on_error(self, error: Exception) -> None:
        if not self.finished:
            self.finished = True
            self.emit(RequestFailed(error))

    def stop_at_deadline(self) -> None:
        """End the sequences as if max_tokens were reached. It is an error if there is no token, or a prompt that is not scored yet."""
        if not self.generated or any(sequence.scores_prompt for sequence in self.sequences):
            message = f"no token within {self.timeout_s:g} s, waiting included; send fewer prompts, lower max_tokens, or try again later."
            self.on_error(DeadlineExceededError(message))
            return
        self.timed_out = True
        for sequence in list(self.sequences):
            self._end(sequence, "length")

    def _start(self, sequence: Sequence) -> None:
        if not self.first:
            self.first, self.started = time.monotonic(), sequence.started
            self.emit(RequestStarted(self.started - self.received))

    def _end(self, sequence: Sequence, reason: EndReason) -> None:
        self.emit(SequenceEnded(sequence.index, reason))
        self.sequences.remove(sequence)
        if not self.sequences:
            self.finished = True
            self.emit(
                RequestDone(
                    self.prompt_tokens, self.generated, self.started - self.received, self.first - self.started,
                    time.monotonic() - self.started, self.timed_out, self.drafted, self.accepted,
                    tuple((cut, self.at[key]) for key, cut in self.cuts.items()),
                )
            )  # fmt: skip


class Engine:
    """Steps the batches of resident models in a thread of its own until `close`."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._models: list[ResidentModel] = []
        self._requests: set[ActiveRequest] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self._thread.start()

    # ---- from any thread

    def add(self, model: ResidentModel) -> None:
        with self._changed:
            self._models.append(model)

    def remove(self, model: ResidentModel) -> bool:
        """Remove a model. Return False, and keep it, if requests use it or if it was not there."""
        with self._changed:
            if any(request.model is model for request in self._requests) or model not in self._models:
                return False
            self._models.remove(model)
            return True

    @property
    def open(self) -> int:
        """The number of requests that are waiting or running."""
        return len(self._requests)

    @property
    def sequences(self) -> int:
        """The number of sequences that are waiting or running."""
        return sum(len(model.batch) for model in list(self._models))

    @property
    def alive(self) -> bool:
        """Whether it can step its models."""
        return self._thread.is_alive() and all(model.batch.broken is None for model in self._models)

    def submit(
        self,
        model: ResidentModel,
        request: GenerationRequest,
        on_event: Callable[[list[TokenEvent]], object],
        received: float | None = None,
    ) -> ActiveRequest:
        """Begin a request, and load the weights of its size if necessary. That may take seconds.

        Its timeout counts from `received`, in seconds of time.monotonic; None stands for now. Raise an EngineError or BudgetError for
        a request that is not valid, and an AcipError for weights that can't be loaded. Later errors are events.
        """
        received = time.monotonic() if received is None else received
        if len(request.parts) > 1 and not model.changes_sizes:
            raise SizePartsError(f"{model.name} is served by an engine that computes each answer at one size; give one size.")
        parts = request.parts or [SizePart(request.budget)]
        smallest = None if request.min_budget is None else model.cut(request.min_budget)
        part_cuts = [model.cut(part.budget) for part in parts]
        cuts = {cut.key: cut for cut in (*part_cuts, *([smallest] if smallest is not None else []))}
        prompts = [list(prompt) for prompt in request.prompts]
        model.check_tokens(prompts, request.sampling)
        max_tokens = model.answer_tokens(prompts, request.max_tokens, request.default_max_tokens)
        seed = randbits(63) if request.seed is None else request.seed
        timeout_s = self.timeout_s if request.timeout_s is None else request.timeout_s
        active = ActiveRequest(model, cuts, seed, max_tokens, sum(map(len, prompts)), timeout_s, received, on_event)
        sizes = [Size(cut.key, cut.ranks, cut.versions) for cut in part_cuts]
        changes = [SizeChange(size, part.tokens, part.ends) for size, part in zip(sizes[1:], parts, strict=False)]
        end_tokens = model.end_tokens if request.end_tokens is None else request.end_tokens
        sequences = []
        for index in range(len(prompts) * request.choices):
            ids = list(prompts[index // request.choices])
            sampler = model.sampler(request.sampling, (seed + index) % 2**63, ids, max_tokens)
            sampler.constraint = request.constraint() if request.constraint is not None else None
            consumer = request.consumer(index) if request.consumer is not None else None
            sequences.append(
                Sequence(
                    ids, sizes[0], sampler, max_tokens, end_tokens, active, index, consumer, request.prompt_logprobs, request.speculative,
                    deque(changes), None if smallest is None else Size(smallest.key, smallest.ranks, smallest.versions),
                )
            )  # fmt: skip
        active.sequences = list(sequences)
        if request.speculative and max_tokens > 1 and model.drafts:
            model.weights.prepare_draft()
        held: list[Cut] = []  # until the request leaves `_requests`
        try:
            for cut in cuts.values():
                model.weights.hold(cut)
                held.append(cut)
            with self._changed:
                if model not in self._models:
                    raise ModelUnloadedError(f"{model.name} was unloaded; send the request again.")
                self._requests.add(active)
                model.batch.waiting.extend(sequences)
                self._changed.notify()
        except BaseException:
            for cut in held:
                model.weights.release(cut)
            raise
        return active

    def cancel(self, request: ActiveRequest) -> None:
        """Drop a request: its sequences leave the batch before the next step, and it has no more events."""
        request.canceled = True
        with self._changed:
            self._changed.notify()

    def events(self, model: ResidentModel, request: GenerationRequest) -> Iterator[TokenEvent]:
        """Submit a request, and yield its events until the last. Closing the iterator cancels the request."""
        return stream(
            lambda on_event: self.submit(model, request, on_event),
            self.cancel,
            lambda event: isinstance(event, RequestDone | RequestFailed),
        )

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # ---- in the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or any(model.batch for model in self._models))
                if self._closed:
                    return
                ready = [model for model in self._models if model.batch]
            for model in ready:
                try:
                    model.batch.step()
                except Exception as error:
                    model.batch.clear()
                    with self._changed:
                        lost = [request for request in self._requests if request.model is model]
                    for request in lost:
                        request.on_error(error)
                    del lost, request
            self._after_step()
            del ready, model  # references would keep a removed model in memory while this thread waits

    def _after_step(self) -> None:
        """Apply deadlines, hand over events, and drop requests that are done."""
        now = time.monotonic()
        with self._changed:
            requests = list(self._requests)
        for request in requests:
            if now > request.deadline and not request.done:
                request.stop_at_deadline()
            request.flush()
            if request.done:
                with self._changed:
                    self._requests.discard(request)
                for cut in request.cuts.values():
                    request.model.weights.release(cut)
