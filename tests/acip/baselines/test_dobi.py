"""Dobi-SVD: the gradient of the truncation, the incremental components, and the learned ranks."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from acip.base import Base
from acip.baselines import dobi
from acip.baselines.prefix_factors import stored_at, uniform_ranks
from acip.layers.targets import find_linears


@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (2, 6, 5)])
@pytest.mark.parametrize("gamma", [2.9, 4.1])
def test_the_gradient_of_the_truncation_equals_finite_differences(shape: tuple[int, ...], gamma: float) -> None:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    at = torch.tensor(gamma, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dobi.Truncation.apply, (A, at), eps=1e-7, atol=1e-5)


def test_the_gradient_by_random_projection_equals_finite_differences() -> None:
    """As in the paper, few of many directions are computed. The others of this matrix are zero, so projections omit nothing."""
    q = 5 + dobi.EXTRA
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(40, q, dtype=torch.float64, generator=generator) @ torch.randn(q, 30, dtype=torch.float64, generator=generator)
    at = torch.tensor(5.2, dtype=torch.float64, requires_grad=True)
    inside, outside = (torch.randn(40, 30, dtype=torch.float64, generator=generator) for _ in range(2))
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    inside = U[:, :q] @ (U[:, :q].T @ inside)  # stays in the column space; `moved` leaves it
    moved = outside @ Vh[:q].T @ Vh[:q]
    weights = torch.randn(40, 30, dtype=torch.float64, generator=generator)

    def loss(A: Tensor) -> Tensor:
        return (dobi.Truncation.apply(A, at) * weights).sum()

    leaf = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    for direction in (inside @ Vh[:q].T @ Vh[:q], moved):
        measured = (loss(A + 1e-6 * direction) - loss(A - 1e-6 * direction)) / 2e-6
        torch.testing.assert_close((grad * direction).sum(), measured.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "faint"), [((7, 30), False), ((30, 7), False), ((2, 12, 40), False), ((12, 40), True), ((40, 12), True)])
def test_leading_directions_are_those_of_the_svd(shape: tuple[int, ...], faint: bool) -> None:
    """This includes matrices whose smallest singular values are lost when squared."""
    A = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    if faint:
        s = 10.0 ** -torch.arange(len(s), dtype=A.dtype)
        A = U * s @ Vh
    q = min(shape[-2:]) - (0 if faint else 2)
    U_q, s_q, V_q = dobi.leading(A, q)
    torch.testing.assert_close(s_q, s[..., :q], rtol=1e-6, atol=1e-14)
    for vectors in (U_q, V_q):
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(q, dtype=A.dtype).expand(*shape[:-2], q, q), rtol=0, atol=1e-7)
    torch.testing.assert_close((U_q * s_q[..., None, :]) @ V_q.mT, (U * s[..., None, :])[..., :q] @ Vh[..., :q, :])


def test_an_open_gate_changes_nothing_and_equal_values_have_finite_gradients() -> None:
    A = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    open_ = torch.tensor(9.0, dtype=torch.float64)
    out = dobi.Truncation.apply(A, open_)
    torch.testing.assert_close(out, A)
    (grad,) = torch.autograd.grad(out.sum(), A)
    torch.testing.assert_close(grad, torch.ones_like(A))
    equal = torch.eye(6, 4, requires_grad=True)
    dobi.Truncation.apply(equal, torch.tensor(2.0)).square().sum().backward()
    assert equal.grad is not None and equal.grad.abs().max() < 1e3


def test_incremental_components_are_those_of_one_batch() -> None:
    rows_nM = torch.randn(60, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64) + 3
    pca = dobi.IncrementalPCA(9)
    for batch in rows_nM.split([20, 7, 33]):
        pca.fit(batch)
    _, s, Vh = torch.linalg.svd(rows_nM - rows_nM.mean(0), full_matrices=False)
    torch.testing.assert_close(pca.s_k, s)
    torch.testing.assert_close(pca.mean_M, rows_nM.mean(0))
    torch.testing.assert_close((pca.V_kM @ Vh.T).abs(), torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-8)


def test_few_incremental_components_are_the_largest_ones() -> None:
    """They equal those of one batch exactly if there are no others, and nearly if the dropped ones are small."""
    generator = torch.Generator().manual_seed(0)
    weak = torch.tensor([9.0, 7, 5, 3, 0.3, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    for scale, least in (((weak > 1) * weak, 1 - 1e-9), (weak, 0.999)):
        mixed = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=generator)).Q
        rows_nM = torch.randn(60, 9, dtype=torch.float64, generator=generator) * scale @ mixed + 3
        pca = dobi.IncrementalPCA(4)
        for batch in rows_nM.split([20, 7, 33]):
            pca.fit(batch)
        assert pca.V_kM.shape == (4, 9)
        Vh = torch.linalg.svd(rows_nM - rows_nM.mean(0), full_matrices=False).Vh[:4]
        assert torch.linalg.svdvals(pca.V_kM @ Vh.T).min() > least


def test_components_of_nearly_equal_values_are_found() -> None:
    """The rows are orthonormal like singular vectors. Merging them gives the same result as exact SVDs."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.linalg.qr(torch.randn(64, 12, dtype=torch.float64, generator=generator)).Q.T for _ in range(4)]
    pca, exact, count = dobi.IncrementalPCA(11), torch.zeros(0, 64, dtype=torch.float64), 0
    mean = torch.zeros(64, dtype=torch.float64)
    for batch in batches:
        pca.fit(batch)
        new = batch.mean(0)
        shift = (len(batch) * count / (len(batch) + count)) ** 0.5 * (mean - new)
        _, s, Vh = torch.linalg.svd(torch.cat([exact, batch - new, shift[None]]), full_matrices=False)
        exact, mean, count = s[:11, None] * Vh[:11], (count * mean + len(batch) * new) / (count + len(batch)), count + len(batch)
    torch.testing.assert_close(pca.s_k, exact.norm(dim=1))
    assert torch.linalg.svdvals(pca.V_kM @ (exact / exact.norm(dim=1, keepdim=True)).T).min() > 1 - 1e-6


