"""Keys and values of many sequences, a slot each, and attention over them in one forward pass.

A step's tokens stand in one row, [1, T]: single tokens of sequences that are being continued, and pieces of prompts.
Everything in a decoder is computed token by token, but for attention, which finds its sequence here:

    single tokens    all at once, as a batch over slots; heads that share keys stand in for query positions, so that nothing
                     is repeated
    a prompt's piece its own slot, causally; shared keys in the same way

transformers calls `attend` by its registered name, with the step in a thread-local variable, as there is no other way in.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

ATTENTION = "acip_slots"
LEAST_LENGTH = 128  # tokens that a slot has room for at first; it doubles

_here = threading.local()


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of the step belong to `slot`, which holds `past` tokens already."""

    slot: int
    past: int
    start: int
    stop: int


class Slots(Cache):
    """[slots, heads, length, head size] keys and values of each layer. Room is made before a step, in both directions."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.count, self.length = 0, 0

    def room(self, slots: int, length: int) -> None:
        """At least so many slots of at least so many tokens. What is there stays, but for what is beyond both."""
        if slots <= self.count and length <= self.length:
            return
        count, longest = doubled(slots, 1), doubled(length)
        stay = (slice(min(count, self.count)), slice(None), slice(min(longest, self.length)))
        for kept in (self.keys, self.values):
            for layer, old in kept.items():
                new = old.new_zeros(count, old.shape[1], longest, old.shape[3])
                new[stay] = old[stay]
                kept[layer] = new
        self.count, self.length = count, longest

    def move(self, source: int, target: int, length: int) -> None:
        for kept in (self.keys, self.values):
            for tensor in kept.values():
                tensor[target, :, :length] = tensor[source, :, :length]

    def free(self) -> None:
        """Nobody has a slot: give the memory back."""
        self.keys, self.values = {}, {}
        self.count, self.length = 0, 0

    # ---- what transformers calls

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        step: Step = _here.step
        if layer_idx not in self.keys:
            for kept, states in ((self.keys, key_states), (self.values, value_states)):
                kept[layer_idx] = states.new_zeros(self.count, states.shape[1], self.length, states.shape[3])
        if step.alone is not None:
            slot, place = step.alone
            self.keys[layer_idx][slot, :, place] = key_states[0, :, 0]
            self.values[layer_idx][slot, :, place] = value_states[0, :, 0]
        else:
            self.keys[layer_idx][step.slot, :, step.position] = key_states[0].transpose(0, 1)
            self.values[layer_idx][step.slot, :, step.position] = value_states[0].transpose(0, 1)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return int(query_length), 0


@dataclass
class Step:
    """Which slot and position each token of a forward pass has. Entered around the pass."""

    slots: Slots
    slot: Tensor  # [T]
    position: Tensor  # [T]
    pieces: Sequence[Piece]
    single_n: Tensor  # tokens that continue a sequence, by their place in the step
    single_slots: Tensor
    used: int  # slots [0, used) hold all of those
    longest: int  # tokens in any of them, this one included
    alone: tuple[int, int] | None  # slot and position where there is one token only, which needs no tables
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, slots: Slots, pieces: Sequence[Piece], device: torch.device, more: int = 0, spare: int = 0) -> "Step":
        """From the pieces of all sequences, which follow each other; a single token is one that continues.

        `more` tokens of nobody follow, in the slot `spare`.
        """
        slots_T = [piece.slot for piece in pieces for _ in range(piece.start, piece.stop)] + [spare] * more
        position_T = [piece.past + i for piece in pieces for i in range(piece.stop - piece.start)] + [0] * more
        single = [piece for piece in pieces if piece.stop - piece.start == 1 and piece.past]
        return cls(
            slots, torch.tensor(slots_T, device=device), torch.tensor(position_T, device=device),
            [piece for piece in pieces if piece.stop - piece.start > 1 or not piece.past],
            torch.tensor([piece.start for piece in single], dtype=torch.long, device=device),
            torch.tensor([piece.slot for piece in single], dtype=torch.long, device=device),
            max((piece.slot for piece in single), default=-1) + 1,
            max((piece.past for piece in single), default=-1) + 1,
            (slots_T[0], position_T[0]) if len(slots_T) == 1 and single else None,
        )  # fmt: skip

    def __enter__(self) -> Self:
        _here.step = self
        return self

    def __exit__(self, *_: object) -> None:
        _here.step = None

    def mask(self, dtype: torch.dtype, window: int | None) -> Tensor:
        """[used, 1, 1, longest] what the single token of each slot attends to. A slot without one looks at its first place."""
        if window not in self._masks:
            last = self.single_n.new_zeros(self.used)
            last[self.single_slots] = self.position[self.single_n]
            place = torch.arange(self.longest, device=last.device)
            seen = place <= last[:, None]
            if window is not None:
                seen &= place > last[:, None] - window
            self._masks[window] = torch.zeros(seen.shape, dtype=dtype, device=last.device).masked_fill(~seen, -torch.inf)[:, None, None]
        return self._masks[window]

    def causal(self, piece: Piece, shared: int, dtype: torch.dtype, window: int | None) -> Tensor:
        """[shared t, past + t] what the t tokens of a piece attend to, for each of the heads that share keys."""
        key = (piece, window)
        if key not in self._masks:
            place = torch.arange(piece.past + piece.stop - piece.start, device=self.slot.device)
            seen = place <= place[piece.past :, None]
            if window is not None:
                seen &= place > place[piece.past :, None] - window
            self._masks[key] = torch.zeros(seen.shape, dtype=dtype, device=place.device).masked_fill(~seen, -torch.inf).repeat(shared, 1)
        return self._masks[key]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, head size] -> [1, T, heads, value size]."""
    step: Step = _here.step
    keys, values = step.slots.keys[module.layer_idx], step.slots.values[module.layer_idx]
    heads, kv_heads = query.shape[1], keys.shape[1]
    if step.alone is not None:
        slot, place = step.alone
        seen_from = 0 if sliding_window is None else max(0, place + 1 - sliding_window)
        q, seen_by = query.view(1, kv_heads, heads // kv_heads, -1), (slice(slot, slot + 1), slice(None), slice(seen_from, place + 1))
        seen = F.scaled_dot_product_attention(q, keys[seen_by], values[seen_by], scale=scaling)
        return seen.reshape(1, 1, heads, -1), None
    out_THD = query.new_zeros(query.shape[2], heads, values.shape[3])
    if step.used:
        q_nHD = query[0, :, step.single_n].transpose(0, 1)
        q = q_nHD.new_zeros(step.used, *q_nHD.shape[1:])
        q[step.single_slots] = q_nHD
        seen = F.scaled_dot_product_attention(
            q.unflatten(1, (kv_heads, heads // kv_heads)), keys[: step.used, :, : step.longest], values[: step.used, :, : step.longest],
            attn_mask=step.mask(query.dtype, sliding_window), scale=scaling,
        )  # fmt: skip
        out_THD[step.single_n] = seen.flatten(1, 2)[step.single_slots]
    for piece in step.pieces:
        own = (slice(piece.slot, piece.slot + 1), slice(None), slice(piece.past + piece.stop - piece.start))
        q = query[:, :, piece.start : piece.stop].reshape(1, kv_heads, -1, query.shape[3])
        mask = step.causal(piece, heads // kv_heads, query.dtype, sliding_window)
        seen = F.scaled_dot_product_attention(q, keys[own], values[own], attn_mask=mask, scale=scaling)
        out_THD[piece.start : piece.stop] = seen.view(heads, piece.stop - piece.start, -1).transpose(0, 1)
    return out_THD[None], None


AttentionInterface.register(ATTENTION, attend)


def doubled(needed: int, least: int = LEAST_LENGTH) -> int:
    """The room that is made for what is needed: a power of two, as `least` is."""
    return max(least, 1 << (needed - 1).bit_length())
