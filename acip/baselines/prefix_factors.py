"""A layer as two factors, of which every rank is a prefix, and a model whose layers are temporarily replaced by such factors.

    W_MN ~ left_MK[:, :r] right_KN[:r],    r (M + N) stored numbers and the bias

The methods of this folder choose factors and ranks in different ways. They share this file: the rank for a size, the storage of a
model, and the replacement of layers.

Legend: M = out features, N = in features, K = min(M, N), r = kept rank; a rank of None = the original dense layer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor, nn

from acip.calibration.activation_covariance import feed_tokens
from acip.errors import BaseModelError, BudgetError
from acip.layers.targets import weight_MN
from acip.modeling_acip import LowRankLinear, bias_of, set_module
from acip.sizing.cut_table import LayerShape
from acip.utils.threads import one_thread_each

T = TypeVar("T")
Ranks = Mapping[str, int | None]
Progress = Callable[[str, int, int], None]  # (name of the stage, done, total)


@dataclass(frozen=True)
class Factors:
    """W ~ left [M, K] right [K, N], most important direction first, in the dtype of the layer."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, linear: nn.Module, left_MK: Tensor, right_KN: Tensor) -> "Factors":
        dtype = weight_MN(linear).dtype
        return cls(left_MK.to(dtype), right_KN.to(dtype))

    def at(self, linear: nn.Module, rank: int) -> LowRankLinear:
        """Return the layer at a rank, with tensors of its own."""
        return LowRankLinear(self.left[:, :rank].contiguous(), self.right[:rank].clone(), bias_of(linear))


def shape_of(name: str, linear: nn.Module) -> LayerShape:
    """Return the shape of a dense layer."""
    M, N = weight_MN(linear).shape
    return LayerShape(name, M, N, bias_of(linear) is not None)


def uniform_ranks(linears: Mapping[str, nn.Module], size: float) -> dict[str, int | None]:
    """Return the same share of every layer: the largest r with r (M + N) plus the bias within `size` of the dense layer.

    At size 1.0 the ranks are None. Raises BudgetError if a layer has no rank left.
    """
    if size == 1:
        return dict.fromkeys(linears)
    ranks: dict[str, int | None] = {}
    for name, linear in linears.items():
        shape = shape_of(name, linear)
        bias = shape.M * shape.bias
        rank = (allowed(size, shape.dense_params) - bias) // (shape.M + shape.N)
        if rank < 1:
            least = (shape.M + shape.N + bias) / shape.dense_params
            raise BudgetError(
                f"size {size!r} leaves no rank for {name} [{shape.M}, {shape.N}]; its smallest size is {math.ceil(least * 1e4) / 1e4}."
            )
        ranks[name] = rank
    return ranks


def allowed(size: float, dense: int) -> int:
    """Return how many of `dense` numbers `size` allows, by its decimal value, not its nearest double."""
    return math.floor(Fraction(repr(float(size))) * dense)


def stored_at(linears: Mapping[str, nn.Module], ranks: Ranks) -> int:
    """Return the numbers that the layers store at these ranks, including biases."""
    total = 0
    for name, linear in linears.items():
        shape, rank = shape_of(name, linear), ranks[name]
        total += shape.dense_params if rank is None else rank * (shape.M + shape.N) + shape.M * shape.bias
    return total


def stored(model: nn.Module, names: Iterable[str]) -> int:
    """Return the numbers that the layers `names` of `model` store: all their parameters, including biases."""
    return sum(param.numel() for name in names for param in model.get_submodule(name).parameters())


@contextmanager
def swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `layers` into the model, and restore the previous ones after the context."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            set_module(model, name, layer)
        yield
    finally:
        for name, layer in before.items():
            set_module(model, name, layer)


def layers_at(linears: Mapping[str, nn.Module], factors: Mapping[str, Factors], ranks: Ranks) -> dict[str, nn.Module]:
    """Return each layer at its rank."""
    return {name: linear if (rank := ranks[name]) is None else factors[name].at(linear, rank) for name, linear in linears.items()}


def on_inputs(linears: Mapping[str, nn.Module], callback: Callable[[str, Tensor], None]) -> list[torch.utils.hooks.RemovableHandle]:
    """Register hooks that call `callback(name, x_SN)` with the inputs of each layer, one row per token. Return their handles."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _layer, args: callback(name, args[0].detach().flatten(0, -2))

    return [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]


def feed(model: nn.Module, windows: Tensor, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Run the model on one window after another."""
    device = next(model.parameters()).device
    for i, window in enumerate(windows.split(1)):
        feed_tokens(model, window.long().to(device))
        progress(i + 1, len(windows))


def each(linears: Mapping[str, nn.Module], solve: Callable[[str, nn.Module], T]) -> Iterator[tuple[str, T]]:
    """Yield (name, solve(name, layer)) of every layer in order; on a CPU, several layers are solved at once."""
    if next(iter(linears.values())).weight.is_cuda:
        yield from ((name, solve(name, linear)) for name, linear in linears.items())
        return
    with one_thread_each() as pool:
        yield from zip(linears, pool.map(solve, linears.keys(), linears.values()), strict=True)


def blocks_of(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Group layers by the outermost block that contains them."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks: dict[str, list[str]] = {}
    for name in names:
        outermost = min((outer for outer in lists if name.startswith(f"{outer}.")), key=len)
        index = name.removeprefix(f"{outermost}.").partition(".")[0]
        blocks.setdefault(f"{outermost}.{index}", []).append(name)
    return blocks


def require_calls(linears: Mapping[str, nn.Module], called: Iterable[str]) -> None:
    """Raise BaseModelError if the text never reaches some of the layers."""
    called = set(called)
    if uncalled := [name for name in linears if name not in called]:
        raise BaseModelError(
            f"{len(uncalled)} layers are never called on this text, for example {uncalled[0]}, so they cannot be compressed. "
            "Use more text, or add a part of their names to exclude."
        )
