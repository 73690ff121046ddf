"""The basis of the directions of each layer (paper 2.2.1).

    W = U V,  U_MK orthonormal,  V_KN = U^T W,  K = min(M, N)

is exact for every basis U of the column space of W. (If the basis is not orthonormal, the pseudoinverse U^+ takes the place of U^T.) The
basis decides how well a prefix of the directions approximates the layer:

* `svd`: the left singular vectors of W (the paper).
* `covariance`: the eigenvectors of W C W^T, C = mean of x x^T over the inputs of the layer. Every prefix is then the best layer of
  its rank for the calibration activations. SVD-LLM reaches the same optimum by whitening, which needs an inverse.
* `fisher`: U = G^-1/2 Z with the eigenvectors Z of G^1/2 W C W^T G^1/2, G = mean of g g^T over the gradients at the outputs. Every prefix
  is then the best layer of its rank for the model's predictions, if x and g are independent: E (g^T dW x)^2 = tr(G dW C dW^T), the
  approximation of K-FAC (Martens and Grosse, 2015, arXiv 1503.05671). U has unit columns that are not orthogonal, and V = U^+ W.

Four things make it fast. W C W^T is the second moment of the outputs y = W x, so a layer with fewer outputs than inputs sums this small
matrix and needs no product. A layer with more outputs is solved for the small R of W = Q R. Each thread solves one layer. Float32
eigenvectors suffice, since their error enters squared; `accuracy` measures it against float64.

Legend: M = out features, N = in features, n = M or N, S = samples (tokens), b = layers in one stack.
"""

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acip.calibration.activation_covariance import Feed, activation_covariances, covariance_matrix_bytes, feed_tokens, grouped, probe
from acip.calibration.basis_cache import BasisCache, basis_keys
from acip.calibration.fisher_moments import FisherMoments, fisher_moments
from acip.errors import BaseModelError
from acip.layers import sharding
from acip.layers.targets import weight_MN
from acip.modeling_acip import widened
from acip.recipe import Recipe
from acip.utils.threads import Spread, each_in_turn

RIDGE = 1e-6  # of C's mean energy, added to C: directions without energy are then ordered as by the SVD, not arbitrarily
GRADIENT_DAMPING = 0.1  # of G's mean energy, added to G: few samples leave it without rank, and it is only an approximation (QUALITY.md)
REACH = 1e-6  # of the largest eigenvalue: smaller eigenvalues have no reliable order in float32
ORTHONORMAL = 1e-4  # largest error of orthonormality before the directions are rounded to 16 bit (which adds 4e-3)
STACK = 2**27  # numbers in a stack of layers that a GPU solves at once


