"""Second moments of what layers are fed, or give: what the covariance basis is made of.

Layers are hooked, and the calibration text runs through the model once. W C W^T is the second moment of the outputs y = W x, so a
layer with fewer outputs than inputs gathers that smaller matrix, unless the inputs' own is wanted (`inputs_only`). Layers that
are fed one tensor share one matrix.

Legend: M = out features, N = in features, n = M or N, S = samples (tokens).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
    """Run the blocks, and not the head where the model parts them."""
    getattr(model, "base_model", model)(input_ids=ids_BT, use_cache=False)


def of_outputs(layer: nn.Module, inputs_only: bool = False) -> bool:
    """Whether a layer's second moment is taken of its outputs: they are fewer, and Wx itself."""
    M, N = weight_MN(layer).shape
    return not inputs_only and M < N and getattr(layer, "bias", None) is None


def covariance_matrix_bytes(layer: nn.Module, inputs_only: bool = False) -> int:
    M, N = weight_MN(layer).shape
    return accumulation_dtype(weight_MN(layer).dtype).itemsize * (M if of_outputs(layer, inputs_only) else N) ** 2


class _Fed(Exception):  # noqa: N818
    """Every layer of the group has been fed: the rest of the forward pass is of no use."""


@torch.no_grad()
def activation_covariances(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    windows: Tensor,
    feed: Feed = feed_tokens,
    batch_size: int = 4,
    calls: Counter[str] | None = None,
    inputs_only: bool = False,
) -> dict[str, Tensor]:
    """The mean of x x^T per layer, x its inputs [N] or outputs [M] (see `of_outputs`), [n, n], in one forward pass.

    Layers that are fed the same tensor (q, k, v; gate, up) share one matrix. The matrices are in the accumulation dtype.
    `feed(model, windows[i:j])` runs a model on other inputs (images); the matrix is then a multiple of the mean, which has the same
    eigenvectors. A layer that is never called is missing. `calls` counts the calls of each layer in one forward pass, where that is
    known: a pass ends with the last.
    """
    gathering = _Gathering(linears, Counter(calls), inputs_only)
    rank, size = sharding.rank(), sharding.workers()
    with hooked(gathering.hook(name, layer) for name, layer in linears.items()):
        for batch in windows[rank::size].split(batch_size) if rank < len(windows) else ():
            gathering.start()
            with suppress(_Fed):
                feed(model, batch.to(next(model.parameters()).device))
    sums, shares = gathering.sums, gathering.shares
    if size > 1:
        shares = {name: owner for part in sharding.from_all(shares) for name, owner in part.items()}
    for owner in sorted(set(shares.values())):
        if owner not in sums:
            W_MN = weight_MN(linears[owner])
            n = W_MN.shape[0 if of_outputs(linears[owner], inputs_only) else 1]
            sums[owner] = torch.zeros(n, n, dtype=accumulation_dtype(W_MN.dtype), device=W_MN.device)
        if size > 1:
            dist.all_reduce(sums[owner])
        lower_nn = sums[owner].div_(windows.numel()).tril_()
        lower_nn += lower_nn.tril(-1).T
    return {name: sums[shares[name]] for name in linears if name in shares}


class _Gathering:
    """The hooks of some layers, and what they have summed up."""

    def __init__(self, linears: Mapping[str, nn.Module], expected: Counter[str], inputs_only: bool) -> None:
        self.linears, self.expected, self.inputs_only = linears, expected, inputs_only
        self.called: Counter[str] = Counter()  # in this forward pass
        self.waiting: set[str] = set()  # layers with calls to come in it
        self.sums: dict[str, Tensor] = {}  # sum of x x^T, the lower triangle
        self.shares: dict[str, str] = {}  # the layer whose matrix it is
        self.last: tuple[Tensor, str] | None = None  # the input hooked last, and the layer that saw it first

    def start(self) -> None:
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
        x_Sn = widened(x.reshape(-1, x.shape[-1]))
        if owner not in self.sums:
            self.sums[owner] = x_Sn.new_zeros(x_Sn.shape[1], x_Sn.shape[1])
        _add_outer(self.sums[owner], x_Sn)

    def end(self, name: str) -> None:
        self.called[name] += 1
        if self.called[name] == self.expected[name]:
            self.waiting.discard(name)
            if not self.waiting:
                raise _Fed


def _add_outer(C_nn: Tensor, x_Sn: Tensor) -> None:
    """C += x^T x in strips down from the diagonal: the lower triangle, for little more than half of the work."""
    n = len(C_nn)
    step = max(128, -(-n // 8))
    for i in range(0, n, step):
        C_nn[i:, i : i + step].addmm_(x_Sn[:, i:].T, x_Sn[:, i : i + step])


def probe(
    model: nn.Module, linears: Mapping[str, nn.Module], windows: Tensor, feed: Feed = feed_tokens, inputs_only: bool = False
) -> list[tuple[str, str]]:
    """The calls on one window, in their order: (layer, the layer that saw the same input first)."""
    trace: list[tuple[str, str]] = []
    last: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if of_outputs(linears[name], inputs_only):
                trace.append((name, name))
                return
            if not last or last[0][0] is not args[0]:
                last[:] = [(args[0], name)]
            trace.append((name, last[0][1]))

        return note

    with hooked(layer.register_forward_pre_hook(hook(name)) for name, layer in linears.items()):
        feed(model, windows[:1].to(next(model.parameters()).device))
    return trace


def grouped(linears: Mapping[str, nn.Module], trace: Sequence[tuple[str, str]], limit: int, inputs_only: bool = False) -> list[list[str]]:
    """Layers in the order of their calls, cut into groups whose matrices take at most `limit` bytes, or one layer."""
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
