"""Find the layers of a model that can be compressed, and those that are parametrized."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from acip.errors import BaseModelError
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.modeling_acip import weight_MN


def targets(model: nn.Module) -> dict[str, SVDLinear | ElasticLinear]:
    """Return the parametrized layers of `model` by their dotted names, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear | ElasticLinear)}


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove these hooks at the end of the block."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_linears(model: nn.Module, exclude: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """Return the linear layers inside the model's blocks (the elements of its ModuleLists) by their dotted names.

    Embeddings and heads are outside of blocks. Routers of experts are skipped, and so are layers whose name contains an element of
    `exclude`. Raises BaseModelError for layers that can't be compressed: quantized weights, experts fused into one tensor, and
    subclasses of nn.Linear that do not compute W x + b.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise _quantized(type(model).__name__)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = tuple(f"{name}.{i}." for name, module in lists for i in range(len(module)))
    inside = {name: module for name, module in model.named_modules() if name.startswith(blocks)}
    experts = {name: len(weight) for name, module in inside.items() if (weight := _fused(name, module)) is not None}
    linears: dict[str, nn.Module] = {}
    for name, module in inside.items():
        if any(part in name for part in exclude):
            continue
        if name in experts:
            raise BaseModelError(
                f"{name} stores the weights of its experts fused into one tensor, which can't be compressed. "
                f"Set exclude to {[name.rpartition('.')[2], *exclude]} to compress only the other layers."
            )
        if _is_quantized(module):
            raise _quantized(name)
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if any(name.startswith(e.rpartition(".")[0] + ".") and len(weight_MN(module)) in (1, count) for e, count in experts.items()):
            continue  # a router, or the gate of a shared expert
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear and not _computes_Wx(module):
            raise BaseModelError(
                f"layer {name} is a {type(module).__name__}, which does not compute W x + b. "
                f"Set exclude to {[name.rpartition('.')[2], *exclude]} to leave it unchanged."
            )
        linears[name] = module
    if not linears:
        raise BaseModelError(
            f"{type(model).__name__} has no linear layers inside repeated blocks"
            + (f" that exclude = {list(exclude)} does not skip; shorten exclude." if exclude else ", so there is nothing to compress.")
        )
    return linears


def require_matches(model: nn.Module, exclude: tuple[str, ...]) -> None:
    """Raise BaseModelError if an element of `exclude` is in no module's name: with a misspelled one, its layers would be compressed."""
    matching = with_matches(model, exclude)
    if unmatched := [part for part in exclude if part not in matching]:
        found = dict.fromkeys(name.rpartition(".")[2] for name in find_linears(model, matching))
        raise BaseModelError(
            f"exclude has {unmatched[0]!r}, but no module of {type(model).__name__} has this in its name. The names of its linear layers "
            f"end with {', '.join(found)}. Correct {unmatched[0]!r}, or remove it."
        )


def with_matches(model: nn.Module, exclude: tuple[str, ...]) -> tuple[str, ...]:
    """Return the elements of `exclude` that are in the name of a module."""
    names = [name for name, _ in model.named_modules() if name]
    return tuple(part for part in exclude if any(part in name for name in names))


def _fused(name: str, module: nn.Module) -> Tensor | None:
    """Return a fused weight of several experts: [experts, M, N], or [experts * M, N] in a module called experts. Else None."""
    if isinstance(module, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    own = (weight for weight in module.parameters(recurse=False) if weight.ndim > 1 and min(weight.shape) > 1)
    return next((weight for weight in own if weight.ndim == 3 or "experts" in name), None)


def _is_quantized(module: nn.Module) -> bool:
    """Return whether a module's weights are integers, 8-bit floats, or of a special tensor class."""
    own = [tensor for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if tensor.ndim > 1]
    packed = any(tensor.dtype == torch.int32 or (tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool) for tensor in own)
    return packed or (isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter)


def _quantized(name: str) -> BaseModelError:
    return BaseModelError(f"{name} is already quantized, and quantized weights can't be parametrized. Load the base model in 16 or 32 bit.")


@torch.no_grad()
def _computes_Wx(layer: nn.Linear) -> bool:
    """Return whether a subclass of nn.Linear (for example Falcon's) computes W x + b."""
    x_1N = torch.linspace(-1, 1, layer.weight.shape[1], dtype=layer.weight.dtype, device=layer.weight.device)[None]
    expected = F.linear(x_1N, layer.weight, layer.bias)
    try:
        return bool((layer(x_1N) - expected).norm() <= 0.01 * expected.norm())
    except RuntimeError:  # incompatible shapes
        return False
