"""The sequences of a step are independent: each has the logits of the model alone, for every architecture that is served."""

from typing import Any

import pytest
import torch
from acip_platform.serve.engine.kv_cache import ATTENTION, CachePiece, KVCache, Step
from torch import Tensor
from transformers import LlamaConfig

from tests.acip.layers.test_architectures import ARCHITECTURES, GROUPED, random_model

LENGTHS = (23, 9, 17)  # tokens; longer than the sliding windows
# (sequence, token count) pairs of each step: prompts in chunks, then single tokens, in any order
SCHEDULE = [[(0, 5)], [(1, 4), (0, 1)], [(2, 6), (0, 7), (1, 1)], *[[(2, 1), (0, 1), (1, 1)]] * 4, *[[(0, 1), (2, 1)]] * 6, [(2, 1)]]


def run(model: Any, cache: KVCache, pieces: list[CachePiece], tokens: list[int]) -> Tensor:
    """Return the [T, V] logits of one step."""
    with torch.no_grad(), Step.of(cache, pieces, torch.device("cpu")) as step:
        return model(input_ids=torch.tensor([tokens]), position_ids=step.position[None], past_key_values=cache, use_cache=True).logits[0]


def batched_logits(model: Any, ids: list[list[int]], cache: KVCache, slots: list[int]) -> list[Tensor]:
    """Return the [length, V] logits of each sequence, computed in the steps of SCHEDULE with these cache slots."""
    model.set_attn_implementation(ATTENTION)
    past, logits_of = [0] * len(ids), [list[Tensor]() for _ in ids]
    for parts in SCHEDULE:
        pieces, tokens, start = [], list[int](), 0
        for sequence, count in parts:
            pieces.append(CachePiece(slots[sequence], past[sequence], start, start + count))
            tokens += ids[sequence][past[sequence] : past[sequence] + count]
            start += count
            past[sequence] += count
        cache.room(max(slots) + 1, max(past))
        with torch.no_grad(), Step.of(cache, pieces, torch.device("cpu")) as step:
            logits = model(
                input_ids=torch.tensor([tokens]), position_ids=step.position[None], past_key_values=cache, use_cache=True
            ).logits[0]
        for (sequence, _), piece in zip(parts, pieces, strict=True):
            logits_of[sequence].append(logits[piece.start : piece.stop])
    return [torch.cat(rows) for rows in logits_of]


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 256, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"falcon"}))
def test_each_sequence_has_the_logits_of_the_model_alone(name: str, ids: list[list[int]]) -> None:
    model = random_model(ARCHITECTURES[name].config)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row])).logits[0] for row in ids]
    for slots in ([1, 0, 2], [1, 2, 0]):  # with the second ones, the single tokens of some steps are in the order of their slots
        for expected, batched in zip(alone, batched_logits(model, ids, KVCache(), slots), strict=True):
            assert len(batched) == len(expected)
            assert torch.allclose(expected, batched, atol=2e-4), float((expected - batched).abs().max())


def test_falcon_has_other_logits_in_a_batch(ids: list[list[int]]) -> None:
    """Falcon has its own attention, whose logits differ in a batch, so it is not served."""
    model = random_model(ARCHITECTURES["falcon"].config)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([ids[0]])).logits[0]
    batched = batched_logits(model, ids, KVCache(), [1, 0, 2])[0]
    assert float((alone - batched).norm() / alone.norm()) > 0.2


def test_slot_moves_with_its_keys_and_values(ids: list[list[int]]) -> None:
    model = random_model(LlamaConfig(**GROUPED))
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([ids[0]])).logits[0]
    model.set_attn_implementation(ATTENTION)
    cache, slots = KVCache(), (2, 2, 0, 1)
    past = 0
    for count, slot, previous in zip((7, 5, 1, 10), slots, (2, *slots), strict=False):
        cache.room(3, past + count)
        if slot != previous:
            cache.move(previous, slot, past)
        out = run(model, cache, [CachePiece(slot, past, 0, count)], ids[0][past : past + count])
        assert torch.allclose(out, alone[past : past + count], atol=1e-5)
        past += count
    assert cache.length == 128
    cache.room(3, 129)
    assert (cache.count, cache.length) == (4, 256)
    cache.free()
    assert not cache.keys and not cache.values
