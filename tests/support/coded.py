"""Coded layers in milliseconds: weights rounded to a few step sizes, with the losses that rounding predicts."""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from acip.artifact.artifact import Artifact
from acip.coding.coded_model import CodedModel
from acip.coding.codes import Codes, PackedCodes, stored_steps
from acip.modeling_acip import weight_MN
from acip.sizing.budget import Budget
from acip.sizing.byte_order import ByteOrder, Version

LARGEST = (2, 9, 100)  # the largest code of each version


def rounded(linears: Mapping[str, nn.Module], largest: Sequence[int] = LARGEST) -> CodedModel:
    """Return the weights of `linears` rounded to the nearest multiple of a step, in one version for each largest code."""
    versions: dict[str, list[PackedCodes]] = {}
    facts: dict[str, list[Version]] = {}
    for name, layer in linears.items():
        W_MN = weight_MN(layer).detach().float()
        versions[name], facts[name] = [], []
        for top in largest:
            steps_M = stored_steps(W_MN.abs().amax(1) / top)
            codes_MN = (W_MN / steps_M[:, None]).round().clamp(-127, 127).char()
            codes = Codes(codes_MN, steps_M)
            versions[name].append(codes.pack())
            facts[name].append(Version(versions[name][-1].bytes, float((codes.decode() - W_MN).square().sum())))
    return CodedModel(versions, ByteOrder(facts))


def load_bytes(artifact: Artifact, limit_bytes: int) -> tuple[PreTrainedModel, int]:
    """Return the best model of an artifact within a number of stored bytes, and its stored bytes."""
    any_size = artifact.load(size=Budget(stored_bytes=limit_bytes))
    assert any_size.cut is not None
    assert any_size.cut.bytes is not None
    return any_size.materialize(), any_size.cut.bytes
