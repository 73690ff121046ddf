"""Continuous batching of one resident model: sequences of any size join and leave between steps.

    waiting --a slot is free--> prefilling, in chunks --first token--> decoding, one token per step --end--> slot free again

Each step is one forward pass over one token of every sequence that is decoding and over up to `PREFILL_CHUNK_TOKENS` tokens of prompts,
so a long prompt delays the other sequences by one chunk at a time. Requests of all sizes are served in their order of arrival.
"""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from acip.layers.mixed_sizes import Mixer, Size, padded
from acip.modeling_acip import onednn
from acip_platform.serve.engine.events import EndReason
from acip_platform.serve.engine.kv_cache import CachePiece, KVCache, Step, doubled
from acip_platform.serve.engine.request import TokenConsumer
from acip_platform.serve.engine.sampling import SampledToken, Sampler, ScoredToken, sample, score

MAX_SEQUENCES = 32  # in a batch
PREFILL_CHUNK_TOKENS = 128  # tokens of prompts in a step


class Owner(Protocol):
    """The request that a sequence belongs to."""

    @property
    def done(self) -> bool: ...  # canceled or finished: its sequences are removed before the next step
    def on_prompt(self, sequence: "Sequence") -> None: ...  # the prompt has been processed; called before the first token
    def on_token(self, sequence: "Sequence", token: SampledToken) -> None: ...
    def on_end(self, sequence: "Sequence", reason: EndReason) -> None: ...
    def on_no_token(self, reason: str) -> None: ...
    def on_error(self, error: Exception) -> None: ...


@dataclass(eq=False)
class Sequence:
    """One continuation of one prompt."""

    ids: list[int]  # the prompt, and the tokens generated so far
    size: Size
    sampler: Sampler
    max_tokens: int
    end_tokens: frozenset[int]
    owner: Owner
    index: int = 0  # among the sequences of its request
    consumer: TokenConsumer | None = None
    prompt_logprobs: int | None = None  # alternatives with each token; None = the prompt is not scored
    prompt_scores: list[ScoredToken] = field(default_factory=list)
    generated: int = 0  # tokens
    cached: int = 0  # tokens whose keys and values are in the cache
    slot: int = -1
    started: float = 0.0  # when it got its slot, in seconds of time.monotonic
    ended: bool = False

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
    waiting: deque[Sequence] = field(default_factory=deque)
    active: list[Sequence] = field(default_factory=list)  # by slot
    cache: KVCache = field(default_factory=KVCache)
    broken: str | None = None

    def __len__(self) -> int:
        return len(self.waiting) + len(self.active)

    @torch.inference_mode()
    def step(self) -> None:
        """Run one forward pass, and sample a token for every sequence whose tokens have all been processed."""
        self._remove([sequence for sequence in self.active if sequence.owner.done])
        self._admit()
        if not self.active:
            return
        pieces: list[CachePiece] = []
        runs: list[tuple[Size, int]] = []
        last: list[tuple[Sequence, int]] = []  # row of the logits
        prompts: list[tuple[Sequence, int, int, int]] = []  # first token, rows of the logits
        keep: list[int] = []
        ids: list[int] = []
        start = 0
        for sequence, count in self._parts():
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

    def _parts(self) -> list[tuple[Sequence, int]]:
        """Return the sequences of the next pass with their counts of tokens, in descending order of size."""
        parts, room = [], PREFILL_CHUNK_TOKENS
        for sequence in self.active:
            count = len(sequence.ids) - sequence.cached
            if count > 1 or not sequence.cached:
                count = min(count, room)
                room -= count
            if count:
                parts.append((sequence, count))
        return sorted(parts, key=lambda part: part[0].size.key)

    def _forward(self, ids: list[int], pieces: list[CachePiece], runs: list[tuple[Size, int]], keep: list[int]) -> torch.Tensor:
        """Return the logits [n, V] of the tokens `keep`."""
        device = self.model.device
        padding = padded(len(ids)) - len(ids)  # tokens of no sequence, in a slot of no sequence
        runs[-1] = (runs[-1][0], runs[-1][1] + padding)
        self.cache.room(len(self.active) + (padding > 0), max(len(sequence.ids) for sequence in self.active))
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


def _score_prompt(sequence: Sequence, logits_nV: torch.Tensor, first: int) -> None:
    """Score the prompt's tokens after `first` by the logits of the tokens from `first` on: each predicts its successor."""
    following = sequence.ids[first + 1 : first + 1 + len(logits_nV)]
    if not sequence.prompt_scores:
        sequence.prompt_scores.append(ScoredToken(sequence.ids[0]))
    if following:
        sequence.prompt_scores += score(logits_nV[: len(following)], following, sequence.prompt_logprobs or 0)
