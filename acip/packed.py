"""Dense weights in oneDNN's own order, for the few rows at a time that a server multiplies on a CPU.

A product sorts a plain weight anew each time, which takes about as long as the multiplying where rows are few
(tests/benchmarks/products.py). Sorted once, a weight can be multiplied and nothing else, so it takes the plain one's place where that
is possible. Factors stay plain: a rank is a prefix of them, and what is sorted can't be cut. (In sorted pieces of 64 to 256 directions
they were slower than plain: each piece is a product of its own.)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from acip.linear import ElasticLinear
from acip.modeling_acip import weight_MN


def pack(model: PreTrainedModel, layers: Iterable[ElasticLinear]) -> None:
    """Pack the dense weights of `layers`, and the model's head, whose plain weight stays beside it where it is the embeddings', too."""
    for layer in layers:
        if packable(layer.original.weight):
            layer.original = PackedLinear(weight_MN(layer.original), layer.bias)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and packable(head.weight):
        model.set_output_embeddings(PackedLinear(head.weight, head.bias))


def packable(weight: Tensor | nn.Module) -> bool:
    """Whether oneDNN multiplies such weights here."""
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """y = W x + b."""

    def __init__(self, weight_MN: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._packed = (torch.ops.mkldnn._reorder_linear_weight(weight_MN.detach(), None),)  # in a tuple: no parameter to move or to save

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed[0], self.bias, "none", [], "")
        return y

    @property
    def packed_bytes(self) -> int:
        return int(torch.ops.mkldnn._nbytes(self._packed[0]))
