"""float64 works like the other dtypes: no value is rounded to 32 bit between weights, scores, files and exports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from acip import finetune
from acip.artifact.artifact import Artifact
from acip.artifact.published import open_published
from acip.base import Base, digest, load_base
from acip.calibration import losses
from acip.calibration.activation_covariance import activation_covariances
from acip.calibration.bases import basis
from acip.calibration.loop import Calibration, calibrate, trial_step
from acip.calibration.parametrize import parametrize
from acip.calibration.state import CalibrationState, StepReport
from acip.data import TokenBatches
from acip.export.folder import export
from acip.export.quantization import spread
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import find_linears, targets, weight_MN
from acip.modeling_acip import PivotLinear, accumulation_dtype, widened
from acip.recipe import Recipe
from tests.conftest import GOLDEN, logits, read

RECIPE = Recipe(
    sample_windows=8, adapter_rank=4, adapter_alpha=4.0, dtype="float64", batch_size=4, seq_len=64, lr=5e-3, lambda_factor=1.4,
    scores="order", post_tune_steps=4,
)  # fmt: skip


def is_rounded(values: Tensor) -> bool:
    """Return whether float32 can represent these numbers exactly."""
    return torch.equal(values.float().double(), values)


@pytest.fixture(scope="module")
def base(small_base: str) -> Base:
    return load_base(small_base, "float64")


@pytest.fixture(scope="module")
def state_tensors() -> dict[str, Tensor]:
    """The state's tensors during pruning and post-tuning, filled by `calibrated_64`."""
    return {}


@pytest.fixture(scope="module")
def calibrated_64(small_base: str, golden_tokens: Tensor, state_tensors: dict[str, Tensor]) -> tuple[Base, Calibration]:
    def observe(reports: list[StepReport], state: CalibrationState) -> None:
        phase = reports[-1].phase
        state_tensors[f"{phase}/score"], state_tensors[f"{phase}/crossing"] = state.scores.score, state.scores.crossing
        for name, param in state.params.items():
            state_tensors[f"{phase}/{name}"] = param.detach().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                state_tensors[f"{phase}/{name}/{key}"] = state.optimizer.state[param][key].clone()

    base = load_base(small_base, "float64")
    parametrize(base.model, RECIPE, golden_tokens)
    return base, calibrate(base.model, TokenBatches(golden_tokens, 4), RECIPE, observe=observe)


