"""Continuous batching of one resident model: sequences of any size join and leave between steps.

    waiting --a slot is free--> prefilling, in pieces --first token--> continued, a token a step --end--> slot free again

Each step is one forward pass over one token of every sequence that is being continued and over up to `PREFILL_CHUNK_TOKENS` tokens
of prompts, so a long prompt delays the others by one chunk at a time. Requests of all sizes are served in their order of arrival.
"""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from acip.layers.mixed_sizes import Mixer, Size, padded
from acip.modeling_acip import onednn
from acip_platform.serve.engine.kv_cache import CachePiece, KVCache, Step, doubled
from acip_platform.serve.engine.sampling import SampledToken, SamplingParams, sample
from acip_platform.serve.text.detokenizer import Detokenizer
from acip_platform.serve.text.prompt_logprobs import Echo

MAX_SEQUENCES = 32  # at once
PREFILL_CHUNK_TOKENS = 128  # tokens of prompts in a step


class Listener(Protocol):
    """Who asked."""

    @property
    def gone(self) -> bool: ...  # nobody waits any more
    def token(self, sequence: "Sequence", choice: SampledToken, text: str) -> None: ...  # and the text that became certain with it
    def ended(self, sequence: "Sequence", text: str, reason: str) -> None: ...  # the last text, and why
    def failed(self, sequence: "Sequence", error: str) -> None: ...  # no token, and why
    def error(self, error: Exception) -> None: ...  # nothing can follow


@dataclass(eq=False)
class Sequence:
    """One prompt being answered once."""

    ids: list[int]  # the prompt, and what was generated
    size: Size
    sampler: SamplingParams
    text: Detokenizer
    max_tokens: int
    ends: frozenset[int]  # tokens that end it
    hear: "Listener"
    index: int = 0  # of its request's answers
    echo: Echo | None = None  # the prompt, where it is part of the answer
    made: int = 0
    past: int = 0  # tokens in the cache
    slot: int = -1
    began: float = 0.0  # when it got its slot, seconds of time.monotonic

    @property
    def longest(self) -> int:
        return len(self.ids) - self.made + self.max_tokens


