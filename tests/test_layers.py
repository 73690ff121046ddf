"""The layer in its forms: each computes what the one before computes."""

import pytest
import torch
from torch import nn

from acip.base import load_base
from acip.calibrate import calibrate, cut_table, set_rank, sort_layers
from acip.data import TokenBatches
from acip.linear import ElasticLinear, KnotLinear, LowRankLinear, SVDLinear, knot_place
from acip.parametrise import basis, covariances, find_linears, parametrise, restore, targets
from acip.recipe import Recipe
from acip.scores import ScoreMap


def recipe(**changes: object) -> Recipe:
    fields = {"dtype": "float32", "adapter_rank": 4, "adapter_alpha": 4.0, "batch_size": 4, "seq_len": 64} | changes
    return Recipe.from_dict(fields)


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("basis_name", ["covariance", "svd"])
def test_full_rank_is_the_base_and_restore_is_exact(
    small_base: str, golden_tokens: torch.Tensor, heldout_tokens: torch.Tensor, basis_name: str
) -> None:
    model = load_base(small_base, "float32").model
    before = logits(model, heldout_tokens[:4])
    parametrise(model, recipe(basis=basis_name), golden_tokens)
    torch.testing.assert_close(logits(model, heldout_tokens[:4]), before, rtol=1e-5, atol=1e-4)
    restore(model)
    assert torch.equal(logits(model, heldout_tokens[:4]), before)
    assert not targets(model)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(("M", "N"), [(24, 24), (40, 16), (16, 40)])
def test_bases_are_orthonormal_and_lossless(M: int, N: int) -> None:
    torch.manual_seed(0)
    W, X = torch.randn(M, N), torch.randn(500, N) @ torch.randn(N, N)
    for C in (None, X.T @ X / len(X), torch.zeros(N, N)):
        U = basis(W, C).double()
        torch.testing.assert_close(U.T @ U, torch.eye(min(M, N), dtype=torch.float64), rtol=0, atol=1e-5)
        torch.testing.assert_close(U @ (U.T @ W.double()), W.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("M", "N"), [(24, 24), (40, 16), (16, 40)])
def test_every_covariance_prefix_is_the_whitening_optimum(M: int, N: int) -> None:
    """The error of rank r equals the dropped singular values of W S, C = S S^T (SVD-LLM's optimum), without its inverse."""
    torch.manual_seed(1)
    W, X = torch.randn(M, N).double(), (torch.randn(2000, N) @ torch.randn(N, N)).double()
    C = X.T @ X
    U = basis(W, C)
    dropped = torch.linalg.svdvals(W @ torch.linalg.cholesky(C)) ** 2
    for r in (1, 5, 10, 15):
        error = ((W - U[:, :r] @ (U[:, :r].T @ W)) @ X.T).square().sum()
        torch.testing.assert_close(error, dropped[r:].sum(), rtol=1e-4, atol=1e-6)


def test_a_covariance_that_rounding_made_indefinite_still_orders_directions() -> None:
    """Where one direction carries nearly all energy (massive activations), float32 rounding outweighs the others' energy."""
    torch.manual_seed(0)
    X, W = torch.randn(600, 256) + 1e3 * torch.randn(256), torch.randn(300, 256)
    C = X.T @ X / len(X)
    assert torch.linalg.eigvalsh(C.double())[0] < 0
    U, W, X = basis(W, C), W.double(), X.double()
    error = ((W - U[:, :64] @ (U[:, :64].T @ W)) @ X.T).square().sum()
    assert error < 1.5 * torch.linalg.svdvals(W @ X.T)[64:].square().sum()


