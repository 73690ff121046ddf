"""Second moments of layer inputs or outputs, from which the covariance basis is computed.

Hooks on the layers sum the moments in one pass of the calibration text through the model. The second moment of the outputs y = W x is
W C W^T. A layer with fewer outputs than inputs therefore sums this smaller matrix, unless `inputs_only` is set. Layers with the
same input tensor share one matrix.

Legend: M = out features, N = in features, n = M or N, S = samples (tokens).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from acip.layers import sharding
from acip.layers.targets import hooked, weight_MN
from acip.modeling_acip import accumulation_dtype, widened

Feed = Callable[[nn.Module, Tensor], Any]


def feed_tokens(model: nn.Module, ids_BT: Tensor) -> None:
    """Run the model on token ids [B, T], without its head if the model separates it."""
    getattr(model, "base_model", model)(input_ids=ids_BT, use_cache=False)


def of_outputs(layer: nn.Module, inputs_only: bool = False) -> bool:
    """Return whether the second moment of a layer's outputs is used: the layer has fewer outputs than inputs, and no bias."""
    M, N = weight_MN(layer).shape
    return not inputs_only and M < N and getattr(layer, "bias", None) is None


def covariance_matrix_bytes(layer: nn.Module, inputs_only: bool = False) -> int:
    """Return the bytes of the second-moment matrix of a layer."""
    M, N = weight_MN(layer).shape
    return accumulation_dtype(weight_MN(layer).dtype).itemsize * (M if of_outputs(layer, inputs_only) else N) ** 2


class _Done(Exception):  # noqa: N818
    """Ends a forward pass early: every layer of the group has been called."""


@torch.no_grad()
def activation_covariances(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    windows: Tensor,
    feed: Feed = feed_tokens,
    calls: Counter[str] | None = None,
    inputs_only: bool = False,
) -> dict[str, Tensor]:
    """Return the mean of x x^T [n, n] per layer, for its inputs x [N] or outputs x [M] (see `of_outputs`).

    There is one forward pass per window. Layers with the same input tensor (q, k, v; gate, up) share one matrix. The matrices are in the
    accumulation dtype. A layer that is never called is missing in the result. `feed(model, windows[i:j])` runs a model on other inputs,
    such as images; the matrix is then a multiple of the mean, with the same eigenvectors. `calls` is the number of calls of each layer in
    one forward pass, if known; a pass then ends after the last of them.
    """
    sums = MomentSums(linears, Counter(calls), inputs_only)
    rank, size = sharding.rank(), sharding.workers()
    with sums.hooks():
        for i in range(0, len(windows), size):  # layers of a sharded model are gathered by all workers together, also for the last window
            window = min(i + rank, len(windows) - 1)
            sums.start(counts=i + rank == window)
            with suppress(_Done):
                feed(model, windows[window][None].to(next(model.parameters()).device))
    return sums.means(windows.numel())


