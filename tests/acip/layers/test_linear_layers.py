"""All forms of a layer compute the same function."""

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acip.base import load_base
from acip.calibration import losses
from acip.calibration.bases import basis
from acip.calibration.loop import calibrate
from acip.calibration.losses import as_base
from acip.calibration.parametrize import parametrize, restore
from acip.data import TokenBatches
from acip.layers.adapters import LoRA
from acip.layers.directions import DirectionMatrix, FourBitDirectionMatrix
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import targets
from acip.modeling_acip import LowRankLinear, PivotLinear, set_module
from acip.recipe import Recipe, Storage
from acip.sizing.model_sizes import cut_table, sort_layers
from acip.sizing.score_map import ScoreMap
from tests.conftest import logits


def recipe(**changes: object) -> Recipe:
    fields = {"dtype": "float32", "adapter_rank": 4, "adapter_alpha": 4.0, "batch_size": 4, "seq_len": 64} | changes
    return Recipe.from_dict(fields)


@pytest.mark.parametrize("basis_name", ["covariance", "svd"])
def test_full_rank_is_the_base_and_restore_is_exact(
    small_base: str, golden_tokens: torch.Tensor, heldout_tokens: torch.Tensor, basis_name: str
) -> None:
    model = load_base(small_base, "float32").model
    before = logits(model, heldout_tokens[:4])
    parametrize(model, recipe(basis=basis_name), golden_tokens)
    torch.testing.assert_close(logits(model, heldout_tokens[:4]), before, rtol=1e-5, atol=1e-4)
    restore(model)
    assert torch.equal(logits(model, heldout_tokens[:4]), before)
    assert not targets(model)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_mask_is_that_of_the_paper(dtype: torch.dtype) -> None:
    """dL/dp_k = dL/dg_k of y = U' diag(g) V' x with U' V' = U V / s, in every dtype. Pruned directions have no gradient."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 8, bias=False)
    layer = SVDLinear(linear.to(dtype), linear.weight.detach(), basis(linear.weight.detach(), None), 0.02)
    with torch.no_grad():
        layer.p[3] = -0.01
    x, v = torch.randn(5, 12).to(dtype), torch.randn(5, 8).to(dtype)
    (layer(x) * v).sum().backward()
    U = basis(linear.weight.detach().float(), None)
    V = U.T @ linear.weight.detach().float()
    expected = ((x.float() @ V.T) * (v.float() @ U)).sum(0) / 0.02
    expected[3] = 0
    assert layer.p.grad is not None
    assert layer.p.grad.dtype == torch.float32
    torch.testing.assert_close(layer.p.grad, expected, rtol=0, atol=1e-3 if dtype == torch.float32 else 3.0)
    assert layer.p.grad[3] == 0


def test_masks_scores_and_optimizer_moments_are_float32_in_a_bfloat16_model(small_base: str, golden_tokens: torch.Tensor) -> None:
    base = load_base(small_base, "bfloat16")
    quick = recipe(dtype="bfloat16", lr=3e-3, lambda_factor=1.3, post_tune_steps=2)
    parametrize(base.model, quick, golden_tokens)
    dtypes: set[torch.dtype] = set()

    def observe(report: object, state: object) -> None:
        dtypes.update(value.dtype for moments in state.optimizer.state.values() for value in moments.values())  # type: ignore[attr-defined]

    cores = [core for core in targets(base.model).values() if isinstance(core, SVDLinear)]
    assert {core.p.dtype for core in cores} == {torch.float32}
    assert {core.left.dtype for core in cores} == {torch.bfloat16}
    calibration = calibrate(base.model, TokenBatches(golden_tokens, 4), quick, observe=observe)
    assert dtypes == {torch.float32}
    assert calibration.scores.score.dtype == torch.float32


@pytest.mark.parametrize("adapter", ["factors", "layer"])
@pytest.mark.parametrize("storage", ["pivot", "factors"])
def test_masked_packed_sorted_and_materialized_agree(
    small_base: str, golden_tokens: torch.Tensor, heldout_tokens: torch.Tensor, adapter: str, storage: Storage
) -> None:
    """Masks, packed rows, a prefix of sorted rows, and plain layers with the same directions compute the same."""
    model = load_base(small_base, "float32").model
    layers = parametrize(model, recipe(adapter=adapter, adapter_dropout=0.0), golden_tokens)
    torch.manual_seed(0)
    for core in layers.values():
        assert isinstance(core, SVDLinear)
        with torch.no_grad():
            core.p.copy_(torch.randn_like(core.p))
            for lora in core.loras.values():
                lora.B.normal_(std=0.02)
    masks = {name: core.p.detach().clone() for name, core in layers.items() if isinstance(core, SVDLinear)}
    tokens = heldout_tokens[:4]
    masked = logits(model, tokens)
    for core in layers.values():
        assert isinstance(core, SVDLinear)
        core.pack((core.p > 0).nonzero().squeeze(1))
    torch.testing.assert_close(logits(model, tokens), masked, rtol=0, atol=2e-4)
    scores = ScoreMap.start(masks)
    layers = sort_layers(model, scores)
    for name, core in layers.items():
        assert isinstance(core, ElasticLinear)
        core.set_rank(int((masks[name] > 0).sum()))
    torch.testing.assert_close(logits(model, tokens), masked, rtol=0, atol=2e-4)
    with as_base(layers):
        torch.testing.assert_close(logits(model, tokens), logits(load_base(small_base, "float32").model, tokens), rtol=0, atol=0)
    rest = sum(p.numel() for name, p in load_base(small_base, "float32").model.named_parameters() if "_proj" not in name)
    assert cut_table(model, scores, recipe()).rest_params == rest
    for name, core in layers.items():
        assert isinstance(core, ElasticLinear)
        assert core.rank is not None
        left, right = core.folded(core.rank)
        resident = ElasticLinear(core.original, left, right, lead=4 if adapter == "layer" else 0)
        resident.set_rank(core.rank)
        x = torch.randn(3, right.shape[1])
        torch.testing.assert_close(resident(x), core(x), rtol=0, atol=1e-4)
        set_module(model, name, core.materialize(storage))
    torch.testing.assert_close(logits(model, tokens), masked, rtol=0, atol=5e-4)


@pytest.mark.parametrize(("M", "N", "q"), [(6, 5, 0), (96, 96, 60), (256, 96, 40), (96, 256, 95), (40, 8, 1), (8, 40, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_pivot_form_is_the_product_with_fewer_numbers(M: int, N: int, q: int, bias: bool) -> None:
    torch.manual_seed(0)
    left, right, b, x = torch.randn(M, q), torch.randn(q, N), torch.randn(M), torch.randn(5, N)
    layer = PivotLinear.of(left, right, b if bias else None, torch.float32)
    expected = x @ (left @ right).T + (b if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert sum(p.numel() for p in layer.parameters()) == q * (M + N - q) + M * bias
    assert (layer.combine.weight.abs() < 10).all(), "the coefficients of the pivot rows are not small"


def test_the_pivot_form_is_as_good_in_16_bit_as_two_factors(calibrated: Any) -> None:
    """For trained layers at half their rank, the rounding error of the pivot form is similar to that of the factors."""
    _, calibration = calibrated
    for core in targets(calibration.model).values():
        assert isinstance(core, ElasticLinear)
        left_qM, right = core.folded(core.stored_rank // 2)
        left = left_qM.T
        x = torch.randn(64, right.shape[1])
        exact = x @ (left @ right).T
        error = [
            float((layer(x.bfloat16()).float() - exact - (core.bias if core.bias is not None else 0)).norm() / exact.norm())
            for layer in (PivotLinear.of(left, right, None, torch.bfloat16), LowRankLinear(left.bfloat16(), right.bfloat16(), None))
        ]
        assert error[0] < 3 * error[1] < 0.03


def test_adapters_on_the_factors_leave_the_span_of_the_kept_directions() -> None:
    """The rank stays the same, but the row and column spaces of the layer change."""
    linear = torch.nn.Linear(12, 8, bias=False)
    W = linear.weight.detach()
    core = SVDLinear(linear, W, basis(W, None), 0.02, {"right": LoRA(12, 8, 2, 1.0), "left": LoRA(8, 8, 2, 1.0)})
    with torch.no_grad():
        for lora in core.loras.values():
            lora.B.normal_()
    elastic = core.sorted(torch.arange(8))
    elastic.set_rank(3)
    left, right = elastic.folded(3)
    assert torch.linalg.matrix_rank(left.T @ right) == 3
    joint = torch.cat([elastic.left.read(3), left]), torch.cat([elastic.right.read(3), right])
    assert [int(torch.linalg.matrix_rank(both)) for both in joint] == [5, 5], "each side spans two more dimensions"


@pytest.mark.parametrize("rank", [1, 37, 64, 70, 90])
def test_ranks_in_16_bit_are_multiplied_in_steps_and_use_no_other_direction(rank: int) -> None:
    """Results and gradients are those of the kept directions alone, and the rows of the adapters beyond them have no gradient."""
    torch.manual_seed(0)
    loras = {"right": LoRA(100, 90, 4, 1.0, model_dtype=torch.bfloat16), "left": LoRA(90, 96, 4, 1.0, model_dtype=torch.bfloat16)}
    nn.init.normal_(loras["right"].B)
    nn.init.normal_(loras["left"].B)
    original = nn.Linear(100, 96, dtype=torch.bfloat16)
    left, right = torch.randn(90, 96).bfloat16(), torch.randn(90, 100).bfloat16()
    left[rank:], right[rank:] = 1e4, 1e4
    layer = ElasticLinear(original, left, right, loras)
    layer.set_rank(rank)
    x = torch.randn(2, 5, 100).bfloat16().requires_grad_()
    y = layer(x)
    y.float().square().mean().backward()
    folded_left, folded_right = layer.folded(rank)
    wide = x.detach().float().requires_grad_()
    expected = wide @ folded_right.T @ folded_left + original.bias.float()
    expected.square().mean().backward()
    assert x.grad is not None
    assert wide.grad is not None
    for got, exact in ((y, expected), (x.grad, wide.grad)):
        assert float((got.detach().float() - exact.detach()).norm() / exact.detach().norm()) < 0.05
    assert loras["right"].B.grad is not None
    assert loras["left"].A.grad is not None
    assert not loras["right"].B.grad[rank:].any()
    assert not loras["left"].A.grad[:, rank:].any()


def test_a_parametrized_model_can_be_moved_and_cast(small_base: str, golden_tokens: torch.Tensor, heldout_tokens: torch.Tensor) -> None:
    """After `model.to`, the layers use the new factors."""
    model = load_base(small_base, "float32").model
    parametrize(model, recipe(adapter_dropout=0.0), golden_tokens)
    before = logits(model, heldout_tokens[:2])
    torch.nn.Module.to(model, torch.float64)
    torch.testing.assert_close(logits(model, heldout_tokens[:2]), before.double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_and_its_gradient_equal_autograd(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compared with autograd through log-softmax, with a chunk size that does not divide the rows."""
    monkeypatch.setattr(losses, "CHUNK", 3 * 50)
    torch.manual_seed(0)
    logits, base = (3 * torch.randn(2, 5, 50)).to(dtype).requires_grad_(), (3 * torch.randn(2, 5, 50)).to(dtype)
    ids = torch.randint(50, (2, 5))
    kl, task_loss = losses.Divergence.apply(logits, base, losses.next_token.labels(ids))  # type: ignore[misc]
    (2 * kl).backward()
    torch.testing.assert_close(task_loss, losses.next_token.loss(logits.detach(), ids), rtol=1e-5, atol=0)
    assert not task_loss.requires_grad and losses.Divergence.apply(logits, base)[1].isnan()
    exact = logits.detach().double().requires_grad_()
    expected = F.kl_div(exact.log_softmax(-1), base.double().log_softmax(-1), log_target=True, reduction="sum") / 10
    (2 * expected).backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(kl.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [64, 100, 192])
