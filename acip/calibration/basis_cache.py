"""A cache of bases on disk, keyed by the content they are computed from, for restarts, sweeps and transfers on one node."""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from acip.calibration.activation_covariance import Feed, feed_tokens
from acip.layers.targets import weight_MN
from acip.recipe import Recipe
from acip.utils.atomic import SUFFIX, atomic_file
from acip.utils.threads import one_thread_each

VERSION = 2  # part of every key; increase it when the same inputs give another basis
log = logging.getLogger(__name__)


class BasisCache:
    """A cache of directions: one safetensors file per layer in `folder`, named by its key.

    Several processes may write to the folder: files are renamed into place, and equal names have equal content. A damaged file is
    deleted and counts as a miss. Above `limit_bytes`, the least recently used files are deleted. If the folder cannot be written, the
    cache logs a warning and stores nothing.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._bytes: int | None = None  # approximate bytes in the folder; None = not counted yet
        self._writable = True

    def get(self, key: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """Return the directions of `key`, or None if there are none with this shape and dtype."""
        path = self._path(key)
        try:
            directions = load_file(path)["directions"]  # memory-mapped, so that the processes of a node share its pages
            if (directions.shape, directions.dtype) != (shape, dtype):
                raise ValueError(f"{tuple(directions.shape)} {directions.dtype} instead of {shape} {dtype}")
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("the cached basis %s cannot be read: %s", path, error)
            return None
        except (SafetensorError, KeyError, ValueError) as error:
            log.warning("the cached basis %s is damaged and will be computed again: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return directions

    def put(self, key: str, directions_KM: Tensor) -> None:
        """Store the directions of `key`."""
        if not self._writable:
            return
        path, content = self._path(key), save({"directions": directions_KM.cpu()})
        try:
            with atomic_file(path) as partial:
                partial.write_bytes(content)
            self._make_room(len(content))
        except OSError as error:
            self._writable = False
            log.warning("%s cannot be written, so bases are no longer cached: %s", self.folder, error)

    def has_room(self, content_bytes: float) -> bool:
        """Return whether the folder can be written, and may hold this many bytes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError:
            return False
        limit = free if self.limit_bytes is None else min(free, self.limit_bytes)
        return self._writable and os.access(self.folder, os.W_OK) and content_bytes <= limit

    @contextmanager
    def exclusive(self, keys: Iterable[str]) -> Iterator[None]:
        """Hold a lock while any of `keys` is missing, so that only one process of this node computes them.

        The kernel releases the lock of a process that dies.
        """
        names = sorted(keys)
        with ExitStack() as stack:
            if not self.holds(names):
                # If the folder cannot be written or locked, every process computes the bases. Some versions of filelock raise
                # NotImplementedError for a file system without locks.
                with suppress(OSError, NotImplementedError):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    path = self.folder / f"{hashlib.sha256(repr(names).encode()).hexdigest()}.lock"
                    lock = stack.enter_context(FileLock(path))
                    if self.holds(names):
                        lock.release()
            yield

    def holds(self, keys: Iterable[str]) -> bool:
        """Return whether all of these keys are in the cache."""
        return all(self._path(key).exists() for key in keys)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self, new: int) -> None:
        if self.limit_bytes is None:
            return
        if self._bytes is not None and self._bytes + new <= self.limit_bytes:
            self._bytes += new
            return
        files = []
        for path in (*self.folder.glob("*.safetensors"), *self.folder.glob(f"*{SUFFIX}")):
            with suppress(FileNotFoundError):  # deleted by another process
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
    """Return the cache key of each layer: equal keys mean equal bases.

    The covariance and Fisher bases of a layer also depend on the other weights of the model, on the text, and on `feed`.
    """
    windows = windows[: recipe.sample_windows] if recipe.basis != "svd" and windows is not None else None
    weights = {name: weight_MN(layer) for name, layer in linears.items()}
    world: dict[str, Tensor] = {}
    if windows is not None:
        world = {"windows": windows} | dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {_place(tensor): tensor for tensor in (*weights.values(), *world.values())}
    with one_thread_each() as pool:
        hashes = dict(zip(tensors, pool.map(_hash, tensors.values()), strict=True))
    context: list[Any] = [VERSION, recipe.basis, *([recipe.seed] if recipe.basis == "fisher" else [])]
    if windows is not None:
        around = [(name, hashes[_place(tensor)]) for name, tensor in world.items()]
        context += [around, f"{feed.__module__}.{getattr(feed, '__qualname__', feed)}"]
    return {name: hashlib.sha256(repr((context, name, hashes[_place(weight)])).encode()).hexdigest() for name, weight in weights.items()}


def _place(tensor: Tensor) -> Any:
    """Return a value that is equal for equal views of the same memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _hash(tensor: Tensor) -> str:
    """Return the sha256 of dtype, shape and all bytes."""
    sha = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