def test_every_window_contributes(base: Base, windows: Tensor) -> None:
    """Windows of an incomplete last batch also change the result."""
    name, linear = next(iter(find_linears(base.model).items()))
    scale = dobi.RankScale(linear, T := 24)
    assert scale.windows > 1
    few = windows[: scale.windows + 1, :T]
    other = torch.cat([few[:-1], windows[-1:, :T]])
    found = [
        dobi.rebuilt(base.model, {name: linear}, {name: scale}, {name: 5.0}, {name: 8}, ids, lambda *_: None)[name].left
        for ids in (few, other, few[:-1])
    ]
    assert not any(torch.allclose(a @ a.T, b @ b.T, atol=1e-4) for a, b in combinations(found, 2))


def test_the_penalty_moves_the_ranks_to_the_size(base: Base, windows: Tensor) -> None:
    linears = find_linears(base.model)
    scales = {name: dobi.RankScale(linear, windows.shape[1]) for name, linear in linears.items()}
    start = {name: scales[name].gamma(rank or 0) for name, rank in uniform_ranks(linears, 0.8).items()}

    def size(gammas: dict[str, float]) -> float:
        return sum(scales[name].numbers(gamma) for name, gamma in gammas.items()) / sum(scale.M * scale.N for scale in scales.values())

    learned = dobi.learned(
        base.model, linears, scales, start, windows[:4], 0.5, lambda *_: None, epochs=6, accumulate=2, lr=(1.0, 1.0), penalty=1e3
    )
    assert size(start) == pytest.approx(0.8, abs=0.02)
    assert abs(size(learned) - 0.5) < 0.15
    for asked in (0.5, 0.3):
        ranks = dobi.within(linears, scales, learned, asked)
        assert asked - 0.05 < stored_at(linears, ranks) / stored_at(linears, dict.fromkeys(linears)) <= asked
