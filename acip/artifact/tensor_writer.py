"""Write a safetensors file whose bfloat16 tensors are stored in fewer bytes (lossless.py)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acip.artifact import lossless
from acip.artifact.safetensors_ranges import CODED, DTYPES, METADATA, Entry
from acip.modeling_acip import MIN_CHUNK_BYTES


def save_coded(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to `path`. A copy of one of them at most is in memory at once.

    bfloat16 tensors of at least `MIN_CHUNK_BYTES` are coded, the others are written as they are. These come first, with the largest
    numbers at the start, so that all are aligned.
    """
    coded = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16 and tensor.nbytes >= MIN_CHUNK_BYTES}
    order = sorted(tensors, key=lambda name: 0 if name in coded else -tensors[name].itemsize)
    entries = {name: _entry(tensors[name]) for name in order}
    chunks = {name: entries[name].stored_chunks(0, entries[name].rows) for name in order}
    limits = {name: [lossless.most_bytes(size) for size in sizes] if name in coded else sizes for name, sizes in chunks.items()}
    length = len(_header(entries, limits, coded))
    with path.open("wb") as file:
        file.seek(8 + length)  # the header needs the bytes of the chunks
        for name in order:
            tensor, entry = tensors[name].detach().cpu().contiguous(), entries[name]
            if name in coded:
                encoded = (lossless.encode(rows) for rows in tensor.split(entry.chunk_rows))
                chunks[name] = [file.write(chunk) for chunk in encoded]
            else:
                file.write(tensor.flatten().view(torch.uint8).numpy().tobytes())
        file.seek(0)
        file.write(length.to_bytes(8, "little") + _header(entries, chunks, coded).ljust(length))


def _entry(tensor: Tensor) -> Entry:
    row_bytes = tensor[0].nbytes if tensor.ndim and len(tensor) else tensor.nbytes
    return Entry(tensor.dtype, tuple(tensor.shape), 0, row_bytes)


def _header(entries: Mapping[str, Entry], chunks: Mapping[str, Sequence[int]], coded: set[str]) -> bytes:
    """Return the header of a file of these tensors, from the stored bytes of their chunks. Its length is a multiple of 8."""
    header: dict[str, Any] = {
        METADATA: {f"{name}{CODED}": json.dumps([entries[name].shape, chunks[name]]) for name in entries if name in coded}
    }
    end = 0
    for name, entry in entries.items():
        start, end = end, end + sum(chunks[name])
        plain = next(text for text, dtype in DTYPES.items() if dtype == entry.dtype)
        dtype, shape = ("U8", [end - start]) if name in coded else (plain, list(entry.shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    return raw + b" " * (-len(raw) % 8)
