"""Whatever an artifact's files hold, opening them ends in a model or in an error of ours: nothing runs, nothing else is touched."""

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


class Held:
    """Files in memory; those of a folder, some of them replaced."""

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
            assert 0 <= start <= stop <= len(self.files[file]), "never asked for what is not there"
        return [memoryview(bytearray(self.files[file][start:stop])) for start, stop in ranges]


def opened(content: bytes) -> TensorFile | None:
    """The file, every tensor read; None where it was refused."""
    with contextlib.suppress(ArtifactError):
        file = TensorFile(Held({"x": content}), "x")
        file.read(list(file.entries))
        return file
    return None


def packed(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@fuzz(st.binary(max_size=64))
def test_bytes(content: bytes) -> None:
    opened(content)
    opened(packed(content))


@fuzz(st.dictionaries(st.text(max_size=4), JSON, max_size=3), st.binary(max_size=16))
def test_headers(header: dict[str, Any], data: bytes) -> None:
    with contextlib.suppress(ValueError):  # an int that Python does not write
        json.dumps(header)
        opened(packed(header, data))


NUMBERS = st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**64, -(2**63)])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "object"]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    }
)


@fuzz(st.dictionaries(st.sampled_from("abc"), ENTRY, max_size=3), st.binary(max_size=40))
def test_tensors_that_lie_about_their_place(header: dict[str, Any], data: bytes) -> None:
    if (file := opened(packed(header, data))) is not None:
        assert sum(entry.rows * entry.row_bytes for entry in file.entries.values()) == len(data)


@pytest.mark.parametrize(
    ("content", "says"),
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
def test_what_is_said(content: bytes, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        TensorFile(Held({"x": content}), "x")


def dumped(content: Any) -> bytes:
    try:
        return json.dumps(content).encode()
    except ValueError:  # an int that Python does not write
        return b'{"schema": ' + b"9" * 5000 + b"}"


def used(place: Path, files: dict[str, bytes], artifact: Artifact, words: bool) -> None:
    """Open `artifact` with these files instead of its own, as from elsewhere, and make a model of it; `words`: its tokenizer, too.

    Into a folder of its own, outside of which nothing appears.
    """
    with contextlib.suppress(AcipError):
        opened = Artifact.open(place / "inside", Held(files, artifact.folder), verify=True)
        if words:
            assert opened.tokenizer()("a")["input_ids"] is not None
        model: Any = opened.load(size=0.6).model
        with torch.no_grad():
            assert model(input_ids=torch.arange(8)[None]).logits.shape[:2] == (1, 8)
    assert {path.name for path in place.iterdir()} <= {"inside"}


@fuzz(st.data(), share=0.7)
def test_a_manifest_with_anything_anywhere(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    manifest = data.draw(harmed(small_artifact.manifest, most=2))
    used(tmp_path_factory.mktemp("place"), {MANIFEST: dumped(manifest)}, small_artifact, words=False)


def sealed(artifact: Artifact, file: str, content: bytes) -> dict[str, bytes]:
    """A file and a manifest that knows it: who makes an artifact makes its checksums, too."""
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {file: content, MANIFEST: json.dumps({**artifact.manifest, "files": {**artifact.manifest["files"], file: facts}}).encode()}


SMALL = st.none() | st.booleans() | st.integers(-2, 99) | st.floats() | st.text(max_size=8) | st.lists(st.integers(-2, 9), max_size=3)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@fuzz(st.data(), share=0.4)
def test_what_transformers_reads_with_anything_anywhere(
    small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    """Numbers stay small where they decide how large a model is made: a config may ask for more than there is memory, as any may."""
    content = dumped(data.draw(harmed(json.loads((small_artifact.folder / file).read_text()), SMALL)))
    used(tmp_path_factory.mktemp("place"), sealed(small_artifact, file, content), small_artifact, words="tokenizer" in file)


@fuzz(st.data(), share=0.3)
def test_a_tokenizer_with_anything_anywhere(
    small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tokenizer = json.loads((small_artifact.folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = dict(list(tokenizer["model"]["vocab"].items())[:9])
    content = dumped(data.draw(harmed(tokenizer, SMALL)))
    used(tmp_path_factory.mktemp("place"), sealed(small_artifact, "tokenizer.json", content), small_artifact, words=True)


@pytest.mark.parametrize("name", [".", "", "..", "../x", "/x", "a/../../x", "a\\..\\x", "C:x", "a\0b", "a\nb", "\ud800"])
def test_names_of_files_that_are_refused(small_artifact: Artifact, tmp_path: Path, name: str) -> None:
    manifest = {**small_artifact.manifest, "files": {**small_artifact.manifest["files"], name: {"bytes": 0, "sha256": ""}}}
    with pytest.raises(ArtifactError, match="outside its folder"):
        Artifact.open(tmp_path, Held({MANIFEST: json.dumps(manifest).encode()}, small_artifact.folder))


@fuzz(st.sampled_from(["factors", "dense", "rest", "order"]), st.integers(0, 10**6), st.integers(0, 255), share=0.5)
def test_a_byte_changed_in_a_file(small_artifact: Artifact, file: str, place: int, value: int) -> None:
    """Of headers: the weights themselves have checksums."""
    name = f"{file}.safetensors"
    content = bytearray((small_artifact.folder / name).read_bytes())
    content[place % (8 + int.from_bytes(content[:8], "little"))] = value
    with contextlib.suppress(AcipError):
        Artifact.open(small_artifact.folder, Held({name: bytes(content)}, small_artifact.folder)).load(size=0.6)
