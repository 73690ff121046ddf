"""Base models on a real S3 server: downloaded once per version, equal to those of a folder."""

from collections.abc import Iterable
from pathlib import Path
from shutil import copytree

import boto3
import pytest
import torch
from acip_platform.scheduling.fleet import Job
from acip_platform.storage import base_models
from acip_platform.storage.inputs import identity, resolved
from acip_platform.storage.s3 import S3

from acip.base import load_base
from acip.errors import BaseModelError


@pytest.fixture
def source(s3_server: dict[str, str], small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Upload a base model, with weights in another format beside it. Return its URI."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    bucket = tmp_path.name.replace("_", "-")
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    folder = copytree(small_base, tmp_path / "base")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.pth").write_bytes(b"the same weights again")
    for file in folder.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), bucket, f"models/small/{file.relative_to(folder)}")
    return f"s3://{bucket}/models/small"


def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the name of every file that is downloaded."""
    names, original = list[str](), S3.download

    def download(s3: S3, uri: str, wanted: Iterable[str], into: Path) -> None:
        names.extend(wanted := list(wanted))
        original(s3, uri, wanted, into)

    monkeypatch.setattr(S3, "download", download)
    return names


def test_a_base_on_s3_equals_that_of_a_folder_and_is_downloaded_once_per_version(
    source: str, small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, expected = downloads(monkeypatch), load_base(small_base, "float32")
    for uri in (source, f"{source}/"):
        base = base_models.load(uri, "float32", False, tmp_path / "cache")
        assert (base.source, base.digest) == (uri, expected.digest)
        assert base.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert len(names) == len(set(names)), "each file is downloaded once"
    assert "original/consolidated.pth" not in names
    before = base_models.local(source, tmp_path / "cache")
    bucket = source.split("/")[2]
    boto3.client("s3").put_object(Bucket=bucket, Key="models/small/README.md", Body=b"changed")
    assert base_models.local(source, tmp_path / "cache") != before
    assert base_models.local(small_base, tmp_path / "cache") == small_base


def test_the_fingerprint_of_a_job_changes_with_the_files_on_s3(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved(source) == source
    names, before = downloads(monkeypatch), Job("a", source).fingerprint
    assert Job("b", f"{source}/").fingerprint == before
    assert identity(source).startswith("s3:")
    boto3.client("s3").put_object(Bucket=source.split("/")[2], Key="models/small/config.json", Body=b"{}")
    assert Job("a", source).fingerprint != before
    assert names == []


def test_an_outline_downloads_no_weights(source: str, small_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names, expected = downloads(monkeypatch), load_base(small_base, "float32").model
    model = base_models.outlined(source, "float32", False).model
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in expected.named_parameters()}
    assert all(p.device == torch.device("meta") for p in model.parameters())
    assert "config.json" in names
    assert not [name for name in names if name.endswith((".safetensors", ".pth"))]


def test_a_folder_without_a_model_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no base model at s3://.*/models/nothing: it has 0 files, but no config.json. Check the URI"):
        base_models.load(source.replace("small", "nothing"), "float32", False, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/base_models/*/"))
