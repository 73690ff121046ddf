"""The covariance cut, without training: one eigenproblem gives the best layer of every rank for the calibration activations.

This is the optimum of Swift-SVD (Qi et al., 2026, arXiv 2604.01609), in the basis of acip.calibration.bases.

    Q = eigenvectors of W C W^T,  W_r = Q_r Q_r^T W,  |(W - W_r) X|^2 = the sum of the dropped eigenvalues

Whitening reaches the same optimum, with a Cholesky factor and its inverse. Ranks are

    uniform    the same share of every layer
    global     directions are dropped by their share of the energy of their layer, per stored number, lowest first. Every layer
               keeps at least half of its uniform rank: a lower floor is harmful (perplexity 22.2 instead of 12.5, LLaMA-7B
               in the authors' ablation). The authors also weigh layers by importance; this allocation does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.base import Base
from acip.baselines.prefix_factors import Factors, Progress, feed, layers_at, on_inputs, shape_of, swapped, uniform_ranks
from acip.calibration.bases import bases
from acip.errors import RecipeError
from acip.layers.svd_linear import coordinates
from acip.layers.targets import find_linears, hooked, weight_MN
from acip.modeling_acip import widened
from acip.recipe import Recipe
from acip.sizing.budget import Budget
from acip.sizing.cut_table import CutTable


def run(
    base: Base,
    windows: Tensor,
    sizes: Sequence[float],
    progress: Progress,
    *,
    allocation: Literal["uniform", "global"],
    exclude: tuple[str, ...] = (),
    sample_windows: int = 256,
    floor: float = 0.5,
) -> Iterator[tuple[float, nn.Module]]:
    """Yield (size, model) for each size. C is computed from the first `sample_windows` windows.

    With global ranks, every layer keeps at least `floor` of its uniform rank.
    """
    if not 0 <= floor <= 1:
        raise RecipeError(f"floor is {floor}; it must be a share of the uniform rank, from 0 to 1.")
    model, recipe = base.model, Recipe(sample_windows=sample_windows)
    linears = find_linears(model, exclude)
    factors: dict[str, Factors] = {}
    for name, directions_KM in bases(model, linears, recipe, windows, progress=lambda done, total: progress("basis", done, total)):
        W_MN = weight_MN(linears[name])
        left_KM = directions_KM.to(W_MN.dtype)
        factors[name] = Factors.of(linears[name], left_KM.T, coordinates(W_MN, left_KM, refine=2))
    energy = energies(model, linears, factors, windows[:sample_windows]) if allocation == "global" else {}
    for size in sizes:
        ranks = uniform_ranks(linears, size)
        if energy and size < 1:
            ranks = global_ranks(linears, energy, ranks, floor, size)
        with swapped(model, layers_at(linears, factors, ranks)):
            yield size, model


@torch.no_grad()
def energies(model: nn.Module, linears: Mapping[str, nn.Module], factors: Mapping[str, Factors], windows: Tensor) -> dict[str, Tensor]:
    """Return per layer the sum of (q^T W x)^2 over the tokens for each direction q [K]: the eigenvalues of W C W^T."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x_SN: Tensor) -> None:
        sums[name] = sums.get(name, 0) + widened(F.linear(x_SN, factors[name].right)).square().sum(0)

    with hooked(on_inputs(linears, add)):
        feed(model, windows)
    return {name: sums[name].cpu() for name in linears}


def global_ranks(
    linears: Mapping[str, nn.Module], energy: Mapping[str, Tensor], uniform: Mapping[str, int | None], floor: float, size: float
) -> dict[str, int | None]:
    """Return the ranks of the largest model within `size` if directions are dropped by energy share per stored number."""
    keys, layer_of = [], []
    shapes = tuple(shape_of(name, linear) for name, linear in linears.items())
    for i, shape in enumerate(shapes):
        rank = uniform[shape.name]
        assert rank is not None
        share_K = energy[shape.name].double() / energy[shape.name].double().sum().clamp_min(1e-300)
        key_K = share_K.cummin(0).values / (shape.M + shape.N)
        key_K[: max(1, round(floor * rank))] = torch.inf
        keys.append(key_K)
        layer_of.append(torch.full((shape.K,), i, dtype=torch.int32))
    order = torch.cat(layer_of)[torch.argsort(torch.cat(keys), stable=True)]
    return dict(CutTable(shapes, order, 0, 0, "factors").cut(Budget(ratio=size)).ranks)
