"""A calibration by block equals that of the whole model, bit for bit on a CPU, and continues after the last finished block."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

from acip.calibration.block_calibration import calibrate_by_block
from acip.calibration.block_pass import BlockPass, PassFiles
from acip.calibration.loop import calibrate
from acip.calibration.parametrize import parametrize
from acip.calibration.result import Calibration
from acip.data import TokenBatches
from acip.errors import BaseModelError, CalibrationError, DataError
from acip.layers.block_chain import BlockChain
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import targets
from acip.recipe import Recipe
from tests.acip.layers.test_architectures import GROUPED, OPT, random_model

WINDOWS = torch.randint(3, 256, (9, 12), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(sample_windows=6, batch_size=4, seq_len=12, post_tune_steps=0, adapter_rank=2, dtype="float32", seed=3)
LLAMA = LlamaConfig(**GROUPED | {"num_hidden_layers": 4})
CONFIGS = [
    LLAMA,
    Qwen3Config(**GROUPED, head_dim=16),
    Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4),
    OPTConfig(vocab_size=256, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16),
]


def model_of(config: Any, recipe: Recipe = RECIPE) -> nn.Module:
    return random_model(config).to(getattr(torch, recipe.dtype))


def held(config: Any, recipe: Recipe = RECIPE) -> Calibration:
    """Return the calibration of the whole model."""
    model = model_of(config, recipe)
    parametrize(model, recipe, WINDOWS)
    return calibrate(model, TokenBatches(WINDOWS, recipe.batch_size, recipe.seed), recipe)


def streamed(config: Any, folder: Path, recipe: Recipe = RECIPE, **options: Any) -> Calibration:
    chain, batches = BlockChain(model_of(config, recipe)), TokenBatches(WINDOWS, recipe.batch_size, recipe.seed)
    return calibrate_by_block(chain, recipe, WINDOWS, batches.__getitem__, folder / "by-block", "cpu", **options)


def assert_same(found: Calibration, expected: Calibration) -> None:
    assert (found.table.layers, found.table.rest_params) == (expected.table.layers, expected.table.rest_params)
    assert torch.equal(found.table.order, expected.table.order)
    assert torch.equal(found.scores.score, expected.scores.score)
    assert torch.equal(found.scores.crossing, expected.scores.crossing)
    layers, others = targets(found.model), targets(expected.model)
    assert list(layers) == list(others)
    for name, layer in layers.items():
        other = others[name]
        assert isinstance(layer, ElasticLinear) and isinstance(other, ElasticLinear)
        state, reference = layer.state_dict(), other.state_dict()
        assert list(state) == list(reference)
        for key, tensor in state.items():
            assert tensor.dtype == reference[key].dtype and torch.equal(tensor, reference[key]), f"{name}.{key}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_the_result_equals_that_of_the_whole_model(config: Any, tmp_path: Path) -> None:
    assert_same(streamed(config, tmp_path), held(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"}, {"dtype": "float64"}, {"basis": "covariance"}, {"basis": "svd"}, {"adapter": "layer"}, {"adapter_rank": 0},
        {"basis": "svd", "scores": "singular_values"}, {"exclude": ("layers.1.", "q_proj")}, {"gradient_checkpointing": True},
        {"sample_windows": 1},
    ],
    ids=str,
)  # fmt: skip
def test_other_recipes_also_have_equal_results(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = replace(RECIPE, **changes)
    assert_same(streamed(LLAMA, tmp_path, recipe), held(LLAMA, recipe))


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(
    "at", [("gradients", 2), ("gradients", 4), ("gradients", 6), ("basis", 7), ("basis", 14), ("basis", 28), ("scores", 3), ("scores", 7)]
)
def test_a_job_that_was_killed_continues_after_the_last_finished_block(
    at: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has four blocks with seven layers each."""
    calls: list[int] = []
    block = BlockChain.block

    def counted(self: BlockChain, i: int, *args: torch.Tensor) -> torch.Tensor:
        calls.append(i)
        return block(self, i, *args)

    def kill(what: str, done: int, total: int) -> None:
        if (what, done) == at:
            raise Killed

    monkeypatch.setattr(BlockChain, "block", counted)
    expected = streamed(LLAMA, tmp_path / "whole")
    count = len(calls)
    with pytest.raises(Killed):
        streamed(LLAMA, tmp_path, progress=kill)
    assert len(calls) < 2 * count
    assert_same(streamed(LLAMA, tmp_path), expected)
    assert len(calls) == 2 * count, "no block is computed twice"


def test_finished_blocks_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = streamed(LLAMA, tmp_path)
    monkeypatch.setattr(BlockChain, "block", lambda *args: pytest.fail("a finished block was computed"))
    monkeypatch.setattr(BlockPass, "differentiate", lambda *args: pytest.fail("a finished pass was repeated"))
    assert_same(streamed(LLAMA, tmp_path), expected)


