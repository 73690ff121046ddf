"""Copies of the sizes in use, stacked and packed like the layers of an export.

Layers of any size multiply by plain matrices, because a size is a prefix of them. On a CPU, oneDNN reorders plain matrices for each
product, which takes a third of its time for 8 rows; and the parts of a fused layer are separate products. So a size that is in every step
for some time gets copies, if there is memory for them. A batch of two sizes uses the copies of both.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import cast

import torch
from acip_platform.serve.engine.resident_weights import ResidentWeights
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from acip.layers.elastic_linear import ElasticLinear
from acip.layers.mixed_sizes import Form, Size
from acip.layers.targets import weight_MN
from acip_vllm.product import FusedProduct
from acip_vllm.shards import Piece

COPIED_AFTER = 16  # steps in a row that have a size
MAX_COPIES = 2  # sizes

Key = tuple[int, int]  # of a size
Parts = Mapping[str, nn.Module]  # the layers that vLLM fuses into one, by name
Product = Callable[[Tensor], Tensor]


class SizeCopies:
    """The copies of one model. `weights` states whether there may be copies, and has their memory; None = there are none."""

    def __init__(self, weights: ResidentWeights | None) -> None:
        self.weights = weights
        self._steps: Counter[Key] = Counter()  # in a row
        self._products: OrderedDict[Key, dict[int, Product | None]] = OrderedDict()  # by size and by the id of the parts
        self._reserved = 0  # sizes that there is memory for
        self._gemm = UnquantizedLinearMethod()  # of the platform

    def __contains__(self, key: Key) -> bool:
        return key in self._products

    def prepare(self, sizes: list[Key]) -> bool:
        """Return whether all sizes of the next step have copies. New ones are made in this step."""
        if self.weights is None:
            return False
        if not self.weights.packed:  # memory is short
            self._products.clear()
            return False
        self._steps = Counter({key: self._steps[key] + 1 for key in sizes})
        for key in sizes:
            if key not in self._products and self._steps[key] > COPIED_AFTER and self._has_room(sizes):
                self._products[key] = {}
            if key in self._products:
                self._products.move_to_end(key)
        return bool(sizes) and all(key in self._products for key in sizes)

    def _has_room(self, sizes: list[Key]) -> bool:
        """Return whether there is memory for another size, after the copies of one that this step does not have were dropped."""
        assert self.weights is not None
        if len(self._products) == self._reserved < MAX_COPIES:
            layers = [(weight_MN(layer.original), layer.left.values, layer.right.values) for layer in self.weights.layers.values()]
            largest = sum(max(W.nbytes, left.nbytes + right.nbytes) for W, left, right in layers)
            self._reserved += self.weights.memory.reserve_copies(largest)
        if len(self._products) == self._reserved and (unused := next((key for key in self._products if key not in sizes), None)):
            del self._products[unused]
        return len(self._products) < self._reserved

    def compute(self, parts: Parts, runs: list[tuple[Size, int]], x_TN: Tensor) -> Tensor | None:
        """Return the outputs [T, M] of the layers `parts` for runs of rows, whose sizes have copies; None if a layer has no sizes."""
        products = [self._product(parts, size) for size, _ in runs]
        if len(products) == 1:
            return None if products[0] is None else products[0](x_TN)
        rows = x_TN.split_with_sizes([count for _, count in runs])
        found = [product(x) for product, x in zip(products, rows, strict=True) if product is not None]
        return torch.cat(found) if found else None

    def _product(self, parts: Parts, size: Size) -> Product | None:
        products = self._products[size.key]
        if id(parts) not in products:
            products[id(parts)] = self._made(parts, size)
        return products[id(parts)]

    def _made(self, parts: Parts, size: Size) -> Product | None:
        if not all(isinstance(part, ElasticLinear) for part in parts.values()):
            return None
        layers = cast(Mapping[str, ElasticLinear], parts)
        product = FusedProduct([_piece(layer, size.form(name)) for name, layer in layers.items()])
        for matrix in product.matrices():
            self._gemm.process_weights_after_loading(matrix)
        if all(layer.bias is None for layer in layers.values()):
            return lambda x: product(x, self._gemm.apply)
        bias_M = torch.cat([
            layer.left.values.new_zeros(layer.left.values.shape[1]) if layer.bias is None else layer.bias for layer in layers.values()
        ])  # fmt: skip
        return lambda x: product(x, self._gemm.apply) + bias_M


def _piece(layer: ElasticLinear, form: Form) -> Piece:
    """Return the matrices of a layer in one form."""
    version, rank = form
    if version is not None:
        coded = layer.coded[str(version)]
        return Piece(coded.codes, steps=coded.steps)
    if rank is None:
        return Piece(weight_MN(layer.original))
    kept = layer.lead + rank
    return Piece(layer.right.read(kept), layer.left.read(kept).T)
