"""Fine-tuning starts from the served model, improves one size, changes nothing else, and resumes bit for bit."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from acip.artifact.artifact import Artifact
from acip.base import load_base
from acip.calibration.loop import calibrate
from acip.calibration.losses import next_token
from acip.calibration.parametrize import parametrize
from acip.calibration.state import CalibrationState, StepReport
from acip.data import TokenBatches
from acip.errors import ArtifactError, BudgetError, CalibrationError, RecipeError
from acip.evaluate import perplexity
from acip.export.folder import export
from acip.export.peft import save_peft
from acip.finetune import attach, finetune, save, scores_of, tuning
from acip.layers.elastic_linear import ElasticLinear
from acip.recipe import Recipe
from acip.sizing.budget import Budget
from acip.sizing.elastic_model import ElasticModel
from tests.conftest import logits, read

SIZE, STEPS = 0.5, 40
PROVENANCE = {"finetuned": {"size": SIZE, "steps": STEPS, "data": "/texts/austen.txt"}}


def prepared(artifact: Artifact, size: float = SIZE, **changes: Any) -> tuple[ElasticModel, Recipe]:
    any_size = artifact.load(size=None if changes.get("distill_weight") else size)
    any_size.resize(size)
    recipe = tuning(artifact, size, **{"post_tune_steps": STEPS, "lr": 2e-3, "adapter_dropout": 0.05} | changes)
    attach(any_size, recipe)
    return any_size, recipe


@pytest.fixture(scope="module")
def literal_artifact(small_base: str, golden_tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact in the form of the paper, with adapters beside the layers and stored factors, but calibrated without pruning."""
    recipe = Recipe(
        basis="svd", scores="singular_values", adapter="layer", storage="factors", adapter_rank=4, adapter_alpha=3.0, dtype="float32",
        batch_size=4, seq_len=64, lr=1e-3, post_tune_steps=20, post_tune="stop", distill_weight=0.0,
    )  # fmt: skip
    base = load_base(small_base, recipe.dtype)
    parametrize(base.model, recipe)
    calibration = calibrate(base.model, TokenBatches(golden_tokens, recipe.batch_size), recipe)
    return Artifact.save(tmp_path_factory.mktemp("literal"), base, calibration, {})


@pytest.fixture(scope="module")
def tuned(
    small_artifact: Artifact, golden_tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, list[StepReport]]:
    any_size, recipe = prepared(small_artifact)
    history = finetune(any_size, scores_of(small_artifact), TokenBatches(golden_tokens, 4, recipe.seed), recipe)
    folder = tmp_path_factory.mktemp("tuned")
    save(folder, small_artifact, any_size, PROVENANCE)
    return Artifact.open(folder, verify=True), history


def test_tuning_starts_from_the_served_model(small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path: Path) -> None:
    served = small_artifact.load(size=SIZE)
    any_size, _ = prepared(small_artifact)
    assert torch.equal(logits(any_size.model, heldout_tokens[:8]), logits(served.model, heldout_tokens[:8]))
    unchanged = save(tmp_path, small_artifact, any_size, {})
    saved, factors = (load_file(artifact.folder / "factors.safetensors") for artifact in (unchanged, small_artifact))
    assert all(torch.equal(saved[name], factors[name]) for name in factors)


def test_tuning_improves_its_size_and_changes_nothing_else(
    tuned: tuple[Artifact, list[StepReport]], small_artifact: Artifact, golden_tokens: torch.Tensor, heldout_tokens: torch.Tensor
) -> None:
    artifact, history = tuned
    assert [report.step for report in history] == list(range(1, STEPS + 1)) and {report.phase for report in history} == {"post_tune"}
    before, after = small_artifact.load(size=SIZE), artifact.load(size=SIZE)
    assert perplexity(after.model, golden_tokens[:128], 32).loss < perplexity(before.model, golden_tokens[:128], 32).loss
    assert perplexity(after.model, heldout_tokens[:128], 32).loss < perplexity(before.model, heldout_tokens[:128], 32).loss
    for file in ("dense", "rest", "order"):
        assert (artifact.folder / f"{file}.safetensors").read_bytes() == (small_artifact.folder / f"{file}.safetensors").read_bytes()
    ranks = small_artifact.table().cut(Budget(SIZE)).ranks
    tuned_factors, factors = (load_file(each.folder / "factors.safetensors") for each in (artifact, small_artifact))
    for name, rank in ranks.items():
        for side in ("left", "right"):
            rows, old_rows = tuned_factors[f"{name}.{side}"], factors[f"{name}.{side}"]
            assert torch.equal(rows[rank or 0 :], old_rows[rank or 0 :])
            assert rank is None or not torch.equal(rows[:rank], old_rows[:rank])
    assert artifact.curve == [] and artifact.manifest["provenance"] == PROVENANCE
    assert artifact.recipe == small_artifact.recipe
    base = small_artifact.load()
    assert torch.equal(logits(artifact.load().model, heldout_tokens[:4]), logits(base.model, heldout_tokens[:4])), (
        "size 1.0 is the base model"
    )


