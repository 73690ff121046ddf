"""The Fisher basis is optimal for second moments of inputs and gradients, which other passes over the text can gather for it."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from acip.base import load_base
from acip.calibration.activation_covariance import activation_covariances
from acip.calibration.bases import bases, fisher_bases_cached, fisher_basis
from acip.calibration.basis_cache import BasisCache
from acip.calibration.fisher_moments import FisherMoments, fisher_moments
from acip.calibration.loop import calibrate
from acip.calibration.losses import sampled_loss
from acip.calibration.parametrize import parametrize
from acip.coding.statistics import layer_statistics
from acip.data import TokenBatches
from acip.errors import BaseModelError, CalibrationError
from acip.layers.svd_linear import coordinates
from acip.layers.targets import find_linears, hooked, targets, weight_MN
from acip.recipe import Recipe
from acip.sizing.budget import Budget
from acip.sizing.model_sizes import set_size
from tests.acip.calibration.test_bases import correlated, same

RECIPE = Recipe(basis="fisher", dtype="float32", sample_windows=8)


@pytest.fixture
def model(small_base: str) -> Any:
    return load_base(small_base, "float32").model


def shaped(M: int, N: int, W: torch.Tensor, G_MM: torch.Tensor) -> torch.Tensor:
    """Return the second moment that `fisher_basis` takes, from that of the gradients at the outputs."""
    return G_MM if M <= N else W.T @ G_MM @ W


@pytest.mark.parametrize(("M", "N"), [(24, 24), (40, 16), (16, 40)])
def test_every_fisher_prefix_is_the_optimum_for_inputs_and_gradients(M: int, N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimum of tr(G dW C dW^T) at rank r is the sum of the dropped squared singular values of G^1/2 W C^1/2."""
    monkeypatch.setattr("acip.calibration.bases.GRADIENT_DAMPING", 0.0)
    torch.manual_seed(0)
    W, X, g = torch.randn(M, N).double(), torch.randn(500, N).double() * torch.logspace(0, 1, N), torch.randn(500, M).double()
    g = g * torch.logspace(0, 1, M)
    C, G = X.T @ X, g.T @ g
    dropped = torch.linalg.svdvals(torch.linalg.cholesky(G).T @ W @ torch.linalg.cholesky(C)) ** 2
    for given in [C] if M >= N else [C, W @ C @ W.T]:
        U = fisher_basis(W, given, shaped(M, N, W, G))
        V = coordinates(W, U.T, refine=0, orthonormal=False)
        torch.testing.assert_close(U.norm(dim=0), torch.ones(min(M, N)).double())
        torch.testing.assert_close(U @ V, W, rtol=0, atol=1e-6)
        for r in (1, 5, 10, 15):
            error = W - U[:, :r] @ V[:r]
            torch.testing.assert_close(torch.trace(error.T @ G @ error @ C), dropped[r:].sum(), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("M", "N"), [(96, 96), (160, 64), (64, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_any_condition_gets_a_lossless_fisher_basis(M: int, N: int, dtype: torch.dtype) -> None:
    """The weights are random, of low rank, nearly of low rank, and zero; gradients have full rank, few samples, and none."""
    W, C = correlated(M, N, 500)
    generator = torch.Generator().manual_seed(1)
    low = W[:, :8] @ torch.randn(8, N, generator=generator)
    for weight in (W, low, low + 1e-3 * W, torch.zeros(M, N)):
        for samples in (500, 5, 0):
            g = torch.randn(samples, M, generator=generator)
            U = fisher_basis(weight.to(dtype), C, shaped(M, N, weight, g.T @ g))
            left = U.T.to(dtype).contiguous()
            V = coordinates(weight.to(dtype), left, refine=2, orthonormal=False)
            assert U.isfinite().all() and V.isfinite().all()
            error = (left.double().T @ V.double() - weight.to(dtype).double()).norm()
            assert error <= (1e-2 if dtype == torch.bfloat16 else 1e-3) * weight.norm()


def test_moments_of_gradients_are_those_of_each_layer_alone(model: Any, golden_tokens: torch.Tensor) -> None:
    """Layers with the same input have separate gradients. The reference differentiates by an offset at each layer's output."""
    linears, windows = find_linears(model), golden_tokens[:2]
    _, found = fisher_moments(model, linears, windows, seed=3)
    offsets: dict[str, list[torch.Tensor]] = {name: [] for name in linears}

    def hook(name: str) -> Callable[..., torch.Tensor]:
        def add_offset(_layer: nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
            offsets[name].append(torch.zeros_like(out, requires_grad=True))
            return out + offsets[name][-1]

        return add_offset

    with hooked(layer.register_forward_hook(hook(name)) for name, layer in linears.items()):
        for i, window in enumerate(windows):
            sampled_loss(model(input_ids=window[None]).logits[0], i, 3).backward()
    for name, layer in linears.items():
        W = weight_MN(layer)
        g = torch.cat([offset.grad.flatten(0, 1) for offset in offsets[name] if offset.grad is not None])
        g = g @ W if len(W) > W.shape[1] else g
        torch.testing.assert_close(found[name], g.T @ g, rtol=1e-3, atol=1e-4 * float((g.T @ g).diagonal().mean()))


def test_the_fisher_basis_has_less_divergence_than_the_covariance_basis(small_base: str, golden_tokens: torch.Tensor) -> None:
    divergences = {}
    for kind in ("covariance", "fisher"):
        base = load_base(small_base, "float32")
        recipe = Recipe(basis=kind, dtype="float32", sample_windows=32, batch_size=4, seq_len=64, adapter_rank=0, post_tune_steps=0)
        with torch.no_grad():
            expected = base.model(input_ids=golden_tokens[32:40]).logits.log_softmax(-1)
        parametrize(base.model, recipe, golden_tokens)
        table = calibrate(base.model, TokenBatches(golden_tokens, 4, 0), recipe).table
        set_size(targets(base.model), table.cut(Budget(0.6)))
        with torch.no_grad():
            found = base.model(input_ids=golden_tokens[32:40]).logits.log_softmax(-1)
        divergences[kind] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert divergences["fisher"] < divergences["covariance"], divergences


def test_a_feed_without_logits_has_no_fisher_basis(model: Any, golden_tokens: torch.Tensor) -> None:
    linears = find_linears(model)
    with pytest.raises(BaseModelError, match=r"feed returned NoneType\. Return the logits.*set basis to 'covariance'"):
        list(bases(model, linears, RECIPE, golden_tokens, feed=lambda model, ids: None))
    own = dict(bases(model, linears, RECIPE, golden_tokens))
    given = dict(bases(model, linears, RECIPE, golden_tokens, feed=lambda model, ids: model(input_ids=ids)))
    assert same(own, given)


def test_moments_of_activations_are_those_of_a_forward_pass(model: Any, golden_tokens: torch.Tensor) -> None:
    """Layers with the same input share one matrix, although their gradients are gathered separately."""
    linears = find_linears(model)
    C, G = fisher_moments(model, linears, golden_tokens[:8])
    expected = activation_covariances(model, linears, golden_tokens[:8])
    assert C.keys() == G.keys() == expected.keys()
    for name, moment in expected.items():
        torch.testing.assert_close(C[name], moment, rtol=1e-4, atol=1e-5 * float(moment.diagonal().max()))
    shared = [{tuple(name for name in found if found[name] is found[first]) for first in found} for found in (C, expected)]
    assert shared[0] == shared[1] != {(name,) for name in linears}
    assert not any(matrix.requires_grad for matrix in (*C.values(), *G.values()))


def test_bases_come_from_the_passes_that_gather_the_statistics_of_codes(model: Any, golden_tokens: torch.Tensor, tmp_path: Path) -> None:
    """They are those of `bases`, and the statistics do not change. Cached bases are not computed again."""
    linears, cache = find_linears(model), BasisCache(tmp_path)
    expected = layer_statistics(model, linears, golden_tokens[:8], RECIPE.seed)
    solved: list[int] = []

    def spread(function: Any, items: Any, threads: int = 0) -> Any:
        for item in items:
            solved.append(len(item[0]))
            yield function(item)

    steps: list[tuple[int, int]] = []
    for lost, count in ((0, len(linears)), (0, 0), (1, 1)):
        for file in sorted(tmp_path.glob("*.safetensors"))[:lost]:
            file.unlink()
        solved.clear()
        steps.clear()
        with fisher_bases_cached(model, linears, RECIPE, golden_tokens, cache, spread, lambda *step: steps.append(step)) as computed:
            found = layer_statistics(model, linears, golden_tokens[:8], RECIPE.seed)
        assert computed == sum(solved) == count
        assert steps == [(i + 1, count) for i in range(count)]
        for name, each in found.items():
            torch.testing.assert_close(each.metric, expected[name].metric, rtol=1e-5, atol=0.0)
            torch.testing.assert_close(each.importance, expected[name].importance, rtol=1e-5, atol=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acip.calibration.bases.fisher_moments", lambda *args: pytest.fail("the bases are not in the cache"))
        cached = dict(bases(model, linears, RECIPE, golden_tokens, cache=cache))
    for name, directions in bases(model, linears, RECIPE, golden_tokens):
        W, r = weight_MN(linears[name]), len(directions) // 2
        halves = [each[:r].T @ coordinates(W, each, refine=2, orthonormal=False)[:r] for each in (cached[name], directions)]
        assert (halves[0] - halves[1]).norm() < 0.05 * W.norm()


def hooks_of(model: nn.Module) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.modules())


def test_nothing_is_shared_through_a_cache_that_cannot_hold_the_bases(model: Any, golden_tokens: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for cache in (BasisCache(tmp_path / "file" / "bases"), BasisCache(tmp_path / "small", 1000)):
        with fisher_bases_cached(model, find_linears(model), RECIPE, golden_tokens, cache) as computed:
            assert computed == hooks_of(model) == 0
    assert not list(tmp_path.glob("*/*"))


def test_an_error_in_the_passes_leaves_no_hooks_and_no_bases(model: Any, golden_tokens: torch.Tensor, tmp_path: Path) -> None:

    def interrupted(done: int, total: int) -> None:
        assert hooks_of(model) > 0
        raise KeyboardInterrupt

    linears = find_linears(model)
    with pytest.raises(KeyboardInterrupt), fisher_bases_cached(model, linears, RECIPE, golden_tokens, BasisCache(tmp_path)):
        layer_statistics(model, linears, golden_tokens[:8], progress=interrupted)
    assert hooks_of(model) == 0 and not list(tmp_path.glob("*.safetensors"))


def test_no_activation_outlives_the_passes(model: Any, golden_tokens: torch.Tensor) -> None:
    linears = find_linears(model)
    inputs: list[weakref.ref[torch.Tensor]] = []
    watched = hooked(layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0]))) for layer in linears.values())
    moments = FisherMoments(linears)
    with watched, moments.summed():
        layer_statistics(model, linears, golden_tokens[:1])
    gc.collect()
    assert inputs and not any(each() is not None for each in inputs)


def drawn(logits_SV: torch.Tensor, window: int = 0, seed: int = 0) -> torch.Tensor:
    """Return the classes [S] of a loss, from its gradient: the probabilities minus one at the class."""
    logits_SV = logits_SV.clone().requires_grad_()
    (gradient_SV,) = torch.autograd.grad(sampled_loss(logits_SV, window, seed), logits_SV)
    return gradient_SV.argmin(1)


def test_classes_are_drawn_from_the_predictions() -> None:
    """The shares of 20,000 draws have a standard error of at most 0.0035."""
    shares = torch.tensor([0.0, 0.5, 0.3, 0.2, 0.0])
    classes = drawn(shares.log().expand(20_000, 5))
    torch.testing.assert_close(classes.bincount(minlength=5) / 20_000, shares, rtol=0, atol=0.02)
    assert set(classes.tolist()) == {1, 2, 3}, "a class that is impossible is never drawn"


def test_draws_depend_on_the_window_and_the_seed_alone() -> None:
    logits_SV = torch.zeros(100, 50)
    first, same, window, seed = (drawn(logits_SV, *numbers) for numbers in ((3, 1), (3, 1), (4, 1), (3, 2)))
    assert torch.equal(first, same)
    assert not torch.equal(first, window) and not torch.equal(first, seed)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_predictions_that_are_not_finite_are_refused(value: float) -> None:
    logits_SV = torch.zeros(4, 8)
    logits_SV[2, 3] = value
    with pytest.raises(CalibrationError, match="logits of the base model are not finite"):
        sampled_loss(logits_SV, 0, 0)