@torch.no_grad()
def bases(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    recipe: Recipe,
    windows: Tensor | None = None,
    feed: Feed = feed_tokens,
    cache: BasisCache | None = None,
    keys: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    covariance_bytes: int = 8 * 2**30,
    spread: Spread = each_in_turn,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, directions_KM) for each of `linears`: unit rows, most important first. The order of the layers is unspecified.

    Directions are on the device of the weight and in its dtype. `model` must not change until the last pair. Layers are processed in
    groups whose covariances take at most `covariance_bytes` (or of one layer), with one pass per group over the first
    `recipe.sample_windows` of `windows`, and its backward pass for the Fisher basis. Bases in `cache` are not computed. `spread`
    distributes the eigenproblems.

    Under torch.distributed, each rank runs its share of the windows and solves its share of the layers. All ranks get the same
    directions, and rank 0 writes the cache. Raises BaseModelError for missing windows, or a layer that is never called on this text.
    """
    rank = sharding.rank()
    samples = None
    if recipe.basis != "svd":
        if windows is None:
            raise BaseModelError(f"the {recipe.basis} basis needs calibration text. Pass `windows`, or set basis to 'svd'.")
        samples = windows[: recipe.sample_windows]
    if keys is None:
        keys = basis_keys(model, linears, recipe, windows, feed) if cache and rank == 0 else {}
    done = 0
    missing = dict(linears)
    for name, layer in linears.items() if sharding.from_first(cache is not None) else ():
        hit = cache.get(keys[name], _shape_KM(layer), weight_MN(layer).dtype) if cache and rank == 0 else None
        if sharding.from_first(hit is not None):
            progress(done := done + 1, len(linears))
            yield name, _broadcast(hit, layer, 0)
            del missing[name]
    if not missing:
        return

    trace: list[tuple[str, str]] = []
    groups = [list(missing)]
    if samples is not None and sum(map(covariance_matrix_bytes, missing.values())) > covariance_bytes:
        trace = sharding.from_first(probe(model, missing, samples, feed))
        groups = grouped(missing, trace, covariance_bytes)
    for group in groups:
        layers = {name: missing[name] for name in group}
        C: dict[str, Tensor] = {}
        G: dict[str, Tensor] = {}
        if samples is not None and recipe.basis == "fisher":
            C, G = fisher_moments(model, layers, samples, feed, recipe.seed)
            require_called(layers, C)
            require_reached(layers, G)
        elif samples is not None:
            C = activation_covariances(model, layers, samples, feed, calls=Counter(name for name, _ in trace))
            require_called(layers, C)

        def keep(name: str, directions_KM: Tensor) -> None:
            nonlocal done
            if cache and rank == 0:
                cache.put(keys[name], directions_KM)
            progress(done := done + 1, len(linears))

        solved = solve(layers, C, G, keep, spread)
        C.clear()
        G.clear()
        yield from solved.items()


@contextmanager
def fisher_bases_cached(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    recipe: Recipe,
    windows: Tensor,
    cache: BasisCache,
    spread: Spread = each_in_turn,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[int]:
    """Compute Fisher bases from passes that the caller makes for another purpose, and put them in `cache`, where `bases` finds them.

    Yields the number of bases that are computed: none that the cache holds already, and none at all if it can't hold the missing ones.

    In this context, the caller differentiates the `sampled_loss` of each of the first `recipe.sample_windows` of `windows`, with the seed
    of the recipe, as `acip.coding.statistics.layer_statistics` does. One worker holds the model, and the moments of all layers are in
    memory. Raises BaseModelError if a layer is never called, or if the loss does not depend on one.
    """
    samples = windows[: recipe.sample_windows]
    keys = basis_keys(model, linears, recipe, samples)
    missing = {name: layer for name, layer in linears.items() if not cache.holds([keys[name]])}
    if not missing or not cache.has_room(sum(math.prod(_shape_KM(layer)) * weight_MN(layer).itemsize for layer in missing.values())):
        yield 0
        return
    moments = FisherMoments(missing)
    with moments.summed():
        yield len(missing)
    cache_bases(moments, samples, keys, cache, spread, progress)


def cache_bases(
    moments: FisherMoments,
    samples: Tensor,
    keys: Mapping[str, str],
    cache: BasisCache,
    spread: Spread = each_in_turn,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compute the Fisher bases of the layers of `moments`, sums over `samples`, token ids [n, T], and put them in `cache`.

    Raises BaseModelError if a layer has no moments.
    """
    C, G = moments.results(samples.numel())
    require_called(moments.linears, C)
    require_reached(moments.linears, G)
    done = 0

    def keep(name: str, directions_KM: Tensor) -> None:
        nonlocal done
        cache.put(keys[name], directions_KM)
        progress(done := done + 1, len(moments.linears))

    solve(moments.linears, C, G, keep, spread)


def require_called(layers: Iterable[str], C: Container[str]) -> None:
    """Raise BaseModelError if a layer has no second moment in `C`."""
    if uncalled := [name for name in layers if name not in C]:
        raise BaseModelError(
            f"{len(uncalled)} layers are never called on this text, for example {uncalled[0]}, so they have no basis. They may "
            "belong to another modality or to cross-attention. Add a part of their names to exclude."
        )


