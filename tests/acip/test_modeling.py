"""The API of the paper: prune to any size, compress, quantize, and go back."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, pipeline

import acip
from acip import modeling, modeling_acip
from acip.artifact.artifact import Artifact
from acip.errors import ArtifactError, BudgetError, HubError
from acip.export.folder import PROVENANCE
from acip.modeling import ElasticCausalLM
from acip.sizing.budget import Budget
from acip.sizing.elastic_model import ElasticModel
from acip.utils.checksums import sha256
from tests.conftest import logits, read


def test_sizes_change_back_and_forth(small_artifact: Artifact, heldout_tokens: torch.Tensor, any_size: ElasticModel) -> None:
    tokens = heldout_tokens[:2]
    model: Any = acip.from_pretrained(small_artifact.folder)
    whole = logits(model, tokens)
    half = logits(model.prune_model_by_score(size_ratio=0.5), tokens)
    assert model.cut.got <= 0.5 and not torch.equal(whole, half)
    assert torch.equal(logits(model.prune_model_by_score(compression_rate=0.0), tokens), whole)
    assert torch.equal(logits(model.prune_model_by_score(compression_rate=0.5), tokens), half)
    footprint = model.get_memory_footprint()
    small = model.compress()
    any_size.resize(0.5)
    assert small is model and torch.equal(logits(model, tokens), logits(any_size.materialize(), tokens))
    assert model.get_memory_footprint() < 0.6 * footprint
    quantized = logits(model.quantize("nf4"), tokens)
    assert (quantized - half).norm() < 0.2 * half.norm()
    with pytest.raises(ArtifactError, match="already quantized to nf4"):
        model.quantize("fp4")
    assert torch.equal(logits(model.prune_model_by_score(1.0), tokens), whole), "compress and quantize are reversible"
    assert model.generate(tokens[:1, :8], max_new_tokens=4, pad_token_id=0).shape[1] <= 12


def test_from_pretrained_accepts_budgets_and_saves_exports(small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path: Path) -> None:
    tokens = heldout_tokens[:2]
    model: Any = acip.from_pretrained(str(small_artifact.folder), size="1MB")
    assert model.cut.bytes <= 10**6
    model.save_pretrained(tmp_path / "elastic")
    model.compress().save_pretrained(tmp_path / "compressed", max_shard_size="300KB")
    for folder in ("elastic", "compressed"):
        assert (tmp_path / folder / PROVENANCE).is_file()
        loaded: Any = acip.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    model.save_pretrained(tmp_path / "trainer", state_dict=model.state_dict())
    assert torch.equal(logits(read(tmp_path / "trainer"), tokens), logits(model, tokens))
    ready: Any = acip.from_pretrained(small_artifact.folder, size=Budget(ratio=0.5), quantize="int8")
    ready.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(read(tmp_path / "quantized"), tokens), logits(ready, tokens))


def test_wrong_sizes_and_folders_are_refused(small_artifact: Artifact, exported: Path, small_base: str, tmp_path: Path) -> None:
    model: Any = acip.from_pretrained(small_artifact.folder)
    for wrong in ({}, {"size_ratio": 0.5, "compression_rate": 0.5}, {"compression_rate": 1}, {"size_ratio": 0}, {"size_ratio": "half"}):
        with pytest.raises(BudgetError):
            model.prune_model_by_score(**wrong)
    with pytest.raises(BudgetError, match="is a model of one size"):
        acip.from_pretrained(exported, size=0.5)
    with pytest.raises(ArtifactError, match="neither an artifact nor an export"):
        acip.from_pretrained(small_base, size=0.5)
    with pytest.raises(ArtifactError, match="not an artifact"):
        acip.from_pretrained(tmp_path)
    shutil.copyfile(small_artifact.folder / "config.json", tmp_path / "config.json")  # as if the writing of an artifact was interrupted
    loads: tuple[Any, ...] = (acip.from_pretrained, AutoModelForCausalLM.from_pretrained)
    for load in loads:
        with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
            load(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute 'from_pretraind'"):
        acip.from_pretraind  # noqa: B018


def test_transformers_loads_an_artifact(small_artifact: Artifact, heldout_tokens: torch.Tensor) -> None:
    """AutoModelForCausalLM loads an artifact, as in the paper's example."""
    tokens, folder = heldout_tokens[:2], small_artifact.folder
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, ElasticCausalLM) and model.cut.got == 1.0
    assert torch.equal(logits(model, tokens), logits(acip.from_pretrained(folder), tokens))
    half = logits(model.prune_model_by_score(0.5), tokens)
    straight: Any = AutoModelForCausalLM.from_pretrained(folder, size=0.5, device_map="cpu", attn_implementation="eager")
    assert straight.config._attn_implementation == "eager"
    assert (logits(straight, tokens) - half).abs().max() < 1e-4
    precise: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, size=0.5)
    expected = logits(precise, tokens)
    again = precise.compress().resize(0.5)
    assert expected.dtype == again.dtype == torch.float64 and torch.equal(logits(again, tokens), expected), (
        "the dtype stays after compress and resize"
    )
    texts = pipeline("text-generation", str(folder), tokenizer=small_artifact.tokenizer())("The", max_new_tokens=3)
    assert texts[0]["generated_text"].startswith("The")
    with pytest.raises(ArtifactError, match=r"loaded with quantization_config; allowed are size"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config={"bits": 4})
    with pytest.raises(ArtifactError, match="loaded with state_dict, tp_plan; allowed are size"):
        AutoModelForCausalLM.from_pretrained(folder, state_dict={}, tp_plan="auto")
    for device_map in ({"a": 0, "b": 1}, "balanced"):
        with pytest.raises(ArtifactError, match="to one device"):
            AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)


