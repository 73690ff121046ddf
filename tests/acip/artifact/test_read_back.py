"""A base model whose export would fail, or whose weights are incomplete, is refused before the calibration."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Mamba2Config

from acip.artifact.read_back import read_back
from acip.base import Base, load_base, outline
from acip.calibration.parametrize import parametrize
from acip.errors import AcipError, BaseModelError
from acip.recipe import Recipe
from tests.conftest import byte_tokenizer

RECIPE = Recipe(sample_windows=4, adapter_rank=2, adapter_alpha=2.0, dtype="float32", batch_size=2, seq_len=16, post_tune_steps=2)
Weights = dict[str, torch.Tensor]


@pytest.fixture
def folder(small_base: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_base, tmp_path / "base"))


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reweight(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}  # copied, because the mapped file is replaced below
    save_file(change(weights), path, {"format": "pt"})


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def with_nan(weights: Weights) -> Weights:
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    return weights


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda weights: {f"module.{name}": weight for name, weight in weights.items()}, "begin with 'module.'"),
        (lambda weights: {f"_orig_mod.{name}": weight for name, weight in weights.items()}, "begin with '_orig_mod.'"),
        (without("layers.1.mlp.up"), "model.layers.1.mlp.up_proj.weight"),
        (lambda weights: weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)}, "model.layers.0.self_attn.q_proj.bias"),
        (lambda weights: weights | {"model.layers.77.mlp.up_proj.weight": torch.zeros(8, 8)}, "model.layers.77.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("load", [load_base, outline])
def test_weights_that_do_not_fit_the_model_are_named(
    folder: Path, load: Callable[[str, str], Base], change: Callable[[Weights], Weights], name: str
) -> None:
    reweight(folder, change)
    with pytest.raises(BaseModelError) as refused:
        load(str(folder), "float32")
    assert name in str(refused.value) and str(folder) in str(refused.value)


def test_a_weight_that_is_not_finite_is_named(folder: Path) -> None:
    reweight(folder, with_nan)
    with pytest.raises(BaseModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight contains NaN"):
        load_base(str(folder), "float32")


def test_weights_of_another_part_are_only_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    reweight(folder, lambda weights: weights | {"vision_tower.patch.weight": torch.zeros(8, 8)})
    read_back(load_base(str(folder), "float32"), RECIPE)
    assert "vision_tower.patch.weight" in caplog.text


def test_a_tied_head_is_not_missing(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, tie_word_embeddings=True
        )
    )
    tied.save_pretrained(tmp_path / "tied")
    byte_tokenizer().save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    read_back(load_base(str(tmp_path / "tied"), "float32"), RECIPE)


def test_a_tokenizer_larger_than_the_model_is_refused_before_calibration_and_in_a_dry_run(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    for base in (load_base(str(folder), "float32"), outline(str(folder), "float32")):
        with pytest.raises(BaseModelError, match=r"257 tokens \(ids up to 256\), but the model has 256 embeddings"):
            read_back(base, RECIPE)
    with pytest.raises(BaseModelError, match="token id 256"):
        parametrize(load_base(str(folder), "float32").model, RECIPE, torch.full((8, 16), 256))


def test_a_special_token_outside_of_the_vocabulary_is_named(folder: Path) -> None:
    reconfigure(folder, eos_token_id=50_256)
    with pytest.raises(BaseModelError, match="eos_token_id is 50,256"):
        read_back(load_base(str(folder), "float32"), RECIPE)


def test_generation_settings_that_transformers_does_not_write_are_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    for base in (load_base(str(folder), "float32"), outline(str(folder), "float32")):
        with pytest.raises(
            BaseModelError, match=r"generation settings .*temperature.* Correct its generation_config.json; .* do_sample: true"
        ):
            read_back(base, RECIPE)


def test_a_model_that_needs_remote_code_is_refused(folder: Path) -> None:
    (folder / "my_lm.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\nclass MyConfig(LlamaConfig):\n    model_type = 'mylm'\n\n\n"
        "class MyForCausalLM(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    auto_map = {"AutoConfig": "my_lm.MyConfig", "AutoModelForCausalLM": "my_lm.MyForCausalLM"}
    reconfigure(folder, model_type="mylm", architectures=["MyForCausalLM"], auto_map=auto_map)
    base = load_base(str(folder), "float32", trust_remote_code=True)
    for refused in (lambda: read_back(base, RECIPE), lambda: parametrize(base.model, RECIPE, torch.ones(8, 16, dtype=torch.long))):
        with pytest.raises(BaseModelError, match="needs remote code for its model"):
            refused()
    with pytest.raises(AcipError):
        load_base(str(folder), "float32")


def test_exports_and_adapters_are_refused_as_base_models(folder: Path, exported: Path) -> None:
    with pytest.raises(BaseModelError, match="is already compressed"):
        read_back(load_base(str(exported), "float32"), RECIPE)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="adapter"):
        load_base(str(folder), "float32")


@pytest.mark.parametrize("value", [math.nan, {1: 2}, {"a", "b"}, [1, math.nan]])
def test_a_configuration_that_json_cannot_represent_is_refused(folder: Path, value: Any) -> None:
    base = load_base(str(folder), "float32")
    base.model.config.own_field = value
    with pytest.raises(BaseModelError, match="config"):
        read_back(base, RECIPE)


def test_infinity_in_a_configuration_is_read_back(folder: Path) -> None:
    base = load_base(str(folder), "float32")
    base.model.config.own_field = [0.0, math.inf]
    read_back(base, RECIPE)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}),
        GPT2Config(),
        Gemma3TextConfig(layer_types=["sliding_attention"] * 5 + ["full_attention"], num_hidden_layers=6),
    ],
    ids=lambda config: config.model_type,
)
def test_a_large_architecture_is_read_back_without_its_weights(config: Any) -> None:
    """The config is that of a real model. The check builds only a tiny model of the same architecture."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    read_back(Base(model, byte_tokenizer(), config.model_type, None, ""), RECIPE)


def test_the_check_does_not_change_the_base_model(folder: Path) -> None:
    base = load_base(str(folder), "float32")
    before, config = {name: weight.clone() for name, weight in base.model.state_dict().items()}, base.model.config.to_dict()
    state = torch.get_rng_state()
    read_back(base, RECIPE)
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.state_dict().items())
    assert base.model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state), "the random state is unchanged"


def test_infinite_limits_of_a_state_space_model_survive(tmp_path: Path) -> None:
    """transformers encodes infinity in JSON in its own way, so the artifact reads the config through transformers."""
    from acip.artifact.artifact import Artifact
    from acip.artifact.manifest import CONFIG

    Mamba2Config().save_pretrained(tmp_path)
    files = {CONFIG: {"bytes": (tmp_path / CONFIG).stat().st_size, "sha256": ""}}
    artifact = Artifact(tmp_path, {"files": files, "base": {}}, Any)  # type: ignore[arg-type]
    assert artifact.config.time_step_limit[1] == math.inf
