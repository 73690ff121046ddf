"""An export of coded layers has the bytes of its size and the logits of the resident model, with or without acip."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import acip
from acip.artifact.artifact import Artifact
from acip.base import Base
from acip.errors import ArtifactError, BudgetError
from acip.export.card import artifact_card
from acip.export.folder import PROVENANCE, export, tensor_bytes
from acip.export.stored import export_size
from acip.finetune import attach, tuning
from acip.layers.targets import find_linears
from acip.modeling_acip import CodedLinear, LowRankLinear, PivotLinear
from acip.recipe import Recipe
from acip.sizing.budget import BITS_PER_WEIGHT, Budget
from acip.sizing.elastic_model import ElasticModel
from tests.acip.artifact.test_codes_file import calibrated_with_codes, gpt2, llama
from tests.acip.export.test_export import clean_environment
from tests.conftest import logits, read
from tests.support.coded import rounded
from tests.support.small import byte_tokenizer
from tests.support.waiting import PATIENCE_S

TOKENS = torch.arange(16)[None]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(llama(64, dtype=request.param))
    return Artifact.save(tmp_path_factory.mktemp("coded") / "artifact", base, calibration, {}, codes)


@pytest.fixture
def any_size(artifact: Artifact) -> ElasticModel:
    return artifact.load(size=middle(artifact))


def middle(artifact: Artifact) -> Budget:
    """A budget of bytes in the middle of the sizes without exact layers."""
    sizes = artifact.table().byte_sizes
    assert sizes is not None
    return Budget(stored_bytes=sizes.bytes(sizes.all_coded // 2) + 1)


def assert_same_model(model: Any, other: Any) -> None:
    """The tensors are equal bit for bit. The logits of a model in bfloat16 may depend on the addresses of its tensors."""
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    torch.testing.assert_close(logits(model, TOKENS), logits(other, TOKENS), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0, None])
def test_an_export_has_the_bytes_and_logits_of_its_size(artifact: Artifact, tmp_path: Path, position: float | None) -> None:
    """None is the base model, whose bfloat16 tensors take fewer bytes, too. The sizes next to it have exact layers."""
    sizes = artifact.table().byte_sizes
    assert sizes is not None
    steps = None if position is None else int(position * (len(sizes.order.steps) - 1))
    any_size = artifact.load(size=Budget(stored_bytes=sizes.bytes(steps)))
    provenance = export(any_size, artifact, tmp_path / "out")
    assert any_size.cut is not None
    assert tensor_bytes(tmp_path / "out") == any_size.cut.bytes == provenance["weight_bytes"] == sizes.bytes(steps)
    loaded = read(tmp_path / "out")
    assert_same_model(loaded, any_size.materialize())
    torch.testing.assert_close(logits(loaded, TOKENS), logits(any_size.model, TOKENS), rtol=0.02, atol=0.01)
    coded = {name for name in any_size.layers if isinstance(loaded.get_submodule(name), CodedLinear)}
    assert coded == set(sizes.versions(steps))
    assert (loaded.dtype, loaded.name_or_path) == (any_size.model.dtype, str(tmp_path / "out"))
    assert loaded.generation_config.eos_token_id == any_size.model.generation_config.eos_token_id


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0, None])
@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_size_in_bytes_is_exported_without_loading_it(
    model: Any, dtype: torch.dtype, position: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are bit for bit those of the export of the loaded model. None is the base model."""
    base, calibration, codes = calibrated_with_codes(model(64, dtype=dtype))
    artifact = Artifact.save(tmp_path / "artifact", base, calibration, {}, codes)
    sizes = artifact.table().byte_sizes
    assert sizes is not None
    budget = Budget(stored_bytes=sizes.bytes(None if position is None else int(position * (len(sizes.order.steps) - 1))))
    export(artifact.load(size=budget), artifact, tmp_path / "loaded" / "out")
    loads = budget.stored_bytes == artifact.table().base_bytes  # in float32, the base model takes its own bytes
    if not loads:
        monkeypatch.setattr(Artifact, "load", None)
    export_size(artifact, budget, tmp_path / "copied" / "out")
    files = {path.name: path.read_bytes() for path in (tmp_path / "loaded" / "out").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "copied" / "out").iterdir()} == files


def test_sizes_that_have_to_be_computed_are_loaded(artifact: Artifact, tmp_path: Path) -> None:
    ranks = Budget(ratio=0.6, convention="linear")
    assert export_size(artifact, ranks, tmp_path / "out", kind="nf4")["quantize"] == "nf4"
    with pytest.raises(ArtifactError, match="can't be quantized to nf4"):
        export_size(artifact, middle(artifact), tmp_path / "other", kind="nf4")