def require_reached(layers: Iterable[str], G: Container[str]) -> None:
    """Raise BaseModelError if a layer has no second moment of gradients in `G`."""
    if unreached := [name for name in layers if name not in G]:
        raise BaseModelError(
            f"the loss does not depend on {len(unreached)} layers, for example {unreached[0]}, so they have no Fisher basis. "
            "Add a part of their names to exclude, or set basis to 'covariance'."
        )


# ---- solving


@torch.no_grad()
def basis(W_MN: Tensor, C_nn: Tensor | None = None) -> Tensor:
    """Return U_MK, an orthonormal basis of the columns of W, most important direction first. W and C may be stacks [b, M, N], [b, n, n].

    `C_nn` is the second moment of the inputs [N, N], or, for M < N, of the outputs [M, M]; None = the basis of the SVD.
    For M > N, W = Q R and U = Q Z with the eigenvectors Z of R C R^T, which is orthonormal for every condition of C.

    Eigenvectors are computed in float32, and in float64 for float64 weights or if half of the eigenvalues are below REACH (massive
    activations, fewer samples than features). The result is float32, or float64 for float64 weights.
    """
    exact, half = W_MN.dtype == torch.float64, W_MN.dtype.itemsize == 2
    Q, R = _factors(widened(W_MN), half)
    values, Z = torch.linalg.eigh(_energy(R, C_nn, R.dtype))
    if not exact and not bool((values[..., values.shape[-1] // 2] > REACH * values[..., -1]).all()):
        Z = torch.linalg.eigh(_energy(R, C_nn, torch.float64)).eigenvectors
    U = Z.flip(-1).to(R.dtype)
    return U if Q is None else Q(U)


@torch.no_grad()
def fisher_basis(W_MN: Tensor, C_nn: Tensor, G_kk: Tensor) -> Tensor:
    """Return U_MK, a basis of the columns of W with unit columns, most important direction first. All may be stacks.

    `C_nn` is that of `basis`. `G_kk` is a multiple of the second moment of the gradients at the outputs [M, M], or, for M > N, at the
    inputs [N, N]. With Cholesky factors G = L L^T, U = L^-T Z and Z are the eigenvectors of L^T W C W^T L; for M > N, C = L L^T, U = W L Z
    and Z are the eigenvectors of L^T W^T G W L. The result is float32, or float64 for float64 weights.
    """
    W, G = W_MN.double(), G_kk.double()
    M, N = W.shape[-2:]
    tiny = torch.finfo(torch.float32).tiny
    if M <= N:
        energy = G.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(tiny)
        L = torch.linalg.cholesky(G + GRADIENT_DAMPING * energy * torch.eye(M, dtype=G.dtype, device=G.device))
        Z = _eigenvectors(L.mT @ _energy(W, C_nn, G.dtype) @ L, W_MN.dtype)
        U = torch.linalg.solve_triangular(L.mT, Z, upper=True)
    else:
        C = C_nn.double()
        ridge = RIDGE * C.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(tiny)
        L = torch.linalg.cholesky(C + ridge * torch.eye(N, dtype=C.dtype, device=C.device))
        WW = W.mT @ W
        energy = (_trace(G) / _trace(WW).clamp_min(tiny))[..., None, None].clamp_min(tiny)
        U = W @ (L @ _eigenvectors(L.mT @ (G + GRADIENT_DAMPING * energy * WW) @ L, W_MN.dtype))
    U = U / U.norm(dim=-2, keepdim=True).clamp_min(tiny)
    return U if W_MN.dtype == torch.float64 else U.float()


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def _eigenvectors(A: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the eigenvectors of A, those of the largest eigenvalues first, in float64.

    They are computed in float32, and in float64 for float64 weights or if half of the eigenvalues are below REACH.
    """
    if dtype != torch.float64:
        values, Z = torch.linalg.eigh(A.float())
        if bool((values[..., values.shape[-1] // 2] > REACH * values[..., -1]).all()):
            return Z.flip(-1).double()
    return torch.linalg.eigh(A).eigenvectors.flip(-1)


def _factors(W_MN: Tensor, coarse: bool) -> tuple[Callable[[Tensor], Tensor] | None, Tensor]:
    """Factor W = Q R for M > N, with orthonormal columns of Q and R [N, N]. Return (function x -> Q x, R); for M <= N, (None, W).

    `coarse` first tries the Cholesky factor of W^T W, which takes half of the operations. Q is then orthonormal up to ORTHONORMAL,
    except for ill-conditioned weights, which take the QR decomposition.
    """
    M, N = W_MN.shape[-2:]
    if M <= N:
        return None, W_MN
    if coarse:
        L_NN, failed = torch.linalg.cholesky_ex(W_MN.mT @ W_MN)
        generator = torch.Generator(L_NN.device).manual_seed(0)
        z_N8 = torch.randn(*L_NN.shape[:-1], 8, generator=generator, dtype=L_NN.dtype, device=L_NN.device)

        def Q(x: Tensor) -> Tensor:
            return W_MN @ torch.linalg.solve_triangular(L_NN.mT, x, upper=True)

        if not failed.any():
            off_N8 = torch.linalg.solve_triangular(L_NN, W_MN.mT @ Q(z_N8), upper=False) - z_N8  # (Q^T Q - 1) z
            if bool((off_N8.norm(dim=(-2, -1)) < ORTHONORMAL * z_N8.norm(dim=(-2, -1))).all()):
                return Q, L_NN.mT
    Q_MN, R_NN = torch.linalg.qr(W_MN)
    return lambda x: Q_MN @ x, R_NN


def _energy(R_KN: Tensor, C_nn: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return R C R^T [K, K] in `dtype`. The sum is in float64: it can cancel if R is nearly orthogonal to the largest eigenvectors of C."""
    R = R_KN.to(dtype)
    if C_nn is None:
        return R @ R.mT
    C = C_nn.double()
    ridge = RIDGE * C.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)[..., None, None]
    if C.shape[-1] == R.shape[-1]:
        R = R.double()
        return (R @ (C + ridge * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)) @ R.mT).to(dtype)
    if dtype == torch.float64:
        G = R @ R.mT
        C = C + ridge / G.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(torch.finfo(torch.float32).tiny) * G
    return C.to(dtype)


def solve(
    linears: Mapping[str, nn.Module],
    C: Mapping[str, Tensor],
    G: Mapping[str, Tensor] | None = None,
    keep: Callable[[str, Tensor], None] = lambda name, directions: None,
    spread: Spread = each_in_turn,
) -> dict[str, Tensor]:
    """Return directions_KM of each layer for its second moments in `C` (empty = the SVD) and `G` (empty = the covariance basis).

    `keep(name, directions_KM)` is called for each.

    On a GPU, layers of equal shape are solved in stacks. On a CPU, each layer is solved by one of as many threads as torch uses. `spread`
    distributes the stacks, if one worker holds the model.
    """
    rank, size = sharding.rank(), sharding.workers()
    weights: dict[str, Tensor] = {}
    for i, (name, layer) in enumerate(linears.items()):
        W_MN = sharding.read(weight_MN(layer))  # a collective operation of all ranks
        if i % size == rank:
            weights[name] = W_MN
    kept: dict[str, Tensor] = {}

    def items() -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        for names in stacks:
            moments = (torch.stack([each[name] for name in names]) if each else None for each in (C, G))
            yield torch.stack([weights[name] for name in names]), *moments  # type: ignore[misc]

    stacks = _stacks(weights)
    device = next((W_MN.device for W_MN in weights.values()), torch.device("cpu"))
    threads = 0 if device.type == "cpu" else 1
    results = (spread if size == 1 else each_in_turn)(partial(_directions, device=device), items(), threads=threads)
    for names, stack in zip(stacks, results, strict=True):
        for name, directions in zip(names, stack.to(device), strict=True):
            kept[name] = directions
            if size == 1:
                keep(name, directions)
    if size > 1:
        for i, (name, layer) in enumerate(linears.items()):
            kept[name] = _broadcast(kept.get(name), layer, i % size)
            keep(name, kept[name])
    return {name: kept[name] for name in linears}


@torch.no_grad()
def _directions(item: tuple[Tensor, Tensor | None, Tensor | None], device: torch.device) -> Tensor:
    """Return the directions [b, K, M] of a stack of weights [b, M, N] and second moments, computed on `device`."""
    W_bMN, C_bnn, G_bkk = item
    if C_bnn is None or G_bkk is None:
        U_bMK = basis(W_bMN.to(device), None if C_bnn is None else C_bnn.to(device))
    else:
        U_bMK = fisher_basis(W_bMN.to(device), C_bnn.to(device), G_bkk.to(device))
    return U_bMK.mT.to(W_bMN.dtype).contiguous()


def _stacks(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """Group names by device, dtype and shape into stacks of at most STACK numbers; on a CPU, into stacks of one."""
    stacks: list[list[str]] = []
    open_: dict[Any, list[str]] = {}
    for name, W in weights.items():
        kind = (W.device, W.dtype, W.shape)
        stack = open_.get(kind)
        if not W.is_cuda or stack is None or (len(stack) + 1) * max(W.shape) ** 2 > STACK:
            stack = open_[kind] = []
            stacks.append(stack)
        stack.append(name)
    return stacks


def _shape_KM(layer: nn.Module) -> tuple[int, int]:
    M, N = weight_MN(layer).shape
    return min(M, N), M


class Accuracy(NamedTuple):
    """The accuracy of a basis. Errors are shares of tr(W C W^T), the whole energy of the layer."""

    orthonormality: float  # largest entry of |U^T U - 1|
    optimum: Tensor  # [K], the least possible error of rank 1 .. K, tr((W - W_r) C (W - W_r)^T)
    excess: Tensor  # [K], the error of W_r = U_r U_r^T W minus the optimum


@torch.no_grad()
def accuracy(W_MN: Tensor, C_nn: Tensor | None, directions_KM: Tensor) -> Accuracy:
    """Measure the accuracy of `directions_KM` in float64. `C_nn` is that of `basis`."""
    W, U = W_MN.double(), directions_KM.double().T
    A = W @ W.T if C_nn is None else C_nn.double()
    if C_nn is not None and len(C_nn) == W.shape[1]:
        A = W @ A @ W.T
    K = U.shape[1]
    optimum = torch.linalg.eigvalsh(A)[-K:].clamp_min(0).cumsum(0).flip(0)
    G, H = U.T @ U, U.T @ A @ U
    error = A.trace() - 2 * H.diagonal().cumsum(0) + (G * H).cumsum(0).cumsum(1).diagonal()
    optimum = torch.cat([optimum[1:], optimum.new_zeros(1)])
    off = G - torch.eye(K, dtype=G.dtype, device=G.device)
    return Accuracy(float(off.abs().max()), optimum / A.trace(), (error - optimum) / A.trace())


def _broadcast(directions_KM: Tensor | None, layer: nn.Module, owner: int) -> Tensor:
    """Return the directions of rank `owner` on the device of the layer. They are sent as bytes, which every backend supports."""
    device = weight_MN(layer).device
    if directions_KM is None:
        directions_KM = torch.empty(_shape_KM(layer), dtype=weight_MN(layer).dtype, device=device)
    directions_KM = directions_KM.to(device)
    if sharding.workers() > 1:
        dist.broadcast(directions_KM.view(torch.uint8), owner)
    return directions_KM