def test_a_job_that_was_killed_while_it_sorted_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = PassFiles.put

    def kill(self: PassFiles, kind: str, number: int, some: Any) -> None:
        if (kind, number) == ("sorted", 2):
            raise Killed
        put(self, kind, number, some)

    monkeypatch.setattr(PassFiles, "put", kill)
    with pytest.raises(Killed):
        streamed(LLAMA, tmp_path)
    monkeypatch.undo()
    assert_same(streamed(LLAMA, tmp_path), held(LLAMA))
    files = {file.name for file in (tmp_path / "by-block").iterdir()}
    assert files == {"job-000.safetensors", "scores-000.safetensors", *(f"sorted-{i:03}.safetensors" for i in range(4))}


@pytest.mark.parametrize("kind", ["gradients/hidden-000", "gradients/gradients-002", "gradients/statistics-002"])
def test_a_damaged_file_is_named(kind: str, tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if (what, done) == ("gradients", 6):
            raise Killed

    with pytest.raises(Killed):
        streamed(LLAMA, tmp_path, progress=kill)
    file = tmp_path / "by-block" / f"{kind}.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(CalibrationError, match=rf"{kind}\.safetensors cannot be read"):
        streamed(LLAMA, tmp_path)
    save_file({"unknown": torch.zeros(2)}, file)
    with pytest.raises(CalibrationError, match=rf"{kind}\.safetensors cannot be read"):
        streamed(LLAMA, tmp_path)
    file.write_bytes(whole)
    assert_same(streamed(LLAMA, tmp_path), held(LLAMA))


def test_the_files_of_another_model_recipe_or_text_are_refused(tmp_path: Path) -> None:
    expected = streamed(LLAMA, tmp_path)
    for model in (CONFIGS[1], LlamaConfig(**GROUPED | {"num_hidden_layers": 2})):
        with pytest.raises(CalibrationError, match="has files of another model, recipe or text"):
            streamed(model, tmp_path)
    with pytest.raises(CalibrationError, match="has files of another model, recipe or text"):
        streamed(LLAMA, tmp_path, replace(RECIPE, basis="covariance"))
    chain = BlockChain(model_of(LLAMA))
    with pytest.raises(CalibrationError, match="has files of another model, recipe or text"):
        calibrate_by_block(chain, RECIPE, WINDOWS + 1, lambda i: WINDOWS, tmp_path / "by-block", "cpu")
    with torch.no_grad():
        chain.model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(2)
    with pytest.raises(CalibrationError, match="has files of another model, recipe or text"):
        calibrate_by_block(chain, RECIPE, WINDOWS, lambda i: WINDOWS, tmp_path / "by-block", "cpu")
    assert_same(streamed(LLAMA, tmp_path), expected)


@pytest.mark.parametrize("changes", [{"scores": "order"}, {"post_tune_steps": 1}, {"total_steps": 1}, {"quantize": "nf4"}], ids=str)
def test_a_recipe_that_needs_the_whole_model_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"need the whole model in memory\. Set scores to 'fisher', post_tune_steps to 0"):
        streamed(LLAMA, tmp_path, replace(RECIPE, **changes))


def test_a_text_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    chain = BlockChain(model_of(LLAMA))
    with pytest.raises(BaseModelError, match="token id 9,999"):
        calibrate_by_block(chain, RECIPE, WINDOWS + 9999 - int(WINDOWS.max()), lambda i: WINDOWS, tmp_path, "cpu")


def test_a_model_in_training_mode_has_the_same_result() -> None:
    """GPT-2 has dropout by default."""
    model = model_of(CONFIGS[3]).train()
    parametrize(model, RECIPE, WINDOWS)
    assert_same(calibrate(model, TokenBatches(WINDOWS, RECIPE.batch_size, RECIPE.seed), RECIPE), held(CONFIGS[3]))


def test_windows_longer_than_the_context_of_the_model_are_refused(tmp_path: Path) -> None:
    windows = WINDOWS.repeat(1, 6)
    with pytest.raises(BaseModelError, match="have 72 tokens, but this model has 64 positions"):
        parametrize(model_of(OPTConfig(**OPT, word_embed_proj_dim=32)), RECIPE, windows)
    with pytest.raises(BaseModelError, match="have 72 tokens, but this model has 64 positions"):
        calibrate_by_block(BlockChain(model_of(LLAMA)), RECIPE, windows, lambda i: windows, tmp_path, "cpu")


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (WINDOWS[:0], r"are \[0, 12\]; they must be \[n, T\]"), (WINDOWS[:, :0], r"are \[9, 0\]"), (WINDOWS[:, :1], "T at least 2"),
        (WINDOWS[0], r"are \[12\]"), (-WINDOWS, "ids are at least 0"),
    ],
)  # fmt: skip
def test_windows_without_a_token_to_predict_or_with_negative_ids_are_refused(windows: torch.Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        parametrize(model_of(LLAMA), RECIPE, windows)
    with pytest.raises(DataError, match=message):
        calibrate_by_block(BlockChain(model_of(LLAMA)), RECIPE, windows, lambda i: windows, tmp_path, "cpu")
