"""Continuous batching of one resident model: sequences of any size join and leave between steps.

    waiting --a slot is free--> prefilling, in chunks --first token--> decoding, one token per step --end--> slot free again

Each step is one forward pass over one token of every sequence that is decoding and over up to `PREFILL_CHUNK_TOKENS` tokens of prompts,
so a long prompt delays the other sequences by one chunk at a time. If none is decoding, a step has several chunks, which take less time
together. Requests of all sizes are served in their order of arrival.

A sequence may change its size between steps: at the end of a part (`SizeChange`), and while others wait for a slot (`smallest`).

If all sequences decode at one size, a step may instead be several passes that draft tokens and one that verifies them (`speculation`).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from acip.layers.mixed_sizes import Mixer, Size, padded
from acip.modeling_acip import onednn
from acip_platform.serve.engine.events import EndReason
from acip_platform.serve.engine.kv_cache import CachePiece, KVCache, Step, doubled
from acip_platform.serve.engine.request import TokenConsumer
from acip_platform.serve.engine.sampling import SampledToken, Sampler, ScoredToken, sample, score
from acip_platform.serve.engine.speculation import Speculation

MAX_SEQUENCES = 32  # in a batch
PREFILL_CHUNK_TOKENS = 128  # tokens of prompts in a step
CHUNKS_ALONE = 8  # in a step without decoding, at most. It has 1, 2, 4, ... full ones: few numbers of rows, see `padded`


class Owner(Protocol):
    """The request that a sequence belongs to."""

    @property
    def done(self) -> bool: ...  # canceled or finished: its sequences are removed before the next step
    def on_prompt(self, sequence: "Sequence") -> None: ...  # the prompt has been processed; called before the first token
    def on_token(self, sequence: "Sequence", token: SampledToken) -> None: ...
    def on_drafts(self, count: int) -> None: ...  # so many tokens were drafted; called before the tokens of the step
    def on_end(self, sequence: "Sequence", reason: EndReason) -> None: ...
    def on_no_token(self, reason: str) -> None: ...
    def on_error(self, error: Exception) -> None: ...


@dataclass(frozen=True)
class SizeChange:
    """A change of a sequence's size: after so many tokens since the change before it, or once `when` is true of these tokens."""

    size: Size
    tokens: int | None = None
    when: Callable[[list[int]], bool] | None = None


@dataclass(eq=False)
class Sequence:
    """One continuation of one prompt."""

    ids: list[int]  # the prompt, and the tokens generated so far
    size: Size  # of the next pass
    sampler: Sampler
    max_tokens: int
    end_tokens: frozenset[int]
    owner: Owner
    index: int = 0  # among the sequences of its request
    consumer: TokenConsumer | None = None
    prompt_logprobs: int | None = None  # alternatives with each token; None = the prompt is not scored
    speculative: bool = True  # whether its tokens may be drafted
    changes: deque[SizeChange] = field(default_factory=deque)  # to come
    smallest: Size | None = None  # its size while other sequences wait
    prompt_scores: list[ScoredToken] = field(default_factory=list)
    generated: int = 0  # tokens
    cached: int = 0  # tokens whose keys and values are in the cache
    slot: int = -1
    started: float = 0.0  # when it got its slot, in seconds of time.monotonic
    ended: bool = False
    changed: int = 0  # tokens that had been generated at the last change

    def __post_init__(self) -> None:
        self.requested = self.size

    @property
    def prompt_tokens(self) -> int:
        return len(self.ids) - self.generated

    @property
    def longest(self) -> int:
        """Its largest possible length, in tokens."""
        return self.prompt_tokens + self.max_tokens

    @property
    def scores_prompt(self) -> bool:
        return self.prompt_logprobs is not None and not self.generated

    def pending(self, others_wait: bool) -> int:
        """Return how many tokens the next pass may process, and set its size."""
        count = len(self.ids) - self.cached
        if not self.generated and self.changes and self.changes[0].tokens == 0:
            if count > 1:
                count -= 1  # the last token of the prompt gives the first one of the answer, at the next size
            else:
                self._change()
        self.size = self.smallest if others_wait and self.smallest is not None else self.requested
        return count

    def _change(self) -> None:
        self.requested = self.size = self.changes.popleft().size
        self.changed = self.generated

    def _change_if_due(self) -> None:
        while self.changes:
            change = self.changes[0]
            due = change.tokens is not None and self.generated - self.changed >= change.tokens
            if not due and not (change.when is not None and change.when(self.ids[self.prompt_tokens + self.changed :])):
                return
            self._change()

    def take(self, token: SampledToken) -> None:
        """Append a sampled token, and end the sequence if nothing may follow."""
        constraint = self.sampler.constraint
        self.ended = True
        if token.error is not None:
            self.owner.on_no_token(token.error)
            return
        if not self.generated:
            self.owner.on_prompt(self)
        if not self.max_tokens:
            self.owner.on_end(self, "length")
            return
        self.ids.append(token.token)
        self.generated += 1
        if token.token in self.end_tokens:
            self.owner.on_end(self, "stop")
            return
        stopped = self.consumer is not None and self.consumer.take(token)
        self.owner.on_token(self, token)
        if stopped:
            self.owner.on_end(self, "stop")
        elif constraint is not None and constraint.error is not None:
            self.owner.on_error(constraint.error)
        elif constraint is not None and constraint.done:
            self.owner.on_end(self, "stop")
        elif self.generated >= self.max_tokens:
            self.owner.on_end(self, "length")
        else:
            self.ended = False
            self._change_if_due()


