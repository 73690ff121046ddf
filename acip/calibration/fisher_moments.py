"""Second moments of activations and of gradients, from which the Fisher basis is computed, in one forward and backward pass per window.

The loss is the negative log likelihood of classes that are drawn from the model's own predictions, so that a change dW of a layer moves
the predictions, to second order, by KL = 1/2 mean over tokens of (g^T dW x)^2, with the input x and the gradient g at the output of the
layer (acip.coding.statistics). The statistics of codes come from the same passes, and both can be summed in one (`FisherMoments`).

Legend: M = out features, N = in features, n = the smaller one, S = samples (tokens), V = classes.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from acip.calibration.activation_covariance import Feed, MomentSums, add_outer, complete, feed_tokens
from acip.calibration.losses import sampled_loss
from acip.calibration.training_mode import frozen
from acip.errors import BaseModelError
from acip.layers import sharding
from acip.layers.targets import hooked, weight_MN
from acip.modeling_acip import accumulation_dtype, widened


def fisher_moments(
    model: nn.Module, linears: Mapping[str, nn.Module], windows: Tensor, feed: Feed = feed_tokens, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the second moments of activations (those of `activation_covariances`) and of gradients, per layer.

    The moment of gradients is the sum of g g^T [M, M] over tokens, or of (W^T g)(W^T g)^T [N, N] if the layer has more outputs than inputs.
    There is one forward and backward pass per window. Classes are drawn with `seed`. The matrices are in the accumulation dtype.
    `feed(model, windows[i:j])` runs a model on other inputs and returns its logits [..., V], or an object that has them. A layer that is
    never called, or that the loss does not depend on, is missing in the results (with several workers, its gradients are zero). Raises
    BaseModelError if `feed` returns no logits, and CalibrationError if they are not finite.
    """
    moments = FisherMoments(linears)
    rank, size = sharding.rank(), sharding.workers()
    with frozen(model), torch.enable_grad():
        for i in range(0, len(windows), size):  # layers of a sharded model are gathered by all workers together, also for the last window
            window = min(i + rank, len(windows) - 1)
            with moments.summed(counts=i + rank == window):
                logits_SV = _logits(model, windows[window][None].to(next(model.parameters()).device), feed)
                loss = sampled_loss(logits_SV, window, seed)
                if loss.requires_grad:  # false if no layer was called
                    loss.backward()
    return moments.results(windows.numel())


class FisherMoments:
    """The sums of all layers over the forward and backward passes in the contexts `summed`."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self.linears, self.activations, self.gradients = linears, MomentSums(linears, ends=False), dict[str, Tensor]()
        for name, layer in linears.items() if sharding.workers() > 1 else ():  # all workers sum the same matrices
            W_MN = weight_MN(layer)
            n = min(W_MN.shape)
            self.gradients[name] = torch.zeros(n, n, dtype=accumulation_dtype(W_MN.dtype), device=sharding.device())

    @contextmanager
    def summed(self, counts: bool = True) -> Iterator[None]:
        """Add the passes in this context to the sums, if it `counts`."""
        self.activations.start(counts)
        # the hooks for gradients replace inputs, by which layers with the same input are recognized, so they come second
        with self.activations.hooks(), _hooks(self.linears, self.gradients if counts else {}):
            try:
                yield
            finally:
                self.activations.last = None  # it would keep the graph of a pass in memory

    def results(self, tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the two results of `fisher_moments` for sums over this number of tokens, summed over all workers."""
        for each in self.gradients.values():
            if sharding.workers() > 1:
                dist.all_reduce(each)
            complete(each)
        return self.activations.means(tokens), self.gradients


@contextmanager
def gradient_sums(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that holds, at the end of the context, the moments of gradients of `fisher_moments` from the backward passes in it."""
    sums: dict[str, Tensor] = {}
    with _hooks(linears, sums):
        yield sums
    for each in sums.values():
        complete(each)


def _hooks(linears: Mapping[str, nn.Module], sums: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Add the moments of gradients, as lower triangles, to `sums` in the backward passes in this context."""
    return hooked(_hook(name, layer, sums) for name, layer in linears.items())


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
        if name not in sums:
            sums[name] = g_Sn.new_zeros(g_Sn.shape[1], g_Sn.shape[1])
        add_outer(sums[name], g_Sn)

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
