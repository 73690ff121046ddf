"""Quantize the matrices of a compressed model to 8 or 4 bit with the codes of bitsandbytes (paper 3.4, W4A16).

Blocks of 64 values never cross rows, so the bytes are those that a cut counted, and the result is correct on a CPU. In bitsandbytes
0.50, the blocks of Linear4bit cross rows: on a CPU it gives wrong results without an error for rows of 96 or 32 values, and fails for
most ranks. Its int8 is correct everywhere.

Layers stored by pivots are converted to two factors first, because the combinations of pivot rows would amplify their rounding errors.
"""

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from acip.errors import ArtifactError, BudgetError
from acip.layers.directions import four_bit
from acip.modeling_acip import (
    LowRankLinear,
    PivotLinear,
    QuantLinear,
    accumulation_dtype,
    bias_of,
    plain_linear,
    set_module,
    swap_linears,
    weight_MN,
    widened,
)
from acip.sizing.budget import KIND_OF_BITS, Budget, Kind
from acip.sizing.cut_table import Cut

BEST: Literal["best"] = "best"  # whichever of the bit widths with a measured curve is best
BITS = {"nf4": 4, "fp4": 4, "int8": 8}


@torch.no_grad()
def quantized(layer: nn.Module, kind: str) -> QuantLinear:
    """Return a linear layer in 8 or 4 bit."""
    W_MN = weight_MN(layer).float()
    N, bias_M = W_MN.shape[1], bias_of(layer)
    if not W_MN.numel():
        return QuantLinear.blank(layer, kind)
    if kind == "int8":
        absmax = W_MN.abs().amax(1, keepdim=True)
        return QuantLinear((W_MN * (127 / absmax.clamp_min(1e-30))).round().to(torch.int8), absmax, N, kind, bias_M)
    codes, absmax, _ = four_bit(W_MN, kind)
    return QuantLinear(codes, absmax, N, kind, bias_M)


@torch.no_grad()
def spread(layer: PivotLinear) -> nn.Module:
    """Return a pivot layer as two factors, the left one orthonormal, or as one matrix if that stores fewer numbers."""
    pivots_qN, combine = layer.pivots.weight, layer.combine.weight
    (q, N), M = pivots_qN.shape, layer.out_features
    unit = torch.eye(q, dtype=accumulation_dtype(combine.dtype), device=pivots_qN.device)
    left_Mq = torch.cat([unit, widened(combine)])[layer.place]
    if q * (M + N) >= M * N:
        return plain_linear((left_Mq @ widened(pivots_qN)).to(pivots_qN.dtype), layer.bias)
    left_Mq, R = torch.linalg.qr(left_Mq)
    right_qN = R @ widened(pivots_qN)
    return LowRankLinear(left_Mq.to(pivots_qN.dtype), right_qN.to(pivots_qN.dtype), layer.bias)


def quantize_in_place(model: PreTrainedModel, kind: str) -> None:
    """Quantize the matrices of the target layers of a model that `acip.export.folder.compressed_model` made. The rest is unchanged."""
    acip = model.config.acip
    _check_kind(kind)
    if acip["quantize"] is not None:
        raise ArtifactError(f"the model is already quantized to {acip['quantize']}. To quantize it to {kind}, resize it first.")
    for name in acip["layers"]:
        layer = model.get_submodule(name)
        if isinstance(layer, PivotLinear):
            converted = spread(layer)
            set_module(model, name, converted)
            factors = isinstance(converted, LowRankLinear)
            acip["layers"][name] = {"form": "factors", "rank": layer.rank} if factors else {"form": "linear", "rank": None}
    swap_linears(model, acip["layers"], lambda linear: quantized(linear, kind))
    acip["quantize"] = kind


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the quantized matrices of a model by their dequantized values: the same results, without dequantizing each time."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            set_module(model, name, plain_linear(layer.dequantized(model.dtype), layer.bias))
    return model


def counted(budget: Budget, kind: Kind | Literal["best"] | None) -> Budget:
    """Return `budget`, counted in the bits of `kind` unless it has bits of its own. With "best", the measured curves choose the bits."""
    if kind is None or budget.bits is not None:
        return budget
    if kind == BEST:
        return replace(budget, bits=BEST)
    _check_kind(kind)
    if budget.by_curve and kind not in KIND_OF_BITS.values():
        raise BudgetError(
            f"curves are measured in {' and '.join(KIND_OF_BITS.values())}, not in {kind}: use another kind of budget, such as bytes."
        )
    return replace(budget, bits=8 if BITS[kind] == 8 else 4)


def kind_of(cut: Cut, kind: Kind | Literal["best"] | None) -> Kind | None:
    """Return the kind to quantize a cut to, if `kind` is requested; None for no quantization.

    A cut whose budget was counted in 8 or 4 bit is quantized by default. Raise ArtifactError for a `kind` with more bits than that, and
    for coded layers.
    """
    if kind == BEST:
        kind = None
    if kind is not None:
        _check_kind(kind)
    if kind is not None and cut.versions is not None:
        raise ArtifactError(
            f"this size is stored in codes of {cut.bits_per_weight:.2f} bits per weight, and can't be quantized to {kind}. Omit the kind, "
            'or ask for a size of ranks, such as Budget(ratio=0.6, convention="linear").'
        )
    if cut.bits is None:
        return kind
    if kind is None:
        return KIND_OF_BITS[cut.bits]
    if BITS[kind] > cut.bits:
        raise ArtifactError(
            f"the size was counted in {cut.bits} bit, but {kind} needs {BITS[kind]} bit. Omit the kind, or count the size in these bits."
        )
    return kind


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ArtifactError(f"{kind!r} is not a kind of quantization; allowed are {', '.join(get_args(Kind))}.")