def test_resumed_equals_straight_bit_for_bit(
    tuned: tuple[Artifact, list[StepReport]], small_artifact: Artifact, golden_tokens: torch.Tensor, tmp_path: Path
) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def kill(reports: list[StepReport], state: CalibrationState) -> None:
        if state.step == STEPS // 2:
            state.save(tmp_path)
            raise Killed

    straight, history = tuned
    scores, batches = scores_of(small_artifact), TokenBatches(golden_tokens, 4, small_artifact.recipe.seed + 1)
    any_size, recipe = prepared(small_artifact)
    with pytest.raises(Killed):
        finetune(any_size, scores, batches, recipe, observe=kill)
    any_size, recipe = prepared(small_artifact)
    assert finetune(any_size, scores, batches, recipe, resume=tmp_path) == history
    (tmp_path / "artifact").mkdir()
    resumed = save(tmp_path / "artifact", small_artifact, any_size, {})
    for file in ("factors", "adapters"):
        assert (resumed.folder / f"{file}.safetensors").read_bytes() == (straight.folder / f"{file}.safetensors").read_bytes()


def test_a_tuned_artifact_is_exported_tuned_again_and_saved_for_peft(
    tuned: tuple[Artifact, list[StepReport]], small_artifact: Artifact, small_base: str, heldout_tokens: torch.Tensor, tmp_path: Path
) -> None:
    """The PEFT adapters contain the changes of both the calibration and the fine-tuning."""
    artifact, _ = tuned
    any_size = artifact.load(size=SIZE)
    export(any_size, artifact, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "was fine-tuned at size 0.5 (40 steps on austen.txt)" in card and "was not trained" not in card
    exact = logits(any_size.model, heldout_tokens[:4])
    torch.testing.assert_close(logits(read(tmp_path / "export"), heldout_tokens[:4]), exact, atol=1e-3, rtol=0)
    again, _ = prepared(artifact)
    assert torch.equal(logits(again.model, heldout_tokens[:4]), exact)
    cut = artifact.table().cut(Budget(SIZE))
    directions: list[torch.Tensor] = []
    for each in (small_artifact, artifact):
        save_peft(each, tmp_path / f"peft-{len(directions)}", cut, small_base)
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_base), tmp_path / f"peft-{len(directions)}")
        name = next(name for name, rank in cut.ranks.items() if rank is not None)
        left, right = each.tensors("factors").read([f"{name}.left", f"{name}.right"]).values()
        adapted: Any = peft.get_submodule(f"base_model.model.{name}")
        directions.append(left[: cut.ranks[name]].T @ right[: cut.ranks[name]] - adapted.get_delta_weight("default"))
    torch.testing.assert_close(*directions, atol=1e-5, rtol=0)  # without the adapters, both have the same directions


def test_adapters_beside_the_layers_are_tuned(
    literal_artifact: Artifact, golden_tokens: torch.Tensor, heldout_tokens: torch.Tensor, tmp_path: Path
) -> None:
    """In the form of the paper, the rows of the adapters are trained, and no direction changes."""
    any_size, recipe = prepared(literal_artifact, size := 0.8, lr=1e-3)
    served = literal_artifact.load(size=size)
    torch.testing.assert_close(logits(any_size.model, heldout_tokens[:4]), logits(served.model, heldout_tokens[:4]), atol=1e-4, rtol=0)
    history = finetune(any_size, scores_of(literal_artifact), TokenBatches(golden_tokens, 4, recipe.seed), recipe)
    artifact = save(tmp_path, literal_artifact, any_size, {})
    R, cut = literal_artifact.recipe.adapter_rows, literal_artifact.table().cut(Budget(size))
    after, before = (load_file(each.folder / "factors.safetensors") for each in (artifact, literal_artifact))
    for name, rank in cut.ranks.items():
        for side in ("left", "right"):
            assert torch.equal(after[f"{name}.{side}"][R:], before[f"{name}.{side}"][R:])
            assert torch.equal(after[f"{name}.{side}"][:R], before[f"{name}.{side}"][:R]) == (rank is None)
    assert None in cut.ranks.values() and any(cut.ranks.values()), "this size has dense and compressed layers"
    assert artifact.table().cut(Budget(size)).params == cut.params
    loss = perplexity(served.model, golden_tokens[:128], 32).loss
    assert len(history) == STEPS and perplexity(artifact.load(size=size).model, golden_tokens[:128], 32).loss < loss


