"""Opening an artifact with arbitrary file contents gives a model or one of acip's errors. No code runs and no other file changes."""

import contextlib
import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Folder, Range
from acip.artifact.manifest import MANIFEST
from acip.artifact.safetensors_ranges import TensorFile
from acip.errors import AcipError, ArtifactError
from tests.support.fuzzing import JSON, fuzz, harmed


class MemorySource:
    """A byte source of files in memory, which replace files of the same name in an optional folder."""

    where, checked = "memory", False

    def __init__(self, files: dict[str, bytes], folder: Path | None = None) -> None:
        self.files, self.folder = files, Folder(folder) if folder else None

    def size(self, file: str) -> int:
        if file in self.files:
            return len(self.files[file])
        if self.folder is None:
            raise ArtifactError(f"{file} is missing.")
        return self.folder.size(file)

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        if file not in self.files:
            assert self.folder is not None
            return self.folder.read(file, ranges)
        for start, stop in ranges:
            assert 0 <= start <= stop <= len(self.files[file]), "a range lies outside of the file"
        return [memoryview(bytearray(self.files[file][start:stop])) for start, stop in ranges]


def open_tensors(content: bytes) -> TensorFile | None:
    """Open a file and read all its tensors. Return None if it is refused."""
    with contextlib.suppress(ArtifactError):
        file = TensorFile(MemorySource({"x": content}), "x")
        file.read(list(file.entries))
        return file
    return None


def packed(header: Any, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@fuzz(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    open_tensors(content)
    open_tensors(packed(content))


@fuzz(st.dictionaries(st.text(max_size=4), JSON, max_size=3), st.binary(max_size=16))
def test_any_header_is_read_or_refused(header: dict[str, Any], data: bytes) -> None:
    with contextlib.suppress(ValueError):  # an int with too many digits for Python to print
        json.dumps(header)
        open_tensors(packed(header, data))


NUMBERS = st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**64, -(2**63)])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "object"]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    }
)


@fuzz(st.dictionaries(st.sampled_from("abc"), ENTRY, max_size=3), st.binary(max_size=40))
def test_accepted_tensors_fill_the_data_exactly(header: dict[str, Any], data: bytes) -> None:
    if (file := open_tensors(packed(header, data))) is not None:
        assert sum(entry.rows * entry.row_bytes for entry in file.entries.values()) == len(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        ((2**62).to_bytes(8, "little") + b"{}", "header would have 4,611,686,018,427,387,904 bytes"),
        (packed(b"[" * 100_000), "not JSON"),
        (packed(pickle.dumps({})), "not JSON"),
        (packed([]), "not an object"),
        (packed({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"), "does not fill its bytes"),
        (packed({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, b"1234"), "overlap, or leave gaps"),
        (packed({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}, b"1234"), "end at byte"),
        (
            packed({name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"}, b"12345678"),
            "overlap",
        ),
    ],
)
def test_the_reason_of_a_refusal_is_named(content: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        TensorFile(MemorySource({"x": content}), "x")


def to_json(content: Any) -> bytes:
    try:
        return json.dumps(content).encode()
    except ValueError:  # an int with too many digits for Python to print
        return b'{"schema": ' + b"9" * 5000 + b"}"


def open_and_load(parent: Path, files: dict[str, bytes], artifact: Artifact, tokenizer: bool) -> None:
    """Open `artifact` with some files replaced, load a model, and check that no file appears outside of the artifact's folder.

    `tokenizer`: load and call the tokenizer as well.
    """
    with contextlib.suppress(AcipError):
        opened = Artifact.open(parent / "inside", MemorySource(files, artifact.folder), verify=True)
        if tokenizer:
            assert opened.tokenizer()("a")["input_ids"] is not None
        model: Any = opened.load(size=0.6).model
        with torch.no_grad():
            assert model(input_ids=torch.arange(8)[None]).logits.shape[:2] == (1, 8)
    assert {path.name for path in parent.iterdir()} <= {"inside"}


@fuzz(st.data(), share=0.7)
def test_any_manifest_is_read_or_refused(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    manifest = data.draw(harmed(small_artifact.manifest, most=2))
    open_and_load(tmp_path_factory.mktemp("parent"), {MANIFEST: to_json(manifest)}, small_artifact, tokenizer=False)


def sealed(artifact: Artifact, file: str, content: bytes) -> dict[str, bytes]:
    """Return a file and a manifest with its checksum, because the author of an artifact also writes its checksums."""
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {file: content, MANIFEST: json.dumps({**artifact.manifest, "files": {**artifact.manifest["files"], file: facts}}).encode()}


SMALL = st.none() | st.booleans() | st.integers(-2, 99) | st.floats() | st.text(max_size=8) | st.lists(st.integers(-2, 9), max_size=3)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@fuzz(st.data(), share=0.4)
def test_any_config_is_read_or_refused(
    small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    """Numbers stay small, because any config can describe a model that is larger than the memory."""
    content = to_json(data.draw(harmed(json.loads((small_artifact.folder / file).read_text()), SMALL)))
    open_and_load(tmp_path_factory.mktemp("parent"), sealed(small_artifact, file, content), small_artifact, tokenizer="tokenizer" in file)


@fuzz(st.data(), share=0.3)
def test_any_tokenizer_is_read_or_refused(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tokenizer = json.loads((small_artifact.folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = dict(list(tokenizer["model"]["vocab"].items())[:9])
    content = to_json(data.draw(harmed(tokenizer, SMALL)))
    open_and_load(tmp_path_factory.mktemp("parent"), sealed(small_artifact, "tokenizer.json", content), small_artifact, tokenizer=True)


@pytest.mark.parametrize("name", [".", "", "..", "../x", "/x", "a/../../x", "a\\..\\x", "C:x", "a\0b", "a\nb", "\ud800"])
def test_file_names_outside_of_the_folder_are_refused(small_artifact: Artifact, tmp_path: Path, name: str) -> None:
    manifest = {**small_artifact.manifest, "files": {**small_artifact.manifest["files"], name: {"bytes": 0, "sha256": ""}}}
    with pytest.raises(ArtifactError, match="outside its folder"):
        Artifact.open(tmp_path, MemorySource({MANIFEST: json.dumps(manifest).encode()}, small_artifact.folder))


@fuzz(st.sampled_from(["factors", "dense", "rest", "order"]), st.integers(0, 10**6), st.integers(0, 255), share=0.5)
def test_a_changed_byte_in_a_header_is_read_or_refused(small_artifact: Artifact, file: str, offset: int, value: int) -> None:
    """Only headers are changed; the weights have checksums."""
    name = f"{file}.safetensors"
    content = bytearray((small_artifact.folder / name).read_bytes())
    content[offset % (8 + int.from_bytes(content[:8], "little"))] = value
    with contextlib.suppress(AcipError):
        Artifact.open(small_artifact.folder, MemorySource({name: bytes(content)}, small_artifact.folder)).load(size=0.6)
