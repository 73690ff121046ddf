"""Dense weights in oneDNN's own order beside the plain ones, for the few rows at a time that a server multiplies on a CPU.

    1 row     the plain weight: it is read once and in order, which nothing beats
    more      the packed copy: a product sorts a plain weight anew each time, which takes about as long as the multiplying
              (tests/benchmarks/products.py)

The copy is memory for speed, and optional. Factors have none: a rank is a prefix of them, and what is packed can't be cut. (In packed
pieces of 64 to 256 directions they were slower than plain, as each piece is a product of its own.)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from acip.linear import ElasticLinear
from acip.modeling_acip import bias_of, weight_MN


class PackedLinear(nn.Module):
    """The linear layer `plain`, with a packed copy of its weight."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain
        self._packed = (torch.ops.mkldnn._reorder_linear_weight(weight_MN(plain).detach(), None),)  # in a tuple: not to be moved or saved

    @property
    def weight(self) -> Tensor:
        weight = self.plain.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        return bias_of(self.plain)

    @property
    def packed_bytes(self) -> int:
        return int(torch.ops.mkldnn._nbytes(self._packed[0]))

    def forward(self, x: Tensor) -> Tensor:
        one = x.numel() == x.shape[-1]
        y: Tensor = self.plain(x) if one else torch.ops.mkldnn._linear_pointwise(x, self._packed[0], self.bias, "none", [], "")
        return y


def pack(model: PreTrainedModel, layers: Iterable[ElasticLinear]) -> None:
    """Give the dense weights of `layers` and the model's head packed copies."""
    for layer in layers:
        if packable(layer.original.weight):
            layer.original = PackedLinear(layer.original)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and packable(head.weight):
        model.set_output_embeddings(PackedLinear(head))


def packable(weight: Tensor | nn.Module) -> bool:
    """Whether oneDNN multiplies such weights here."""
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