@pytest.mark.parametrize(
    "changes",
    [
        {"quantize": "nf4"},
        {"distill_weight": 1.0},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "post_tune_steps": 20},
    ],
    ids=str,
)
def test_tuning_in_4_bit_by_distillation_and_with_less_memory(
    small_artifact: Artifact, golden_tokens: torch.Tensor, heldout_tokens: torch.Tensor, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Each option lowers the loss, and the saved factors are the trained ones. In 4 bit, tuning starts from a different loss."""
    any_size, recipe = prepared(small_artifact, **changes)
    before = perplexity(any_size.model, golden_tokens[:128], 32).loss
    served = perplexity(small_artifact.load(size=SIZE).model, golden_tokens[:128], 32).loss
    assert before != served if "quantize" in changes else before == pytest.approx(served, abs=1e-4)
    finetune(any_size, scores_of(small_artifact), TokenBatches(golden_tokens, 4, recipe.seed), recipe)
    after = perplexity(any_size.model, golden_tokens[:128], 32).loss
    assert after < before
    saved = save(tmp_path, small_artifact, any_size, {}).load(size=SIZE)
    layers = [(layer, any_size.layers[name]) for name, layer in saved.layers.items() if layer.rank is not None]
    for layer, trained in layers:
        assert isinstance(trained, ElasticLinear) and layer.rank is not None
        torch.testing.assert_close(layer.folded(layer.rank), trained.folded(layer.rank), rtol=0, atol=1e-6)


def test_impossible_tunings_are_refused(small_artifact: Artifact, literal_artifact: Artifact, golden_tokens: torch.Tensor) -> None:
    for size, error, message in (
        (1.0, BudgetError, "there is nothing to tune"),
        (0.001, BudgetError, "can't be reached: the smallest is"),
        (1.5, BudgetError, "size ratio is 1.5"),
    ):
        with pytest.raises(error, match=message):
            tuning(small_artifact, size)
    with pytest.raises(RecipeError, match="must be at least 1"):
        tuning(small_artifact, SIZE, post_tune_steps=0)
    with pytest.raises(RecipeError, match="did you mean 'distill_weight'"):
        tuning(small_artifact, SIZE, distil=1.0)
    with pytest.raises(RecipeError, match="seq_len is 100,000, but this model has 512 positions"):
        tuning(small_artifact, SIZE, seq_len=100_000)
    with pytest.raises(RecipeError, match=r"adapter_rank is 64; it must be"):
        tuning(literal_artifact, 0.8, adapter_rank=64)
    with pytest.raises(CalibrationError, match=r"needs a model with adapters\. Call attach"):
        finetune(small_artifact.load(size=SIZE), scores_of(small_artifact), TokenBatches(golden_tokens, 4), tuning(small_artifact, SIZE))
    any_size, recipe = prepared(small_artifact, lr=1e12)
    with pytest.raises(CalibrationError, match="diverged"):
        finetune(any_size, scores_of(small_artifact), TokenBatches(golden_tokens, 4), recipe)


def test_a_tuning_that_diverges_in_its_last_step_is_refused(small_artifact: Artifact, golden_tokens: torch.Tensor) -> None:
    """The loss of that step was computed before its update."""
    any_size, recipe = prepared(small_artifact, post_tune_steps=2)
    losses = []

    def loss(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
        losses.append(next_token.loss(logits_BTV, ids_BT))
        if len(losses) == 2:
            losses[1].register_hook(lambda gradient: gradient * math.nan)
        return losses[-1]

    task = replace(next_token, loss=loss)
    with pytest.raises(CalibrationError, match=r"trained weights are not finite after step 2: the calibration diverged\. Lower lr"):
        finetune(any_size, scores_of(small_artifact), TokenBatches(golden_tokens, 4), recipe, task=task)


def test_peft_gets_the_adapters_that_only_fine_tuning_added(small_base: str, golden_tokens: torch.Tensor, tmp_path: Path) -> None:
    """Fine-tuning adds adapters to the layers that its size compresses. A smaller size compresses more."""
    recipe = Recipe(basis="svd", scores="singular_values", adapter_rank=0, post_tune_steps=0, dtype="float32", batch_size=4, seq_len=64)
    base = load_base(small_base, recipe.dtype)
    parametrize(base.model, recipe)
    artifact = Artifact.save(tmp_path / "bare", base, calibrate(base.model, TokenBatches(golden_tokens, 4), recipe), {})
    with pytest.raises(ArtifactError, match="has no adapters"):
        save_peft(artifact, tmp_path / "peft", artifact.table().cut(Budget(SIZE)), small_base)
    large, small = (artifact.table().cut(Budget(size)) for size in (0.95, 0.3))
    any_size, tuned_recipe = prepared(artifact, 0.95, post_tune_steps=1)
    finetune(any_size, scores_of(artifact), TokenBatches(golden_tokens, 4), tuned_recipe)
    save_peft(save(tmp_path / "tuned", artifact, any_size, {}), tmp_path / "peft", small, small_base)
    modules = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"]
    assert set(modules) == {name for name, rank in large.ranks.items() if rank is not None} < set(small.ranks)
