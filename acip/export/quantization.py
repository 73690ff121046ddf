"""The matrices of a compressed model in 8 or 4 bit, as bitsandbytes makes them (paper 3.4, W4A16).

Blocks of 64 numbers never leave their row: then bytes are those that a cut counted, and a CPU reads them right. bitsandbytes'
own Linear4bit, whose blocks run on into the next row, is silently wrong on a CPU for rows of 96 or 32 numbers, and stops
there at most ranks (bitsandbytes 0.50); its int8 is right everywhere.

Layers stored by pivots become two factors first: the combinations of rounded pivot rows would magnify their rounding.
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

BEST: Literal["best"] = "best"  # of the bits in which a curve was measured
BITS = {"nf4": 4, "fp4": 4, "int8": 8}


@torch.no_grad()
def quantized(layer: nn.Module, kind: str) -> QuantLinear:
    """A linear layer in 8 or 4 bit."""
    W_MN = weight_MN(layer).float()
    N, bias_M = W_MN.shape[1], bias_of(layer)
    if kind == "int8":
        absmax = W_MN.abs().amax(1, keepdim=True)
        return QuantLinear((W_MN * (127 / absmax.clamp_min(1e-30))).round().to(torch.int8), absmax, N, kind, bias_M)
    if not W_MN.numel():
        return QuantLinear.blank(layer, kind)
    codes, absmax, _ = four_bit(W_MN, kind)
    return QuantLinear(codes, absmax, N, kind, bias_M)


@torch.no_grad()
def spread(layer: PivotLinear) -> nn.Module:
    """The same layer as two factors, the left one orthonormal; as one matrix where these would hold more numbers."""
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
    """The matrices of the target layers of a model that `acip.export.folder.compressed_model` made; everything else stays as it is."""
    acip = model.config.acip
    _known(kind)
    if acip["quantize"] is not None:
        raise ArtifactError(f"the model is quantized to {acip['quantize']} already. Ask for its size again, and then for {kind}.")
    for name in acip["layers"]:
        layer = model.get_submodule(name)
        if isinstance(layer, PivotLinear):
            made = spread(layer)
            set_module(model, name, made)
            factors = isinstance(made, LowRankLinear)
            acip["layers"][name] = {"form": "factors", "rank": layer.rank} if factors else {"form": "linear", "rank": None}
    swap_linears(model, acip["layers"], lambda linear: quantized(linear, kind))
    acip["quantize"] = kind


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """A quantized model with its matrices as they are multiplied: the same answers, without dequantizing at each use."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            set_module(model, name, plain_linear(layer.dequantized(model.dtype), layer.bias))
    return model


def counted(budget: Budget, kind: Kind | Literal["best"] | None) -> Budget:
    """`budget`, counted in the bits that `kind` needs where it does not say itself ("best": in those that the curves choose)."""
    if kind is None or budget.bits is not None:
        return budget
    if kind == BEST:
        return replace(budget, bits=BEST)
    _known(kind)
    if budget.by_curve and kind not in KIND_OF_BITS.values():
        raise BudgetError(f"curves are measured in {' and '.join(KIND_OF_BITS.values())}, not in {kind}: ask for another kind of budget.")
    return replace(budget, bits=8 if BITS[kind] == 8 else 4)


def kind_of(cut: Cut, kind: Kind | Literal["best"] | None) -> Kind | None:
    """What a cut is quantized to where `kind` is asked for: never to more bits than its budget was counted in."""
    if kind == BEST:
        kind = None
    if kind is not None:
        _known(kind)
    if cut.bits is None:
        return kind
    if kind is None:
        return KIND_OF_BITS[cut.bits]
    if BITS[kind] > cut.bits:
        raise ArtifactError(
            f"the size was cut to fit in {cut.bits} bit; {kind} needs {BITS[kind]}. Leave the kind out, or ask for these bits."
        )
    return kind


def _known(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ArtifactError(f"{kind!r} is no quantization; allowed are {', '.join(get_args(Kind))}.")
