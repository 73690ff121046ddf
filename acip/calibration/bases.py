"""The basis of each layer's directions: gathered, solved, kept (paper 2.2.1).

    W = U V,  U_MK orthonormal,  V_KN = U^T W,  K = min(M, N)

is exact for every basis U of W's column space; the basis decides what a prefix of the directions is worth:

* `svd`: left singular vectors of W (the paper).
* `covariance`: eigenvectors of W C W^T, C = mean of x x^T over the layer's inputs. Every prefix is then the best layer of
  its rank for the calibration activations (the optimum that SVD-LLM reaches by whitening, without its inverse).

What makes it fast: W C W^T is the second moment of the outputs y = W x, so a layer with fewer outputs than inputs gathers
the small matrix and needs no product; a layer with more outputs is solved for R of W = Q R, which is small too; one thread
solves one layer; float32 eigenvectors do, an error in them counts by its square.
`accuracy` measures it all against float64.

Legend: M = out features, N = in features, n = M or N, S = samples (tokens), b = layers in one stack.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acip.calibration.activation_covariance import Feed, activation_covariances, covariance_matrix_bytes, feed_tokens, grouped, probe
from acip.calibration.basis_cache import BasisCache, basis_keys
from acip.errors import BaseModelError
from acip.layers import sharding
from acip.layers.targets import weight_MN
from acip.modeling_acip import widened
from acip.recipe import Recipe
from acip.utils.threads import one_thread_each

RIDGE = 1e-6  # of C's mean energy: directions without energy get the order of the plain SVD instead of an arbitrary one
REACH = 1e-6  # of the largest eigenvalue: what lies below has no certain order in float32
ORTHONORMAL = 1e-4  # is what directions have to be before they are rounded to 16 bit, to 4e-3
STACK = 2**27  # numbers in the stacks that a GPU solves at once


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
) -> Iterator[tuple[str, Tensor]]:
    """(name, directions_KM) of each of `linears`: orthonormal rows, most important first, in no promised order of layers.

    They come on the weight's device and in its dtype. `model` must not change until the last one: layers are gathered in groups whose
    covariances take at most `covariance_bytes` (or in groups of one layer), in one forward pass per group over the first
    `recipe.sample_windows` of `windows`. Bases that `cache` holds are not computed.

    Under torch.distributed each rank feeds its share of the windows and solves its share of the layers; all ranks get the
    same directions, and rank 0 keeps the cache. BaseModelError for a layer that is never called on this text.
    """
    rank = sharding.rank()
    samples = None
    if recipe.basis == "covariance":
        if windows is None:
            raise BaseModelError("the covariance basis needs calibration text: pass `windows`, or set basis to 'svd'.")
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
        if samples is not None:
            C = activation_covariances(model, layers, samples, feed, calls=Counter(name for name, _ in trace))
            if idle := [name for name in layers if name not in C]:
                raise BaseModelError(
                    f"{len(idle)} layers are never called on this text, {idle[0]} among them, so nothing can be learned about "
                    "them: another modality's tower, or cross-attention, perhaps. Put a part of their names into exclude."
                )

        def keep(name: str, directions_KM: Tensor) -> None:
            nonlocal done
            if cache and rank == 0:
                cache.put(keys[name], directions_KM)
            progress(done := done + 1, len(linears))

        solved = solve(layers, C, keep)
        C.clear()
        yield from solved.items()


# ---- solving


@torch.no_grad()
def basis(W_MN: Tensor, C_nn: Tensor | None = None) -> Tensor:
    """U_MK, orthonormal, spanning W's columns, most important direction first; also for a stack W [b, M, N], C [b, n, n].

    `C_nn` is the second moment of the inputs [N, N], or, for M < N, of the outputs [M, M]; None = the SVD's basis.
    For M > N, W = Q R and U = Q Z with the eigenvectors Z of R C R^T: orthonormal, however C is conditioned.

    Eigenvectors come in float32, unless half of the energies are out of its reach (massive activations, fewer samples than
    features); in float64 then, and for float64 weights. The result is float32, or float64 like the weight.
    """
    exact, half = W_MN.dtype == torch.float64, W_MN.dtype.itemsize == 2
    Q, R = _factors(widened(W_MN), half)
    values, Z = torch.linalg.eigh(_energy(R, C_nn, R.dtype))
    if not exact and not bool((values[..., values.shape[-1] // 2] > REACH * values[..., -1]).all()):
        Z = torch.linalg.eigh(_energy(R, C_nn, torch.float64)).eigenvectors
    U = Z.flip(-1).to(R.dtype)
    return U if Q is None else Q(U)


def _factors(W_MN: Tensor, coarse: bool) -> tuple[Callable[[Tensor], Tensor] | None, Tensor]:
    """W = Q R with orthonormal columns in Q and R [N, N], for M > N; Q as the product with it. Else None and W.

    `coarse` tries Cholesky factors of W^T W, half the work: Q is orthonormal to ORTHONORMAL for all but ill-conditioned weights.
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
    """R C R^T [K, K] in `dtype`. It is summed in float64: it can cancel where R avoids what has the most energy."""
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
    linears: Mapping[str, nn.Module], C: Mapping[str, Tensor], keep: Callable[[str, Tensor], None] = lambda name, directions: None
) -> dict[str, Tensor]:
    """directions_KM of each layer for its moments `C` (none = the SVD's); `keep(name, directions_KM)` gets each at once.

    On a GPU layers of one shape are solved in stacks, on the CPU each by one of as many threads as torch uses.
    """
    rank, size = sharding.rank(), sharding.workers()
    weights: dict[str, Tensor] = {}
    for i, (name, layer) in enumerate(linears.items()):
        W_MN = sharding.read(weight_MN(layer))  # all ranks take part
        if i % size == rank:
            weights[name] = W_MN
    kept: dict[str, Tensor] = {}

    def of_stack(names: list[str]) -> list[Tensor]:
        W = torch.stack([weights[name] for name in names])
        U = basis(W, torch.stack([C[name] for name in names]) if C else None)
        return list(U.mT.to(W.dtype).contiguous())

    with one_thread_each() as pool:
        stacks = _stacks(weights)
        gpu = any(W_MN.is_cuda for W_MN in weights.values())
        results = map(of_stack, stacks) if gpu else pool.map(of_stack, stacks)
        for names, stack in zip(stacks, results, strict=True):
            for name, directions in zip(names, stack, strict=True):
                kept[name] = directions
                if size == 1:
                    keep(name, directions)
    if size > 1:
        for i, (name, layer) in enumerate(linears.items()):
            kept[name] = _broadcast(kept.get(name), layer, i % size)
            keep(name, kept[name])
    return {name: kept[name] for name in linears}


def _stacks(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """Names by equal device, dtype and shape, in stacks of at most STACK numbers; one by one on the CPU."""
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
    """Energies are shares of tr(W C W^T), all of the layer's."""

    orthonormality: float  # largest entry of |U^T U - 1|
    optimum: Tensor  # [K], the least error of rank 1 .. K, tr((W - W_r) C (W - W_r)^T)
    excess: Tensor  # [K], the error of W_r = U_r U_r^T W above that


@torch.no_grad()
def accuracy(W_MN: Tensor, C_nn: Tensor | None, directions_KM: Tensor) -> Accuracy:
    """How good `directions_KM` are, in float64; `C_nn` as for `basis`."""
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
    """The owner's directions, on the layer's device; as bytes, which every backend carries."""
    device = weight_MN(layer).device
    if directions_KM is None:
        directions_KM = torch.empty(_shape_KM(layer), dtype=weight_MN(layer).dtype, device=device)
    directions_KM = directions_KM.to(device)
    if sharding.workers() > 1:
        dist.broadcast(directions_KM.view(torch.uint8), owner)
    return directions_KM
