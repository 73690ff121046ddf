"""A KV cache with one slot per sequence, and attention over the sequences of one forward pass.

The tokens of a step form one row, [1, T]: single tokens of sequences that are being decoded, and chunks of prompts. A decoder computes
everything for each token alone, except attention. `attend` computes attention for each sequence:

    single tokens       in one batch over slots; query heads that share a key head are treated as query positions, so that keys and
                        values are not repeated
    a prompt chunk      over its own slot, causally; shared key heads are treated in the same way

transformers calls `attend` by its registered name. The step is passed in a thread-local variable, because that call has no argument
for it.

Masks are those of transformers. A model calls the registered `mask_rule` for each kind of layer (full, sliding, chunked, ...), and
receives a `Rule`, which holds a function of two positions, instead of a tensor. `attend` evaluates it at the positions of each sequence.
Soft caps of the logits and attention sinks are computed as in the eager attention of transformers. Any other argument that changes the
result raises an error.
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
MIN_SLOT_TOKENS = 128  # initial capacity of a slot; it doubles when needed
IGNORED_ARGUMENTS = (  # arguments without effect: positions come from the step, and windows from the mask
    "sliding_window", "position_ids", "cache_position", "use_cache", "is_causal", "logits_to_keep", "past_key_values",
    "position_embeddings",
)  # fmt: skip

_current = threading.local()


@dataclass(frozen=True)
class CachePiece:
    """The tokens [start, stop) of a step. They belong to `slot`, which already holds `past` tokens."""

    slot: int
    past: int
    start: int
    stop: int


class KVCache(Cache):
    """Keys and values of each layer, [slots, heads, length, head size]. Call `room` before a step to extend slots and length.

    `least` is the initial capacity of a slot, a power of two.
    """

    def __init__(self, least: int = MIN_SLOT_TOKENS) -> None:
        super().__init__(layers=[])
        self.least = least
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.count, self.length = 0, 0

    def room(self, slots: int, length: int) -> None:
        """Make room for at least `slots` slots of at least `length` tokens. Contents that fit the new shape are kept."""
        if slots <= self.count and length <= self.length:
            return
        count, longest = doubled(slots, 1), doubled(length, self.least)
        kept = (slice(min(count, self.count)), slice(None), slice(min(longest, self.length)))
        for tensors in (self.keys, self.values):
            for layer, old in tensors.items():
                new = old.new_zeros(count, old.shape[1], longest, old.shape[3])
                new[kept] = old[kept]
                tensors[layer] = new
        self.count, self.length = count, longest

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` to slot `target`."""
        for tensors in (self.keys, self.values):
            for tensor in tensors.values():
                tensor[target, :, :length] = tensor[source, :, :length]

    def wipe(self, slot: int, start: int, stop: int) -> None:
        """Set positions [start, stop) of a slot to zero. A masked position has weight zero, but zero times NaN is NaN."""
        for tensors in (self.keys, self.values):
            for tensor in tensors.values():
                tensor[slot, :, start:stop] = 0

    def free(self) -> None:
        """Release the memory. No sequence may hold a slot."""
        self.keys, self.values = {}, {}
        self.count, self.length = 0, 0

    def write(self, layer: int, key_states: Tensor, value_states: Tensor, step: "Step") -> tuple[Tensor, Tensor]:
        """Write the keys and values of a step, [1, heads, T, head size], to their slots. Return those of all slots."""
        if layer not in self.keys:
            for tensors, states in ((self.keys, key_states), (self.values, value_states)):
                tensors[layer] = states.new_zeros(self.count, states.shape[1], self.length, states.shape[3])
        for tensors, states in ((self.keys, key_states), (self.values, value_states)):
            if step.only_token is not None:
                slot, position = step.only_token
                tensors[layer][slot, :, position] = states[0, :, 0]
            else:
                tensors[layer][step.slot, :, step.position] = states[0].transpose(0, 1)
        return self.keys[layer], self.values[layer]

    # ---- the interface of transformers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the arguments unchanged. `attend` writes to the cache, because some models (MLA) compute keys and values from these."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return int(query_length), 0


