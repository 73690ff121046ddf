"""A materialized size can be downloaded as a tar file, whole or in byte ranges, with the same bytes every time."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from acip_platform.serve.http.download import Archive, requested_range
from acip_platform.serve.http.errors import RequestError
from acip_platform.storage.store import Store
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Folder
from acip.export.folder import PROVENANCE
from tests.conftest import logits, read
from tests.support.application import Application
from tests.support.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write files of edge-case sizes: empty, one byte, one block, one byte more; and a name longer than a tar header holds."""
    folder = tmp_path_factory.mktemp("files")
    for name, size in (("empty", 0), ("byte", 1), ("block", 512), ("more", 513), ("under/" + "long" * 40, 2000)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(hashlib.shake_256(name.encode()).digest(size))
    return folder


@pytest.fixture(scope="module")
def archive(folder: Path) -> Archive:
    return Archive(*Store("unused", folder).source(str(folder)), "small")


def test_archive_contains_the_files_of_the_folder(archive: Archive, folder: Path) -> None:
    content = b"".join(archive.read(0, archive.size))
    assert len(content) == archive.size
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        found = {entry.name.removeprefix("small/"): opened.extractfile(entry).read() for entry in opened}  # type: ignore[union-attr]
    assert found == {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_byte_range_equals_that_slice_of_the_archive(archive: Archive, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, archive.size))
    stop = data.draw(st.integers(start, archive.size))
    whole = b"".join(archive.read(0, archive.size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acip_platform.serve.http.download.PART_BYTES", data.draw(st.integers(1, 700)))
        assert b"".join(archive.read(start, stop)) == whole[start:stop]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-", (0, 100)),
        ("bytes=10-19", (10, 20)),
        ("bytes=90-999", (90, 100)),
        ("bytes=-7", (93, 100)),
        ("bytes=-999", (0, 100)),
        ("bytes=5-4", None),
        ("bytes=1-2,5-6", None),
        ("lines=1-2", None),
        ("bytes=-", None),
    ],
)
def test_range_header_is_parsed(header: str | None, expected: tuple[int, int] | None) -> None:
    assert requested_range(header, 100) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_range_beyond_the_end_is_refused(header: str) -> None:
    with pytest.raises(RequestError, match="the archive, which has 100 bytes") as refused:
        requested_range(header, 100)
    assert refused.value.status == 416


@pytest.fixture
def app(small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Application]:
    monkeypatch.setenv("ACIP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    app = Application(tmp_path / "home", small_artifact)
    until(lambda: app.ask("GET", "/ready")[0] == 200, "the model is not loaded")
    yield app
    app.close()


TARGET = "home/artifacts/exports/small/1/size-0.6000-0123456789abcdef-01234567"


def materialized(exported: Path, target: Path) -> str:
    """Copy an export to the store as a materialization, and return the path of its archive."""
    copytree(exported, target)
    provenance = json.loads((target / PROVENANCE).read_text())
    facts = {"id": "mat-0123456789abcdef", "model": "small", "version": "1", "size": {"ratio": 0.6}, "quantize": None}
    (target / PROVENANCE).write_text(json.dumps({**provenance, "materialization": facts}))
    return "/v1/materializations/mat-0123456789abcdef/archive"


@pytest.mark.parametrize("removed", ["weights", "folder"])
def test_incomplete_export_is_not_an_archive(app: Application, exported: Path, tmp_path: Path, removed: str) -> None:
    target = tmp_path / TARGET
    path = materialized(exported, target)
    assert app.ask("GET", path)[0] == 200
    if removed == "folder":
        rmtree(target)
    else:
        (target / "model.safetensors").unlink()
    status, body = app.ask("GET", path)
    expected = (404, "materialization_not_found") if removed == "folder" else (409, "not_materialized")
    assert (status, json.loads(body)["error"]["code"]) == expected


def test_route_returns_the_archive_whole_and_in_ranges(
    app: Application, exported: Path, heldout_tokens: torch.Tensor, tmp_path: Path
) -> None:
    target = tmp_path / TARGET
    path = materialized(exported, target)
    status, whole = app.ask("GET", path)
    assert status == 200, whole
    with tarfile.open(fileobj=io.BytesIO(whole)) as opened:
        opened.extractall(tmp_path / "down", filter="data")
    AutoTokenizer.from_pretrained(tmp_path / "down" / "small-0.6000")
    assert torch.equal(logits(read(tmp_path / "down" / "small-0.6000"), heldout_tokens[:2]), logits(read(exported), heldout_tokens[:2]))
    half = len(whole) // 2
    for header, expected in ((f"bytes=0-{half - 1}", whole[:half]), (f"bytes={half}-", whole[half:])):
        assert app.ask("GET", path, headers=[(b"range", header.encode())]) == (206, expected)
    assert app.ask("GET", path, headers=[(b"range", b"bytes=5-9"), (b"if-range", b'"another"')]) == (200, whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Archive, "read", None)  # for HEAD, no file is read
        assert app.ask("HEAD", path) == (200, b"")
    assert app.ask("GET", path, headers=[(b"range", b"bytes=%d-" % len(whole))])[0] == 416
    assert app.ask("GET", path.replace("cdef", "cdee"))[0] == 404


def test_archive_is_read_from_s3_in_ranges(
    folder: Path, archive: Archive, s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    store = Store(f"s3://models/{tmp_path.name}", tmp_path / "cache")
    uri = store.add(copytree(folder, tmp_path / "copy"), "small", "byte")
    remote = Archive(*store.source(uri), "small")
    assert not isinstance(remote.source, Folder)
    assert remote.size == archive.size
    assert b"".join(remote.read(100, 3000)) == b"".join(archive.read(100, 3000))
