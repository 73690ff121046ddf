"""Loading a size reads little more than the bytes of that size, from a real S3 server and from disk. Growing reads the difference."""

import json
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree
from typing import Any, cast

import boto3
import psutil
import pytest
import torch
from acip_platform.storage.s3 import S3Source
from acip_platform.storage.store import Store, StoreError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import acip
from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Folder, Range
from acip.base import Base
from acip.calibration.loop import calibrate
from acip.calibration.parametrize import parametrize
from acip.data import TokenBatches
from acip.errors import ArtifactError
from acip.recipe import Recipe
from acip.sizing.elastic_model import ElasticModel
from tests.conftest import byte_tokenizer

RECIPE = Recipe(basis="svd", scores="singular_values", adapter_rank=0, post_tune_steps=0)
ALLOWED = 2_000_000  # bytes read in addition to those of the size: headers, checksums, the removal order, ends of chunks


class CountingFolder(Folder):
    """A folder that counts the bytes it reads and verifies their checksums, as the S3 source does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, checked=True)
        self.fetched = 0

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        self.fetched += sum(stop - start for start, stop in ranges)
        return super().read(file, ranges)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random Llama of 60 MB in bfloat16, large enough that the bytes of a size outweigh headers and checksums."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12, max_position_embeddings=64
    )
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config).bfloat16().eval()
    base = Base(model, byte_tokenizer(), "random", None, "0" * 12)
    parametrize(model, RECIPE)
    calibration = calibrate(model, TokenBatches(torch.zeros(4, 64, dtype=torch.long), 1), RECIPE)
    return Artifact.save(tmp_path_factory.mktemp("wide") / "artifact", base, calibration, {})


@pytest.fixture
def remote(s3_server: dict[str, str], wide: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, str]:
    """The wide artifact on S3."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    store = Store(f"s3://models/{tmp_path.name}", tmp_path / "cache")
    return store, store.put(copytree(wide.folder, tmp_path / "copy"), "wide/1")


def needed(any_size: ElasticModel) -> int:
    """Return the bytes of the factors and dense layers at the current ranks, plus the rest of the model."""
    total = any_size.table.weights.rest if any_size.table.weights else 0
    for layer in any_size.layers.values():
        M, N = layer.left.values.shape[1], layer.right.values.shape[1]
        total += 2 * (M * N if layer.rank is None else layer.rank * (M + N))
    return total


def logits(any_size: ElasticModel) -> Tensor:
    model: Any = any_size.model
    with torch.no_grad():
        return model(input_ids=torch.arange(32)[None]).logits


def assert_same_size(found: ElasticModel, expected: ElasticModel) -> None:
    """Compare the ranks and factors exactly, and the logits up to rounding: ranks may be padded, if more of them are in memory."""
    for name, layer in found.layers.items():
        other = expected.layers[name]
        assert layer.rank == other.rank
        for some, more in ((layer.left.values, other.left.values), (layer.right.values, other.right.values)):
            rows = min(len(some), len(more))
            assert rows >= (layer.rank or 0) and torch.equal(some[:rows], more[:rows])
    assert (logits(found) - logits(expected)).norm() <= 0.01 * logits(expected).norm()


@pytest.mark.parametrize("size", [0.3, 0.6, 0.9, 1.0])
def test_loading_a_size_reads_only_its_bytes_from_s3(remote: tuple[Store, str], wide: Artifact, size: float) -> None:
    store, uri = remote
    artifact = store.open(uri)
    source = artifact.source
    assert isinstance(source, S3Source)
    any_size = artifact.load(size=size)
    assert source.fetched <= 1.02 * needed(any_size) + ALLOWED
    assert source.fetched < needed(any_size) + ALLOWED / 2, "the additional bytes are far below the limit"
    assert source.requests < 200
    whole = wide.load()
    whole.resize(size)
    assert_same_size(any_size, whole)


def test_growing_fetches_the_difference(remote: tuple[Store, str], wide: Artifact) -> None:
    store, uri = remote
    artifact = store.open(uri)
    source: Any = artifact.source
    any_size = artifact.load(size=0.4)
    small, before = needed(any_size), source.fetched
    any_size.resize(0.6)
    assert 0 < source.fetched - before <= 1.02 * (needed(any_size) - small) + 100_000
    grown, whole = source.fetched, wide.load()
    for smaller in (0.5, 0.4, 0.6):
        any_size.resize(smaller)
        whole.resize(smaller)
        assert_same_size(any_size, whole)
    assert source.fetched == grown, "rows in memory are not fetched again"
    any_size.resize(1.0)
    whole.resize(1.0)
    assert torch.equal(logits(any_size), logits(whole))