def test_parameters_of_other_threads_are_not_changed_while_a_model_is_built(
    small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, on_meta = PreTrainedModel._from_config.__func__, list[bool]()  # type: ignore[attr-defined]

    def checked(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            on_meta.append(pool.submit(lambda: torch.nn.Linear(1, 1).weight.is_meta).result())
        return build(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_from_config", classmethod(checked))
    acip.from_pretrained(small_artifact, 0.5)
    assert on_meta == [False, False], "one is the base model, the other the model of any size"


def test_an_artifact_in_a_subfolder_is_loaded(small_artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(small_artifact.folder, tmp_path / "repository" / "half")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "repository", subfolder="half", size=0.5)
    assert model.cut.got <= 0.5 and model.artifact.folder == tmp_path / "repository" / "half"


def test_a_model_loaded_by_a_relative_path_grows_in_another_working_directory(
    small_artifact: Artifact, heldout_tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(small_artifact.folder.parent)
    model: Any = acip.from_pretrained(small_artifact.folder.name, size=0.5)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(model.resize(0.9), heldout_tokens[:2]), logits(acip.from_pretrained(small_artifact, 0.9), heldout_tokens[:2]))
    assert model.save_pretrained("export")["size"]["asked"] == 0.9


def test_an_artifact_without_acip_is_an_import_error(small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of modeling_acip.py in an export has no function that loads artifacts."""
    monkeypatch.setattr(modeling_acip, "load_artifact", None)
    with pytest.raises(ImportError, match="install acip"):
        AutoModelForCausalLM.from_pretrained(small_artifact.folder)


def test_old_names_of_the_model_class_and_the_loader_are_found() -> None:
    with pytest.warns(FutureWarning, match="ElasticCausalLM"):
        assert modeling.AnySizeModel is ElasticCausalLM
    with pytest.warns(FutureWarning, match="load_artifact"):
        assert modeling.through_transformers is modeling.load_artifact


def test_the_config_of_an_artifact_is_that_of_the_base_model(small_artifact: Artifact, small_base: str, tmp_path: Path) -> None:
    """The config loads in its current form and in the form before schema 4."""
    base = AutoConfig.from_pretrained(small_base)
    assert differing_fields(small_artifact.config, base) <= {"_name_or_path", "dtype", "architectures", "transformers_version"}
    old = tmp_path / "old"
    shutil.copytree(small_artifact.folder, old)
    base.save_pretrained(old)
    manifest = json.loads((old / "manifest.json").read_text())
    facts = {"bytes": (old / "config.json").stat().st_size, "sha256": sha256(old / "config.json")}
    manifest = manifest | {"schema": 3, "files": manifest["files"] | {"config.json": facts}}
    (old / "manifest.json").write_text(json.dumps(manifest))
    opened = Artifact.open(old, verify=True)
    assert type(opened.config) is type(base) and opened.load(size=0.5).cut is not None


def differing_fields(first: Any, second: Any) -> set[str]:
    a, b = first.to_dict(), second.to_dict()
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


def test_a_missing_repository_is_an_error() -> None:
    with pytest.raises(HubError, match="can't be downloaded from the hub"):
        acip.from_pretrained("nobody/nothing")
