"""A size is fetched as its bytes and little more, from a real S3 server and from disk; growing fetches the difference."""

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
ALLOWED = 2_000_000  # bytes beside the size's own: headers, checksums, the removal order, ends of chunks


class Counting(Folder):
    """A folder that counts what is asked of it, and compares it with its checksums as S3's bytes are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, checked=True)
        self.fetched = 0

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        self.fetched += sum(stop - start for start, stop in ranges)
        return super().read(file, ranges)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random Llama of 60 MB in bfloat16: large enough that a size's bytes outweigh headers and checksums."""
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
    """Bytes of factors and dense layers at the present ranks, and of the rest."""
    own = any_size.table.weights.rest if any_size.table.weights else 0
    for layer in any_size.layers.values():
        M, N = layer.left.values.shape[1], layer.right.values.shape[1]
        own += 2 * (M * N if layer.rank is None else layer.rank * (M + N))
    return own


def logits(any_size: ElasticModel) -> Tensor:
    model: Any = any_size.model
    with torch.no_grad():
        return model(input_ids=torch.arange(32)[None]).logits


@pytest.mark.parametrize("size", [0.3, 0.6, 0.9, 1.0])
def test_a_size_is_read_from_s3_as_its_bytes(remote: tuple[Store, str], wide: Artifact, size: float) -> None:
    store, uri = remote
    artifact = store.open(uri)
    source = artifact.source
    assert isinstance(source, S3Source)
    any_size = artifact.load(size=size)
    assert source.fetched <= 1.02 * needed(any_size) + ALLOWED
    assert source.fetched < needed(any_size) + ALLOWED / 2, "what is read beside is far below what is allowed"
    assert source.requests < 200
    whole = wide.load()
    whole.resize(size)
    assert torch.equal(logits(any_size), logits(whole))


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
        assert torch.equal(logits(any_size), logits(whole))
    assert source.fetched == grown, "what is there is not fetched again"
    any_size.resize(1.0)
    whole.resize(1.0)
    assert torch.equal(logits(any_size), logits(whole))


def test_the_three_lines_fetch_what_they_need(remote: tuple[Store, str], wide: Artifact, tmp_path: Path) -> None:
    """from_pretrained at 0.4, up to 0.6, compressed: what an export of 0.6 computes."""
    store, uri = remote
    artifact = store.open(uri)
    source: Any = artifact.source
    model: Any = acip.from_pretrained(artifact, size=0.4)
    at_first = source.fetched
    assert at_first < 0.6 * sum(path.stat().st_size for path in wide.folder.rglob("*"))
    model.prune_model_by_score(size_ratio=0.6).compress()
    assert source.fetched > at_first
    whole = wide.load()
    whole.resize(0.6)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, cast(Any, whole.materialize())(input_ids=ids).logits)


def test_a_model_of_one_size_can_be_moved_and_cast_and_still_grows(wide: Artifact) -> None:
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


def test_from_disk_no_more_is_read(wide: Artifact) -> None:
    source = Counting(wide.folder)
    any_size = Artifact.open(wide.folder, source).load(size=0.4)
    assert source.fetched <= 1.02 * needed(any_size) + ALLOWED
    assert all(layer.original.weight.is_meta for layer in any_size.layers.values() if layer.rank is not None)
    held = sum(layer.left.values.numel() + layer.right.values.numel() for layer in any_size.layers.values())
    assert held * 2 < 1.1 * needed(any_size), "and no more is held"


def test_what_is_mapped_is_not_copied(wide: Artifact) -> None:
    """All replicas of one machine share the pages of one file: loading takes no memory of its own."""
    own = psutil.Process().memory_full_info().uss
    any_size = wide.load()
    assert psutil.Process().memory_full_info().uss - own < 0.2 * needed(any_size)


def test_a_header_that_lies_about_its_numbers_is_found(remote: tuple[Store, str]) -> None:
    """BF16 read as F16 has the same bytes, and another meaning."""
    store, uri = remote
    key = uri.removeprefix("s3://models/") + "/factors.safetensors"
    client = boto3.client("s3")
    content = client.get_object(Bucket="models", Key=key)["Body"].read()
    client.put_object(Bucket="models", Key=key, Body=content.replace(b'"BF16"', b'"F16" '))
    with pytest.raises(ArtifactError, match="corrupted"):
        store.open(uri).load()


def test_what_is_fetched_is_compared(remote: tuple[Store, str]) -> None:
    store, uri = remote
    key = uri.removeprefix("s3://models/") + "/dense.safetensors"
    client = boto3.client("s3")
    content = bytearray(client.get_object(Bucket="models", Key=key)["Body"].read())
    content[-1] ^= 1
    client.put_object(Bucket="models", Key=key, Body=bytes(content))
    with pytest.raises(ArtifactError, match="corrupted"):
        store.fetch(uri)
    assert not list(store.cache.glob("*/*")), "nothing of it stays"


@pytest.mark.parametrize("file", ["factors", "dense", "rest", "order", "digests"])
def test_a_flipped_bit_on_s3_is_found(remote: tuple[Store, str], file: str) -> None:
    store, uri = remote
    bucket, key = "models", uri.removeprefix("s3://models/") + f"/{file}.safetensors"
    client = boto3.client("s3")
    content = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    content[-1 if file == "order" else len(content) // 2] ^= 1
    if file == "order":  # `layer` alone is read of it
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        content[-1] ^= 1
        content[8 + int.from_bytes(content[:8], "little") + header["layer"]["data_offsets"][0]] ^= 1
    client.put_object(Bucket=bucket, Key=key, Body=bytes(content))
    with pytest.raises(ArtifactError, match="corrupted"):
        store.open(uri).load()


def test_an_object_replaced_while_it_is_read_is_no_mixture(remote: tuple[Store, str]) -> None:
    store, uri = remote
    artifact = store.open(uri)
    any_size = artifact.load(size=0.4)
    key = uri.removeprefix("s3://models/") + "/factors.safetensors"
    boto3.client("s3").put_object(Bucket="models", Key=key, Body=b"another")
    with pytest.raises(StoreError, match="was replaced while it was being read"):
        any_size.resize(0.6)
    assert torch.isfinite(logits(any_size)).all(), "the size that was there still is"