class SteppedBatch(Protocol):
    """The sequences of one model, stepped by the engine's thread: `Batch`, or another engine's batch."""

    waiting: deque[Sequence]  # the engine appends to it from any thread
    broken: str | None  # why no step is possible any more, or None

    def __len__(self) -> int: ...  # the number of sequences, those that wait included
    def step(self) -> None: ...  # give each sequence that runs its next token, or part of its prompt
    def clear(self) -> None: ...  # drop all sequences


@dataclass
class Batch:
    """The sequences that one model is generating, and those that wait for a slot."""

    model: Any
    mixer: Mixer
    kv_tokens: int  # slots times their length, at most; one sequence is always accepted
    draft: Callable[[], Size | None] = lambda: None  # the size that drafts, if its weights are in memory
    waiting: deque[Sequence] = field(default_factory=deque)
    active: list[Sequence] = field(default_factory=list)  # by slot
    cache: KVCache = field(default_factory=KVCache)
    broken: str | None = None
    speculation: Speculation | None = None

    def __len__(self) -> int:
        return len(self.waiting) + len(self.active)

    @torch.inference_mode()
    def step(self) -> None:
        """Give each sequence its next token, or process part of its prompt. With drafts, a sequence may get several tokens."""
        self._remove([sequence for sequence in self.active if sequence.owner.done])
        self._admit()
        if not self.active:
            return
        parts = [(sequence, sequence.pending(bool(self.waiting))) for sequence in self.active]
        speculation = self._speculation()
        if speculation is None:
            self._advance(parts)
            return
        size, count = self.active[0].size, len(self.active)
        least = min(sequence.max_tokens - sequence.generated for sequence in self.active)
        each = speculation.count(size, count, least - 1)
        clock = time.thread_time if self.model.device.type == "cpu" else time.perf_counter  # on a CPU, without the time of other programs
        start, right = clock(), list[int]()
        drafts = self._draft(speculation.draft, each)
        drafted = clock()
        if each:
            right = self._verify(drafts)
        else:
            self._advance(parts)
        speculation.measured(size, count, each, right, drafted - start, clock() - drafted)

    def _speculation(self) -> Speculation | None:
        """Return the measurements of drafts if this step may use them: all sequences decode at one size, and allow drafts."""
        draft = self.draft()
        if draft is None:
            self.speculation = None
        elif self.speculation is None:
            self.speculation = Speculation(draft)
        sizes = {sequence.size.key for sequence in self.active}
        decode = all(sequence.speculative and sequence.generated and sequence.cached == len(sequence.ids) - 1 for sequence in self.active)
        return self.speculation if decode and len(sizes) == 1 else None

    def _advance(self, parts: list[tuple[Sequence, int]]) -> None:
        """Run one forward pass, and sample a token for every sequence whose tokens have all been processed."""
        pieces: list[CachePiece] = []
        runs: list[tuple[Size, int]] = []
        last: list[tuple[Sequence, int]] = []  # row of the logits
        prompts: list[tuple[Sequence, int, int, int]] = []  # first token, rows of the logits
        keep: list[int] = []
        ids: list[int] = []
        start = 0
        for sequence, count in _limited(parts):
            pieces.append(CachePiece(sequence.slot, sequence.cached, start, start + count))
            ids += sequence.ids[sequence.cached : sequence.cached + count]
            start += count
            if runs and runs[-1][0].key == sequence.size.key:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((sequence.size, count))
            sequence.cached += count
            complete = sequence.cached == len(sequence.ids)
            if sequence.scores_prompt:
                prompts.append((sequence, sequence.cached - count, len(keep), len(keep) + count))
                keep += range(start - count, start)
            elif complete:
                keep.append(start - 1)
            if complete:
                last.append((sequence, len(keep) - 1))
        keep = keep or [start - 1]
        logits_nV = self._forward(ids, pieces, runs, keep + keep[-1:] * (padded(len(keep)) - len(keep) if prompts else 0))
        for sequence, first, begin, stop in prompts:
            _score_prompt(sequence, logits_nV[begin:stop], first)
        if last:
            sequences = [sequence for sequence, _ in last]
            rows_nV = logits_nV[[row for _, row in last]] if prompts else logits_nV
            for sequence, token in zip(sequences, sample(rows_nV, [sequence.sampler for sequence in sequences]), strict=True):
                sequence.take(token)
            self._remove([sequence for sequence in sequences if sequence.ended])

    def _draft(self, size: Size, count: int) -> list[list[int]]:
        """Return `count` drafts for each sequence. Their keys and values are in the cache afterwards."""
        drafts: list[list[int]] = [[] for _ in self.active]
        samplers = [sequence.sampler.for_drafts() for sequence in self.active] if count else []
        for done in range(count):
            ids = [draft[-1] if draft else sequence.ids[-1] for sequence, draft in zip(self.active, drafts, strict=True)]
            pieces = [CachePiece(sequence.slot, sequence.cached + done, i, i + 1) for i, sequence in enumerate(self.active)]
            logits_nV = self._forward(ids, pieces, [(size, len(ids))], list(range(len(ids))))
            for draft, sampler, token in zip(drafts, samplers, sample(logits_nV, samplers), strict=True):
                draft.append(max(token.token, 0))  # no token (-1) is a wrong draft
                sampler.ids.append(draft[-1])
        return drafts

    def _verify(self, drafts: list[list[int]]) -> list[int]:
        """Give each sequence the tokens that its drafts lead to, at least one. Return how many of its drafts were right."""
        pieces: list[CachePiece] = []
        ids: list[int] = []
        for sequence, draft in zip(self.active, drafts, strict=True):
            pieces.append(CachePiece(sequence.slot, sequence.cached, len(ids), len(ids) + 1 + len(draft)))
            ids += [sequence.ids[-1], *draft]
        logits_nV = self._forward(ids, pieces, [(self.active[0].size, len(ids))], list(range(len(ids))))
        right = []
        for sequence, draft, piece in zip(self.active, drafts, pieces, strict=True):
            sequence.owner.on_drafts(len(draft))
            count, end, size = 0, piece.past + len(draft) + 1, sequence.size
            for row, guess in enumerate([*draft, None], piece.start):
                (token,) = sample(logits_nV[row : row + 1], [sequence.sampler])
                sequence.cached += 1
                count += token.token == guess
                sequence.take(replace(token, drafted=token.token == guess))
                if sequence.ended or token.token != guess or sequence.size is not size:
                    break
            if sequence.cached < end:
                self.cache.wipe(sequence.slot, sequence.cached, end)
            right.append(count)
        self._remove([sequence for sequence in self.active if sequence.ended])
        return right

    def clear(self) -> None:
        """Drop all sequences, as after a step that failed."""
        self.waiting.clear()
        self.active.clear()
        self.cache.free()
        self.mixer.clear()

    def _admit(self) -> None:
        while self.waiting and len(self.active) < MAX_SEQUENCES:
            if self.waiting[0].owner.done:
                self.waiting.popleft()
                continue
            longest = max(sequence.longest for sequence in (*self.active, self.waiting[0]))
            if self.active and doubled(len(self.active) + 2, 1) * doubled(longest) > self.kv_tokens:
                return
            sequence = self.waiting.popleft()
            sequence.slot, sequence.started = len(self.active), time.monotonic()
            self.active.append(sequence)

    def _forward(self, ids: list[int], pieces: list[CachePiece], runs: list[tuple[Size, int]], keep: list[int]) -> torch.Tensor:
        """Return the logits [n, V] of the tokens `keep`."""
        device = self.model.device
        padding = padded(len(ids)) - len(ids)  # tokens of no sequence, in a slot of no sequence
        runs[-1] = (runs[-1][0], runs[-1][1] + padding)
        ends = [piece.past + piece.stop - piece.start for piece in pieces]
        self.cache.room(len(self.active) + (padding > 0), max(*(len(sequence.ids) for sequence in self.active), *ends))
        self.mixer.set(runs)
        with Step.of(self.cache, pieces, device, padding, len(self.active)) as step, onednn(len(ids) > 1):
            out = self.model(
                input_ids=torch.tensor([ids + [0] * padding], device=device), position_ids=step.position[None],
                past_key_values=self.cache, use_cache=True, logits_to_keep=torch.tensor(keep, device=device),
            )  # fmt: skip
        return out.logits[0]

    def _remove(self, leaving: Iterable[Sequence]) -> None:
        """Free the slots of `leaving`. The last slot moves into a free one, so that those in use are always the first."""
        for sequence in leaving:
            mover, hole = self.active[-1], sequence.slot
            held = len(sequence.ids)
            if mover is not sequence:
                self.cache.wipe(hole, 0, held)
                self.cache.move(mover.slot, hole, 0 if mover.ended else mover.cached)
                self.active[hole], mover.slot, held = mover, hole, len(mover.ids)
            self.active.pop()
            self.cache.wipe(len(self.active), 0, held)
        if not self.active:
            self.cache.free()


