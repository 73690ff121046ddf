"""Packed weights give the same products as plain weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import acip
from acip.artifact.artifact import Artifact
from acip.layers.packing import PackedLinear, as_bytes, from_bytes, pack, packable, packed_weight, supports_bytes
from tests.conftest import logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUPPORTED = [dtype for dtype in DTYPES if packable(torch.empty(1, 1, dtype=dtype))]  # the dtypes that oneDNN supports on this machine


@pytest.mark.parametrize("dtype", SUPPORTED)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_plain_weights(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(130, 75, bias=bias).to(dtype).requires_grad_(False)
    packed = PackedLinear(plain)
    for rows in (1, 2, 3, 8, 33):
        x = torch.randn(1, rows, 130).to(dtype)
        torch.testing.assert_close(packed(x), plain(x))
        torch.testing.assert_close(packed(x[0]), plain(x[0]))


@pytest.mark.skipif(not SUPPORTED or not supports_bytes(), reason="this version of torch cannot build a packed weight from bytes")
def test_packed_weights_from_bytes_give_the_same_products() -> None:
    torch.manual_seed(0)
    for dtype in SUPPORTED:
        plain = nn.Linear(130, 75).to(dtype).requires_grad_(False)
        packed = PackedLinear(plain)
        stored = {name: tensor.clone() for name, tensor in as_bytes(packed_weight(plain.weight)).items()}
        mapped = PackedLinear(plain, from_bytes(stored, plain.weight))
        assert mapped.packed_bytes == packed.packed_bytes
        del stored  # the packed weight keeps its memory
        for rows in (1, 2, 8, 33):
            x = torch.randn(rows, 130).to(dtype)
            assert torch.equal(mapped(x), packed(x))


def test_a_packed_model_gives_the_same_logits_at_every_size(small_artifact: Artifact, heldout_tokens: torch.Tensor) -> None:
    any_size = small_artifact.load()
    model, tokens = any_size.model, heldout_tokens[:2, :32]
    sizes = (1.0, 0.5)
    expected = []
    for size in sizes:
        any_size.resize(size)
        expected.append(logits(model, tokens))
    pack(model)
    supported = torch.float32 in SUPPORTED
    assert {isinstance(layer.original, PackedLinear) for layer in any_size.layers.values()} == {supported}
    assert isinstance(model.get_output_embeddings(), PackedLinear) is supported
    for size, before in zip(sizes, expected, strict=True):
        any_size.resize(size)
        assert torch.allclose(logits(model, tokens), before, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unsupported_dtypes_stay_plain(small_artifact: Artifact, dtype: torch.dtype) -> None:
    any_size = small_artifact.load()
    nn.Module.to(any_size.model, dtype)
    pack(any_size.model)
    kinds = {type(layer.original) for layer in any_size.layers.values()} | {type(any_size.model.get_output_embeddings())}
    assert kinds == {PackedLinear if dtype in SUPPORTED else nn.Linear}


@pytest.mark.parametrize("size", [1.0, 0.5])
def test_a_packed_export_is_the_same_model(small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path: Path, size: float) -> None:
    """Packing changes neither results nor copying, saving and training."""
    model: Any = acip.from_pretrained(small_artifact.folder, size=size).compress()
    tokens = heldout_tokens[:2, :32]
    expected, names, stored = logits(model, tokens), list(model.state_dict()), sum(p.numel() for p in model.parameters())
    acip.pack(model)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all((type(module) is PackedLinear) == (torch.float32 in SUPPORTED) for module in linears)
    assert (list(model.state_dict()), sum(p.numel() for p in model.parameters())) == (names, stored)
    assert torch.allclose(logits(model, tokens), expected, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    for other in (copy.deepcopy(model), AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert torch.allclose(logits(other, tokens), expected, atol=1e-4)
    model.requires_grad_(True)
    model(tokens, labels=tokens).loss.backward()
    assert all(module.weight.grad is not None for module in linears)
    assert torch.allclose(logits(model.double(), tokens).float(), expected, atol=1e-4), "a cast model uses plain weights"
