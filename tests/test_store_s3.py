"""The store on S3, against a real server: what is put is what is fetched, and nothing counts before its manifest."""

from pathlib import Path
from shutil import copytree

import boto3
import pytest
from acip_platform.store import Store, StoreError

from acip.artifact import MANIFEST, Artifact


@pytest.fixture
def bucket(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of this test's own."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    name = tmp_path.name.replace("_", "-")
    boto3.client("s3").create_bucket(Bucket=name)
    return name


def test_an_artifact_goes_there_and_back(bucket: str, small_artifact: Artifact, tmp_path: Path) -> None:
    store = Store(f"s3://{bucket}/artifacts", tmp_path / "cache")
    copytree(small_artifact.folder, tmp_path / "copy")
    assert not store.exists(store.uri("tiny/1"))
    uri = store.put(tmp_path / "copy", "tiny/1")
    assert uri == f"s3://{bucket}/artifacts/tiny/1"
    assert store.exists(uri)
    fetched = Artifact.open(store.fetch(uri), verify=True)
    assert fetched.manifest == small_artifact.manifest
    assert store.fetch(uri) == fetched.folder, "a second fetch downloads nothing"

    changed = fetched.record_curve([{"asked": 1.0}])
    store.replace_manifest(uri, changed.folder)
    assert Artifact.open(store.fetch(uri)).curve == [{"asked": 1.0}]


def test_without_its_manifest_nothing_is_there(bucket: str, small_artifact: Artifact, tmp_path: Path) -> None:
    store = Store(f"s3://{bucket}/artifacts", tmp_path / "cache")
    copytree(small_artifact.folder, tmp_path / "copy")
    uri = store.put(tmp_path / "copy", "tiny/1")
    boto3.client("s3").delete_object(Bucket=bucket, Key=f"artifacts/tiny/1/{MANIFEST}")
    assert not store.exists(uri)
    with pytest.raises(StoreError, match="no complete artifact"):
        store.fetch(uri)


def test_a_missing_bucket_says_what_to_check(bucket: str, tmp_path: Path) -> None:
    store = Store("s3://nobody-has-this/artifacts", tmp_path / "cache")
    with pytest.raises(StoreError, match=r"NoSuchBucket.*Check the bucket's name"):
        store.fetch(store.uri("tiny/1"))