@pytest.fixture(scope="module")
def artifact_64(calibrated_64: tuple[Base, Calibration], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact.save(tmp_path_factory.mktemp("float64") / "artifact", *calibrated_64, {})


def test_sums_of_16_and_32_bit_are_in_float32_and_of_float64_in_float64() -> None:
    wide = {dtype: accumulation_dtype(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
    assert wide == {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in wide}
    x = torch.randn(3)
    assert widened(x) is x


# ---- a calibration


def test_every_tensor_and_loss_of_a_calibration_is_in_float64(
    calibrated_64: tuple[Base, Calibration], state_tensors: dict[str, Tensor]
) -> None:
    _, calibration = calibrated_64
    assert {name.partition("/")[0] for name in state_tensors} == {"prune", "post_tune"}
    assert any(name.endswith("mask/exp_avg") for name in state_tensors)
    assert {name for name, tensor in state_tensors.items() if tensor.dtype != torch.float64} == set()
    for name, tensor in state_tensors.items():
        assert not tensor.any() or not is_rounded(tensor), name
    for values in (report.loss for report in calibration.history), (report.task_loss for report in calibration.history):
        assert not is_rounded(torch.tensor([value for value in values if value is not None], dtype=torch.float64))


@pytest.mark.parametrize("changes", [{"basis": "svd", "scores": "singular_values"}, {"scores": "fisher"}], ids=lambda c: c["scores"])
def test_scores_that_need_no_pruning_are_in_float64(small_base: str, golden_tokens: Tensor, changes: dict[str, Any]) -> None:
    base, recipe = load_base(small_base, "float64"), replace(RECIPE, post_tune_steps=0, **changes)
    parametrize(base.model, recipe, golden_tokens)
    score = calibrate(base.model, TokenBatches(golden_tokens, 4), recipe).scores.score
    assert score.dtype == torch.float64 and not is_rounded(score)


def test_covariances_and_bases_are_exact_to_float64(base: Base, golden_tokens: Tensor) -> None:
    linears = find_linears(base.model)
    covariances = activation_covariances(base.model, linears, golden_tokens[:4])
    for name, C in covariances.items():
        assert C.dtype == torch.float64 and not is_rounded(C), name
        W = weight_MN(linears[name])
        for U in (basis(W, C), basis(W, None)):
            torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)
            core = SVDLinear(linears[name], W, U, 0.02)
            torch.testing.assert_close(core.left.read().T @ core.right.read(), W, rtol=0, atol=1e-12)


def test_the_divergence_and_its_gradient_are_exact_to_float64() -> None:
    torch.manual_seed(0)
    logits_BTV, base_BTV = (3 * torch.randn(2, 5, 50, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(50, (2, 5))
    fused, plain = logits_BTV.clone().requires_grad_(), logits_BTV.clone().requires_grad_()
    kl, task_loss = losses.Divergence.apply(fused, base_BTV, losses.next_token.labels(ids))  # type: ignore[misc]
    expected = F.kl_div(plain.log_softmax(-1), base_BTV.log_softmax(-1), log_target=True, reduction="sum") / 10
    kl.backward()
    expected.backward()
    assert kl.dtype == task_loss.dtype == torch.float64
    torch.testing.assert_close(kl, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(task_loss, losses.next_token.loss(logits_BTV, ids), rtol=1e-13, atol=0)
    torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-12, atol=1e-15)


def test_a_calibration_in_4_bit_runs_with_a_float64_model(small_base: str, golden_tokens: Tensor) -> None:
    base, recipe = load_base(small_base, "float64"), replace(RECIPE, quantize="nf4")
    cores = parametrize(base.model, recipe, golden_tokens)
    assert 0 < trial_step(base.model, TokenBatches(golden_tokens, 4), recipe) < 10
    assert {core.left.dtype for core in cores.values()} == {torch.float64}


# ---- the artifact


def test_size_one_of_the_artifact_is_the_base_bit_for_bit(artifact_64: Artifact, base: Base, heldout_tokens: Tensor) -> None:
    artifact = Artifact.open(artifact_64.folder, verify=True)
    assert artifact.recipe.dtype == "float64"
    any_size = artifact.load()
    any_size.resize(0.5)
    any_size.resize(1.0)
    assert any_size.model.dtype == torch.float64
    assert digest(any_size.materialize()) == base.digest
    assert torch.equal(logits(any_size.model, heldout_tokens[:2]), logits(base.model, heldout_tokens[:2]))


def test_every_form_of_a_size_computes_the_same(
    artifact_64: Artifact, calibrated_64: tuple[Base, Calibration], heldout_tokens: Tensor, tmp_path: Path
) -> None:
    """The calibrated, resident, materialized and exported models agree, and the weights take 8 bytes per number."""
    any_size = artifact_64.load()
    cut = any_size.resize(0.5)
    expected = logits(any_size.model, heldout_tokens[:2])
    for name, layer in targets(calibrated_64[1].model).items():
        layer.set_rank(cut.ranks[name])  # type: ignore[operator, union-attr, unused-ignore]
    torch.testing.assert_close(logits(calibrated_64[1].model, heldout_tokens[:2]), expected, rtol=0, atol=1e-9)
    plain = any_size.materialize()
    torch.testing.assert_close(logits(plain, heldout_tokens[:2]), expected, rtol=0, atol=1e-9)
    provenance = export(any_size, artifact_64, tmp_path / "export")
    exported = read(tmp_path / "export")
    assert exported.dtype == torch.float64
    assert torch.equal(logits(exported, heldout_tokens[:2]), logits(plain, heldout_tokens[:2]))
    assert provenance["weight_bytes"] == cut.bytes


def test_a_fine_tuned_size_stays_in_float64(artifact_64: Artifact, golden_tokens: Tensor, tmp_path: Path) -> None:
    any_size = artifact_64.load(size=0.5)
    recipe = finetune.tuning(artifact_64, 0.5, post_tune_steps=2, batch_size=4, seq_len=64)
    finetune.attach(any_size, recipe)
    history = finetune.finetune(any_size, finetune.scores_of(artifact_64), TokenBatches(golden_tokens, 4), recipe)
    assert not is_rounded(torch.tensor([report.loss for report in history], dtype=torch.float64))
    tuned = finetune.save(tmp_path / "tuned", artifact_64, any_size, {})
    for file in ("factors", "adapters"):
        assert {entry.dtype for entry in tuned.tensors(file).entries.values()} == {torch.float64}


def test_pivots_and_their_factors_are_exact_to_float64() -> None:
    torch.manual_seed(0)
    left, right, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((40, 8), (8, 30), (5, 30)))
    layer = PivotLinear.of(left, right, None, torch.float64)
    for form in (layer, spread(layer)):
        torch.testing.assert_close(form(x), x @ (left @ right).T, rtol=0, atol=1e-11)


def test_equal_digests_mean_equal_models_in_float64(base: Base) -> None:
    with torch.no_grad():
        weight = next(base.model.parameters()).view(-1)[:1]
        before = weight.clone()
        weight.mul_(1 + 1e-12)
        changed = digest(base.model)
        weight.copy_(before)
    assert changed != base.digest == digest(base.model)


def test_a_published_checkpoint_in_float64_opens(small_base: str, tmp_path: Path, heldout_tokens: Tensor) -> None:
    (tmp_path / "config.json").write_bytes((GOLDEN / "checkpoint" / "config.json").read_bytes())
    tensors = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    save_file({key: tensor.double() for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    opened, calibration = open_published(tmp_path, small_base)
    assert calibration.recipe.dtype == "float64" and calibration.scores.score.dtype == torch.float64
    in_float32, _ = open_published(GOLDEN / "checkpoint", small_base)
    for model in (opened.model, in_float32.model):
        for layer in targets(model).values():
            layer.set_rank(30)  # type: ignore[operator, union-attr, unused-ignore]
    torch.testing.assert_close(
        logits(opened.model, heldout_tokens[:2]).float(), logits(in_float32.model, heldout_tokens[:2]), rtol=0, atol=1e-3
    )