def test_layers_that_share_an_input_share_its_covariance(small_base: str, golden_tokens: torch.Tensor) -> None:
    model = load_base(small_base, "float32").model
    C = covariances(model, find_linears(model), golden_tokens[:8])
    layer = "model.layers.1."
    assert C[layer + "self_attn.q_proj"] is C[layer + "self_attn.v_proj"]
    assert C[layer + "mlp.gate_proj"] is C[layer + "mlp.up_proj"]
    assert C[layer + "self_attn.q_proj"] is not C[layer + "self_attn.o_proj"]
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layer + "mlp.down_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    logits(model, golden_tokens[:8])
    handle.remove()
    X = torch.cat(seen)
    torch.testing.assert_close(C[layer + "mlp.down_proj"], X.T @ X / len(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_masks_gradient_is_the_papers(dtype: torch.dtype) -> None:
    """dL/dp_k = dL/dg_k of y = U' diag(g) V' x with U' V' = U V / s, whatever the dtype; none for the pruned."""
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


def test_masks_scores_and_moments_are_float32_in_a_bfloat16_model(small_base: str, golden_tokens: torch.Tensor) -> None:
    base = load_base(small_base, "bfloat16")
    quick = recipe(dtype="bfloat16", lr=3e-3, lambda_factor=1.3, post_tune_steps=2)
    parametrise(base.model, quick, golden_tokens)
    dtypes: set[torch.dtype] = set()

    def observe(report: object, state: object) -> None:
        dtypes.update(value.dtype for moments in state.optimizer.state.values() for value in moments.values())  # type: ignore[attr-defined]

    cores = [target.core for target in targets(base.model) if isinstance(target.core, SVDLinear)]
    assert {core.p.dtype for core in cores} == {torch.float32}
    assert {core.U.dtype for core in cores} == {torch.bfloat16}
    calibration = calibrate(base.model, TokenBatches(golden_tokens, 4), quick, observe=observe)
    assert dtypes == {torch.float32}
    assert calibration.scores.score.dtype == torch.float32


def test_masked_sorted_and_materialised_agree(small_base: str, golden_tokens: torch.Tensor, heldout_tokens: torch.Tensor) -> None:
    """One set of kept directions in three forms: masks, a prefix of sorted rows with the adapter beside, two linears."""
    model = load_base(small_base, "float32").model
    layers = parametrise(model, recipe(adapter_dropout=0.0), golden_tokens)
    torch.manual_seed(0)
    masks = {}
    for target in layers:
        assert isinstance(target.core, SVDLinear)
        with torch.no_grad():
            target.core.p.copy_(torch.randn_like(target.core.p))
            target.Bs[0].normal_(std=0.02)
        masks[target.name] = target.core.p.detach().clone()
    masked = logits(model, heldout_tokens[:4])
    scores = ScoreMap.start(masks)
    live = {name: int((p > 0).sum()) for name, p in masks.items()}
    layers = sort_layers(model, layers, scores)
    for target in layers:
        set_rank(target, live[target.name])
    torch.testing.assert_close(logits(model, heldout_tokens[:4]), masked, rtol=0, atol=2e-4)
    target, core = layers[0], layers[0].core
    assert isinstance(core, ElasticLinear)
    x = torch.randn(3, 7, core.right.shape[1])
    kept = slice(live[target.name])
    folded = LowRankLinear(
        torch.cat([target.Bs[0].detach(), core.left[kept].T], dim=1), torch.cat([target.A.detach(), core.right[kept]]), core.bias
    )
    torch.testing.assert_close(folded(x), target.slot(x), rtol=0, atol=1e-5)
    assert cut_table(model, scores, recipe()).rest_params == sum(
        p.numel() for name, p in load_base(small_base, "float32").model.named_parameters() if "_proj" not in name
    )


def test_knots_interpolate() -> None:
    knots = (0.4, 0.5, 1.0)
    assert knot_place(0.3, knots) == (0, 0, 0.0)
    assert knot_place(0.5, knots) == (0, 1, pytest.approx(1.0))
    assert knot_place(0.75, knots) == (1, 2, pytest.approx(0.5))
    layer = KnotLinear(torch.zeros(2, 3), 3)
    with torch.no_grad():
        layer.weights[2].fill_(4.0)
    layer.place = knot_place(0.75, knots)
    torch.testing.assert_close(layer.weight, torch.full((2, 3), 2.0))
