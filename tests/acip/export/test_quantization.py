"""A quantized export is close to the model of its size and has the predicted bytes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from acip.artifact.artifact import Artifact
from acip.errors import ArtifactError, RecipeError
from acip.evaluate import PerplexityOn, QuantizedOn, Text, evaluate, extended, perplexity
from acip.evaluate.measurement import size_facts
from acip.export.folder import compressed_model, export, tensor_bytes
from acip.export.quantization import quantized as as_quantized
from acip.export.quantization import rounded, spread
from acip.layers.directions import four_bit
from acip.modeling_acip import LowRankLinear, PivotLinear, QuantLinear, plain_linear
from acip.sizing.budget import Budget, Curve
from acip.sizing.elastic_model import ElasticModel
from tests.conftest import logits, read


@pytest.mark.parametrize(("kind", "bits", "near"), [("nf4", 4, 0.2), ("fp4", 4, 0.35), ("int8", 8, 0.03)])
def test_a_quantized_export_is_close_and_has_the_predicted_bytes(
    any_size: ElasticModel, small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path: Path, kind: Any, bits: Any, near: float
) -> None:
    most = {4: 400_000, 8: 500_000}[bits]
    cut = any_size.resize(Budget(stored_bytes=most, bits=bits))
    export(any_size, small_artifact, tmp_path / "out", kind=kind)
    assert cut.bytes is not None and tensor_bytes(tmp_path / "out") == cut.bytes <= most
    loaded = read(tmp_path / "out")
    params = sum(p.numel() for p in rounded(compressed_model(any_size, kind)).parameters())
    assert size_facts(loaded) == {"params": params, "bytes": cut.bytes}
    exact = logits(any_size.materialize(), heldout_tokens[:4])
    assert (logits(loaded, heldout_tokens[:4]) - exact).norm() < near * exact.norm()
    assert LowRankLinear in {type(loaded.get_submodule(name)) for name in cut.ranks} <= {LowRankLinear, QuantLinear}
    assert not any(type(part) is nn.Linear for name in cut.ranks for part in loaded.get_submodule(name).modules())
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(read(tmp_path / "again"), heldout_tokens[:2]), logits(loaded, heldout_tokens[:2]))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_loss_of_the_quantized_model_is_measured_with_the_curve(any_size: ElasticModel, small_artifact: Artifact, kind: Any) -> None:
    """The measured model is the exported one. The measurements give a curve for the choice of the best bits."""
    text = Text("package:wikipedia", "packed", 32, 4)
    tokenizer = small_artifact.tokenizer()
    rows = []
    for size in (1.0, 0.5):
        any_size.resize(size)
        rows.append(evaluate(any_size, tokenizer, [PerplexityOn(text), QuantizedOn(text, kind)]))
        plain, quantized = rows[-1]["evaluation"]
        model = compressed_model(any_size, kind)
        assert any(isinstance(layer, QuantLinear) for layer in model.modules())
        assert quantized["values"]["loss_nats"] == pytest.approx(perplexity(model, text.tokens(tokenizer)).loss, abs=1e-6)
        assert quantized["values"]["loss_nats"] != plain["values"]["loss_nats"]
    curve, _ = extended([], rows, 0.4)
    bits: Any = {"nf4": 4, "int8": 8}[kind]
    measured = Curve.of(curve, bits)
    assert measured is not None and len(measured.sizes) == 2


@pytest.mark.parametrize(("M", "N"), [(128, 96), (64, 32), (37, 37), (192, 51), (5, 1), (64, 64)])
@pytest.mark.parametrize(("kind", "near"), [("nf4", 0.15), ("fp4", 0.25), ("int8", 0.02)])
def test_matrices_of_every_shape_are_quantized(M: int, N: int, kind: str, near: float) -> None:
    """The rows have very different scales, so that a misplaced block causes a large error."""
    torch.manual_seed(0)
    W_MN = torch.randn(M, N) * torch.exp(2 * torch.randn(M, 1))
    quantized = as_quantized(plain_linear(W_MN, torch.ones(M)), kind)
    assert ((quantized.dequantized(torch.float32) - W_MN).norm(dim=1) <= near * W_MN.norm(dim=1) + 1e-6).all()
    x = torch.randn(3, N)
    torch.testing.assert_close(quantized(x), nn.functional.linear(x, quantized.dequantized(torch.float32), torch.ones(M)))


def test_a_cut_in_4_bit_is_exported_in_4_bit(any_size: ElasticModel, small_artifact: Artifact, tmp_path: Path) -> None:
    any_size.resize(Budget(ratio=0.5, bits=4))
    assert export(any_size, small_artifact, tmp_path / "out")["quantize"] == "nf4"
    with pytest.raises(ArtifactError, match="int8 needs 8"):
        export(any_size, small_artifact, tmp_path / "other", kind="int8")
    with pytest.raises(ArtifactError, match="allowed are nf4, fp4, int8"):
        export(any_size, small_artifact, tmp_path / "other", kind="int3")  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "near"), [("nf4", 0.15), ("fp4", 0.25), ("int8", 0.02)])
def test_layers_of_pivots_are_quantized_as_factors(kind: str, near: float) -> None:
    """With directions of decreasing importance, the coefficients of pivot rows would amplify rounding errors; factors do not."""
    torch.manual_seed(0)
    left_Mq = torch.linalg.qr(torch.randn(192, 48))[0]
    right_qN = torch.linalg.qr(torch.randn(128, 48))[0].T * torch.logspace(0, -3, 48)[:, None]
    W_MN = left_Mq @ right_qN
    pivot = PivotLinear.of(left_Mq, right_qN, torch.randn(192), torch.float32)
    factors = spread(pivot)
    assert isinstance(factors, LowRankLinear)
    x = torch.randn(5, 128)
    torch.testing.assert_close(factors(x), pivot(x), atol=1e-4, rtol=0)

    def error(left: nn.Module, right: nn.Module) -> float:
        return float(
            (as_quantized(left, kind).dequantized(torch.float32) @ as_quantized(right, kind).dequantized(torch.float32) - W_MN).norm()
        )

    assert error(factors.left, factors.right) < near * W_MN.norm()
    nearly_full = PivotLinear.of(torch.randn(40, 30), torch.randn(30, 40), None, torch.float32)
    dense = spread(nearly_full)
    assert isinstance(dense, nn.Linear)
    torch.testing.assert_close(dense(x[:, :40]), nearly_full(x[:, :40]), atol=1e-3, rtol=0)


def test_4_bit_without_bitsandbytes_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain CUDA image does not contain bitsandbytes, which only 4-bit quantization needs."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RecipeError, match="needs the package bitsandbytes"):
        four_bit(torch.ones(2, 64), "nf4")
