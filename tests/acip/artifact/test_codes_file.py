"""Coded layers are read back from an artifact bit for bit. A model of any number of bytes reads little more than these bytes."""

import contextlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Range
from acip.artifact.codes_file import StoredVersions
from acip.artifact.manifest import MANIFEST, TENSOR_FILES
from acip.base import Base
from acip.calibration.loop import calibrate
from acip.calibration.parametrize import parametrize
from acip.calibration.result import Calibration
from acip.coding.coded_model import CodedModel
from acip.data import TokenBatches
from acip.errors import AcipError, ArtifactError, BudgetError
from acip.layers.targets import find_linears
from acip.modeling_acip import CodedLinear, weight_MN
from acip.recipe import Recipe
from acip.sizing.budget import Budget
from tests.acip.artifact.test_fetch import ALLOWED, CountingFolder, assert_same_size
from tests.acip.artifact.test_hostile import MemorySource, sealed, to_json
from tests.conftest import byte_tokenizer, logits
from tests.support.coded import LARGEST, load_bytes, rounded
from tests.support.fuzzing import fuzz, harmed

RECIPE = Recipe(basis="svd", scores="singular_values", adapter_rank=0, post_tune_steps=0, dtype="float32")
IDS = torch.arange(16)[None]


def llama(width: int = 32, layers: int = 2, dtype: torch.dtype = torch.float32, head_dim: int | None = None) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, attention_bias=True, head_dim=head_dim or width // 4,
    )  # fmt: skip
    config.dtype = dtype
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)  # type: ignore[arg-type]