def test_a_damaged_artifact_is_not_exported(artifact: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact.folder, tmp_path / "artifact")
    path = folder / "codes.safetensors"
    content = bytearray(path.read_bytes())
    first = artifact.tensors("codes").entries[f"{artifact.manifest['layers'][0]['name']}.0.stream"]
    content[first.start + 8] ^= 1
    path.write_bytes(content)
    damaged, sizes = Artifact.open(folder), artifact.table().byte_sizes
    assert sizes is not None
    with pytest.raises(ArtifactError, match="sha256"):
        export_size(damaged, Budget(stored_bytes=sizes.bytes(0)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transposed_weights_take_the_bytes_of_the_artifact(tmp_path: Path) -> None:
    """The weights of GPT-2's layers are [in, out] in the model, and [out, in] in the artifact."""
    base, calibration, codes = calibrated_with_codes(gpt2(64, torch.bfloat16))
    artifact = Artifact.save(tmp_path / "artifact", base, calibration, {}, codes)
    any_size = artifact.load(size=Budget(ratio=1.0, convention="bytes"))
    export(any_size, artifact, tmp_path / "out")
    assert any_size.cut is not None
    assert tensor_bytes(tmp_path / "out") == any_size.cut.bytes
    loaded = read(tmp_path / "out")
    assert_same_model(loaded, any_size.materialize())
    loaded.save_pretrained(tmp_path / "again")
    assert tensor_bytes(tmp_path / "again") == any_size.cut.bytes
    assert_same_model(read(tmp_path / "again"), loaded)


def test_a_loaded_export_is_saved_with_the_same_tensors_in_shards(any_size: ElasticModel, artifact: Artifact, tmp_path: Path) -> None:
    export(any_size, artifact, tmp_path / "out")
    loaded = read(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    parts = list((tmp_path / "again").glob("model-*.safetensors"))
    again = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len(parts) > 2 and again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert_same_model(read(tmp_path / "again"), loaded)
    with pytest.raises(ValueError, match="leave state_dict out"):
        loaded.save_pretrained(tmp_path / "third", state_dict=loaded.state_dict())


def test_an_export_is_loaded_in_another_dtype(any_size: ElasticModel, artifact: Artifact, tmp_path: Path) -> None:
    export(any_size, artifact, tmp_path / "out")
    for dtype in (torch.float32, torch.float16):
        loaded = type(read(tmp_path / "out")).from_pretrained(tmp_path / "out", dtype=dtype, device_map="cpu")
        layer: Any = loaded.get_submodule(any_size.table.layers[0].name)
        assert (loaded.dtype, layer.codes.dtype, layer.steps.dtype) == (dtype, torch.int8, torch.float32)
        expected = logits(any_size.model, TOKENS).float()
        assert float((logits(loaded, TOKENS).float() - expected).norm() / expected.norm()) < 0.02


def test_an_export_loads_without_acip(any_size: ElasticModel, artifact: Artifact, tmp_path: Path) -> None:
    """A process that cannot import acip loads the export with the code of the folder, saves it and loads it again."""
    export(any_size, artifact, tmp_path / "out")
    torch.save(logits(any_size.model, TOKENS), tmp_path / "expected.pt")
    script = f"""
import sys, torch
sys.modules |= dict.fromkeys(("acip", "bitsandbytes", "peft"))  # can't be imported
from transformers import AutoModelForCausalLM, pipeline
for folder in ({str(tmp_path / "out")!r}, {str(tmp_path / "again")!r}):
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        torch.testing.assert_close(model(input_ids=torch.arange(16)[None]).logits, expected, rtol=0.02, atol=0.01)
    model.save_pretrained({str(tmp_path / "again")!r})
print(pipeline("text-generation", model={str(tmp_path / "out")!r}, trust_remote_code=True)("It is", max_new_tokens=4)[0]["generated_text"])
"""
    env = {**clean_environment(), "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    result = run(script, env, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "It is" in result.stdout


def run(script: str, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=folder, timeout=PATIENCE_S, check=False
    )


def test_damaged_exports_are_refused(any_size: ElasticModel, artifact: Artifact, tmp_path: Path) -> None:
    """Streams, step sizes and encoded bfloat16 tensors are too short, or missing."""
    export(any_size, artifact, tmp_path / "out")
    path, name = tmp_path / "out" / "model.safetensors", any_size.table.layers[0].name
    tensors = load_file(path)
    encoded = json.loads((tmp_path / "out" / "config.json").read_text())["acip"]["bfloat16"]
    assert bool(encoded) == (any_size.model.dtype == torch.bfloat16)
    for key in (f"{name}.stream", f"{name}.steps", *encoded):
        without = {other: tensor for other, tensor in tensors.items() if other != key}
        for damaged in (without, {**without, key: tensors[key][:-1]}):
            save_file(damaged, path, {"format": "pt"})
            with pytest.raises(ValueError, match="Export"):
                read(tmp_path / "out")
    with pytest.raises(ArtifactError, match="can't be loaded"):
        acip.from_pretrained(tmp_path / "out")


def test_an_elastic_model_is_compressed_saved_and_resized_at_sizes_in_bytes(artifact: Artifact, tmp_path: Path) -> None:
    budget = middle(artifact)
    model: Any = acip.from_pretrained(artifact, size=f"{budget.stored_bytes} bytes")
    assert model.cut.versions is not None
    model.save_pretrained(tmp_path / "resident")
    with pytest.raises(ArtifactError, match=r"codes of .* bits per weight, and can't be quantized to nf4"):
        model.quantize()
    assert model.any_size is not None, "a refused call changes nothing"
    model.compress().save_pretrained(tmp_path / "compressed")
    expected = artifact.load(size=budget).materialize()
    assert_same_model(model, expected)
    for folder in (tmp_path / "resident", tmp_path / "compressed"):
        assert tensor_bytes(folder) == model.cut.bytes
        assert_same_model(acip.from_pretrained(folder), expected)
    model.resize(Budget(0.6, "linear")).compress()
    name = artifact.manifest["layers"][0]["name"]
    assert isinstance(model.get_submodule(name), PivotLinear | LowRankLinear | torch.nn.Linear)
    model.save_pretrained(tmp_path / "ranks")
    assert tensor_bytes(tmp_path / "ranks") == model.cut.bytes
    assert_same_model(model.resize(budget).compress(), expected)


def test_a_ratio_counts_bytes_if_the_artifact_has_codes_and_the_model_is_not_quantized(artifact: Artifact) -> None:
    sizes = artifact.table().byte_sizes
    assert sizes is not None
    ratio = sizes.bytes(sizes.all_coded // 2) / artifact.table().base_bytes + 0.001
    for model in (acip.from_pretrained(artifact, ratio), acip.from_pretrained(artifact, f"{100 * ratio}%")):
        assert (model.cut.convention, model.cut.asked) == ("bytes", pytest.approx(ratio))
        assert model.cut.bytes <= ratio * artifact.table().base_bytes
    any_size = artifact.load(size=ratio)
    assert any_size.cut is not None and any_size.cut.key == model.cut.key
    quantized = acip.from_pretrained(artifact, 0.6, quantize="int8")
    assert (quantized.cut.convention, quantized.cut.versions) == ("linear", None)


def test_coded_layers_are_not_fine_tuned(any_size: ElasticModel, artifact: Artifact) -> None:
    with pytest.raises(BudgetError, match="a size of coded layers can't be fine-tuned"):
        attach(any_size, tuning(artifact, 0.5, seq_len=64))


def test_the_card_of_an_artifact_of_codes_only_offers_what_it_has(tmp_path: Path) -> None:
    """The artifact has no sizes of ranks: none to choose, to quantize, or to fine-tune."""
    model = llama(64, dtype=torch.bfloat16)
    base, recipe = Base(model, byte_tokenizer(), "random", None, "0" * 12), Recipe(dtype="bfloat16", code="bits")
    artifact = Artifact.save_coded(tmp_path / "artifact", base, recipe, rounded(find_linears(model)), {})
    card = artifact_card(artifact, "some")
    assert 'convention="bytes"' in card and "low-rank" not in card and "quantize" not in card
    usage = card.partition("```python\n")[2].partition("```")[0].replace("path/or/repo", str(artifact.folder))
    exec(usage, {})
    with pytest.raises(BudgetError, match="holds codes only, which can't be fine-tuned"):
        tuning(artifact, 0.5)


def test_the_card_and_the_provenance_describe_the_bytes(artifact: Artifact, tmp_path: Path) -> None:
    row = {"perplexity": 4.0, "stderr": 0.1, "corpus": "books", "windows": 8, "context": 64}
    coded = {**row, "asked": 0.4, "got": 0.39, "bytes": 123_456, BITS_PER_WEIGHT: 2.5, "perplexity": 5.0}
    any_size = artifact.load(size=middle(artifact))
    measured = Artifact(artifact.folder, {**artifact.manifest, "curve": [{**row, "asked": 1.0, "got": 1.0}, coded]}, artifact.source)
    export(any_size, measured, tmp_path / "out")
    card, provenance = (tmp_path / "out" / "README.md").read_text(), json.loads((tmp_path / "out" / PROVENANCE).read_text())
    cut = any_size.cut
    assert cut is not None
    for expected in (
        f"| requested size | {cut.asked:,} bytes |", f"| stored size | {cut.bytes:,} bytes, {cut.sizes['bytes']:.4f} of the base model's; ",
        f"{cut.bits_per_weight:.2f} bits per weight", "- quantized", "| 0.3900 | 123,456 | 2.50 | 5.00 ± 0.50 | closest to this model |",
        "| 1.0000 |  |  | 4.00 ± 0.40 | base model |", f"| layers | {len(artifact.manifest['layers'])} codes |",
    ):  # fmt: skip
        assert expected in card, expected
    assert "low-rank" not in card
    assert (provenance["size"]["bytes"], provenance["size"]["bits_per_weight"]) == (cut.bytes, cut.bits_per_weight)