class MomentSums:
    """Hooks on layers that sum their second moments.

    `expected` is the number of calls of each layer in a forward pass (empty = as in the first pass). A pass ends with an exception after
    the last of them, unless `ends` is False.
    """

    def __init__(
        self, linears: Mapping[str, nn.Module], expected: Counter[str] | None = None, inputs_only: bool = False, ends: bool = True
    ) -> None:
        self.linears, self.expected, self.inputs_only, self.ends = linears, expected or Counter(), inputs_only, ends
        self.counts = True  # whether the inputs of this forward pass are summed
        self.called: Counter[str] = Counter()  # in this forward pass
        self.waiting: set[str] = set()  # layers whose calls in this pass are not complete
        self.matrices: dict[str, Tensor] = {}  # sum of x x^T, lower triangle, by owner
        self.shares: dict[str, str] = {}  # layer -> owner, the layer whose matrix it uses
        self.last: tuple[Tensor, str] | None = None  # the last input, and the first layer that got it

    def hooks(self) -> AbstractContextManager[None]:
        """Sum the moments of all forward passes in this context."""
        return hooked(self.hook(name, layer) for name, layer in self.linears.items())

    def means(self, tokens: int) -> dict[str, Tensor]:
        """Turn the sums into means over this number of tokens. Return the matrix of each layer that was called, summed over all workers."""
        matrices, shares, size = self.matrices, self.shares, sharding.workers()
        if size > 1:
            shares = {name: owner for part in sharding.from_all(shares) for name, owner in part.items()}
        for owner in sorted(set(shares.values())):
            if owner not in matrices:
                W_MN = weight_MN(self.linears[owner])
                n = W_MN.shape[0 if of_outputs(self.linears[owner], self.inputs_only) else 1]
                matrices[owner] = torch.zeros(n, n, dtype=accumulation_dtype(W_MN.dtype), device=W_MN.device)
            if size > 1:
                dist.all_reduce(matrices[owner])
            complete(matrices[owner].div_(tokens))
        return {name: matrices[shares[name]] for name in self.linears if name in shares}

    def start(self, counts: bool = True) -> None:
        """Start a forward pass, or several if passes do not end early. Inputs are summed if it `counts`."""
        self.counts = counts
        self.expected = self.expected or Counter(self.called)
        self.called.clear()
        self.waiting = set(self.linears)
        self.last = None

    def hook(self, name: str, layer: nn.Module) -> RemovableHandle:
        def on_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.last and self.last[0] is args[0]:
                self.shares.setdefault(name, self.shares[self.last[1]])
            else:
                self.last = (args[0], name)
                self.add(self.shares.setdefault(name, name), args[0])
            self.end(name)

        def on_output(_module: nn.Module, _args: Any, y: Tensor) -> None:
            self.shares[name] = name
            self.add(name, y)
            self.end(name)

        outputs = of_outputs(layer, self.inputs_only)
        return layer.register_forward_hook(on_output) if outputs else layer.register_forward_pre_hook(on_input)

    def add(self, owner: str, x: Tensor) -> None:
        if not self.counts:
            return
        x_Sn = widened(x.detach().reshape(-1, x.shape[-1]))
        if owner not in self.matrices:
            self.matrices[owner] = x_Sn.new_zeros(x_Sn.shape[1], x_Sn.shape[1])
        add_outer(self.matrices[owner], x_Sn)

    def end(self, name: str) -> None:
        self.called[name] += 1
        if self.called[name] == self.expected[name]:
            self.waiting.discard(name)
            if self.ends and not self.waiting:
                raise _Done


def add_outer(C_nn: Tensor, x_Sn: Tensor) -> None:
    """Add x^T x to the lower triangle of C, in strips from the diagonal down: little more than half of the operations."""
    n = len(C_nn)
    step = max(128, -(-n // 8))
    for i in range(0, n, step):
        C_nn[i:, i : i + step].addmm_(x_Sn[:, i:].T, x_Sn[:, i : i + step])


def complete(lower_nn: Tensor) -> Tensor:
    """Fill the upper triangle of a symmetric matrix from the lower one, in place, and return it."""
    lower_nn.tril_()
    lower_nn += lower_nn.tril(-1).T
    return lower_nn


def probe(
    model: nn.Module, linears: Mapping[str, nn.Module], windows: Tensor, feed: Feed = feed_tokens, inputs_only: bool = False
) -> list[tuple[str, str]]:
    """Run one window. Return the calls in order, as (layer, first layer with the same input tensor)."""
    trace: list[tuple[str, str]] = []
    last: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if of_outputs(linears[name], inputs_only):
                trace.append((name, name))
                return
            if not last or last[0][0] is not args[0]:
                last[:] = [(args[0], name)]
            trace.append((name, last[0][1]))

        return record

    with hooked(layer.register_forward_pre_hook(hook(name)) for name, layer in linears.items()):
        feed(model, windows[:1].to(next(model.parameters()).device))
    return trace


def grouped(linears: Mapping[str, nn.Module], trace: Sequence[tuple[str, str]], limit: int, inputs_only: bool = False) -> list[list[str]]:
    """Split the layers, in the order of their calls, into groups whose matrices take at most `limit` bytes, or of one layer."""
    shares = dict(reversed(trace))
    groups: list[list[str]] = [[]]
    used = 0
    for name in dict.fromkeys([name for name, _ in trace] + list(linears)):
        size = 0 if shares.get(name, name) in groups[-1] else covariance_matrix_bytes(linears[name], inputs_only)
        if groups[-1] and size and used + size > limit:
            groups.append([])
            used, size = 0, covariance_matrix_bytes(linears[name], inputs_only)
        groups[-1].append(name)
        used += size
    return groups
