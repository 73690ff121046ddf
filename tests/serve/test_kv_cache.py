"""Sequences of a step don't see each other: the logits of each are those of the model alone, for every architecture that is served."""

from typing import Any

import pytest
import torch
from acip_platform.serve.engine.kv_cache import ATTENTION, CachePiece, KVCache, Step
from torch import Tensor
from transformers import LlamaConfig

from tests.acip.layers.test_architectures import ARCHITECTURES, GROUPED, random_model

LENGTHS = (23, 9, 17)  # longer than the windows of those that slide
# who attends first, and with how many tokens: prompts in pieces, then tokens one by one, in any order
SCHEDULE = [[(0, 5)], [(1, 4), (0, 1)], [(2, 6), (0, 7), (1, 1)], *[[(2, 1), (0, 1), (1, 1)]] * 4, *[[(0, 1), (2, 1)]] * 6, [(2, 1)]]


def run(model: Any, slots: KVCache, pieces: list[CachePiece], tokens: list[int]) -> Tensor:
    """[T, V] logits of one step."""
    with torch.no_grad(), Step.of(slots, pieces, torch.device("cpu")) as step:
        return model(input_ids=torch.tensor([tokens]), position_ids=step.position[None], past_key_values=slots, use_cache=True).logits[0]


def together(model: Any, ids: list[list[int]], slots: KVCache, places: list[int]) -> list[Tensor]:
    """[length, V] logits of each sequence, computed in SCHEDULE's steps, in these slots."""
    model.set_attn_implementation(ATTENTION)
    past, found = [0] * len(ids), [list[Tensor]() for _ in ids]
    for parts in SCHEDULE:
        pieces, tokens, start = [], list[int](), 0
        for who, count in parts:
            pieces.append(CachePiece(places[who], past[who], start, start + count))
            tokens += ids[who][past[who] : past[who] + count]
            start += count
            past[who] += count
        slots.room(max(places) + 1, max(past))
        with torch.no_grad(), Step.of(slots, pieces, torch.device("cpu")) as step:
            logits = model(
                input_ids=torch.tensor([tokens]), position_ids=step.position[None], past_key_values=slots, use_cache=True
            ).logits[0]
        for (who, _), piece in zip(parts, pieces, strict=True):
            found[who].append(logits[piece.start : piece.stop])
    return [torch.cat(rows) for rows in found]


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 256, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"falcon"}))
def test_every_sequence_has_the_logits_of_the_model_alone(name: str, ids: list[list[int]]) -> None:
    model = random_model(ARCHITECTURES[name].config)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row])).logits[0] for row in ids]
    for apart, beside in zip(alone, together(model, ids, KVCache(), [1, 0, 2]), strict=True):
        assert len(beside) == len(apart)
        assert torch.allclose(apart, beside, atol=2e-4), float((apart - beside).abs().max())


def test_falcon_attends_in_a_way_of_its_own(ids: list[list[int]]) -> None:
    """So it is not served."""
    model = random_model(ARCHITECTURES["falcon"].config)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([ids[0]])).logits[0]
    beside = together(model, ids, KVCache(), [1, 0, 2])[0]
    assert float((alone - beside).norm() / alone.norm()) > 0.2


def test_a_slot_moves_with_what_it_holds(ids: list[list[int]]) -> None:
    model = random_model(LlamaConfig(**GROUPED))
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([ids[0]])).logits[0]
    model.set_attn_implementation(ATTENTION)
    slots, places = KVCache(), (2, 2, 0, 1)
    past = 0
    for count, place, before in zip((7, 5, 1, 10), places, (2, *places), strict=False):
        slots.room(3, past + count)
        if place != before:
            slots.move(before, place, past)
        out = run(model, slots, [CachePiece(place, past, 0, count)], ids[0][past : past + count])
        assert torch.allclose(out, alone[past : past + count], atol=1e-5)
        past += count
    assert slots.length == 128
    slots.room(3, 129)
    assert (slots.count, slots.length) == (4, 256)
    slots.free()
    assert not slots.keys and not slots.values
