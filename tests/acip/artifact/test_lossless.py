"""bfloat16 tensors of artifacts with codes take two thirds of their bytes, and are read back bit for bit, whole or by ranges of rows."""

import contextlib
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import acip
from acip.artifact import lossless
from acip.artifact.byte_sources import Folder
from acip.artifact.safetensors_ranges import TensorFile
from acip.artifact.tensor_writer import save_tensors
from acip.errors import ArtifactError
from tests.acip.artifact.test_hostile import MemorySource, packed
from tests.support.fuzzing import fuzz

FILE = "x.safetensors"


def every_number() -> Tensor:
    """Return all 65,536 bfloat16 numbers, NaNs, infinities and both zeros included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)


TENSORS = {
    "weight": torch.randn(700, 96, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "every": every_number(),
    "zeros": torch.zeros(100, 100, dtype=torch.bfloat16),
    "column": torch.ones(9_000, 1, dtype=torch.bfloat16),
    "cube": torch.ones(30, 20, 10, dtype=torch.bfloat16),
    "small": torch.ones(3, 5, dtype=torch.bfloat16),
    "none": torch.ones(0, 5, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "float32": torch.randn(7, generator=torch.Generator().manual_seed(0)),
    "float64": torch.ones(2, 3, dtype=torch.float64),
    "float16": torch.ones(90, 90, dtype=torch.float16),
    "int32": torch.arange(5, dtype=torch.int32),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TensorFile:
    folder = tmp_path_factory.mktemp("file")
    save_tensors(TENSORS, folder / FILE, compress=True)
    return TensorFile(Folder(folder), FILE)


def same(one: Tensor, other: Tensor) -> bool:
    """Compare bits, because NaN is not equal to itself."""
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_read_back_bit_for_bit(file: TensorFile, name: str) -> None:
    read = file.read([name])[name]
    assert read.dtype == TENSORS[name].dtype and same(bits(read), bits(TENSORS[name]))


def test_rows_are_read_by_chunks(file: TensorFile) -> None:
    entry = file.entry("weight")
    step = entry.chunk_rows
    assert 1 < step < 700 // 4
    for first, last in ((0, 1), (step, 2 * step), (2 * step, 3 * step + 1), (3 * step, 700), (0, 0)):
        (rows,) = file.rows([("weight", first, last)])
        assert same(bits(rows), bits(TENSORS["weight"][first : min(700, -(-last // step) * step)]))
    start, stop = entry.stored_range(step, 2 * step)
    assert stop - start < 0.8 * step * entry.row_bytes


def test_weights_take_two_thirds_of_their_bytes() -> None:
    chunk = lossless.encode(torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert 8 * len(chunk) / 100_000 == pytest.approx(10.6, abs=0.1)


def test_stored_bytes_and_bytes_in_memory_are_counted(file: TensorFile) -> None:
    assert file.decoded_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert file.data_bytes == sum(file.entry(name).stored_range(0, file.entry(name).rows)[1] - file.entry(name).start for name in TENSORS)
    assert file.entry("every").coded and not any(file.entry(name).coded for name in ("small", "none", "scalar", "float16", "float32"))


def test_tensors_that_are_not_coded_are_aligned(file: TensorFile) -> None:
    for entry in file.entries.values():
        assert entry.coded or entry.start % entry.dtype.itemsize == 0


def test_a_chunk_has_the_bytes_of_the_format() -> None:
    """1.0 is 0 01111111 0000000: the exponent 127 is the high byte, the mantissa 0 and the sign 0 are the low byte."""
    chunk = lossless.encode(torch.tensor([1.0, -1.0, 1.5], dtype=torch.bfloat16))
    assert chunk[:3] == bytes([0b0000000_0, 0b0000000_1, 0b1000000_0])
    assert zlib.decompress(chunk[3:], wbits=-15) == bytes([127, 127, 127])
    stream = zlib.compressobj(wbits=-15)
    other = bytes([0, 1, 128]) + stream.compress(bytes([127, 127, 128])) + stream.flush()
    assert lossless.decode(memoryview(other), [len(other)], [3]).tolist() == [1.0, -1.0, 3.0]


@fuzz(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=600))
def test_any_numbers_are_read_back_bit_for_bit(numbers: list[int]) -> None:
    expected = torch.tensor(numbers, dtype=torch.int16)
    chunk = lossless.encode(expected.view(torch.bfloat16))
    assert lossless.least_bytes(len(numbers)) <= len(chunk) <= lossless.most_bytes(2 * len(numbers))
    assert torch.equal(lossless.decode(memoryview(chunk), [len(chunk)], [len(numbers)]).view(torch.int16), expected)


def test_the_code_of_the_format_description_reads_coded_tensors(file: TensorFile) -> None:
    snippet: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", (Path(acip.__file__).parent / "ARTIFACT.md").read_text(), re.DOTALL)[0], snippet)
    folder = str(cast(Folder, file.source).folder)
    for name in ("weight", "small", "cube", "column"):
        assert torch.equal(torch.from_numpy(snippet["tensor"](folder, "x", name)), TENSORS[name].float())
    assert torch.equal(torch.from_numpy(snippet["tensor"](folder, "x", "weight", 101)), TENSORS["weight"][:101].float())


# ---- hostile input


def coded_file(shape: Any, chunks: Any, data: bytes, dtype: str = "U8", stored: list[int] | None = None) -> MemorySource:
    """Return a file of one coded tensor `a`."""
    entry = {"dtype": dtype, "shape": [len(data)] if stored is None else stored, "data_offsets": [0, len(data)]}
    return MemorySource({"x": packed({"__metadata__": {"a.bfloat16": json.dumps([shape, chunks])}, "a": entry}, data)})


CHUNK = lossless.encode(torch.ones(2, 3, dtype=torch.bfloat16))


def test_a_coded_tensor_of_one_chunk_is_read() -> None:
    assert torch.equal(TensorFile(coded_file([2, 3], [len(CHUNK)], CHUNK), "x").read(["a"])["a"], torch.ones(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("shape", "chunks", "message"),
    [
        ([2, 3], [len(CHUNK) - 1], "do not fit to its shape"),
        ([2, 3], [len(CHUNK) - 1, 1], "do not fit to its shape"),
        ([2, 3], [], "do not fit to its shape"),
        ([2, 300], [len(CHUNK)], "do not fit to its shape"),
        ([2**40, 2**40], [len(CHUNK)], "do not fit to its shape"),
        ([0, 3], [len(CHUNK)], "malformed"),
        ([], [len(CHUNK)], "malformed"),
        ([1] * 9, [len(CHUNK)], "malformed"),
        ([-2, -3], [len(CHUNK)], "malformed"),
        ([2, True], [len(CHUNK)], "malformed"),
        ([2, 3.0], [len(CHUNK)], "malformed"),
        ("23", [len(CHUNK)], "malformed"),
        ([2, 3], len(CHUNK), "malformed"),
        ([2, 3], [str(len(CHUNK))], "malformed"),
        (None, None, "malformed"),
    ],
)
def test_shapes_and_chunks_that_contradict_the_file_are_refused(shape: Any, chunks: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        TensorFile(coded_file(shape, chunks, CHUNK), "x")


@pytest.mark.parametrize("text", ["", "[", "[[2, 3]]", "{}", "1", "[" * 100_000, "[[2, 3], [9], 1]", 7, None, ["a"]])
def test_malformed_metadata_is_refused(text: Any) -> None:
    entry = {"dtype": "U8", "shape": [len(CHUNK)], "data_offsets": [0, len(CHUNK)]}
    with pytest.raises(ArtifactError, match="malformed"):
        TensorFile(MemorySource({"x": packed({"__metadata__": {"a.bfloat16": text}, "a": entry}, CHUNK)}), "x")


@pytest.mark.parametrize(("dtype", "stored"), [("I8", None), ("BOOL", None), ("U8", [1, len(CHUNK)])])
def test_only_one_dimension_of_bytes_is_coded(dtype: str, stored: list[int] | None) -> None:
    with pytest.raises(ArtifactError, match="malformed"):
        TensorFile(coded_file([2, 3], [len(CHUNK)], CHUNK, dtype, stored), "x")


def deflated(content: bytes) -> bytes:
    coder = zlib.compressobj(9, wbits=-15)
    return coder.compress(content) + coder.flush()


LOW = bytes(64)
DAMAGED: dict[str, bytes] = {
    "too short": LOW + deflated(bytes(range(63))),
    "too long": LOW + deflated(bytes(range(65))),
    "cut off": LOW + deflated(bytes(range(64)))[:-3],
    "bytes after the end": LOW + deflated(bytes(range(64))) + b"more",
    "not deflate": LOW + b"\xff" * 40,
    "a bomb": LOW + deflated(bytes(10**6)),
    "all zeros": LOW + bytes(40),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_streams_are_refused(case: str) -> None:
    """A stream that decodes to more than its numbers is not decoded further."""
    data = DAMAGED[case]
    file = TensorFile(coded_file([64], [len(data)], data), "x")
    with pytest.raises(ArtifactError, match=r"a chunk of a (is damaged|does not hold)"):
        file.read(["a"])


def test_a_small_file_cannot_fill_the_memory() -> None:
    """Matches of deflate could code a million numbers in a kilobyte; a chunk of so few bytes is refused before it is decoded."""
    data = deflated(bytes(10**6))
    with pytest.raises(ArtifactError, match="do not fit to its shape"):
        TensorFile(coded_file([1, 10**6], [len(data)], data), "x")


@fuzz(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(file: TensorFile, offset: int, value: int) -> None:
    (raw,) = file.source.read(FILE, [(0, file.source.size(FILE))])
    content = bytearray(raw)
    content[offset % len(content)] = value
    with contextlib.suppress(ArtifactError):
        changed = TensorFile(MemorySource({"x": bytes(content)}), "x")
        for name, tensor in changed.read(list(changed.entries)).items():
            assert tensor.shape == changed.entry(name).shape and tensor.nbytes == changed.entry(name).bytes


def test_every_file_starts_with_the_length_of_its_header(file: TensorFile) -> None:
    (raw,) = file.source.read(FILE, [(0, 8)])
    assert struct.unpack("<Q", raw)[0] % 8 == 0
