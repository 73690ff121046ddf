"""Load a model of any number of bytes: its target layers are the best coded versions that fit."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from acip.artifact.codes_file import StoredVersions, open_codes
from acip.artifact.loading import ModelLoader
from acip.artifact.reader import ArtifactReader
from acip.coding.byte_order import ByteOrder
from acip.coding.coded_linear import CodedLinear
from acip.coding.codes import Codes
from acip.errors import BudgetError


def load_bytes(artifact: ArtifactReader, limit_bytes: int, device: str | torch.device = "cpu") -> tuple[PreTrainedModel, int]:
    """Return the best model whose stored bytes are at most `limit_bytes`, in evaluation mode, and its stored bytes.

    Its target layers are `CodedLinear`. If the base model fits, it is returned, bit for bit. Only the bytes of the model are read.
    Stored bytes are those of the tensors in the artifact: the coded layers, and everything else in the model's dtype.

    Raise BudgetError if no model is as small, ArtifactError if the artifact has no coded layers or is damaged.
    """
    if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int):
        raise BudgetError(f"limit_bytes is {limit_bytes!r}; it must be a whole number of bytes.")
    loader = ModelLoader(artifact, device)
    rest_bytes = artifact.tensors("rest").data_bytes
    dense_bytes = rest_bytes + loader.dense.data_bytes
    if limit_bytes >= dense_bytes:
        return _dense_model(loader), dense_bytes
    coded = open_codes(artifact)
    smallest = rest_bytes + coded.order.totals[0]
    if limit_bytes < smallest:
        raise BudgetError(f"limit_bytes is {limit_bytes:,}; the smallest model of this artifact takes {smallest:,} bytes.")
    count = coded.order.within(limit_bytes - rest_bytes)
    assert isinstance(coded.versions, StoredVersions)
    return _coded_model(loader, coded.versions, coded.order, count), rest_bytes + coded.order.totals[count]


def _dense_model(loader: ModelLoader) -> PreTrainedModel:
    """Return the base model."""
    weights = loader.dense.read([f"{name}.weight" for name in loader.stored_ranks])

    def with_weight(name: str, original: Any) -> nn.Module:
        weight: Tensor = weights[f"{name}.weight"].to(loader.device)
        original.weight = nn.Parameter(weight.T.contiguous() if isinstance(original, Conv1D) else weight, requires_grad=False)
        return original

    return loader.model(with_weight)


def _coded_model(loader: ModelLoader, versions: StoredVersions, order: ByteOrder, count: int) -> PreTrainedModel:
    """Return the model after `count` steps of the byte order."""
    packed = versions.read(order.at(count))

    def with_codes(name: str, original: Any) -> nn.Module:
        codes = packed.pop(name).unpack()
        return CodedLinear(Codes(codes.codes.to(loader.device), codes.steps.to(loader.device)), original.bias)

    return loader.model(with_codes)
