"""The store on a real S3 server: uploads equal downloads, and an artifact exists only once its manifest does."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

import boto3
import pytest
from acip_platform.storage.s3 import S3
from acip_platform.storage.store import Store, StoreError

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST


@pytest.fixture
def bucket(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Create a bucket for one test and return its name."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    name = tmp_path.name.replace("_", "-")
    boto3.client("s3").create_bucket(Bucket=name)
    return name


def test_artifact_round_trip(bucket: str, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"s3://{bucket}/artifacts", tmp_path / "cache")
    copytree(small_artifact.folder, tmp_path / "copy")
    assert not store.exists(store.uri("tiny/1"))
    uri = store.put(tmp_path / "copy", "tiny/1")
    assert uri == f"s3://{bucket}/artifacts/tiny/1"
    assert store.exists(uri)
    fetched = Artifact.open(store.fetch(uri), verify=True)
    assert fetched.manifest == small_artifact.manifest
    assert store.fetch(uri) == fetched.folder, "a second fetch downloads nothing"

    assert store.record_curve(uri, fetched, [{"asked": 1.0}]).curve == [{"asked": 1.0}]
    monkeypatch.setattr(S3, "download", lambda *_: pytest.fail("the files were downloaded again"))
    assert Artifact.open(store.fetch(uri), verify=True).curve == [{"asked": 1.0}], "a new curve reuses the downloaded files"
    assert store.fetch(uri) == fetched.folder


def test_concurrent_fetches_download_once(bucket: str, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, downloads, original_download = Store(f"s3://{bucket}/artifacts", tmp_path / "cache"), list[str](), S3.download
    uri = store.put(copytree(small_artifact.folder, tmp_path / "copy"), "tiny/1")

    def download(s3: S3, uri: str, names: Iterable[str], into: Path) -> None:
        downloads.append(uri)
        original_download(s3, uri, names, into)

    monkeypatch.setattr(S3, "download", download)
    with ThreadPoolExecutor(3) as pool:
        (folder,) = set(pool.map(store.fetch, [uri] * 3))
    assert downloads == [uri] and Artifact.open(folder, verify=True).manifest == small_artifact.manifest


def test_an_artifact_without_manifest_does_not_exist(bucket: str, small_artifact: Artifact, tmp_path: Path) -> None:
    store = Store(f"s3://{bucket}/artifacts", tmp_path / "cache")
    copytree(small_artifact.folder, tmp_path / "copy")
    uri = store.put(tmp_path / "copy", "tiny/1")
    boto3.client("s3").delete_object(Bucket=bucket, Key=f"artifacts/tiny/1/{MANIFEST}")
    assert not store.exists(uri)
    with pytest.raises(StoreError, match="no complete artifact"):
        store.fetch(uri)


def test_a_missing_bucket_is_reported(bucket: str, tmp_path: Path) -> None:
    store = Store("s3://nobody-has-this/artifacts", tmp_path / "cache")
    with pytest.raises(StoreError, match=r"NoSuchBucket.*Check the bucket's name"):
        store.fetch(store.uri("tiny/1"))


def test_a_folder_is_complete_with_its_last_file(bucket: str, tmp_path: Path) -> None:
    store = Store(f"s3://{bucket}", tmp_path / "cache")
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for name in ("last", "deep/last", "weights"):
        (tmp_path / "new" / name).write_text(name)
    copytree(tmp_path / "new", tmp_path / "again")
    uri = store.add(tmp_path / "new", "some/one", "last")
    assert store.exists(uri, "last") and not store.exists(uri)
    (created,) = (time for found, time in store.complete("some", "last").items() if found == uri)
    assert store.add(tmp_path / "again", "some/one", "last") == uri and not (tmp_path / "again").exists()
    assert store.complete("some", "last")[uri] == created, "a complete folder is not overwritten"
    assert store.read([f"{uri}/{name}" for name in ("weights", "deep/last")]) == [b"weights", b"deep/last"]
    with pytest.raises(StoreError, match="NoSuchKey"):
        store.read([f"{uri}/other"])
