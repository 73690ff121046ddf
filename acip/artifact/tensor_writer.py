"""Write a safetensors file tensor by tensor, with bfloat16 tensors in fewer bytes if wanted (lossless.py)."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acip.artifact import lossless
from acip.artifact.safetensors_ranges import CODED, DTYPES, METADATA, Entry
from acip.modeling_acip import MIN_CHUNK_BYTES


@dataclass(frozen=True)
class Deferred:
    """A tensor that is computed when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.itemsize * math.prod(self.shape)


def save_tensors(
    tensors: Mapping[str, Tensor | Deferred], path: Path, compress: bool, metadata: Mapping[str, str] | None = None, alignment: int = 8
) -> None:
    """Write tensors to `path`. A copy of one of them at most is in memory at once.

    With `compress`, bfloat16 tensors of at least `MIN_CHUNK_BYTES` are coded. The others are written as they are. These come first, with
    the largest numbers at the start, so that all are aligned. The first tensor starts at a multiple of `alignment` bytes. `metadata` is
    added to the header's.
    """
    coded = {name for name, each in tensors.items() if compress and each.dtype == torch.bfloat16 and each.nbytes >= MIN_CHUNK_BYTES}
    order = sorted(tensors, key=lambda name: 0 if name in coded else -tensors[name].itemsize)
    entries = {name: _entry(tensors[name]) for name in order}
    chunks = {name: entries[name].stored_chunks(0, entries[name].rows) for name in order}
    limits = {name: [lossless.most_bytes(size) for size in sizes] if name in coded else sizes for name, sizes in chunks.items()}
    length = len(_header(entries, limits, coded, metadata, alignment))
    with path.open("wb") as file:
        file.seek(8 + length)  # the header needs the bytes of the chunks
        for name in order:
            some, entry = tensors[name], entries[name]
            tensor = (some.compute() if isinstance(some, Deferred) else some).detach().cpu().contiguous()
            if name in coded:
                encoded = (lossless.encode(rows) for rows in tensor.split(entry.chunk_rows))
                chunks[name] = [file.write(chunk) for chunk in encoded]
            else:
                file.write(tensor.flatten().view(torch.uint8).numpy().tobytes())
        file.seek(0)
        file.write(length.to_bytes(8, "little") + _header(entries, chunks, coded, metadata, alignment).ljust(length))


def _entry(tensor: Tensor | Deferred) -> Entry:
    row_bytes = tensor.nbytes // tensor.shape[0] if len(tensor.shape) and tensor.shape[0] else tensor.nbytes
    return Entry(tensor.dtype, tuple(tensor.shape), 0, row_bytes)


def _header(
    entries: Mapping[str, Entry], chunks: Mapping[str, Sequence[int]], coded: set[str], metadata: Mapping[str, str] | None, alignment: int
) -> bytes:
    """Return the header of a file of these tensors, from the stored bytes of their chunks. The first tensor follows it, aligned."""
    coding = {f"{name}{CODED}": json.dumps([entries[name].shape, chunks[name]]) for name in entries if name in coded}
    header: dict[str, Any] = {METADATA: {**(metadata or {}), **coding}}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + sum(chunks[name])
        plain = next(text for text, dtype in DTYPES.items() if dtype == entry.dtype)
        dtype, shape = ("U8", [end - start]) if name in coded else (plain, list(entry.shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    return raw + b" " * (-(8 + len(raw)) % alignment)
