"""Take a Llama's weights off the lattice of a quantized file, without a change of the function that the model computes.

The weights of a GGUF file are multiples of the scales of its groups. A quantizer can hit such a lattice exactly, so a table of quantizers
on such weights shows nothing. Here the residual stream is rotated by a random orthogonal matrix Q, and the weights of the norms are folded
into the layers behind them. Every weight of a linear layer becomes a sum of many weights.

    embedding E -> E Q;   W -> W diag(norm) Q for layers that read the stream;   W -> Q^T W for layers that write it
    last norm: the plain norm, followed by Q^T diag(norm) Q, so that embedding and head stay the same tensor
"""

from typing import Any

import torch
from torch import Tensor, nn


class RotatedNorm(nn.Module):
    """A norm without weights, followed by a matrix."""

    def __init__(self, norm: nn.Module, matrix_HH: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("matrix_HH", matrix_HH, persistent=False)
        self.matrix_HH: Tensor

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.norm(x_BTH) @ self.matrix_HH


@torch.no_grad()
def rotate(model: Any, seed: int = 0) -> None:
    """Rotate a Llama in place, in float64, and round its weights to bfloat16 numbers. The weights keep their dtype."""
    generator = torch.Generator().manual_seed(seed)
    hidden = model.config.hidden_size
    Q_HH = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator, dtype=torch.float64))[0]

    def set_weight(layer: Any, weight: Tensor) -> None:
        layer.weight.data = weight.bfloat16().to(layer.weight.dtype)

    def folded(norm: Any) -> Tensor:
        weight_H = norm.weight.double().clone()
        norm.weight.data.fill_(1)
        return weight_H

    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            weight_H = folded(norm)
            for layer in readers:
                set_weight(layer, (layer.weight.double() * weight_H) @ Q_HH)
        for layer in (attention.o_proj, mlp.down_proj):
            set_weight(layer, Q_HH.T @ layer.weight.double())
    last_H = folded(model.model.norm)
    matrix_HH = (Q_HH.T * last_H) @ Q_HH
    model.model.norm = RotatedNorm(model.model.norm, matrix_HH.to(model.model.embed_tokens.weight.dtype))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    head_VH = model.lm_head.weight.double() @ Q_HH
    set_weight(model.model.embed_tokens, model.model.embed_tokens.weight.double() @ Q_HH)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    else:
        set_weight(model.lm_head, head_VH)
