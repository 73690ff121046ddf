"""What is written is what is read, and nothing else is."""

from typing import Any

import torch

from acip.artifact import Artifact
from acip.base import load_base
from acip.materialise import AnySize


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_size_one_is_the_base_bit_for_bit(small_artifact: Artifact, small_base: str, heldout_tokens: torch.Tensor) -> None:
    base = load_base(small_base, "float32").model
    any_size = small_artifact.load()
    any_size.resize(0.5)
    any_size.resize(1.0)
    assert torch.equal(logits(any_size.model, heldout_tokens[:4]), logits(base, heldout_tokens[:4]))
    assert any_size.cut is not None
    assert any_size.cut.params == sum(p.numel() for p in base.parameters())
    assert AnySize is not None
