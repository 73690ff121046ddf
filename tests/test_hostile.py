"""Whatever an artifact's files hold, opening them ends in a model or in an error of ours: nothing runs, nothing else is touched."""

import contextlib
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acip.artifact import MANIFEST, Artifact
from acip.errors import AcipError, ArtifactError
from acip.source import Folder, Range
from acip.tensors import TensorFile

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@FUZZ
@given(st.binary(max_size=64))
def test_bytes(content: bytes) -> None:
    opened(content)
    opened(packed(content))


@FUZZ
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=3), st.binary(max_size=16))
def test_headers(header: dict[str, Any], data: bytes) -> None:
    opened(packed(header, data))


NUMBERS = st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**64, -(2**63)])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "object"]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    }
)


@FUZZ
@given(st.dictionaries(st.sampled_from("abc"), ENTRY, max_size=3), st.binary(max_size=40))
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


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested JSON."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_manifest_with_anything_anywhere(small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Opened as from elsewhere: into a folder of its own, outside of which nothing appears."""
    place = tmp_path_factory.mktemp("place")
    manifest = json.loads(json.dumps(small_artifact.manifest))
    path = data.draw(st.sampled_from(sorted(places(manifest), key=str)))
    value = data.draw(JSON | st.sampled_from([0, -1, 2**70, "../../etc/passwd", "/etc/passwd", ".."]))
    if not path:
        manifest = value
    else:
        inner = manifest
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    source = Held({MANIFEST: json.dumps(manifest).encode()}, small_artifact.folder)
    with contextlib.suppress(AcipError):
        any_size = Artifact.open(place / "inside", source, verify=True).load(size=0.6)
        ids = torch.arange(8)[None]
        model: Any = any_size.model
        with torch.no_grad():
            assert model(input_ids=ids).logits.shape == (1, 8, 256)
    assert {path.name for path in place.iterdir()} <= {"inside"}


@pytest.mark.parametrize("name", [".", "", "..", "../x", "/x", "a/../../x", "a\\..\\x", "C:x", "a\0b", "a\nb", "\ud800"])
def test_names_of_files_that_are_refused(small_artifact: Artifact, tmp_path: Path, name: str) -> None:
    manifest = {**small_artifact.manifest, "files": {**small_artifact.manifest["files"], name: {"bytes": 0, "sha256": ""}}}
    with pytest.raises(ArtifactError, match="outside its folder"):
        Artifact.open(tmp_path, Held({MANIFEST: json.dumps(manifest).encode()}, small_artifact.folder))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["factors", "dense", "rest", "order"]), st.integers(0, 10**6), st.integers(0, 255))
def test_a_byte_changed_in_a_file(small_artifact: Artifact, file: str, place: int, value: int) -> None:
    """Of headers: the weights themselves have checksums."""
    name = f"{file}.safetensors"
    content = bytearray((small_artifact.folder / name).read_bytes())
    content[place % (8 + int.from_bytes(content[:8], "little"))] = value
    with contextlib.suppress(AcipError):
        Artifact.open(small_artifact.folder, Held({name: bytes(content)}, small_artifact.folder)).load(size=0.6)
