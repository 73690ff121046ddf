"""Low-rank adapters of the layers (LoRA).

An adapter sits at one of three places of a layer y = U V x + b:

    layer            y + B A x                    beside the layer: R more directions (the paper, eq. 9)
    right, left      V + B A  and  U + B A        on the factors: folded in, the adapters cost no direction (ours)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.modeling_acip import accumulation_dtype, widened

ALL = slice(None)


class LoRA(nn.Module):
    """A low-rank map scale * B A x with `A` [R, in] and `B` [out, R].

    The matrices are stored in the accumulation dtype of the model's dtype, because 16 bits would lose small optimizer steps.
    All sizes share A and B. On the factors, each size uses the part of A and B that belongs to the directions it keeps.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        device: Any = None,
        model_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        options: Any = {"device": device, "dtype": accumulation_dtype(model_dtype)}
        self.A = nn.Parameter(torch.empty(rank, inputs, **options))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(outputs, rank, **options))

    @classmethod
    def of(cls, A_Rn: Tensor, B_mR: Tensor) -> "LoRA":
        """Wrap given, already scaled matrices in their own dtype, for inference only."""
        lora = cls(1, 1, 1, 1.0, device="meta")
        lora.A, lora.B = (nn.Parameter(matrix, requires_grad=False) for matrix in (A_Rn, B_mR))
        return lora

    def forward(self, x: Tensor, inputs: Tensor | slice = ALL, outputs: Tensor | slice = ALL) -> Tensor:
        """Apply the adapter. `inputs` selects the columns of A that `x` holds, `outputs` the rows of B to compute."""
        # indexing with a full slice would still copy in the backward pass
        A, B = self.A if inputs is ALL else self.A[:, inputs], self.B if outputs is ALL else self.B[outputs]
        A, B = A.to(x.dtype), B.to(x.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return F.linear(F.linear(x, A) * self.scale, B)

    def product(self) -> Tensor:
        """Return scale * B A [out, in]."""
        return widened(self.B) @ widened(self.A) * self.scale


def sort_directions(values: Tensor, place: str, part: str, importance_K: Tensor) -> Tensor:
    """Reorder the layer's directions in an adapter's matrix, or in its optimizer moments.

    `place` is the adapter's place ("layer", "right" or "left") and `part` the matrix ("A" or "B"). Matrices without an axis of
    directions are returned unchanged.
    """
    dim = {("right", "B"): 0, ("left", "A"): 1}.get((place, part))
    return values if dim is None else values.index_select(dim, importance_K)
