"""Base model -> model with `SVDLinear` layers, and the exact inverse (paper 2.2.1).

    W = U V,  U_MK orthonormal,  V_KN = U^T W

is exact for every basis U of W's column space; the basis decides what a prefix of the directions is worth:

* `svd`: left singular vectors of W (the paper).
* `covariance`: eigenvectors of W C W^T, C = sum x x^T over the layer's inputs. Every prefix is then the best layer of
  its rank for the calibration activations (the optimum that SVD-LLM reaches by whitening, without its inverse).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from acip import shard
from acip.errors import BaseModelError
from acip.linear import ElasticLinear, LoRA, SVDLinear
from acip.recipe import Recipe

RIDGE = 1e-6  # of C's mean energy: directions without energy get the order of the plain SVD instead of an arbitrary one


def targets(model: nn.Module) -> dict[str, SVDLinear | ElasticLinear]:
    """The parametrised layers of `model` by their dotted names, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear | ElasticLinear)}


def find_linears(model: nn.Module, exclude: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """Every linear layer inside the model's blocks, which are the elements of its ModuleLists.

    Embeddings and heads stand outside, routers of experts are left alone, and so is what has a part of `exclude` in its
    name. BaseModelError for what can't be compressed: quantised weights, experts fused into one tensor, and subclasses
    of nn.Linear that compute something else than W x + b.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise _quantised(type(model).__name__)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = tuple(f"{name}.{i}." for name, module in lists for i in range(len(module)))
    inside = {name: module for name, module in model.named_modules() if name.startswith(blocks)}
    experts = {name: len(weight) for name, module in inside.items() if (weight := _fused(name, module)) is not None}
    found: dict[str, nn.Module] = {}
    for name, module in inside.items():
        if any(part in name for part in exclude):
            continue
        if name in experts:
            raise BaseModelError(
                f"{name} holds its experts' weights fused into one tensor, which can't be compressed. "
                f"Set exclude to {[name.rpartition('.')[2], *exclude]} to compress the other layers only."
            )
        if _is_quantised(module):
            raise _quantised(name)
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if any(name.startswith(e.rpartition(".")[0] + ".") and len(weight_MN(module)) in (1, count) for e, count in experts.items()):
            continue  # a router, or the gate of a shared expert
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear and not _computes_Wx(module):
            raise BaseModelError(
                f"layer {name} is a {type(module).__name__}, which computes something else than W x + b. "
                f"Set exclude to {[name.rpartition('.')[2], *exclude]} to leave it as it is."
            )
        found[name] = module
    if not found:
        raise BaseModelError(
            f"{type(model).__name__} has no linear layers inside repeated blocks"
            + (f" that `exclude` = {list(exclude)} leaves." if exclude else "; there is nothing to compress.")
        )
    return found


def _fused(name: str, module: nn.Module) -> Tensor | None:
    """The weights of many linear layers in one tensor: [experts, M, N], or [experts * M, N] in what calls itself experts."""
    if isinstance(module, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    own = (weight for weight in module.parameters(recurse=False) if weight.ndim > 1 and min(weight.shape) > 1)
    return next((weight for weight in own if weight.ndim == 3 or "experts" in name), None)


def _is_quantised(module: nn.Module) -> bool:
    """Weights in integers, 8-bit floats, or a tensor class of their own."""
    own = [tensor for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if tensor.ndim > 1]
    packed = any(tensor.dtype == torch.int32 or (tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool) for tensor in own)
    return packed or (isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter)


def _quantised(name: str) -> BaseModelError:
    return BaseModelError(f"{name} is quantised already, and its weights can't be parametrised. Load the base model in 16 or 32 bit.")


@torch.no_grad()
def _computes_Wx(layer: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear (Falcon's) does what nn.Linear does."""
    x_1N = torch.linspace(-1, 1, layer.weight.shape[1], dtype=layer.weight.dtype, device=layer.weight.device)[None]
    expected = F.linear(x_1N, layer.weight, layer.bias)
    try:
        return bool((layer(x_1N) - expected).norm() <= 0.01 * expected.norm())
    except RuntimeError:  # other shapes
        return False


def weight_MN(layer: nn.Module) -> Tensor:
    """The weight as [out, in]; GPT-2's Conv1D stores [in, out]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(layer, Conv1D) else weight


def feed_tokens(model: nn.Module, ids_BT: Tensor) -> None:
    """Run the blocks, and not the head where the model parts them."""
    getattr(model, "base_model", model)(input_ids=ids_BT, use_cache=False)


@torch.no_grad()
def covariances(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    windows: Tensor,
    batch_size: int = 4,
    feed: Callable[[nn.Module, Tensor], Any] = feed_tokens,
) -> dict[str, Tensor]:
    """C_NN = mean of x x^T per layer over `windows` [n, T] of token ids, float32, in one forward pass.

    Layers that are fed the same tensor (q, k, v; gate, up) share one C. `feed(model, windows[i:j])` runs a model on other
    inputs (images); C is then a multiple of the mean, which has the same eigenvectors. A layer that is never called is missing.
    """
    shared: dict[str, Tensor] = {}
    last: list[tuple[Tensor, str]] = []  # the input hooked last, and the layer that saw it first

    def hook(name: str) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if last and last[0][0] is x:
                shared.setdefault(name, shared[last[0][1]])
                return
            last[:] = [(x, name)]
            x_SN = x.reshape(-1, x.shape[-1]).float()
            C_NN = shared.setdefault(name, torch.zeros(x_SN.shape[1], x_SN.shape[1], device=x.device))
            C_NN.addmm_(x_SN.T, x_SN, alpha=1.0 / windows.numel())

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        for batch in windows.split(batch_size):
            feed(model, batch.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return shared


@torch.no_grad()
def basis(W_MN: Tensor, C_NN: Tensor | None) -> Tensor:
    """U_MK, orthonormal, spanning W's columns, most important direction first. `C_NN` None = the SVD's (float32).

    The covariance basis is solved in float64. For M > N that happens in the small space: with C = L L^T and the
    eigenvectors Q of L^T W^T W L, the columns of W L Q span the right prefixes, and QR makes them orthonormal without
    changing a span.
    """
    M, N = W_MN.shape
    if C_NN is None:
        return torch.linalg.svd(W_MN.float(), full_matrices=False).U
    W, C = W_MN.double(), C_NN.double()
    energy = C.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    C = C + RIDGE * energy * torch.eye(N, dtype=C.dtype, device=C.device)
    if M <= N:
        return torch.linalg.eigh(W @ C @ W.T).eigenvectors.flip(1)
    L, failed = torch.linalg.cholesky_ex(C)
    if failed:  # float32 rounding of C outweighs the ridge where few directions carry most of the energy
        values, vectors = torch.linalg.eigh(C)
        L = vectors * values.clamp_min(RIDGE * energy).sqrt()
    WL = W @ L
    Q = torch.linalg.eigh(WL.T @ WL).eigenvectors.flip(1)
    return torch.linalg.qr(WL @ Q).Q


def parametrise(
    model: nn.Module,
    recipe: Recipe,
    windows: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    feed: Callable[[nn.Module, Tensor], Any] = feed_tokens,
) -> dict[str, SVDLinear | ElasticLinear]:
    """Swap every target layer of `model` for an `SVDLinear` with its adapters, in place.

    `windows` [n, T] of token ids feed the covariance basis (`recipe.sample_windows` of them are used), or, for other
    models, whatever `feed(model, windows[i:j])` makes of them.
    `progress(done, total)` counts layers. The swapped model computes what the base model computes, up to rounding.
    """
    if targets(model):
        raise BaseModelError("this model is parametrised already; call restore(model) first.")
    linears = find_linears(model, recipe.exclude)
    model.requires_grad_(False)
    device = next(model.parameters()).device
    if shard.workers() > 1:
        for linear in linears.values():
            shard.shard(linear)
        device = shard.device()
        nn.Module.to(model, device)
    C: Mapping[str, Tensor] = {}
    if recipe.basis == "covariance":
        if windows is None:
            raise BaseModelError("the covariance basis needs calibration text: pass `windows`, or set basis to 'svd'.")
        C = covariances(model, linears, windows[: recipe.sample_windows], feed=feed)
        if idle := [name for name in linears if name not in C]:
            raise BaseModelError(
                f"{len(idle)} layers are never called on this text, {idle[0]} among them, so nothing can be learned about them: "
                "another modality's tower, or cross-attention, perhaps. Put a part of their names into exclude."
            )
    torch.manual_seed(recipe.seed)  # the adapters' start
    for done, (name, linear) in enumerate(linears.items(), 1):
        with shard.whole(linear):
            W_MN = weight_MN(linear)
            core = SVDLinear(linear, W_MN, basis(W_MN, C.get(name)), recipe.mask_scale, adapters(W_MN, recipe), recipe.quantise)
        for rows in (core.left, core.right):
            shard.shard(rows)
        set_module(model, name, core)
        progress(done, len(linears))
    return targets(model)


def adapters(W_MN: Tensor, recipe: Recipe) -> dict[str, LoRA]:
    """Fresh adapters for a layer, by place: beside it, or on its two factors. B is zero, so nothing changes yet."""
    (M, N), R = W_MN.shape, recipe.adapter_rank
    places = {} if not R else {"layer": (N, M)} if recipe.adapter == "layer" else {"right": (N, min(M, N)), "left": (min(M, N), M)}
    scale = recipe.adapter_alpha / max(1, R)
    return {place: LoRA(n, m, R, scale, recipe.adapter_dropout, W_MN.device) for place, (n, m) in places.items()}


def restore(model: nn.Module) -> nn.Module:
    """The inverse: every original layer back in its slot, adapters gone."""
    for name, core in targets(model).items():
        set_module(model, name, core.exact)
    return model


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