@dataclass
class Batch:
    model: Any
    mixer: Mixer
    kv_tokens: int  # slots times their length, at most; one sequence is always taken
    waiting: deque[Sequence] = field(default_factory=deque)
    active: list[Sequence] = field(default_factory=list)  # by slot
    slots: KVCache = field(default_factory=KVCache)

    def __bool__(self) -> bool:
        return bool(self.waiting or self.active)

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass for whoever is there."""
        self._leave([sequence for sequence in self.active if sequence.hear.gone])
        self._join()
        if not self.active:
            return
        parts = self._parts()
        pieces: list[CachePiece] = []
        runs: list[tuple[Size, int]] = []
        last: list[tuple[Sequence, int]] = []  # row of the logits
        scored: list[tuple[Echo, int, int, int]] = []  # first token, rows of the logits
        keep: list[int] = []
        ids: list[int] = []
        start = 0
        for sequence, count in parts:
            pieces.append(CachePiece(sequence.slot, sequence.past, start, start + count))
            ids += sequence.ids[sequence.past : sequence.past + count]
            start += count
            if runs and runs[-1][0].removed == sequence.size.removed:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((sequence.size, count))
            sequence.past += count
            complete = sequence.past == len(sequence.ids)
            if sequence.echo is not None and sequence.echo.scores and not sequence.made:
                scored.append((sequence.echo, sequence.past - count, len(keep), len(keep) + count))
                keep += range(start - count, start)
            elif complete:
                keep.append(start - 1)
            if complete:
                last.append((sequence, len(keep) - 1))
        keep = keep or [start - 1]
        logits_nV = self._forward(ids, pieces, runs, keep + keep[-1:] * (padded(len(keep)) - len(keep) if scored else 0))
        for echo, first, begin, stop in scored:
            echo.score(logits_nV[begin:stop], first)
        if last:
            done = [sequence for sequence, _ in last]
            rows_nV = logits_nV[[row for _, row in last]] if scored else logits_nV
            for sequence, choice in zip(done, sample(rows_nV, [sequence.sampler for sequence in done]), strict=True):
                self._take(sequence, choice)
            self._leave([sequence for sequence in done if sequence.past < 0])

    def fail(self) -> None:
        """Everybody leaves."""
        self.waiting.clear()
        self.active.clear()
        self.slots.free()
        self.mixer.clear()

    def _join(self) -> None:
        while self.waiting and len(self.active) < MAX_SEQUENCES:
            if self.waiting[0].hear.gone:
                self.waiting.popleft()
                continue
            longest = max(sequence.longest for sequence in (*self.active, self.waiting[0]))
            if self.active and doubled(len(self.active) + 2, 1) * doubled(longest) > self.kv_tokens:
                return
            sequence = self.waiting.popleft()
            sequence.slot, sequence.began = len(self.active), time.monotonic()
            self.active.append(sequence)

    def _parts(self) -> list[tuple[Sequence, int]]:
        """Who takes part with how many tokens, sizes falling."""
        parts, room = [], PREFILL_CHUNK_TOKENS
        for sequence in self.active:
            count = len(sequence.ids) - sequence.past
            if count > 1 or not sequence.past:
                count = min(count, room)
                room -= count
            if count:
                parts.append((sequence, count))
        return sorted(parts, key=lambda part: part[0].size.removed)

    def _forward(self, ids: list[int], pieces: list[CachePiece], runs: list[tuple[Size, int]], keep: list[int]) -> torch.Tensor:
        """[n, V] logits of the tokens `keep`."""
        device = self.model.device
        more = padded(len(ids)) - len(ids)  # tokens of nobody, in a slot of nobody's
        runs[-1] = (runs[-1][0], runs[-1][1] + more)
        self.slots.room(len(self.active) + (more > 0), max(len(sequence.ids) for sequence in self.active))
        self.mixer.set(runs)
        with Step.of(self.slots, pieces, device, more, len(self.active)) as step, onednn(len(ids) > 1):
            out = self.model(
                input_ids=torch.tensor([ids + [0] * more], device=device), position_ids=step.position[None], past_key_values=self.slots,
                use_cache=True, logits_to_keep=torch.tensor(keep, device=device),
            )  # fmt: skip
        return out.logits[0]

    def _take(self, sequence: Sequence, choice: SampledToken) -> None:
        if choice.error is not None:
            sequence.hear.failed(sequence, choice.error)
            sequence.past = -1  # done
            return
        if not sequence.max_tokens:  # only the prompt was asked for
            sequence.hear.ended(sequence, sequence.text.end(), "length")
            sequence.past = -1
            return
        sequence.ids.append(choice.token)
        sequence.made += 1
        if choice.token in sequence.ends:
            sequence.hear.ended(sequence, sequence.text.end(), "stop")
        else:
            sequence.hear.token(sequence, choice, sequence.text.add(choice.token))
            constraint = sequence.sampler.constraint
            if sequence.text.stopped:
                sequence.hear.ended(sequence, "", "stop")
            elif constraint is not None and constraint.error is not None:
                sequence.hear.error(constraint.error)
            elif constraint is not None and constraint.done:
                sequence.hear.ended(sequence, sequence.text.end(), "stop")
            elif sequence.made >= sequence.max_tokens:
                sequence.hear.ended(sequence, sequence.text.end(), "length")
            else:
                return
        sequence.past = -1  # done

    def _leave(self, leaving: Iterable[Sequence]) -> None:
        """Free their slots. The last slot moves into a hole, so that those in use are the first."""
        for sequence in leaving:
            mover, hole = self.active[-1], sequence.slot
            held = len(sequence.ids)
            if mover is not sequence:
                self.slots.wipe(hole, 0, held)
                self.slots.move(mover.slot, hole, max(mover.past, 0))
                self.active[hole], mover.slot, held = mover, hole, len(mover.ids)
            self.active.pop()
            self.slots.wipe(len(self.active), 0, held)
        if not self.active:
            self.slots.free()
