"""Elastic models and exports can be copied, pickled, resized, cast, edited and saved like any transformers model."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

import acip
from acip.artifact.artifact import Artifact
from acip.base import load_base
from acip.calibration.loop import calibrate
from acip.calibration.parametrize import parametrize
from acip.data import TokenBatches
from acip.errors import ArtifactError
from tests.acip.layers.test_architectures import GROUPED, RECIPE, random_model
from tests.conftest import byte_tokenizer, logits
from tests.support.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny Llama whose head shares its weights with the embedding."""
    folder = tmp_path_factory.mktemp("tied")
    random_model(LlamaConfig(**GROUPED, tie_word_embeddings=True)).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    base = load_base(str(folder / "base"), "float32")
    windows = torch.randint(3, 256, (32, RECIPE.seq_len), generator=torch.Generator().manual_seed(0))
    parametrize(base.model, RECIPE, windows)
    return Artifact.save(folder / "artifact", base, calibrate(base.model, TokenBatches(windows, RECIPE.batch_size), RECIPE), {})


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("which", ["small", "tied"])
def test_resized_embeddings_are_saved_and_kept_at_another_size(
    which: str, compressed: bool, small_artifact: Artifact, tied: Artifact, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model: Any = acip.from_pretrained(small_artifact if which == "small" else tied, size=0.6)
    before = logits(model, tokens)
    if compressed:
        model.compress()
    model.resize_token_embeddings(264)
    assert torch.allclose(logits(model, tokens)[..., :256], before, atol=1e-4)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is (which == "tied")
    model.save_pretrained(tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["vocab_size"] == 264
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert loaded.get_input_embeddings().weight.shape[0] == 264
    assert torch.allclose(logits(loaded, tokens), logits(model, tokens), atol=1e-4)
    model.resize(0.8)
    assert logits(model, tokens).shape[-1] == 264
    loaded.resize_token_embeddings(256)
    loaded.save_pretrained(tmp_path / "copied")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "copied"), tokens), before, atol=1e-4)


def test_a_copy_is_independent(small_artifact: Artifact, tokens: torch.Tensor) -> None:
    model: Any = acip.from_pretrained(small_artifact, size=0.6)
    at_60 = logits(model, tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens), at_60)
    whole = logits(twin.resize(1.0), tokens)
    assert torch.equal(logits(model, tokens), at_60), "resizing the copy changes the original"
    with torch.no_grad():
        twin.get_input_embeddings().weight.zero_()
    assert torch.equal(logits(model, tokens), at_60)
    assert torch.equal(logits(model.resize(1.0), tokens), whole)
    twin.compress()
    assert twin.any_size is None and model.any_size is not None


READ = """
import pickle, sys, torch
model = torch.load(sys.argv[1], weights_only=False) if sys.argv[1].endswith(".pt") else pickle.load(open(sys.argv[1], "rb"))
tokens = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save((model(input_ids=tokens).logits, model.resize(1.0)(input_ids=tokens).logits), sys.argv[3])
"""


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_another_process_reads_a_pickled_model(kind: str, small_artifact: Artifact, tokens: torch.Tensor, tmp_path: Path) -> None:
    model: Any = acip.from_pretrained(small_artifact, size=0.6)
    at_60 = logits(model, tokens)
    file = tmp_path / ("model.pt" if kind == "torch" else "model.pickle")
    if kind == "torch":
        torch.save(model, file)
    else:
        file.write_bytes(pickle.dumps(model))
    torch.save(tokens, tmp_path / "tokens")
    arguments = [str(file), str(tmp_path / "tokens"), str(tmp_path / "logits")]
    subprocess.run([sys.executable, "-c", READ, *arguments], check=True, timeout=PATIENCE_S)
    small, whole = torch.load(tmp_path / "logits")
    assert torch.allclose(small, at_60, atol=1e-4)
    assert torch.allclose(whole, logits(model.resize(1.0), tokens), atol=1e-4)


def test_exports_and_compressed_models_are_pickled(small_artifact: Artifact, exported: Path, tokens: torch.Tensor) -> None:
    compressed: Any = acip.from_pretrained(small_artifact, size=0.6)
    compressed.compress()
    for model in (compressed, acip.from_pretrained(exported)):
        copied = pickle.loads(pickle.dumps(model))
        assert type(copied) is type(model) and type(copied.config) is type(model.config)
        assert torch.equal(logits(copied, tokens), logits(model, tokens))


def test_training_after_compress_is_saved_and_kept_outside_of_the_targets(
    small_artifact: Artifact, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model: Any = acip.from_pretrained(small_artifact, size=0.6)
    model.compress()
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.eval()
    model.save_pretrained(tmp_path / "trained")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "trained"), tokens), logits(model, tokens), atol=1e-4)
    norm = model.model.norm.weight.clone()
    model.resize(1.0)
    assert torch.equal(model.model.norm.weight, norm)


def test_a_cast_model_grows_in_its_dtype(small_artifact: Artifact, tokens: torch.Tensor, tmp_path: Path) -> None:
    exact: Any = acip.from_pretrained(small_artifact)
    model: Any = acip.from_pretrained(small_artifact, size=0.5)  # growing reads the rest
    model.to(torch.float64)
    assert torch.allclose(logits(model.resize(0.9), tokens).float(), logits(exact.resize(0.9), tokens), atol=1e-3)
    assert {p.dtype for p in model.parameters() if not p.is_meta} == {torch.float64}
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_edits_of_the_config_reach_all_modules_and_are_saved(small_artifact: Artifact, tmp_path: Path) -> None:
    model: Any = acip.from_pretrained(small_artifact, size=0.6)
    model.config.attention_dropout = 0.125
    model.generation_config.max_new_tokens = 7
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
    model.save_pretrained(tmp_path / "edited")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert (loaded.config.attention_dropout, loaded.generation_config.max_new_tokens) == (0.125, 7)


def test_a_model_with_peft_adapters_keeps_its_size(small_artifact: Artifact) -> None:
    model: Any = acip.from_pretrained(small_artifact, size=0.6)
    model.compress().add_adapter(LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ArtifactError, match="PEFT adapters can't be changed"):
        model.resize(0.8)
