"""The base class of the two layers that hold directions: `SVDLinear` (calibration) and `ElasticLinear` (any rank)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from acip.layers.adapters import LoRA
from acip.layers.directions import DirectionMatrix, FourBitLinear


class Compressible(nn.Module):
    """A linear layer with its directions and adapters, and with the original layer as its exact inverse.

    `left` [K, M] and `right` [K, N] hold one direction per row: W = left^T right. `loras` maps places to adapters
    (`acip.layers.adapters`).
    """

    def __init__(self, original: nn.Module, left_KM: DirectionMatrix, right_KN: DirectionMatrix, loras: dict[str, LoRA] | None) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.left, self.right = left_KM, right_KN
        self.loras: dict[str, LoRA] = nn.ModuleDict(loras)  # type: ignore[assignment]
        self.bypass = False  # True: `forward` computes the original layer

    @property
    def bias(self) -> Tensor | None:
        bias = self.original.bias
        return bias if isinstance(bias, Tensor) else None

    def park(self) -> None:
        """Move the full-precision layer of a 4-bit layer to the host."""
        if isinstance(self.original, FourBitLinear):
            self.original.park()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Compressible":
        """Move or cast the layer, except for a weight on the meta device.

        A meta weight is not read yet and can't be moved or cast. The loader later reads it onto the device of the directions.
        """
        unread = self.original._parameters.get("weight")
        if unread is None or not unread.is_meta:
            return super()._apply(fn, recurse)
        del self.original._parameters["weight"]
        try:
            return super()._apply(fn, recurse)
        finally:
            self.original._parameters["weight"] = unread

    @property
    def exact(self) -> nn.Module:
        """The original layer at its full precision."""
        return self.original.exact if isinstance(self.original, FourBitLinear) else self.original
