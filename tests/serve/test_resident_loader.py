"""A model whose weights are mapped from the files of a node is the same model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from acip_platform.serve.engine import resident_model
from acip_platform.serve.engine.engine import Engine
from acip_platform.serve.engine.events import TokenSampled
from acip_platform.serve.engine.model_cache import ModelCache
from acip_platform.serve.engine.request import GenerationRequest
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import SamplingParams
from acip_platform.storage import resident_files
from acip_platform.storage.resident_files import ResidentFiles

from acip.artifact.artifact import Artifact
from acip.errors import AcipError
from acip.layers.packing import PackedLinear, packable, supports_bytes
from acip.sizing.budget import Budget
from tests.serve.conftest import save_with_codes
from tests.support.engines import embedded_only

pytestmark = embedded_only

SIZES = [Budget(ratio=1.0), Budget(ratio=0.6), Budget(ratio=0.4, convention="bytes")]  # dense, ranks, codes
PROMPTS = [[1], list(range(3, 12)), list(range(40, 80))]  # products of one row, and of several


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return save_with_codes(tmp_path_factory.mktemp("resident"), 64, torch.bfloat16)


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write files also if the disk of this machine is almost full."""
    monkeypatch.setattr(resident_files, "FREE_SHARE", 0.0)


def load(artifact: Artifact, root: Path | None, **options: Any) -> ResidentModel:
    version: Any = SimpleNamespace(name="small", version="7", uri="here")
    return ResidentModel(version, artifact, files=None if root is None else ResidentFiles(root, artifact), **options)


def sampled(model: ResidentModel) -> list[tuple[int, float | None]]:
    """Return tokens with their log-probabilities, of several prompts at several sizes."""
    engine, found = Engine(), list[tuple[int, float | None]]()
    engine.add(model)
    try:
        for size in SIZES:
            sampling = SamplingParams(temperature=0.0, logprobs=1)
            for prompt in PROMPTS:
                request = GenerationRequest([prompt], size, max_tokens=6, sampling=sampling, end_tokens=frozenset(), speculative=False)
                events = engine.events(model, request)
                found += [(event.token.token, event.token.logprob) for event in events if isinstance(event, TokenSampled)]
    finally:
        engine.close()
    assert len(found) == 6 * len(SIZES) * len(PROMPTS)
    return found


def test_logits_from_mapped_files_are_the_same_bit_for_bit(artifact: Artifact, tmp_path: Path) -> None:
    expected = sampled(load(artifact, None))
    for _ in range(2):  # the first start writes the files
        assert sampled(load(artifact, tmp_path)) == expected


@pytest.mark.parametrize("coded", [True, False])
def test_weights_are_mapped(artifact: Artifact, tmp_path: Path, coded: bool, small_artifact: Artifact) -> None:
    """Plainly stored weights are mapped from the artifact itself, and not written again."""
    artifact = artifact if coded else small_artifact
    for _ in range(2):
        model = load(artifact, tmp_path)
        with model.holding(model.cut(SIZES[0])), model.holding(model.cut(SIZES[2 if coded else 1])):
            tensors = dict(model.any_size.model.state_dict(keep_vars=True))
    places = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped_lines(tmp_path if coded else artifact.folder)]

    def is_mapped(tensor: torch.Tensor) -> bool:
        return any(first <= tensor.data_ptr() < last for first, last in places)

    kept = {name: tensor for name, tensor in tensors.items() if tensor.numel() and not tensor.is_meta and "inv_freq" not in name}
    assert len(kept) > 20
    assert [name for name, tensor in kept.items() if not is_mapped(tensor)] == []
    assert coded or {path.name.split(".")[-2] for path in tmp_path.rglob("*.safetensors")} <= {"packed"}


def mapped_lines(root: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(root) in line]


@pytest.mark.skipif(
    not packable(torch.empty(1, 1, dtype=torch.bfloat16)) or not supports_bytes(), reason="packed weights are not mapped here"
)
def test_packed_copies_are_mapped(artifact: Artifact, tmp_path: Path) -> None:
    model = load(artifact, tmp_path)
    with model.holding(model.cut(Budget(ratio=1.0))):
        packed = [name for name, module in model.any_size.model.named_modules() if isinstance(module, PackedLinear)]
    assert packed
    folder = ResidentFiles(tmp_path, artifact).folder
    assert all((folder / f"{name}.packed.safetensors").exists() for name in packed)


def test_the_comparison_with_transformers_is_not_repeated(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sampled(load(artifact, tmp_path))

    def fail(*args: Any) -> None:
        raise AcipError("compared")

    monkeypatch.setattr(resident_model, "check", fail)
    assert sampled(load(artifact, tmp_path)) == expected
    with pytest.raises(AcipError, match="compared"):
        load(artifact, tmp_path, max_size="0.6")
    with pytest.raises(AcipError, match="compared"):
        load(artifact, tmp_path / "other")
    with pytest.raises(AcipError, match="compared"):
        load(artifact, None)


def test_files_are_written_from_verified_bytes_only(artifact: Artifact, tmp_path: Path) -> None:
    damaged = tmp_path / "artifact"
    damaged.mkdir()
    for path in artifact.folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    content = bytearray((damaged / "rest.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "rest.safetensors").write_bytes(content)
    store: Any = SimpleNamespace(fetch=lambda uri: damaged)
    version: Any = SimpleNamespace(name="small", version="7", uri=str(damaged))
    engine = Engine()
    try:
        with pytest.raises(AcipError, match="is corrupted: its sha256 is not the artifact's"):
            ModelCache(engine, store, "cpu", 1 << 30, files=tmp_path / "files").get(version)
    finally:
        engine.close()
    assert not list((tmp_path / "files").rglob("*.safetensors"))