@dataclass
class Step:
    """The slot and position of each token of a forward pass. The pass runs inside its `with` block."""

    cache: KVCache
    slot: Tensor  # [T]
    position: Tensor  # [T]
    pieces: Sequence[CachePiece]
    single_n: Tensor  # indices in the step of the single tokens that continue a sequence
    single_slots: Tensor
    used: int  # slots [0, used) include all of `single_slots`
    longest: int  # the largest number of tokens in any of them, with the new token
    only_token: tuple[int, int] | None  # slot and position, if the step is one single token; it needs no index tensors
    in_order: bool  # whether the step is a single token for each of the slots [0, used), in their order; it needs fewer index tensors
    _masks: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: KVCache, pieces: Sequence[CachePiece], device: torch.device, padding: int = 0, padding_slot: int = 0) -> "Step":
        """Return a step of the consecutive pieces of all sequences. A single token after `past` tokens continues its sequence.

        `padding` tokens of no sequence follow, in the slot `padding_slot`.
        """
        slots_T = [piece.slot for piece in pieces for _ in range(piece.start, piece.stop)] + [padding_slot] * padding
        position_T = [piece.past + i for piece in pieces for i in range(piece.stop - piece.start)] + [0] * padding
        single = [piece for piece in pieces if piece.stop - piece.start == 1 and piece.past]
        return cls(
            cache, torch.tensor(slots_T, device=device), torch.tensor(position_T, device=device),
            [piece for piece in pieces if piece.stop - piece.start > 1 or not piece.past],
            torch.tensor([piece.start for piece in single], dtype=torch.long, device=device),
            torch.tensor([piece.slot for piece in single], dtype=torch.long, device=device),
            max((piece.slot for piece in single), default=-1) + 1,
            max((piece.past for piece in single), default=-1) + 1,
            (slots_T[0], position_T[0]) if len(slots_T) == 1 and single else None,
            len(single) == len(pieces) and all(piece.slot == i == piece.start for i, piece in enumerate(pieces)),
        )  # fmt: skip

    def __enter__(self) -> Self:
        _current.step = self
        return self

    def __exit__(self, *_: object) -> None:
        _current.step = None

    def mask(self, rule: "Rule", dtype: torch.dtype) -> Tensor:
        """Return the mask of the single token of each slot over the positions, [used, 1, 1, longest].

        A slot without a token attends to its first position, so that no row is empty.
        """
        if rule not in self._masks:
            last = self.single_n.new_zeros(self.used)
            last[self.single_slots] = self.position[self.single_n]
            mask = rule.mask(last, torch.arange(self.longest, device=last.device))
            mask[:, 0] |= ~mask.any(1)
            self._masks[rule] = added(mask, dtype)[:, None, None]
        return self._masks[rule]

    def causal(self, piece: CachePiece, shared: int, rule: "Rule", dtype: torch.dtype) -> Tensor:
        """Return the mask of each of the t tokens of a piece over the positions, repeated for the heads that share keys.

        The shape is [shared t, past + t].
        """
        key = (piece, rule)
        if key not in self._masks:
            positions = torch.arange(piece.past + piece.stop - piece.start, device=self.slot.device)
            self._masks[key] = added(rule.mask(positions[piece.past :], positions), dtype).repeat(shared, 1)
        return self._masks[key]

    def recent(self, position: int, rule: "Rule", dtype: torch.dtype) -> tuple[int, Tensor | None]:
        """Return the first position that the only token of a step can attend to, and the mask [1, positions] from there, or None."""
        if rule.function is causal_mask_function:
            return 0, None
        if (rule, position) not in self._masks:
            first = 0 if rule.reach is None else max(0, position + 1 - rule.reach)
            positions = torch.arange(first, position + 1, device=self.slot.device)
            self._masks[rule, position] = (first, added(rule.mask(positions[-1:], positions), dtype))
        recent: tuple[int, Tensor] = self._masks[rule, position]
        return recent


@dataclass(frozen=True, eq=False)
class Rule:
    """The attention mask of a kind of layer: a function of transformers of (batch, head, query position, key position)."""

    function: Callable[..., Any]
    reach: int | None  # a token attends to at most so many positions up to its own; None = to any number

    def mask(self, query_q: Tensor, key_k: Tensor) -> Tensor:
        """Return whether a token at each query position attends to each key position, [q, k]."""
        first = query_q.new_zeros(())
        mask: Tensor = self.function(first, first, query_q[:, None], key_k[None]).expand(len(query_q), len(key_k))
        return mask.clone() if self.function is causal_mask_function else mask & (key_k <= query_q[:, None])