def _limited(pending: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
    """Return the sequences of the next pass with their counts of tokens, in descending order of size. Prompts share the room."""
    parts, room = [], _room(pending)
    for sequence, count in pending:
        if _reads_prompt(sequence, count):
            count = min(count, room)  # noqa: PLW2901
            room -= count
        if count:
            parts.append((sequence, count))
    return sorted(parts, key=lambda part: part[0].size.key)


def _room(pending: list[tuple[Sequence, int]]) -> int:
    """Return how many tokens of prompts the next pass may process: several chunks if no sequence waits for its next token meanwhile."""
    prompts = [count for sequence, count in pending if _reads_prompt(sequence, count)]
    scored = any(sequence.scores_prompt for sequence, _ in pending)  # which takes memory for the logits of every token
    if len(prompts) < len(pending) or scored:
        return PREFILL_CHUNK_TOKENS
    chunks = min(max(sum(prompts) // PREFILL_CHUNK_TOKENS, 1), CHUNKS_ALONE)
    return PREFILL_CHUNK_TOKENS << chunks.bit_length() - 1


def _reads_prompt(sequence: Sequence, count: int) -> bool:
    return count > 1 or not sequence.cached


def _score_prompt(sequence: Sequence, logits_nV: torch.Tensor, first: int) -> None:
    """Score the prompt's tokens after `first` by the logits of the tokens from `first` on: each predicts its successor."""
    following = sequence.ids[first + 1 : first + 1 + len(logits_nV)]
    if not sequence.prompt_scores:
        sequence.prompt_scores.append(ScoredToken(sequence.ids[0]))
    if following:
        sequence.prompt_scores += score(logits_nV[: len(following)], following, sequence.prompt_logprobs or 0)
