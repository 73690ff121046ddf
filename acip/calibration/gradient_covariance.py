"""Second moments of gradients at the outputs of layers, from which the Fisher basis is computed together with those of activations.

The loss is the negative log likelihood of classes that are drawn from the model's own predictions, so that a change dW of a layer moves
the predictions, to second order, by KL = 1/2 mean over tokens of (g^T dW x)^2, with the input x and the gradient g at the output of the
layer (acip.coding.statistics).

Legend: M = out features, N = in features, n = the smaller one, S = samples (tokens), V = classes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from acip.calibration.activation_covariance import Feed, feed_tokens
from acip.calibration.losses import DrawnTokens, sampled_loss
from acip.calibration.training_mode import frozen
from acip.errors import BaseModelError
from acip.layers import sharding
from acip.layers.targets import hooked, weight_MN
from acip.modeling_acip import accumulation_dtype, widened


def gradient_covariances(
    model: nn.Module, linears: Mapping[str, nn.Module], windows: Tensor, feed: Feed = feed_tokens, seed: int = 0
) -> dict[str, Tensor]:
    """Return the sum of g g^T [M, M] over tokens per layer, or of (W^T g)(W^T g)^T [N, N] if the layer has more outputs than inputs.

    There is one backward pass per window. Classes are drawn with `seed`. The matrices are in the accumulation dtype. `feed(model,
    windows[i:j])` runs a model on other inputs and returns its logits [..., V], or an object that has them. A layer that the loss does
    not depend on is missing in the result. Raises BaseModelError if `feed` returns no logits.
    """
    sums: dict[str, Tensor] = {}
    rank, size = sharding.rank(), sharding.workers()
    for name, layer in linears.items() if size > 1 else ():
        W_MN = weight_MN(layer)
        sums[name] = torch.zeros(min(W_MN.shape), min(W_MN.shape), dtype=accumulation_dtype(W_MN.dtype), device=sharding.device())
    with frozen(model), torch.enable_grad():
        for i in range(0, len(windows), size):  # layers of a sharded model are gathered by all workers together, also for the last window
            window = min(i + rank, len(windows) - 1)
            counted = sums if i + rank == window else {}
            with hooked(_hook(name, layer, counted) for name, layer in linears.items()):
                logits_SV = _logits(model, windows[window][None].to(next(model.parameters()).device), feed)
                loss = loss_of(window, logits_SV, seed)
                if loss.requires_grad:  # false if no layer was called
                    loss.backward()
    for each in sums.values() if size > 1 else ():
        dist.all_reduce(each)
    return sums


@contextmanager
def gradient_sums(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that receives the matrices of `gradient_covariances` from the backward passes in the context."""
    sums: dict[str, Tensor] = {}
    with hooked(_hook(name, layer, sums) for name, layer in linears.items()):
        yield sums


def loss_of(window: int, logits_SV: Tensor, seed: int) -> Tensor:
    """Return the loss of a window, given its number, for `gradient_covariances`. It is the same for every number of workers."""
    return sampled_loss(logits_SV, DrawnTokens(seed * 1_000_003 + window))


def _logits(model: nn.Module, batch: Tensor, feed: Feed) -> Tensor:
    """Return the logits [S, V] of a batch."""
    out: Any = model(input_ids=batch, use_cache=False) if feed is feed_tokens else feed(model, batch)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor):
        raise BaseModelError(
            f"the Fisher basis needs the logits of the model, and feed returned {type(out).__name__}. Return the logits, or an object "
            "that has them, or set basis to 'covariance'."
        )
    return logits.reshape(-1, logits.shape[-1])


def _hook(name: str, layer: nn.Module, sums: dict[str, Tensor]) -> RemovableHandle:
    """Add the gradients at the layer's outputs, or at its inputs if there are fewer of them, to `sums` in each backward pass."""
    M, N = weight_MN(layer).shape

    def add(gradient: Tensor) -> None:
        g_Sn = widened(gradient.reshape(-1, gradient.shape[-1]))
        if name in sums:
            sums[name].addmm_(g_Sn.T, g_Sn)
        else:
            sums[name] = g_Sn.T @ g_Sn

    def of_input(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()  # layers with the same input have different gradients
        own.register_hook(add)
        return (own, *args[1:])

    def of_output(_layer: nn.Module, _args: Any, out: Tensor) -> None:
        if not out.requires_grad:  # the first layers of a frozen model
            out.requires_grad_()
        out.register_hook(add)

    return layer.register_forward_pre_hook(of_input) if M > N else layer.register_forward_hook(of_output)