def gpt2(width: int = 32, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose linear layers are Conv1D, with transposed weights."""
    config = GPT2Config(vocab_size=256, n_embd=width, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    config.dtype = dtype
    return GPT2LMHeadModel(config).to(dtype).eval().requires_grad_(False)  # type: ignore[arg-type]


def calibrated_with_codes(model: PreTrainedModel, largest: Sequence[int] = LARGEST) -> tuple[Base, Calibration, CodedModel]:
    """Return a calibration of `model` by singular values, and its coded layers. The model is changed in place."""
    base = Base(model, byte_tokenizer(), "random", None, "0" * 12)
    codes = rounded(find_linears(model), largest)
    parametrize(model, RECIPE)
    return base, calibrate(model, TokenBatches(torch.zeros(4, 64, dtype=torch.long), 1), RECIPE), codes


@pytest.fixture(scope="module")
def coded() -> tuple[Base, Calibration, CodedModel]:
    torch.manual_seed(0)
    return calibrated_with_codes(llama())


@pytest.fixture(scope="module")
def artifact(coded: tuple[Base, Calibration, CodedModel], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    base, calibration, codes = coded
    return Artifact.save(tmp_path_factory.mktemp("coded") / "artifact", base, calibration, {}, codes)


def rest_bytes(artifact: Artifact) -> int:
    return artifact.tensors("rest").data_bytes


def limits(artifact: Artifact) -> list[int]:
    """Return the bytes of the smallest, a middle and the largest coded model."""
    totals = artifact.coded().order.totals
    return [rest_bytes(artifact) + totals[i] for i in (0, len(totals) // 2, -1)]


def test_versions_and_their_order_are_read_back_bit_for_bit(artifact: Artifact, coded: tuple[Base, Calibration, CodedModel]) -> None:
    *_, codes = coded
    stored = artifact.coded()
    assert list(stored.versions) == list(codes.versions)
    assert stored.order.versions == codes.order.versions
    assert (stored.order.steps, stored.order.totals, stored.bytes) == (codes.order.steps, codes.order.totals, codes.bytes)
    for name, versions in codes.versions.items():
        assert len(stored.versions[name]) == len(versions) == len(LARGEST)
        for read, packed in zip(stored.versions[name], versions, strict=True):
            assert (read.stream, read.inputs, read.bytes) == (packed.stream, packed.inputs, packed.bytes)
            assert torch.equal(read.steps, packed.steps)
            assert torch.equal(read.unpack().codes, packed.unpack().codes)
    assert [packed.stream for packed in stored.versions[name][1:]] == [packed.stream for packed in versions[1:]]


def test_the_file_is_valid_safetensors_with_coarse_versions_first(artifact: Artifact) -> None:
    path = artifact.folder / "codes.safetensors"
    with safe_open(path, "pt") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a file of safetensors is not iterable)
    assert {tensor.dtype for tensor in content.values()} == {torch.float32, torch.float16, torch.uint8}
    entries = artifact.tensors("codes").entries
    first = [entries[f"{name}.0.stream"].start for name in artifact.coded().versions]
    assert max(first) < min(entry.start for name, entry in entries.items() if name.endswith((".1.stream", ".2.stream")))
    versions = sum(tensor.nbytes for tensor in content.values())
    assert versions == artifact.coded().bytes == artifact.tensors("codes").data_bytes


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_model_of_any_bytes_has_the_decoded_weights(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    plain = make()
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    base, calibration, codes = calibrated_with_codes(plain)
    artifact = Artifact.save(tmp_path / "artifact", base, calibration, {}, codes)
    for limit in [*limits(artifact), limits(artifact)[1] - 1]:
        model, stored_bytes = load_bytes(artifact, limit)
        assert stored_bytes <= limit
        assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())
        expected = make()
        expected.load_state_dict(state)
        linears = find_linears(expected)
        for name, weight in codes.weights(limit - rest_bytes(artifact)):
            assert isinstance(model.get_submodule(name), CodedLinear)
            weight_MN(linears[name]).copy_(weight)
        torch.testing.assert_close(logits(model, IDS), logits(expected, IDS), rtol=0, atol=1e-5)
    assert stored_bytes < limits(artifact)[1], "one byte less is a smaller model"


def test_from_the_bytes_of_the_dense_model_on_it_is_the_base_bit_for_bit(
    coded: tuple[Base, Calibration, CodedModel], artifact: Artifact, tmp_path: Path
) -> None:
    base, calibration, codes = coded
    dense_bytes = rest_bytes(artifact) + artifact.tensors("dense").data_bytes
    uncoded = Artifact.save(tmp_path / "uncoded", base, calibration, {})
    whole = artifact.load()
    for each, limit in ((artifact, dense_bytes), (artifact, 10 * dense_bytes), (uncoded, dense_bytes)):
        model, stored_bytes = load_bytes(each, limit)
        assert stored_bytes == dense_bytes == sum(tensor.nbytes for tensor in model.parameters())
        assert torch.equal(logits(model, IDS), logits(whole.model, IDS))
        assert all(type(model.get_submodule(name)) is nn.Linear for name in codes.versions)
    below, stored_bytes = load_bytes(artifact, dense_bytes - 1)
    assert stored_bytes < dense_bytes
    coded_layers = [isinstance(below.get_submodule(name), CodedLinear) for name in codes.versions]
    assert any(coded_layers) and not all(coded_layers), "the sizes next to the base model have exact layers"


def test_too_few_bytes_are_refused_with_the_smallest_number(artifact: Artifact) -> None:
    smallest = limits(artifact)[0]
    for limit in (smallest - 1, 1):
        with pytest.raises(BudgetError, match=rf"size {limit} \(stored_bytes\) can't be reached: the smallest is {smallest:,} bytes"):
            load_bytes(artifact, limit)


class CountingReads(CountingFolder):
    """A counting folder that also counts the reads of each file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: dict[str, int] = {}

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        self.reads[file] = self.reads.get(file, 0) + 1
        return super().read(file, ranges)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random Llama of 25 MB in bfloat16, large enough that the bytes of a size outweigh headers and checksums."""
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(llama(640, 3, torch.bfloat16), (1, 4, 15, 100))
    return Artifact.save(tmp_path_factory.mktemp("wide") / "artifact", base, calibration, {}, codes)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_loading_reads_only_the_bytes_of_the_model(wide: Artifact, share: float) -> None:
    smallest, _, largest = limits(wide)
    source = CountingReads(wide.folder)
    model, stored_bytes = load_bytes(Artifact.open(wide.folder, source), int(smallest + share * (largest - smallest)))
    assert source.fetched <= 1.05 * stored_bytes + ALLOWED
    assert source.fetched < 1.05 * stored_bytes + ALLOWED / 4, "the additional bytes are far below the limit"
    assert source.reads["codes.safetensors"] == source.reads["rest.safetensors"] == 3, "the length of the header, the header, and one read"
    held = sum(tensor.nbytes for name, tensor in model.named_buffers() if name.endswith((".codes", ".steps")))
    M_N = [(row["M"], row["N"]) for row in wide.manifest["layers"]]
    assert held == sum(M * N + 4 * M for M, N in M_N)


def test_opening_the_codes_reads_none(wide: Artifact) -> None:
    source = CountingReads(wide.folder)
    artifact = Artifact.open(wide.folder, source)
    artifact.tensors("rest")  # reads the checksums of all files
    before = source.fetched
    stored = artifact.coded()
    assert source.fetched - before < 50_000, "the header alone"
    name = next(iter(stored.versions))
    before = source.fetched
    packed = stored.versions[name][-1]
    assert source.fetched - before == packed.bytes


def test_an_artifact_without_codes_has_schema_4(coded: tuple[Base, Calibration, CodedModel], artifact: Artifact, tmp_path: Path) -> None:
    """The files of an earlier, interrupted attempt with codes are removed."""
    base, calibration, _ = coded
    folder = copytree(artifact.folder, tmp_path / "again")
    (folder / MANIFEST).unlink()
    uncoded = Artifact.save(folder, base, calibration, {})
    assert (artifact.manifest["schema"], uncoded.manifest["schema"]) == (5, 4)
    assert "codes" not in uncoded.manifest
    assert not (folder / "codes.safetensors").exists() and "codes.safetensors" not in uncoded.manifest["files"]
    for file in TENSOR_FILES:
        one, other = (each.tensors(file).read(list(each.tensors(file).entries)) for each in (artifact, uncoded))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ArtifactError, match=r"holds no coded layers\. Set code: both or code: bits in the recipe"):
        uncoded.coded()


def test_codes_of_other_layers_are_refused(coded: tuple[Base, Calibration, CodedModel], tmp_path: Path) -> None:
    base, calibration, codes = coded
    fewer = dict(list(codes.versions.items())[1:])
    with pytest.raises(ArtifactError, match="not the target layers"):
        Artifact.save(tmp_path / "other", base, calibration, {}, replace(codes, versions=fewer))
    assert not (tmp_path / "other").exists()


def test_a_tuned_artifact_and_a_measured_curve_keep_the_codes(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    tuned = artifact.tuned(tmp_path / "tuned", {}, {}, {"job": "another"}).record_curve([{"asked": 1.0, "got": 1.0, "loss": 2.0}])
    assert tuned.manifest["schema"] == 5
    assert tuned.manifest["files"]["codes.safetensors"] == artifact.manifest["files"]["codes.safetensors"]
    model, _ = load_bytes(Artifact.open(tuned.folder, CountingFolder(tuned.folder)), limits(artifact)[0])
    assert torch.equal(logits(model, IDS), logits(load_bytes(artifact, limits(artifact)[0])[0], IDS))


def test_an_opened_artifact_with_codes_computes_its_sizes(artifact: Artifact) -> None:
    any_size = artifact.load(size=0.6)
    assert any_size.cut is not None and any_size.cut.got <= 0.6


def test_codes_are_loaded_to_where_the_model_was_moved(artifact: Artifact) -> None:
    any_size = artifact.load(size=Budget(stored_bytes=limits(artifact)[0]))
    torch.nn.Module.to(any_size.model, "meta")
    any_size.resize(Budget(stored_bytes=limits(artifact)[-1]))
    assert {codes.codes.device.type for layer in any_size.layers.values() for codes in layer.coded.values()} == {"meta"}


# ---- hostile input


def edited(artifact: Artifact, edit: Callable[[dict[str, Any]], Any]) -> MemorySource:
    """Return the artifact's files with an edited manifest."""
    manifest = json.loads(json.dumps(artifact.manifest))
    edit(manifest)
    return MemorySource({MANIFEST: to_json(manifest)}, artifact.folder)


def first(manifest: dict[str, Any]) -> list[Any]:
    return manifest["codes"]["layers"][manifest["layers"][0]["name"]]


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "schema 4 with codes": lambda m: m.update(schema=4),
    "schema 5 without codes": lambda m: m.pop("codes"),
    "codes are a list": lambda m: m.update(codes=[]),
    "no layers": lambda m: m.update(codes={}),
    "a layer is missing": lambda m: m["codes"]["layers"].popitem(),
    "an unknown layer": lambda m: m["codes"]["layers"].update(other=[[1, 1.0]]),
    "no versions": lambda m: first(m).clear(),
    "a number instead of a version": lambda m: first(m).__setitem__(0, 3),
    "three numbers": lambda m: first(m)[0].append(1),
    "bytes are a fraction": lambda m: first(m)[0].__setitem__(0, 1.5),
    "bytes are negative": lambda m: first(m)[0].__setitem__(0, -1),
    "bytes are true": lambda m: first(m)[0].__setitem__(0, True),
    "the loss is NaN": lambda m: first(m)[0].__setitem__(1, float("nan")),
    "the loss is infinite": lambda m: first(m)[0].__setitem__(1, float("inf")),
    "the loss is text": lambda m: first(m)[0].__setitem__(1, "0.5"),
    "the loss has thousands of digits": lambda m: first(m)[0].__setitem__(1, 10**400),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_malformed_field_is_refused_when_the_artifact_is_opened(artifact: Artifact, case: str) -> None:
    with pytest.raises(ArtifactError, match="codes"):
        Artifact.open(artifact.folder, edited(artifact, MANIFESTS[case]))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: first(m).append([10**6, 0.0]),
        lambda m: first(m).pop(),
        lambda m: first(m)[0].__setitem__(0, first(m)[0][0] + 1),
        lambda m: m["layers"][0].update(N=m["layers"][0]["N"] * 100),
        lambda m: m["layers"][0].update(M=m["layers"][0]["M"] + 1),
    ],
    ids=["a version more", "a version fewer", "other bytes", "more columns than bits", "a row more"],
)
def test_a_file_that_contradicts_the_manifest_is_refused(artifact: Artifact, edit: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(ArtifactError, match="manifest"):
        Artifact.open(artifact.folder, edited(artifact, edit)).coded()


@fuzz(st.data(), share=0.7)
def test_any_manifest_is_read_or_refused(artifact: Artifact, data: st.DataObject) -> None:
    codes = data.draw(harmed(artifact.manifest["codes"], most=2))
    with contextlib.suppress(AcipError):
        opened = Artifact.open(artifact.folder, MemorySource({MANIFEST: to_json({**artifact.manifest, "codes": codes})}, artifact.folder))
        model, stored_bytes = load_bytes(opened, limits(artifact)[1])
        assert stored_bytes <= limits(artifact)[1]
        assert logits(model, IDS).shape == (1, 16, 256)


@fuzz(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(artifact: Artifact, offset: int, value: int) -> None:
    """The author of an artifact also writes its checksums, so any stream may come."""
    content = bytearray((artifact.folder / "codes.safetensors").read_bytes())
    content[offset % len(content)] = value
    with contextlib.suppress(ArtifactError):
        changed = Artifact.open(artifact.folder, MemorySource(sealed(artifact, "codes.safetensors", bytes(content)), artifact.folder))
        for versions in changed.coded().versions.values():
            for packed in versions:
                assert packed.steps.isfinite().all()
                packed.unpack()


@pytest.mark.parametrize("part", ["unit", "steps", "stream"])
def test_a_flipped_bit_is_detected_by_its_checksum(artifact: Artifact, tmp_path: Path, part: str) -> None:
    folder = copytree(artifact.folder, tmp_path / "copy")
    name = next(iter(artifact.coded().versions))
    content = bytearray((folder / "codes.safetensors").read_bytes())
    content[artifact.tensors("codes").entry(f"{name}.0.{part}").start] ^= 1
    (folder / "codes.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="corrupted"):
        load_bytes(Artifact.open(folder, CountingFolder(folder)), limits(artifact)[0])
    with pytest.raises(ArtifactError, match="corrupted"):
        Artifact.open(folder, verify=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_step_sizes_that_are_not_numbers_above_zero_are_refused(artifact: Artifact, value: float) -> None:
    name = next(iter(artifact.coded().versions))
    content = bytearray((artifact.folder / "codes.safetensors").read_bytes())
    start = artifact.tensors("codes").entry(f"{name}.0.unit").start
    content[start : start + 4] = struct.pack("<f", value)
    changed = Artifact.open(artifact.folder, MemorySource({"codes.safetensors": bytes(content)}, artifact.folder))
    with pytest.raises(ArtifactError, match="not finite, or negative"):
        load_bytes(changed, limits(artifact)[0])


def test_a_truncated_stream_is_refused(artifact: Artifact) -> None:
    name = next(iter(artifact.coded().versions))
    content = bytearray((artifact.folder / "codes.safetensors").read_bytes())
    entry = artifact.tensors("codes").entry(f"{name}.0.stream")
    content[entry.start : entry.start + entry.rows] = bytes(entry.rows)
    changed = Artifact.open(artifact.folder, MemorySource({"codes.safetensors": bytes(content)}, artifact.folder))
    with pytest.raises(ArtifactError, match="stream of codes"):
        load_bytes(changed, limits(artifact)[0])


def test_stored_versions_behave_as_a_mapping(artifact: Artifact) -> None:
    stored = artifact.coded().versions
    assert isinstance(stored, StoredVersions)
    assert len(stored) == len(artifact.manifest["layers"])
    assert "other" not in stored
    with pytest.raises(IndexError):
        next(iter(stored.values()))[len(LARGEST)]


def decoded(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    assert isinstance(layer, CodedLinear)
    return layer.codes.float() * layer.steps[:, None]


def test_more_bytes_give_less_predicted_loss(artifact: Artifact, coded: tuple[Base, Calibration, CodedModel]) -> None:
    *_, codes = coded
    smallest, _, largest = limits(artifact)
    losses = []
    for limit in range(smallest, largest, (largest - smallest) // 5):
        model, stored_bytes = load_bytes(artifact, limit)
        count = codes.order.within(limit - rest_bytes(artifact))
        assert stored_bytes == rest_bytes(artifact) + codes.order.totals[count]
        losses.append(codes.order.losses[count])
        for name, version in codes.order.at(count).items():
            assert torch.equal(decoded(model, name), codes.versions[name][version].unpack().decode())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


# ---- artifacts that hold codes only


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def bits_only(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, CodedModel, Artifact]:
    model = request.param().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    codes = rounded(find_linears(model))
    recipe = replace(RECIPE, code="bits", dtype="bfloat16", dense_if_no_saving=False)
    base = Base(model, byte_tokenizer(), "random", None, "0" * 12)
    return model, codes, Artifact.save_coded(tmp_path_factory.mktemp("bits") / "artifact", base, recipe, codes, {"job": "x"})


def test_an_artifact_of_codes_only_holds_the_base_bit_for_bit(bits_only: tuple[PreTrainedModel, CodedModel, Artifact]) -> None:
    model, _, artifact = bits_only
    whole = Artifact.open(artifact.folder, CountingFolder(artifact.folder)).load()
    plain = sum(p.nbytes for p in model.parameters())
    dense, stored_bytes = load_bytes(artifact, plain)
    state, loaded = model.state_dict(), dense.state_dict()
    assert state.keys() == loaded.keys() and all(torch.equal(state[name], loaded[name]) for name in state)
    assert torch.equal(logits(dense, IDS), logits(whole.model, IDS))
    assert stored_bytes == artifact.tensors("dense").data_bytes + rest_bytes(artifact) < plain
    assert whole.cut is not None and whole.cut.bytes == plain, "a size in ranks counts the bytes of the plain model"
    assert whole.table.dense_params + whole.table.rest_params == model.num_parameters()
    for coded_limit in limits(artifact):
        small, stored_bytes = load_bytes(artifact, coded_limit)
        assert stored_bytes == coded_limit and logits(small, IDS).isfinite().all()


def test_the_only_size_in_ranks_of_an_artifact_of_codes_only_is_the_base(bits_only: tuple[PreTrainedModel, CodedModel, Artifact]) -> None:
    *_, artifact = bits_only
    for budget in (Budget(ratio=0.99), Budget(ratio=0.5, convention="model"), Budget(params=100), Budget(max_flops=100)):
        with pytest.raises(BudgetError, match=r"holds codes only.*give a ratio in the convention bytes, stored_bytes, memory_mb"):
            artifact.table().cut(budget)
    with pytest.raises(BudgetError, match=r"the smallest is .* bytes in 8 bit\. .*holds codes only.*without bits \(--quantize\)"):
        artifact.table().cut(Budget(stored_bytes=100, bits=8))
    assert set(artifact.load(size=1.0).table.cut(Budget(ratio=1.0)).ranks.values()) == {None}


def test_codes_of_other_layers_are_refused_without_directions(
    bits_only: tuple[PreTrainedModel, CodedModel, Artifact], tmp_path: Path
) -> None:
    model, codes, artifact = bits_only
    fewer = dict(list(codes.versions.items())[1:])
    base = Base(model, byte_tokenizer(), "random", None, "0" * 12)
    with pytest.raises(ArtifactError, match="not the target layers"):
        Artifact.save_coded(tmp_path / "other", base, artifact.recipe, replace(codes, versions=fewer), {})


def test_a_removal_order_without_directions_is_refused(bits_only: tuple[PreTrainedModel, CodedModel, Artifact], artifact: Artifact) -> None:
    """An order of no removals belongs to `code: bits`, and to no other artifact."""
    *_, codes_only = bits_only
    for of, code in ((codes_only, "both"), (artifact, "bits")):
        changed = Artifact.open(of.folder, edited(of, lambda m, code=code: m["recipe"].update(code=code)))  # type: ignore[misc]
        with pytest.raises(ArtifactError, match="removal order does not fit"):
            changed.table()


@pytest.mark.parametrize("file", ["dense", "rest", "factors"])
def test_a_flipped_bit_of_a_lossless_tensor_is_detected_by_its_checksum(wide: Artifact, tmp_path: Path, file: str) -> None:
    folder = copytree(wide.folder, tmp_path / "copy")
    content = bytearray((folder / f"{file}.safetensors").read_bytes())
    entry = max(wide.tensors(file).entries.values(), key=lambda entry: entry.bytes)
    assert entry.coded is not None
    content[entry.start] ^= 1  # a mantissa: it decodes to another number
    (folder / f"{file}.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="corrupted"):
        Artifact.open(folder, CountingFolder(folder)).load()


def test_directions_are_read_by_the_rows_that_a_size_needs(wide: Artifact) -> None:
    """Coded chunks of rows are read separately, and give the same model as the whole artifact."""
    counted = CountingFolder(wide.folder)
    size = Budget(0.3, "linear")
    small = Artifact.open(wide.folder, counted).load(size=size)
    assert counted.fetched < 0.6 * wide.tensors("factors").data_bytes + wide.tensors("rest").data_bytes
    whole = wide.load()
    whole.resize(size)
    assert_same_size(small, whole)