def test_rows_in_four_bit_are_small_and_differentiable(kind: Literal["nf4", "fp4"], width: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(20, width)
    rows, full = FourBitDirectionMatrix(values, kind), DirectionMatrix(values.clone())
    bytes_ = sum(p.numel() * p.element_size() for p in rows.parameters())
    assert bytes_ <= 20 * 64 * -(-width // 64) * 0.5625
    assert 0 < float((rows.read() - values).abs().mean()) < 0.12
    assert torch.equal(rows.read(7), rows.read()[:7])
    x, h = torch.randn(3, width, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    for result, reference, leaf in (
        (rows.project(x, 7), x @ rows.read(7).T, x),
        (rows.expand(h, 7, torch.ones(width)), h @ rows.read(7) + 1, h),
    ):
        torch.testing.assert_close(result, reference)
        got, expected = (torch.autograd.grad(y.square().sum(), leaf)[0] for y in (result, reference))
        torch.testing.assert_close(got, expected)
    order = torch.randperm(20)
    before = rows.read()
    for kept in (rows, full):
        kept.permute(order)
    assert torch.equal(rows.read(), before[order])
    assert torch.equal(full.read(), values[order])


def test_a_layer_in_four_bit_is_small_and_restores_its_weight(small_base: str, golden_tokens: torch.Tensor) -> None:
    model = load_base(small_base, "float32").model
    before = {name: p.clone() for name, p in model.named_parameters()}
    full = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "_proj" in name)
    layers = parametrize(model, recipe(quantize="nf4", adapter_rank=0, post_tune_steps=0), golden_tokens)
    frozen = sum(p.numel() * p.element_size() for core in layers.values() for p in core.parameters() if not p.requires_grad)
    assert frozen < 0.45 * full, "layer and directions have 2.4 times the numbers, which would take 2.4 times the bytes in 32 bit"
    restore(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kept", [0, 3])
def test_the_pivot_form_represents_rank_deficient_layers(kept: int) -> None:
    """Models that were grown by whole blocks contain all-zero layers."""
    torch.manual_seed(0)
    left, right = torch.randn(12, 6), torch.randn(6, 10)
    left[:, kept:] = 0
    layer = PivotLinear.of(left, right, None, torch.float32)
    x = torch.randn(4, 10)
    torch.testing.assert_close(layer(x), x @ (left @ right).T, rtol=0, atol=1e-4)
