"""An export in the format compressed-tensors is a standard folder: transformers loads it without acip, with the logits of the size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from acip.artifact.artifact import Artifact
from acip.errors import ArtifactError
from acip.export.compressed_tensors import bits_of, export_compressed_tensors, packed
from acip.export.folder import PROVENANCE, tensor_bytes
from acip.modeling_acip import CodedLinear
from acip.sizing.budget import Budget
from acip.sizing.elastic_model import ElasticModel
from tests.acip.artifact.test_codes_file import calibrated_with_codes, gpt2, llama
from tests.acip.export.test_export import clean_environment
from tests.conftest import logits
from tests.support.waiting import PATIENCE_S

TOKENS = torch.arange(16)[None]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def any_size(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ElasticModel, Artifact]:
    """A size at which one layer has codes up to 100, and all others up to 5."""
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(llama(64, dtype=request.param), (2, 5, 100))
    artifact = Artifact.save(tmp_path_factory.mktemp("coded") / "artifact", base, calibration, {}, codes)
    sizes = artifact.table().byte_sizes
    assert sizes is not None
    steps = next(steps for steps in range(len(sizes.order.steps)) if 2 in sizes.order.at(steps).values())
    return artifact.load(size=Budget(stored_bytes=sizes.bytes(steps))), artifact


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 64), (2, 37), (1, 1)])
def test_codes_are_packed_as_the_package_packs_them(bits: int, shape: tuple[int, int]) -> None:
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    assert torch.equal(packed(codes, bits), package.pack_to_int32(codes, bits))
    assert torch.equal(package.unpack_from_int32(packed(codes, bits), bits, torch.Size(shape)), codes)


def test_the_files_hold_the_codes_and_steps(any_size: tuple[ElasticModel, Artifact], tmp_path: Path) -> None:
    model, artifact = any_size
    provenance = export_compressed_tensors(model, artifact, tmp_path / "out")
    tensors, config = load_file(tmp_path / "out" / "model.safetensors"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"]) and "auto_map" not in config
    groups = config["quantization_config"]["config_groups"].values()
    bits = {name: group["weights"]["num_bits"] for group in groups for name in group["targets"]}
    assert bits.keys() == model.layers.keys() and set(bits.values()) == {4, 8}
    for name, layer in model.layers.items():
        coded = layer.coded[str(layer.version)]
        assert torch.equal(unpacked(tensors[f"{name}.weight_packed"], bits[name], coded.codes.shape[1]), coded.codes)
        assert torch.equal(tensors[f"{name}.weight_scale"][:, 0], coded.steps)
        assert tensors[f"{name}.weight_shape"].tolist() == list(coded.codes.shape)
        assert f"{name}.weight" not in tensors and f"{name}.codes" not in tensors
    assert model.cut is not None and provenance["weight_bytes"] == tensor_bytes(tmp_path / "out") > (model.cut.bytes or 0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| stored size in the artifact | {model.cut.bytes:,} bytes" in card and f"{provenance['weight_bytes']:,} bytes: fixed" in card
    assert "import acip" not in card and "modeling_acip" not in card
    assert {path.name for path in (tmp_path / "out").iterdir()} == {PROVENANCE, *provenance["files"]}
    assert "modeling_acip.py" not in provenance["files"]


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes in int32 words, the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits)
    return (((words[..., None] >> shifts) & (2**bits - 1)).flatten(1)[:, :columns] - 2 ** (bits - 1)).to(torch.int8)


def test_transformers_loads_it_without_acip(any_size: tuple[ElasticModel, Artifact], tmp_path: Path) -> None:
    """In float32 the logits are equal within rounding; a bfloat16 model rounds its steps and weights to 8 bits of mantissa."""
    pytest.importorskip("compressed_tensors")
    model, artifact = any_size
    export_compressed_tensors(model, artifact, tmp_path / "out")
    script = f"""
import sys, torch
sys.modules |= dict.fromkeys(("acip",))  # can't be imported
from transformers import AutoModelForCausalLM
for dtype in ("auto", torch.float32):
    model, report = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert type(model).__module__.startswith("transformers.models."), type(model)
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(16)[None]).logits, f"{{dtype}}.pt")
"""
    env = {**clean_environment(), "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=PATIENCE_S, check=False
    )
    assert result.returncode == 0, result.stderr
    model_dtype, exact = model.model.dtype, logits(model.materialize().float(), TOKENS)
    for file, dtype in (("auto", model_dtype), ("torch.float32", torch.float32)):
        loaded = torch.load(tmp_path / f"{file}.pt")
        assert loaded.dtype == dtype
        assert float((loaded.float() - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float32 else 0.03)


def test_layers_that_are_computed_as_one_have_the_same_bits() -> None:
    small, large = torch.full((2, 4), 7, dtype=torch.int8), torch.full((2, 4), -9, dtype=torch.int8)
    codes = {"q_proj": small, "k_proj": large, "v_proj": small, "o_proj": small, "gate_proj": small, "up_proj": small, "down_proj": large}
    layers = {f"layers.{i}.{name}": CodedLinear(codes[name], torch.ones(2), None) for i in (0, 1) for name in codes}
    layers["layers.1.k_proj"] = CodedLinear(small, torch.ones(2), None)
    bits = {name: width for name, width in bits_of(layers).items() if width == 8}
    assert bits.keys() == {f"layers.0.{name}_proj" for name in "qkv"} | {f"layers.{i}.down_proj" for i in (0, 1)}


def test_sizes_of_ranks_and_other_kinds_of_layers_are_refused(any_size: tuple[ElasticModel, Artifact], tmp_path: Path) -> None:
    _, artifact = any_size
    with pytest.raises(ArtifactError, match="this size has none"):
        export_compressed_tensors(artifact.load(size=Budget(0.6, "linear")), artifact, tmp_path / "out")
    base, calibration, codes = calibrated_with_codes(gpt2())
    transposed = Artifact.save(tmp_path / "artifact", base, calibration, {}, codes)
    sizes = transposed.table().byte_sizes
    assert sizes is not None
    with pytest.raises(ArtifactError, match=r"is a Conv1D; compressed-tensors stores nn\.Linear only"):
        export_compressed_tensors(transposed.load(size=Budget(stored_bytes=sizes.bytes(0))), transposed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
