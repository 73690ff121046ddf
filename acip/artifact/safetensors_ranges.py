"""A range-reading safetensors parser: any rows of a file's tensors, from any source of bytes.

    8 bytes: length of the header | header: JSON {name: {dtype, shape, data_offsets}} | the tensors, row by row

Every header field is validated before anything is allocated: `TensorFile` refuses tensors that overlap, leave gaps, or lie outside
the file, and sizes out of range. Rows are read in chunks of `chunk_rows`, each of which has a sha256 in digests.safetensors.

Tensors may be stored in fewer bytes (lossless.py). They are decoded when they are read.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acip.artifact import lossless
from acip.artifact.byte_sources import Range, Source
from acip.errors import ArtifactError
from acip.modeling_acip import chunk_rows

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
METADATA = "__metadata__"
CODED = ".bfloat16"  # NAME.bfloat16 in the metadata: "[shape, bytes of each chunk]" of a coded tensor
MAX_HEADER_BYTES = 64 << 20  # a model of 100,000 tensors has a header of 10 MB


@dataclass(frozen=True)
class Entry:
    """The dtype, shape and position of one tensor in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    row_bytes: int  # in memory
    coded: tuple[int, ...] | None = None  # the stored bytes of each chunk, if they are coded

    @property
    def rows(self) -> int:
        """The length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def bytes(self) -> int:
        """The bytes of the tensor in memory."""
        return self.rows * self.row_bytes

    @property
    def chunk_rows(self) -> int:
        """The rows of one chunk, the unit of reading, of coding and of checksums."""
        return chunk_rows(self.rows, self.row_bytes)

    def stored_chunks(self, first: int, last: int) -> list[int]:
        """Return the stored bytes of the chunks of rows [first, last). `first` is the start of a chunk, `last` the end of one."""
        if self.coded is not None:
            return list(self.coded[first // self.chunk_rows : -(-last // self.chunk_rows)])
        return [self.row_bytes * count for count in self.chunk_lengths(first, last)]

    def chunk_lengths(self, first: int, last: int) -> list[int]:
        """Return the rows of each chunk of rows [first, last)."""
        return [min(self.chunk_rows, last - row) for row in range(first, last, self.chunk_rows)]

    def stored_range(self, first: int, last: int) -> Range:
        """Return the bytes of the file that hold the chunks of rows [first, last)."""
        start = self.start + sum(self.stored_chunks(0, first))
        return start, start + sum(self.stored_chunks(first, last))


class TensorFile:
    """An opened safetensors file: its validated header in `entries`, and reads of its tensors.

    `digests` holds the sha256 of each chunk, [chunks, 32] by tensor name. They are compared with what is read if `source.checked`.
    All methods raise ArtifactError for a file that is malformed or does not match its digests.
    """

    def __init__(self, source: Source, file: str, digests: Mapping[str, Tensor] | None = None) -> None:
        self.source, self.file, self.digests = source, file, digests or {}
        size = source.size(file)
        header, self.data_bytes = self._header(size)
        data_start = size - self.data_bytes
        self.entries: dict[str, Entry] = {}
        spans: list[Range] = []
        for name, fields in header.items():
            if name != METADATA:
                stored, span = self._entry(name, fields, data_start)
                self.entries[name] = self._coded(name, stored, header)
                spans.append(span)
        end = data_start
        for start, stop in sorted(spans):
            if start != end:
                raise self._refused("its tensors overlap, or leave gaps")
            end = stop
        if end != size:
            raise self._refused(f"its tensors end at byte {end:,} of {size:,}")

    @property
    def decoded_bytes(self) -> int:
        """The bytes of all tensors in memory. `data_bytes` are the stored ones."""
        return sum(entry.bytes for entry in self.entries.values())

    def rows(self, wanted: Sequence[tuple[str, int, int]]) -> list[Tensor]:
        """Return rows [first, last) of tensors, for (name, first, last) in `wanted`, extended to whole chunks.

        `first` must be the start of a chunk; `last` is raised to the end of its chunk.
        """
        ranges, spans = [], []
        for name, first, last in wanted:
            entry = self.entry(name)
            end = min(entry.rows, -(-last // entry.chunk_rows) * entry.chunk_rows)
            spans.append((name, first, end))
            ranges.append(entry.stored_range(first, end))
        contents = self.source.read(self.file, ranges)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # zlib and hashlib run in parallel
            return list(pool.map(self._tensor, *zip(*spans, strict=True), contents)) if spans else []

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return whole tensors by name."""
        return dict(zip(names, self.rows([(name, 0, self.entry(name).rows) for name in names]), strict=True))

    def stored(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return whole tensors by name, as they are stored: coded ones as uint8 [bytes]."""
        entries = [self.entry(name) for name in names]
        contents = self.source.read(self.file, [entry.stored_range(0, entry.rows) for entry in entries])
        return {
            name: self._tensor(name, 0, entry.rows, content, decode=False)
            for name, entry, content in zip(names, entries, contents, strict=True)
        }

    def entry(self, name: str) -> Entry:
        """Return the entry of a tensor."""
        if name not in self.entries:
            raise self._refused(f"it lacks {name}")
        return self.entries[name]

    def _tensor(self, name: str, first: int, last: int, content: memoryview, decode: bool = True) -> Tensor:
        entry = self.entries[name]
        sizes = entry.stored_chunks(first, last)
        if len(content) != sum(sizes):
            raise self._refused(f"{name} came as {len(content):,} bytes instead of {sum(sizes):,}")
        if self.source.checked:
            self._compare(name, first, last, content)
        shape = (last - first, *entry.shape[1:]) if entry.shape else ()
        if entry.coded is not None and not decode:
            return torch.frombuffer(content, dtype=torch.uint8)
        if entry.coded is not None:
            counts = [rows * entry.row_bytes // lossless.ITEMSIZE for rows in entry.chunk_lengths(first, last)]
            try:
                return lossless.decode(content, sizes, counts).view(shape)
            except ValueError as error:
                raise self._refused(f"a chunk of {name} {error}") from error
        return torch.frombuffer(content, dtype=entry.dtype).view(shape) if len(content) else torch.empty(shape, dtype=entry.dtype)

    def _compare(self, name: str, first: int, last: int, content: memoryview) -> None:
        """Compare the stored bytes of rows [first, last) with their digests."""
        entry = self.entries[name]
        expected = self.digests.get(name)
        if expected is None:
            raise self._refused(f"{name} has no checksums")
        computed = chunk_digests(content, entry, first, last)
        begin = first // entry.chunk_rows
        if not torch.equal(computed, expected[begin : begin + len(computed)]):
            raise self._refused(f"{name} is corrupted: its sha256 is not the artifact's")

    def _header(self, size: int) -> tuple[Mapping[str, Any], int]:
        """Return the header, and the number of bytes after it."""
        if size < 8:
            raise self._refused(f"it has {size} bytes")
        (raw,) = self.source.read(self.file, [(0, 8)])
        length = int.from_bytes(raw, "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise self._refused(f"its header would have {length:,} bytes")
        (raw,) = self.source.read(self.file, [(8, 8 + length)])
        try:
            header = json.loads(bytes(raw))
        except (ValueError, RecursionError) as error:
            raise self._refused(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._refused("its header is not an object")
        return header, size - 8 - length

    def _entry(self, name: str, fields: Any, data_start: int) -> tuple[Entry, Range]:
        """Return the entry that the header's fields of a tensor describe, and the tensor's byte range in the file."""
        try:
            dtype, shape, (start, stop) = DTYPES[fields["dtype"]], fields["shape"], fields["data_offsets"]
            numbers = [*shape, start, stop]
        except (KeyError, TypeError, ValueError) as error:
            raise self._refused(f"{name!r} is malformed") from error
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in numbers) or len(shape) > 8:
            raise self._refused(f"the shape or the offsets of {name!r} are out of range")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise self._refused(f"{name!r} of shape {shape} does not fill its bytes")
        row_bytes = math.prod(shape[1:]) * dtype.itemsize if shape else dtype.itemsize
        return Entry(dtype, tuple(shape), data_start + start, row_bytes), (data_start + start, data_start + stop)

    def _coded(self, name: str, stored: Entry, header: Mapping[str, Any]) -> Entry:
        """Return the entry of a tensor whose bytes in the file are `stored`, which may be coded."""
        metadata = header.get(METADATA)
        if not isinstance(metadata, dict) or (key := f"{name}{CODED}") not in metadata:
            return stored
        try:
            shape, chunks = json.loads(metadata[key])
            plain = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**48 for n in (*shape, *chunks))
        except (TypeError, ValueError, RecursionError) as error:
            raise self._refused(f"{key!r} in its metadata is malformed") from error
        if not plain or not 0 < len(shape) <= 8 or stored.dtype != torch.uint8 or len(stored.shape) != 1:
            raise self._refused(f"{key!r} in its metadata is malformed")
        row_numbers = math.prod(shape[1:])
        entry = Entry(torch.bfloat16, tuple(shape), stored.start, row_numbers * lossless.ITEMSIZE, tuple(chunks))
        lengths = entry.chunk_lengths(0, entry.rows)
        # a chunk has a least size, so that a small file cannot fill the memory
        if (
            sum(chunks) != stored.rows
            or len(chunks) != len(lengths)
            or any(size < lossless.least_bytes(count * row_numbers) for size, count in zip(chunks, lengths, strict=True))
        ):
            raise self._refused(f"the chunks of {name!r} do not fit to its shape {shape}")
        return entry

    def _refused(self, problem: str) -> ArtifactError:
        return ArtifactError(f"{self.source.where}/{self.file} can't be read: {problem}. Fetch the artifact again.")


def chunk_digests(content: memoryview | bytes, entry: Entry, first: int, last: int) -> Tensor:
    """Return the sha256 [chunks, 32] of each chunk of rows [first, last), whose stored bytes are `content`.

    Each one covers the tensor's dtype and shape, as the header writes them for plain bytes, followed by the stored bytes of the chunk.
    """
    dtype_name = next(name for name, dtype in DTYPES.items() if dtype == entry.dtype)
    prefix = json.dumps([dtype_name, *entry.shape]).encode()
    digests = bytearray()
    start = 0
    for size in entry.stored_chunks(first, last) or [0]:
        chunk = hashlib.sha256(prefix)
        chunk.update(content[start : start + size])
        digests += chunk.digest()
        start += size
    return torch.frombuffer(digests, dtype=torch.uint8).view(-1, 32)