def mask_rule(*args: Any, mask_function: Callable[..., Any], local_size: int | None = None, **kwargs: Any) -> Rule:
    """Return the mask of one kind of layer in a forward pass. transformers calls this function."""
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
    """Compute the attention of a step: query [1, heads, T, head size] -> [1, T, heads, value size].

    Raise an AcipError for arguments that would change the result.
    """
    step: Step = _current.step
    rule = _checked(module, attention_mask, dropout, kwargs)
    keys, values = step.cache.write(module.layer_idx, key, value, step)
    heads, kv_heads = query.shape[1], keys.shape[1]
    shared = heads // kv_heads
    sinks = None if s_aux is None else s_aux.reshape(1, kv_heads, shared, 1)
    if step.only_token is not None:
        slot, position = step.only_token
        first, mask = step.recent(position, rule, query.dtype)
        q, part = query.view(1, kv_heads, shared, -1), (slice(slot, slot + 1), slice(None), slice(first, position + 1))
        return weighted(q, keys[part], values[part], mask, scaling, softcap, sinks).reshape(1, 1, heads, -1), None
    if step.in_order:
        q = query[0, :, : step.used].transpose(0, 1).unflatten(1, (kv_heads, shared))
        part = (slice(step.used), slice(None), slice(step.longest))
        out = weighted(q, keys[part], values[part], step.mask(rule, query.dtype), scaling, softcap, sinks).flatten(1, 2)
        return F.pad(out, (0, 0, 0, 0, 0, query.shape[2] - step.used))[None], None
    out_THD = query.new_zeros(query.shape[2], heads, values.shape[3])
    if step.used:
        q_nHD = query[0, :, step.single_n].transpose(0, 1)
        q = q_nHD.new_zeros(step.used, *q_nHD.shape[1:])
        q[step.single_slots] = q_nHD
        part = (slice(step.used), slice(None), slice(step.longest))
        out = weighted(q.unflatten(1, (kv_heads, shared)), keys[part], values[part], step.mask(rule, query.dtype), scaling, softcap, sinks)
        out_THD[step.single_n] = out.flatten(1, 2)[step.single_slots]
    for piece in step.pieces:
        count = piece.stop - piece.start
        part = (slice(piece.slot, piece.slot + 1), slice(None), slice(piece.past + count))
        q = query[:, :, piece.start : piece.stop].reshape(1, kv_heads, -1, query.shape[3])
        row_sinks = None if sinks is None else sinks.repeat_interleave(count, 2)
        out = weighted(q, keys[part], values[part], step.causal(piece, shared, rule, query.dtype), scaling, softcap, row_sinks)
        out_THD[piece.start : piece.stop] = out.view(heads, count, -1).transpose(0, 1)
    return out_THD[None], None


def _checked(module: Any, attention_mask: Any, dropout: float, others: dict[str, Any]) -> Rule:
    """Return the mask of a layer. Raise an AcipError for an argument that the engine does not compute."""
    unknown = [name for name, value in others.items() if name not in IGNORED_ARGUMENTS and value is not None and value is not False]
    if others.get("is_causal") is False:
        unknown.append("is_causal=False")
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise AcipError(f"the attention of {type(module).__name__} takes {', '.join(sorted(unknown))}, which the engine does not compute")
    if not isinstance(attention_mask, Rule):
        raise AcipError(f"{type(module).__name__} gets its attention mask from code of its own, which the engine cannot evaluate")
    return attention_mask


def weighted(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return the attention of queries over keys, [..., q, D].

    `mask` is added to the logits (`added`). `sinks` are logits of an additional key without a value.
    """
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling)
    scores = q @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights[..., : keys.shape[-2]] @ values


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to be added to logits: 0 where `mask` is true, else minus infinity. A layer would convert a boolean one each time."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, mask_rule)


def doubled(needed: int, minimum: int = MIN_SLOT_TOKENS) -> int:
    """Return the capacity for `needed` items: the next power of two, at least `minimum`, which is itself a power of two."""
    return max(minimum, 1 << (needed - 1).bit_length())
