"""A layer as two factors whose every rank is a prefix, and a model whose layers are such factors for a while.

    W_MN ~ left_MK[:, :r] right_KN[:r],    r (M + N) stored numbers and the bias

The methods of this folder differ in how they choose the factors and the ranks. What they share is here: the rank that a size
leaves, what a model stores, and putting layers in place and back.

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
Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class Factors:
    """W ~ left [M, K] right [K, N], directions by importance, in the layer's dtype."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, linear: nn.Module, left_MK: Tensor, right_KN: Tensor) -> "Factors":
        dtype = weight_MN(linear).dtype
        return cls(left_MK.to(dtype), right_KN.to(dtype))

    def at(self, linear: nn.Module, rank: int) -> LowRankLinear:
        """The layer at a rank, on its own."""
        return LowRankLinear(self.left[:, :rank].contiguous(), self.right[:rank].clone(), bias_of(linear))


def shape_of(name: str, linear: nn.Module) -> LayerShape:
    M, N = weight_MN(linear).shape
    return LayerShape(name, M, N, bias_of(linear) is not None)


def uniform_ranks(linears: Mapping[str, nn.Module], size: float) -> dict[str, int | None]:
    """The same share of every layer: the largest r with r (M + N), and the bias, within `size` of the dense layer; at 1.0 dense."""
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
                f"size {size!r} leaves {name} [{shape.M}, {shape.N}] no rank; its smallest is {math.ceil(least * 1e4) / 1e4}."
            )
        ranks[name] = rank
    return ranks


def allowed(size: float, dense: int) -> int:
    """Numbers that may be stored of `dense` ones: by the decimal that was written, not its nearest double."""
    return math.floor(Fraction(repr(float(size))) * dense)


def stored_at(linears: Mapping[str, nn.Module], ranks: Ranks) -> int:
    """Numbers that layers store at these ranks, biases too."""
    total = 0
    for name, linear in linears.items():
        shape, rank = shape_of(name, linear), ranks[name]
        total += shape.dense_params if rank is None else rank * (shape.M + shape.N) + shape.M * shape.bias
    return total


def stored(model: nn.Module, names: Iterable[str]) -> int:
    """Numbers that these layers store: all their parameters, biases too."""
    return sum(param.numel() for name in names for param in model.get_submodule(name).parameters())


@contextmanager
def swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, `layers` stand in their places; then the ones that stood there before do again."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            set_module(model, name, layer)
        yield
    finally:
        for name, layer in before.items():
            set_module(model, name, layer)


def layers_at(linears: Mapping[str, nn.Module], factors: Mapping[str, Factors], ranks: Ranks) -> dict[str, nn.Module]:
    """Each layer at its rank."""
    return {name: linear if (rank := ranks[name]) is None else factors[name].at(linear, rank) for name, linear in linears.items()}


def on_inputs(linears: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that show `see(name, x_SN)` what each layer is fed, all of its tokens in rows."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _layer, args: see(name, args[0].detach().flatten(0, -2))

    return [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]


def feed(model: nn.Module, windows: Tensor, told: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Run the model on one window after the other."""
    device = next(model.parameters()).device
    for i, window in enumerate(windows.split(1)):
        feed_tokens(model, window.long().to(device))
        told(i + 1, len(windows))


def each(linears: Mapping[str, nn.Module], solve: Callable[[str, nn.Module], T]) -> Iterator[tuple[str, T]]:
    """(name, solve(name, layer)) of every layer, in order; on a CPU several at once."""
    if next(iter(linears.values())).weight.is_cuda:
        yield from ((name, solve(name, linear)) for name, linear in linears.items())
        return
    with one_thread_each() as pool:
        yield from zip(linears, pool.map(solve, linears.keys(), linears.values()), strict=True)


def blocks_of(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Layers by the outermost block that holds them."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks: dict[str, list[str]] = {}
    for name in names:
        outermost = min((outer for outer in lists if name.startswith(f"{outer}.")), key=len)
        index = name.removeprefix(f"{outermost}.").partition(".")[0]
        blocks.setdefault(f"{outermost}.{index}", []).append(name)
    return blocks


def refuse_idle(linears: Mapping[str, nn.Module], seen: Iterable[str]) -> None:
    """BaseModelError for layers that the text never reaches."""
    if idle := [name for name in linears if name not in set(seen)]:
        raise BaseModelError(
            f"{len(idle)} layers are never called on this text, {idle[0]} among them, so nothing can be learned about them. "
            "Use more text, or put a part of their names into exclude."
        )