def test_the_api_of_the_paper_fetches_only_what_it_needs(remote: tuple[Store, str], wide: Artifact, tmp_path: Path) -> None:
    """A model loaded at 0.4, grown to 0.6 and compressed computes the same as the materialized model at 0.6."""
    store, uri = remote
    artifact = store.open(uri)
    source: Any = artifact.source
    model: Any = acip.from_pretrained(artifact, size=0.4)
    first = source.fetched
    assert first < 0.6 * sum(path.stat().st_size for path in wide.folder.rglob("*"))
    model.prune_model_by_score(size_ratio=0.6).compress()
    assert source.fetched > first
    whole = wide.load()
    whole.resize(0.6)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, cast(Any, whole.materialize())(input_ids=ids).logits)


def test_a_model_loaded_at_one_size_grows_after_a_move_and_a_cast(wide: Artifact) -> None:
    any_size = Artifact.open(wide.folder).load(size=0.4)
    model: Any = any_size.model
    torch.nn.Module.to(model, "cpu", torch.float32)
    for size in (0.6, 1.0):
        any_size.resize(size)
        assert {p.dtype for p in model.parameters() if not p.is_meta} == {torch.float32}
        whole = wide.load()
        torch.nn.Module.to(whole.model, torch.float32)
        whole.resize(size)
        torch.testing.assert_close(logits(any_size), logits(whole), rtol=0, atol=1e-4)


def test_loading_a_size_reads_only_its_bytes_from_disk(wide: Artifact) -> None:
    source = CountingFolder(wide.folder)
    any_size = Artifact.open(wide.folder, source).load(size=0.4)
    assert source.fetched <= 1.02 * needed(any_size) + ALLOWED
    assert all(layer.original.weight.is_meta for layer in any_size.layers.values() if layer.rank is not None)
    held = sum(layer.left.values.numel() + layer.right.values.numel() for layer in any_size.layers.values())
    assert held * 2 < 1.1 * needed(any_size), "memory holds no more than the size needs"


def test_mapped_weights_are_not_copied(wide: Artifact) -> None:
    """Loading uses almost no private memory, because all replicas on a machine share the pages of the mapped file."""
    private = psutil.Process().memory_full_info().uss
    any_size = wide.load()
    assert psutil.Process().memory_full_info().uss - private < 0.2 * needed(any_size)


def test_a_wrong_dtype_in_a_header_is_detected(remote: tuple[Store, str]) -> None:
    """BF16 and F16 have the same number of bytes, so only the checksum reveals the change."""
    store, uri = remote
    key = uri.removeprefix("s3://models/") + "/factors.safetensors"
    client = boto3.client("s3")
    content = client.get_object(Bucket="models", Key=key)["Body"].read()
    client.put_object(Bucket="models", Key=key, Body=content.replace(b'"BF16"', b'"F16" '))
    with pytest.raises(ArtifactError, match="corrupted"):
        store.open(uri).load()


def test_a_fetched_artifact_is_verified(remote: tuple[Store, str]) -> None:
    store, uri = remote
    key = uri.removeprefix("s3://models/") + "/dense.safetensors"
    client = boto3.client("s3")
    content = bytearray(client.get_object(Bucket="models", Key=key)["Body"].read())
    content[-1] ^= 1
    client.put_object(Bucket="models", Key=key, Body=bytes(content))
    with pytest.raises(ArtifactError, match="corrupted"):
        store.fetch(uri)
    assert not list(store.cache.glob("*/*")), "the failed download leaves no file"


@pytest.mark.parametrize("file", ["factors", "dense", "rest", "order", "digests"])
def test_a_flipped_bit_on_s3_is_detected(remote: tuple[Store, str], file: str) -> None:
    store, uri = remote
    bucket, key = "models", uri.removeprefix("s3://models/") + f"/{file}.safetensors"
    client = boto3.client("s3")
    content = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    content[-1 if file == "order" else len(content) // 2] ^= 1
    if file == "order":  # only its tensor `layer` is read
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        content[-1] ^= 1
        content[8 + int.from_bytes(content[:8], "little") + header["layer"]["data_offsets"][0]] ^= 1
    client.put_object(Bucket=bucket, Key=key, Body=bytes(content))
    with pytest.raises(ArtifactError, match="corrupted"):
        store.open(uri).load()


def test_an_object_replaced_during_reading_is_an_error(remote: tuple[Store, str]) -> None:
    store, uri = remote
    artifact = store.open(uri)
    any_size = artifact.load(size=0.4)
    key = uri.removeprefix("s3://models/") + "/factors.safetensors"
    boto3.client("s3").put_object(Bucket="models", Key=key, Body=b"another")
    with pytest.raises(StoreError, match="was replaced while it was being read"):
        any_size.resize(0.6)
    assert torch.isfinite(logits(any_size)).all(), "the previous size still works"
