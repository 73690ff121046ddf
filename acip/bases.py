"""The basis of each layer's directions: gathered, solved, kept (paper 2.2.1).

    W = U V,  U_MK orthonormal,  V_KN = U^T W,  K = min(M, N)

is exact for every basis U of W's column space; the basis decides what a prefix of the directions is worth:

* `svd`: left singular vectors of W (the paper).
* `covariance`: eigenvectors of W C W^T, C = mean of x x^T over the layer's inputs. Every prefix is then the best layer of
  its rank for the calibration activations (the optimum that SVD-LLM reaches by whitening, without its inverse).

What makes it fast: W C W^T is the second moment of the outputs y = W x, so a layer with fewer outputs than inputs gathers
the small matrix and needs no product; a layer with more outputs is solved for R of W = Q R, which is small too; one thread
solves one layer; 16-bit weights get their basis in float32, whose error is below that of rounding it to 16 bit.
`accuracy` measures it all against float64.

Legend: M = out features, N = in features, n = M or N, S = samples (tokens), b = layers in one stack.
"""

import hashlib
import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from acip import shard
from acip.errors import BaseModelError
from acip.recipe import Recipe

VERSION = 1  # of what a cached basis depends on; raise it where the same inputs give another basis
RIDGE = 1e-6  # of C's mean energy: directions without energy get the order of the plain SVD instead of an arbitrary one
REACH = 1e-6  # of the largest eigenvalue: what lies below has no certain order in float32
ORTHONORMAL = 1e-4  # is what directions have to be before they are rounded to 16 bit, to 4e-3
STACK = 2**27  # numbers in the stacks that a GPU solves at once
log = logging.getLogger(__name__)

Feed = Callable[[nn.Module, Tensor], Any]


def weight_MN(layer: nn.Module) -> Tensor:
    """The weight as [out, in]; GPT-2's Conv1D stores [in, out]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(layer, Conv1D) else weight


def feed_tokens(model: nn.Module, ids_BT: Tensor) -> None:
    """Run the blocks, and not the head where the model parts them."""
    getattr(model, "base_model", model)(input_ids=ids_BT, use_cache=False)


@torch.no_grad()
def bases(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    recipe: Recipe,
    windows: Tensor | None = None,
    feed: Feed = feed_tokens,
    cache: "BasisCache | None" = None,
    keys: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    covariance_bytes: int = 8 * 2**30,
) -> Iterator[tuple[str, Tensor]]:
    """(name, directions_KM) of each of `linears`: orthonormal rows, most important first, in no promised order of layers.

    They come on the weight's device, in its dtype if that has 16 bit, else in float32. `model` has to stay as it is until
    the last one: layers are gathered in groups whose covariances take at most `covariance_bytes` (of one layer at least),
    one forward pass per group over the first `recipe.sample_windows` of `windows`. What `cache` knows is not computed.

    Under torch.distributed each rank feeds its share of the windows and solves its share of the layers; all ranks get the
    same directions, and rank 0 keeps the cache. BaseModelError for a layer that is never called on this text.
    """
    rank, _ = _world()
    samples = None
    if recipe.basis == "covariance":
        if windows is None:
            raise BaseModelError("the covariance basis needs calibration text: pass `windows`, or set basis to 'svd'.")
        samples = windows[: recipe.sample_windows]
    if keys is None:
        keys = basis_keys(model, linears, recipe, windows, feed) if cache and rank == 0 else {}
    done = 0
    known: dict[str, Tensor] = {}
    for name, key in keys.items() if cache and rank == 0 else ():
        if cache and (hit := cache.get(key, _shape_KM(linears[name]), _stored(linears[name]))) is not None:
            known[name] = hit
            progress(done := done + 1, len(linears))
    found = _from_rank_0(list(known))
    for name in found:
        yield name, _broadcast(known.get(name), linears[name], 0)
    missing = {name: layer for name, layer in linears.items() if name not in set(found)}
    if not missing:
        return

    trace: list[tuple[str, str]] = []
    groups = [list(missing)]
    if samples is not None and sum(map(_moment_bytes, missing.values())) > covariance_bytes:
        trace = _from_rank_0(_probe(model, missing, samples, feed))
        groups = _grouped(missing, trace, covariance_bytes)
    for group in groups:
        layers = {name: missing[name] for name in group}
        C: dict[str, Tensor] = {}
        if samples is not None:
            C = moments(model, layers, samples, feed, calls=Counter(name for name, _ in trace))
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


# ---- gathering


def of_outputs(layer: nn.Module) -> bool:
    """Whether a layer's second moment is taken of its outputs: they are fewer, and Wx itself."""
    M, N = weight_MN(layer).shape
    return M < N and getattr(layer, "bias", None) is None


