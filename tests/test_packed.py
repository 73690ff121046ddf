"""Packed weights multiply as plain ones do."""

import pytest
import torch
from torch import nn

from acip.artifact import Artifact
from acip.packed import PackedLinear, pack, packable
from tests.conftest import logits

pytestmark = pytest.mark.skipif(not packable(torch.empty(1, 1)), reason="oneDNN is not there")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_plain_weights(dtype: torch.dtype, bias: bool) -> None:
    if not packable(torch.empty(1, 1, dtype=dtype)):
        pytest.skip("no such products here")
    torch.manual_seed(0)
    plain = nn.Linear(130, 75, bias=bias).to(dtype).requires_grad_(False)
    packed = PackedLinear(plain)
    for rows in (1, 2, 8, 33):
        x = torch.randn(1, rows, 130).to(dtype)
        torch.testing.assert_close(packed(x), plain(x))
        torch.testing.assert_close(packed(x[0]), plain(x[0]))


def test_a_packed_model_says_the_same_at_every_size(small_artifact: Artifact, heldout_tokens: torch.Tensor) -> None:
    any_size = small_artifact.load()
    model, tokens = any_size.model, heldout_tokens[:2, :32]
    sizes = (1.0, 0.5)
    expected = []
    for size in sizes:
        any_size.resize(size)
        expected.append(logits(model, tokens))
    pack(model, any_size.layers.values())
    assert all(isinstance(layer.original, PackedLinear) for layer in any_size.layers.values())
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    for size, before in zip(sizes, expected, strict=True):
        any_size.resize(size)
        assert torch.allclose(logits(model, tokens), before, atol=1e-4)
