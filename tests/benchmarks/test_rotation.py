"""A rotated Llama computes the same function, up to the rounding of its weights to bfloat16, and its weights leave their lattice."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from acip.layers.targets import find_linears
from tests.acip.layers.test_architectures import GROUPED, logits, random_model
from tests.benchmarks.rotation import RotatedNorm, rotate


def llama(tied: bool) -> Any:
    """Return a Llama whose norms have random weights."""
    return random_model(LlamaConfig(**GROUPED, tie_word_embeddings=tied)).double()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 256, (4, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_rotation_keeps_the_logits(tied: bool, seed: int, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, the weights are not rounded to bfloat16. The norms of transformers compute in float32."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self)
    model = llama(tied)
    expected = logits(model, tokens)
    linears: dict[str, Any] = dict(find_linears(model))
    before = {name: layer.weight.clone() for name, layer in linears.items()}
    rotate(model, seed)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert all((layer.weight - before[name]).norm() > 0.5 * before[name].norm() for name, layer in linears.items())


@pytest.mark.parametrize("tied", [False, True])
def test_rounded_weights_keep_the_logits_approximately(tied: bool, tokens: Tensor) -> None:
    model = llama(tied).float()
    expected = logits(model, tokens)
    rotate(model)
    assert (logits(model, tokens) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_bfloat16_numbers_of_the_same_dtype(dtype: torch.dtype) -> None:
    model = llama(tied=False).to(dtype)
    rotate(model)
    layers = {**find_linears(model), "embedding": model.model.embed_tokens, "head": model.lm_head}
    assert len(layers) == 16
    for layer in layers.values():
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight, layer.weight.bfloat16().to(dtype))


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_stay_the_same_tensor(tied: bool) -> None:
    model = llama(tied)
    rotate(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert len(list(model.parameters())) == len(list(llama(tied).parameters()))


def test_norms_have_no_weights() -> None:
    model = llama(tied=True)
    rotate(model)
    norm: Any = model.model.norm
    assert isinstance(norm, RotatedNorm)
    last: Any = norm.norm
    for block in model.model.layers:
        assert (block.input_layernorm.weight == 1).all()
        assert (block.post_attention_layernorm.weight == 1).all()
    assert torch.equal(last.weight, torch.ones_like(last.weight))


def test_seed_decides_the_rotation() -> None:
    model = llama(tied=True)
    rotated = [copy.deepcopy(model) for _ in range(3)]
    for each, seed in zip(rotated, (0, 0, 1), strict=True):
        rotate(each, seed)
    first, same, other = (each.model.embed_tokens.weight for each in rotated)
    torch.testing.assert_close(first, same)
    assert not torch.allclose(first, other, rtol=0.1)


def test_weights_leave_their_lattice() -> None:
    """Weights that have 16 values per row before the rotation have many more after it."""
    model = llama(tied=True)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.data = (8 * layer.weight / layer.weight.abs().max()).round() / 8
    assert max(len(row.unique()) for row in layer.weight) <= 17
    rotate(model)
    assert min(len(row.unique()) for row in layer.weight) > 24  # of 32; some of 16 bit are equal by chance