def _moment_bytes(layer: nn.Module) -> int:
    M, N = weight_MN(layer).shape
    return 4 * (M if of_outputs(layer) else N) ** 2


class _Fed(Exception):  # noqa: N818
    """Every layer of the group has been fed: the rest of the forward pass is of no use."""


@torch.no_grad()
def moments(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    windows: Tensor,
    feed: Feed = feed_tokens,
    batch_size: int = 4,
    calls: Counter[str] | None = None,
) -> dict[str, Tensor]:
    """The mean of x x^T per layer, x its inputs [N] or outputs [M] (see `of_outputs`), float32 [n, n], in one forward pass.

    Layers that are fed the same tensor (q, k, v; gate, up) share one matrix. `feed(model, windows[i:j])` runs a model on other
    inputs (images); the matrix is then a multiple of the mean, which has the same eigenvectors. A layer that is never called
    is missing. `calls` counts the calls of each layer in one forward pass, where that is known: a pass ends with the last.
    """
    rank, size = _world()
    expected = Counter(calls)
    called: Counter[str] = Counter()
    sums: dict[str, Tensor] = {}
    shares: dict[str, str] = {}  # the layer whose matrix it is
    last: list[tuple[Tensor, str]] = []  # the input hooked last, and the layer that saw it first

    def add(name: str, x: Tensor) -> None:
        x_Sn = x.reshape(-1, x.shape[-1]).float()
        if name not in sums:
            sums[name] = torch.zeros(x_Sn.shape[1], x_Sn.shape[1], device=x.device)
        _add_outer(sums[name], x_Sn)

    def end(name: str) -> None:
        called[name] += 1
        if all(0 < expected[name] <= called[name] for name in linears):
            raise _Fed

    def on_input(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if last and last[0][0] is args[0]:
                shares.setdefault(name, shares[last[0][1]])
            else:
                last[:] = [(args[0], name)]
                add(shares.setdefault(name, name), args[0])
            end(name)

        return hook

    def on_output(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, y: Tensor) -> None:
            shares[name] = name
            add(name, y)
            end(name)

        return hook

    handles = [
        layer.register_forward_hook(on_output(name)) if of_outputs(layer) else layer.register_forward_pre_hook(on_input(name))
        for name, layer in linears.items()
    ]
    try:
        for batch in windows[rank::size].split(batch_size) if rank < len(windows) else ():
            called.clear()
            with suppress(_Fed):
                feed(model, batch.to(next(model.parameters()).device))
            expected = expected or Counter(called)
    finally:
        last.clear()
        for handle in handles:
            handle.remove()
    if size > 1:
        shares = {name: owner for part in _from_all(shares) for name, owner in part.items()}
    for owner in sorted(set(shares.values())):
        if owner not in sums:
            n = weight_MN(linears[owner]).shape[0 if of_outputs(linears[owner]) else 1]
            sums[owner] = torch.zeros(n, n, device=weight_MN(linears[owner]).device)
        if size > 1:
            dist.all_reduce(sums[owner])
        lower_nn = sums[owner].div_(windows.numel()).tril_()
        lower_nn += lower_nn.tril(-1).T
    return {name: sums[shares[name]] for name in linears if name in shares}


def _add_outer(C_nn: Tensor, x_Sn: Tensor) -> None:
    """C += x^T x in strips down from the diagonal: the lower triangle, for little more than half of the work."""
    n = len(C_nn)
    step = max(128, -(-n // 8))
    for i in range(0, n, step):
        C_nn[i:, i : i + step].addmm_(x_Sn[:, i:].T, x_Sn[:, i : i + step])


def _probe(model: nn.Module, linears: Mapping[str, nn.Module], windows: Tensor, feed: Feed) -> list[tuple[str, str]]:
    """The calls on one window, in their order: (layer, the layer that saw the same input first)."""
    trace: list[tuple[str, str]] = []
    last: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if of_outputs(linears[name]):
                trace.append((name, name))
                return
            if not last or last[0][0] is not args[0]:
                last[:] = [(args[0], name)]
            trace.append((name, last[0][1]))

        return note

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in linears.items()]
    try:
        feed(model, windows[:1].to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _grouped(linears: Mapping[str, nn.Module], trace: Sequence[tuple[str, str]], limit: int) -> list[list[str]]:
    """Layers in the order of their calls, cut into groups whose matrices take at most `limit` bytes, or one layer."""
    shares = dict(reversed(trace))
    groups: list[list[str]] = [[]]
    used = 0
    for name in dict.fromkeys([name for name, _ in trace] + list(linears)):
        size = 0 if shares.get(name, name) in groups[-1] else _moment_bytes(linears[name])
        if groups[-1] and size and used + size > limit:
            groups.append([])
            used, size = 0, _moment_bytes(linears[name])
        groups[-1].append(name)
        used += size
    return groups


# ---- solving


@torch.no_grad()
def basis(W_MN: Tensor, C_nn: Tensor | None = None) -> Tensor:
    """U_MK, orthonormal, spanning W's columns, most important direction first; also for a stack W [b, M, N], C [b, n, n].

    `C_nn` is the second moment of the inputs [N, N], or, for M < N, of the outputs [M, M]; None = the SVD's basis.
    For M > N, W = Q R and U = Q Z with the eigenvectors Z of R C R^T: orthonormal, however C is conditioned.

    Eigenvectors come in float64, for 16-bit weights in float32, unless half of the energies are out of its reach (massive
    activations, fewer samples than features). The SVD of other weights is LAPACK's own, since a recorded run hangs on its
    rounding. The result is float32, or float64 like the weight.
    """
    half = W_MN.dtype.itemsize == 2
    if C_nn is None and not half:
        return torch.linalg.svd(W_MN, full_matrices=False).U
    Q, R = _factors(W_MN.float() if half else W_MN, half)
    values, Z = torch.linalg.eigh(_energy(R, C_nn, torch.float32 if half else torch.float64))
    if half and not bool((values[..., values.shape[-1] // 2] > REACH * values[..., -1]).all()):
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
    rank, size = _world()
    weights: dict[str, Tensor] = {}
    for i, (name, layer) in enumerate(linears.items()):
        W_MN = shard.read(weight_MN(layer))  # all ranks take part
        if i % size == rank:
            weights[name] = W_MN
    kept: dict[str, Tensor] = {}

    def of_stack(names: list[str]) -> list[Tensor]:
        W = torch.stack([weights[name] for name in names])
        U = basis(W, torch.stack([C[name] for name in names]) if C else None)
        return list(U.mT.to(_stored(linears[names[0]])).contiguous())

    with _workers() as pool:
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


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch uses, each with one thread of its own; torch's setting is global, and put back."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _stored(layer: nn.Module) -> torch.dtype:
    dtype = weight_MN(layer).dtype
    return dtype if dtype.itemsize == 2 else torch.float32


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


# ---- ranks


def _world() -> tuple[int, int]:
    """(rank, size) of torch.distributed, (0, 1) without it."""
    return shard.rank(), shard.workers()


def _from_rank_0(value: Any) -> Any:
    values = [value]
    if _world()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def _from_all(value: Any) -> list[Any]:
    values = [value] * _world()[1]
    dist.all_gather_object(values, value)
    return values


def _broadcast(directions_KM: Tensor | None, layer: nn.Module, owner: int) -> Tensor:
    """The owner's directions, on the layer's device; as bytes, which every backend carries."""
    device = weight_MN(layer).device
    if directions_KM is None:
        directions_KM = torch.empty(_shape_KM(layer), dtype=_stored(layer), device=device)
    directions_KM = directions_KM.to(device)
    if _world()[1] > 1:
        dist.broadcast(directions_KM.view(torch.uint8), owner)
    return directions_KM


# ---- keeping


class BasisCache:
    """Directions by the content that they were computed from: one safetensors file per layer in `folder`.

    Writers may share it: files appear whole, and equal names hold equal content. A broken file is a miss, and deleted.
    Above `limit_bytes` the files used longest ago go. Where nothing can be written, nothing is kept: a warning, no error.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._bytes: int | None = None  # in the folder, about; None = not counted yet
        self._writable = True

    def get(self, key: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        path = self._path(key)
        try:
            directions = load(path.read_bytes())["directions"]
            if (directions.shape, directions.dtype) != (shape, dtype):
                raise ValueError(f"{tuple(directions.shape)} {directions.dtype} instead of {shape} {dtype}")
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("the cached basis %s can't be read: %s", path, error)
            return None
        except (SafetensorError, KeyError, ValueError) as error:
            log.warning("the cached basis %s is broken, and computed anew: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return directions

    def put(self, key: str, directions_KM: Tensor) -> None:
        if not self._writable:
            return
        path, content = self._path(key), save({"directions": directions_KM.cpu()})
        part = path.with_name(f"{key}.{uuid.uuid4().hex}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            os.replace(part, path)
            self._make_room(len(content))
        except OSError as error:
            self._writable = False
            log.warning("bases are not kept from here on, %s can't be written: %s", self.folder, error)
            with suppress(OSError):
                part.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self, new: int) -> None:
        if self.limit_bytes is None:
            return
        if self._bytes is not None and self._bytes + new <= self.limit_bytes:
            self._bytes += new
            return
        files = []
        for path in (*self.folder.glob("*.safetensors"), *self.folder.glob("*.part")):
            with suppress(FileNotFoundError):  # another writer's
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        self._bytes = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if self._bytes <= self.limit_bytes:
                return
            with suppress(FileNotFoundError):
                path.unlink()
            self._bytes -= size


def basis_keys(
    model: nn.Module, linears: Mapping[str, nn.Module], recipe: Recipe, windows: Tensor | None, feed: Feed = feed_tokens
) -> dict[str, str]:
    """The cache's name for the basis of each layer: equal names, equal bases.

    The covariance basis of a layer depends on the model's other weights too, on the text, and on how the model is fed.
    """
    windows = windows[: recipe.sample_windows] if recipe.basis == "covariance" and windows is not None else None
    weights = {name: weight_MN(layer) for name, layer in linears.items()}
    world: dict[str, Tensor] = {}
    if windows is not None:
        world = {"windows": windows} | dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {_place(tensor): tensor for tensor in (*weights.values(), *world.values())}
    with _workers() as pool:
        hashes = dict(zip(tensors, pool.map(_hash, tensors.values()), strict=True))
    context: list[Any] = [VERSION, recipe.basis]
    if windows is not None:
        around = [(name, hashes[_place(tensor)]) for name, tensor in world.items()]
        context += [around, f"{feed.__module__}.{getattr(feed, '__qualname__', feed)}"]
    return {name: hashlib.sha256(repr((context, name, hashes[_place(weight)])).encode()).hexdigest() for name, weight in weights.items()}


def _place(tensor: Tensor) -> Any:
    """Equal for equal views of the same memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _hash(tensor: Tensor) -> str:
    """Of dtype, shape and every byte."""
    sha = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
