"""Keys and values of many sequences, a slot each, and attention over them in one forward pass.

A step's tokens stand in one row, [1, T]: single tokens of sequences that are being continued, and pieces of prompts.
Everything in a decoder is computed token by token, but for attention, which finds its sequence here:

    single tokens    all at once, as a batch over slots; heads that share keys stand in for query positions, so that nothing
                     is repeated
    a prompt's piece its own slot, causally; shared keys in the same way

transformers calls `attend` by its registered name, with the step in a thread-local variable, as there is no other way in.

Masks are transformers' own. A model asks the registered `mask_rule` for each kind of layer that it has (full, sliding, chunked, ...), and
gets the rule itself, a function of two positions, instead of a tensor. `attend` evaluates it at each sequence's own positions. A cap of the
logits and sinks are computed as transformers' eager attention does. Every other argument that changes the result is an error.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from acip.errors import AcipError

ATTENTION = "acip_slots"
LEAST_LENGTH = 128  # tokens that a slot has room for at first; it doubles
IRRELEVANT = (  # arguments of attention that add nothing: positions are the step's, windows are in the mask
    "sliding_window", "position_ids", "cache_position", "use_cache", "is_causal", "logits_to_keep", "past_key_values",
    "position_embeddings",
)  # fmt: skip

_here = threading.local()


@dataclass(frozen=True)
class CachePiece:
    """Tokens [start, stop) of the step belong to `slot`, which holds `past` tokens already."""

    slot: int
    past: int
    start: int
    stop: int


class KVCache(Cache):
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

    def wipe(self, slot: int, start: int, stop: int) -> None:
        """Set positions [start, stop) of a slot to zero: a masked position counts zero times its value, which NaN survives."""
        for kept in (self.keys, self.values):
            for tensor in kept.values():
                tensor[slot, :, start:stop] = 0

    def free(self) -> None:
        """Nobody has a slot: give the memory back."""
        self.keys, self.values = {}, {}
        self.count, self.length = 0, 0

    def write(self, layer: int, key_states: Tensor, value_states: Tensor, step: "Step") -> tuple[Tensor, Tensor]:
        """Put the step's keys and values [1, heads, T, head size] into their slots; returns those of all slots."""
        if layer not in self.keys:
            for kept, states in ((self.keys, key_states), (self.values, value_states)):
                kept[layer] = states.new_zeros(self.count, states.shape[1], self.length, states.shape[3])
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            if step.alone is not None:
                slot, place = step.alone
                kept[layer][slot, :, place] = states[0, :, 0]
            else:
                kept[layer][step.slot, :, step.position] = states[0].transpose(0, 1)
        return self.keys[layer], self.values[layer]

    # ---- what transformers calls

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The same: `attend` keeps what it is given, which some models (MLA) make of what they hand over here."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return int(query_length), 0


@dataclass
class Step:
    """Which slot and position each token of a forward pass has. Entered around the pass."""

    slots: KVCache
    slot: Tensor  # [T]
    position: Tensor  # [T]
    pieces: Sequence[CachePiece]
    single_n: Tensor  # tokens that continue a sequence, by their place in the step
    single_slots: Tensor
    used: int  # slots [0, used) hold all of those
    longest: int  # tokens in any of them, this one included
    alone: tuple[int, int] | None  # slot and position where there is one token only, which needs no tables
    _masks: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, slots: KVCache, pieces: Sequence[CachePiece], device: torch.device, more: int = 0, spare: int = 0) -> "Step":
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

    def mask(self, rule: "Rule") -> Tensor:
        """[used, 1, 1, longest] whether the single token of each slot attends to a position. A slot without a token: to its first."""
        if rule not in self._masks:
            last = self.single_n.new_zeros(self.used)
            last[self.single_slots] = self.position[self.single_n]
            seen = rule.seen(last, torch.arange(self.longest, device=last.device))
            seen[:, 0] |= ~seen.any(1)
            self._masks[rule] = seen[:, None, None]
        return self._masks[rule]

    def causal(self, piece: CachePiece, shared: int, rule: "Rule") -> Tensor:
        """[shared t, past + t] whether each of the t tokens of a piece attends to a position, for each of the heads that share keys."""
        key = (piece, rule)
        if key not in self._masks:
            place = torch.arange(piece.past + piece.stop - piece.start, device=self.slot.device)
            self._masks[key] = rule.seen(place[piece.past :], place).repeat(shared, 1)
        return self._masks[key]

    def recent(self, place: int, rule: "Rule") -> tuple[int, Tensor | None]:
        """(first position, mask [1, positions] or None) of what a token that is alone attends to."""
        if rule.function is causal_mask_function:
            return 0, None
        if (rule, place) not in self._masks:
            first = 0 if rule.reach is None else max(0, place + 1 - rule.reach)
            positions = torch.arange(first, place + 1, device=self.slot.device)
            self._masks[rule, place] = (first, rule.seen(positions[-1:], positions))
        recent: tuple[int, Tensor] = self._masks[rule, place]
        return recent


