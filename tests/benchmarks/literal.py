"""A literal implementation of the paper's algorithm: the baseline of calibration.py, written from the paper's description alone.

This file does not import `acip`, and has no optimizations. Layers are decomposed one after the other. Pruned directions are still
multiplied. Each step loops over the layers, waits for each layer's count of live directions, and clones its scores.
tests/acip/calibration/test_literal_baseline.py checks that it reproduces the recorded run.

    y = U diag(g(p)) V x + alpha / R B A x + b        loss = cross-entropy + lambda * sum of relu(p)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Batches(Protocol):
    def __getitem__(self, i: int, /) -> Tensor: ...


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Gate(torch.autograd.Function):
    """The gate g(p): scale * 1[p > 0] in the forward pass, the gradient of relu(p) in the backward pass."""

    @staticmethod
    def forward(ctx: Any, p_K: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(p_K)
        return (p_K > 0).to(dtype) * scale  # the product of a bool and a float would be float32

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None, None]:
        (p_K,) = ctx.saved_tensors
        return grad_K.to(p_K.dtype) * (p_K > 0), None, None


class LiteralLinear(nn.Module):
    """A linear layer as U diag(g(p)) V with a LoRA adapter beside it. Masks and adapters are float32, or float64 in a float64 model."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, scale: float) -> None:
        super().__init__()
        W_MN = linear.weight.detach()
        (M, N), dtype = W_MN.shape, W_MN.dtype
        trained: Any = {"dtype": wide(dtype), "device": W_MN.device}
        U_MK = torch.linalg.svd(W_MN.to(wide(dtype)), full_matrices=False).U / math.sqrt(scale)
        self.register_buffer("U", U_MK.to(dtype).contiguous())
        self.register_buffer("V", (U_MK.T @ W_MN.to(wide(dtype))).to(dtype).contiguous())
        self.U: Tensor
        self.V: Tensor
        self.bias = linear.bias
        self.mask_scale, self.lora_scale = scale, alpha / rank
        self.p = nn.Parameter(torch.full((U_MK.shape[1],), scale, **trained))
        self.A = nn.Parameter(torch.empty(rank, N, **trained))
        self.B = nn.Parameter(torch.zeros(M, rank, **trained))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.V) * Gate.apply(self.p, self.mask_scale, x.dtype)
        adapter = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return F.linear(h, self.U, self.bias) + self.lora_scale * adapter


def parametrize(model: nn.Module, rank: int, alpha: float, scale: float = 0.02) -> dict[str, LiteralLinear]:
    """Replace every linear layer of the transformer blocks, in place. Return the new layers by name."""
    model.requires_grad_(False)
    names = [name for name, module in model.named_modules() if ".layers." in name and isinstance(module, nn.Linear)]
    layers: dict[str, LiteralLinear] = {}
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers[name] = LiteralLinear(linear, rank, alpha, scale)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])  # the original weights are freed here
    return layers


@dataclass(frozen=True)
class Step:
    phase: Literal["prune", "post_tune"]
    loss: float  # with the L1 term
    size: float  # after the step, in the paper's convention
    live: int
    lambda_: float


@dataclass(frozen=True)
class Run:
    history: list[Step]
    scores: dict[str, Tensor]
    stop_step: int


def calibrate(
    model: Callable[..., Any],
    layers: dict[str, LiteralLinear],
    batches: Batches,
    *,
    lr: float,
    lambda_: float,
    lambda_factor: float,
    lambda_interval: int,
    stop_ratio: float,
    post_tune_steps: int,
) -> Run:
    """Prune until `stop_ratio`, then train the adapters with frozen masks."""
    optimizer = torch.optim.AdamW([p for layer in layers.values() for p in (layer.p, layer.A, layer.B)], lr=lr, weight_decay=0.0)
    scores = {name: layer.p.detach().clone() for name, layer in layers.items()}
    dense = sum(layer.U.shape[0] * layer.V.shape[1] for layer in layers.values())
    device = next(iter(layers.values())).p.device
    history: list[Step] = []
    stop_step = None
    while stop_step is None or len(history) < stop_step + post_tune_steps:
        ids = batches[len(history)].to(device)
        logits = model(input_ids=ids, use_cache=False).logits  # with labels, the model would compute the loss in float32
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).to(wide(logits.dtype)), ids[:, 1:].flatten())
        for layer in layers.values():
            loss = loss + lambda_ * layer.p.relu().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if stop_step is not None:
            history.append(Step("post_tune", loss.item(), history[-1].size, history[-1].live, lambda_))
            continue
        if (len(history) + 1) % lambda_interval == 0:
            lambda_ *= lambda_factor
        stored = total_live = 0
        for name, layer in layers.items():
            scores[name] = updated(scores[name], layer.p.detach())
            M, N = layer.U.shape[0], layer.V.shape[1]
            live = int((layer.p > 0).sum().item())
            total_live += live
            stored += min(M * N, live * (M + N))
        history.append(Step("prune", loss.item(), stored / dense, total_live, lambda_))
        if stored / dense <= stop_ratio:
            stop_step = len(history)
            for layer in layers.values():
                layer.p.requires_grad_(False)
    return Run(history, scores, stop_step)


def updated(score_K: Tensor, p_K: Tensor) -> Tensor:
    """Return the new scores: the mask of live directions, -1 for those pruned in this step, one less for those pruned before."""
    new_K = score_K.clone()
    alive_K = p_K > 0
    new_K[alive_K] = p_K[alive_K]
    new_K[~alive_K & (score_K > 0)] = 0.0
    new_K[~alive_K] -= 1.0
    return new_K
