"""Packed weights multiply as plain ones do, and take their place."""

import weakref

import pytest
import torch
from torch import nn

from acip.artifact import Artifact
from acip.budget import Budget
from acip.packed import PackedLinear, pack, packable
from acip.sizes import set_size
from tests.conftest import logits

pytestmark = pytest.mark.skipif(not packable(torch.empty(1, 1)), reason="oneDNN is not there")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_plain_weights(dtype: torch.dtype, bias: bool) -> None:
    if not packable(torch.empty(1, 1, dtype=dtype)):
        pytest.skip("no such products here")
    torch.manual_seed(0)
    plain = nn.Linear(130, 75, bias=bias).to(dtype).requires_grad_(False)
    packed = PackedLinear(plain.weight, plain.bias)
    for rows in (1, 2, 8, 33):
        x = torch.randn(1, rows, 130).to(dtype)
        torch.testing.assert_close(packed(x), plain(x))
        torch.testing.assert_close(packed(x[0]), plain(x[0]))


def test_a_model_says_the_same_and_its_dense_weights_are_there_once(small_artifact: Artifact, heldout_tokens: torch.Tensor) -> None:
    any_size = small_artifact.load()
    model, tokens = any_size.model, heldout_tokens[:2, :32]
    expected = {size: (any_size.resize(size), logits(model, tokens))[1] for size in (1.0, 0.5)}
    weights = [weakref.ref(layer.original.weight) for layer in any_size.layers.values()]
    pack(model, any_size.layers.values())
    assert not any(weight() is not None for weight in weights)
    for size, before in expected.items():
        set_size(any_size.layers, any_size.table.cut(Budget(ratio=size)))
        assert torch.allclose(logits(model, tokens), before, atol=1e-4)
    dense = sum(layer.M * layer.N for layer in any_size.table.layers) * 4
    packed = [layer.original.packed_bytes for layer in any_size.layers.values() if isinstance(layer.original, PackedLinear)]
    assert len(packed) == len(any_size.layers)
    assert dense <= sum(packed) <= 1.25 * dense, "oneDNN pads the sides of so small a model"
