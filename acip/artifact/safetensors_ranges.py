"""A safetensors file read by rows: any prefix of its tensors, from wherever its bytes are.

    8 bytes: length of the header | header: JSON {name: {dtype, shape, data_offsets}} | the tensors, row by row

The header comes from outside and is believed in nothing: `TensorFile` refuses what overlaps, leaves the file, or is absurd,
before anything is allocated. Rows come in chunks of `chunk_rows`, each with a sha256 in the artifact's digests.safetensors.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acip.artifact.byte_sources import Range, Source
from acip.errors import ArtifactError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 64 << 20  # bytes; a model of 100,000 tensors has 10 MB
CHUNK = 8 << 10  # bytes at least, so that small tensors have few
CHUNKS = 128  # of a tensor at most


@dataclass(frozen=True)
class Entry:
    """One tensor's place in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of the file
    row_bytes: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def chunk_rows(self) -> int:
        return max(1, -(-self.rows // CHUNKS), CHUNK // max(1, self.row_bytes))


class TensorFile:
    """An opened file: its checked header. `digests` [chunks, 32] by tensor are compared with what is read, where the source says so."""

    def __init__(self, source: Source, file: str, digests: Mapping[str, Tensor] | None = None) -> None:
        self.source, self.file, self.digests = source, file, digests or {}
        size = source.size(file)
        header, self.data_bytes = self._header(size)
        self.entries: dict[str, Entry] = {}
        end = size - self.data_bytes
        spans: list[Range] = []
        for name, facts in header.items():
            if name != "__metadata__":
                self.entries[name], span = self._entry(name, facts, size - self.data_bytes)
                spans.append(span)
        for start, stop in sorted(spans):
            if start != end:
                raise self._refused("its tensors overlap, or leave gaps")
            end = stop
        if end != size:
            raise self._refused(f"its tensors end at byte {end:,} of {size:,}")

    def rows(self, wanted: Sequence[tuple[str, int, int]]) -> list[Tensor]:
        """Rows [first, last) of each tensor, whole chunks of them: `last` rises to its chunk's end; `first` must be a chunk's start."""
        ranges, spans = [], []
        for name, first, last in wanted:
            entry = self.entry(name)
            end = min(entry.rows, -(-last // entry.chunk_rows) * entry.chunk_rows)
            spans.append((name, first, end))
            ranges.append((entry.start + first * entry.row_bytes, entry.start + end * entry.row_bytes))
        pieces = self.source.read(self.file, ranges)
        return [self._tensor(name, first, last, piece) for (name, first, last), piece in zip(spans, pieces, strict=True)]

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole tensors."""
        return dict(zip(names, self.rows([(name, 0, self.entry(name).rows) for name in names]), strict=True))

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise self._refused(f"it lacks {name}")
        return self.entries[name]

    def _tensor(self, name: str, first: int, last: int, piece: memoryview) -> Tensor:
        entry = self.entries[name]
        if len(piece) != (last - first) * entry.row_bytes:
            raise self._refused(f"{name} came as {len(piece):,} bytes instead of {(last - first) * entry.row_bytes:,}")
        if self.source.checked:
            self._compare(name, first, piece)
        shape = (last - first, *entry.shape[1:]) if entry.shape else ()
        return torch.frombuffer(piece, dtype=entry.dtype).view(shape) if len(piece) else torch.empty(shape, dtype=entry.dtype)

    def _compare(self, name: str, first: int, piece: memoryview) -> None:
        entry = self.entries[name]
        expected = self.digests.get(name)
        if expected is None:
            raise self._refused(f"{name} has no checksums")
        found = digests(piece, entry)
        begin = first // entry.chunk_rows
        if not torch.equal(found, expected[begin : begin + len(found)]):
            raise self._refused(f"{name} is corrupted: its sha256 is not the artifact's")

    def _header(self, size: int) -> tuple[Mapping[str, Any], int]:
        """The header, and the bytes that follow it."""
        if size < 8:
            raise self._refused(f"it has {size} bytes")
        (raw,) = self.source.read(self.file, [(0, 8)])
        length = int.from_bytes(raw, "little")
        if length > min(size - 8, MAX_HEADER):
            raise self._refused(f"its header would have {length:,} bytes")
        (raw,) = self.source.read(self.file, [(8, 8 + length)])
        try:
            header = json.loads(bytes(raw))
        except (ValueError, RecursionError) as error:
            raise self._refused(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._refused("its header is not an object")
        return header, size - 8 - length

    def _entry(self, name: str, facts: Any, data: int) -> tuple[Entry, Range]:
        try:
            dtype, shape, (start, stop) = DTYPES[facts["dtype"]], facts["shape"], facts["data_offsets"]
            numbers = [*shape, start, stop]
        except (KeyError, TypeError, ValueError) as error:
            raise self._refused(f"{name!r} is malformed") from error
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in numbers) or len(shape) > 8:
            raise self._refused(f"{name!r} has an absurd shape or place")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise self._refused(f"{name!r} of shape {shape} does not fill its bytes")
        row_bytes = math.prod(shape[1:]) * dtype.itemsize if shape else dtype.itemsize
        return Entry(dtype, tuple(shape), data + start, row_bytes), (data + start, data + stop)

    def _refused(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.source.where}/{self.file} can't be read: {what}. Fetch the artifact again.")


def digests(piece: memoryview | bytes, entry: Entry) -> Tensor:
    """[chunks, 32] sha256 of whole chunks of rows, each after the tensor's dtype and shape as the header has them."""
    step = max(1, entry.chunk_rows * entry.row_bytes)
    kind = next(name for name, dtype in DTYPES.items() if dtype == entry.dtype)
    facts = json.dumps([kind, *entry.shape]).encode()
    found = bytearray()
    for i in range(0, max(1, len(piece)), step):
        chunk = hashlib.sha256(facts)
        chunk.update(piece[i : i + step])
        found += chunk.digest()
    return torch.frombuffer(found, dtype=torch.uint8).view(-1, 32)