@dataclass(frozen=True, eq=False)
class Rule:
    """What a layer's tokens attend to: transformers' own function of (batch, head, query position, key position)."""

    function: Callable[..., Any]
    reach: int | None  # no token attends to a position that is so far back; None = any

    def seen(self, query_q: Tensor, key_k: Tensor) -> Tensor:
        """[q, k] whether a token at each query position attends to each key position."""
        first = query_q.new_zeros(())
        seen: Tensor = self.function(first, first, query_q[:, None], key_k[None]).expand(len(query_q), len(key_k))
        return seen.clone() if self.function is causal_mask_function else seen & (key_k <= query_q[:, None])


def mask_rule(*args: Any, mask_function: Callable[..., Any], local_size: int | None = None, **kwargs: Any) -> Rule:
    """The mask of one kind of layer in a forward pass, as transformers asks for it."""
    return Rule(mask_function, local_size)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, head size] -> [1, T, heads, value size]. AcipError for arguments that would change the result."""
    step: Step = _here.step
    rule = _checked(module, attention_mask, dropout, kwargs)
    keys, values = step.slots.write(module.layer_idx, key, value, step)
    heads, kv_heads = query.shape[1], keys.shape[1]
    shared = heads // kv_heads
    sinks = None if s_aux is None else s_aux.reshape(1, kv_heads, shared, 1)
    if step.alone is not None:
        slot, place = step.alone
        first, mask = step.recent(place, rule)
        q, seen_by = query.view(1, kv_heads, shared, -1), (slice(slot, slot + 1), slice(None), slice(first, place + 1))
        return weighted(q, keys[seen_by], values[seen_by], mask, scaling, softcap, sinks).reshape(1, 1, heads, -1), None
    out_THD = query.new_zeros(query.shape[2], heads, values.shape[3])
    if step.used:
        q_nHD = query[0, :, step.single_n].transpose(0, 1)
        q = q_nHD.new_zeros(step.used, *q_nHD.shape[1:])
        q[step.single_slots] = q_nHD
        there = (slice(step.used), slice(None), slice(step.longest))
        seen = weighted(q.unflatten(1, (kv_heads, shared)), keys[there], values[there], step.mask(rule), scaling, softcap, sinks)
        out_THD[step.single_n] = seen.flatten(1, 2)[step.single_slots]
    for piece in step.pieces:
        count = piece.stop - piece.start
        own = (slice(piece.slot, piece.slot + 1), slice(None), slice(piece.past + count))
        q = query[:, :, piece.start : piece.stop].reshape(1, kv_heads, -1, query.shape[3])
        sinks_of_rows = None if sinks is None else sinks.repeat_interleave(count, 2)
        seen = weighted(q, keys[own], values[own], step.causal(piece, shared, rule), scaling, softcap, sinks_of_rows)
        out_THD[piece.start : piece.stop] = seen.view(heads, count, -1).transpose(0, 1)
    return out_THD[None], None


def _checked(module: Any, attention_mask: Any, dropout: float, others: dict[str, Any]) -> Rule:
    """The layer's mask, where nothing else was asked for."""
    unknown = [name for name, value in others.items() if name not in IRRELEVANT and value is not None and value is not False]
    if others.get("is_causal") is False:
        unknown.append("is_causal=False")
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise AcipError(f"the attention of {type(module).__name__} takes {', '.join(sorted(unknown))}, which the engine does not compute")
    if not isinstance(attention_mask, Rule):
        raise AcipError(f"{type(module).__name__} gets its attention mask from code of its own, which the engine can't evaluate")
    return attention_mask


def weighted(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention [..., q, D] of queries over keys; `mask` is true where they attend, `sinks` are logits of a key without a value."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling)
    scores = q @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights[..., : keys.shape[-2]] @ values


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, mask_rule)


def doubled(needed: int, least: int = LEAST_LENGTH) -> int:
    """The room that is made for what is needed: a power of two, as `least` is."""
    return max(least, 1 << (needed - 1).bit_length())
