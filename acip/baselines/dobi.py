"""Dobi-SVD without remapping: learn where to truncate the activations, then rebuild the weights for these truncations.

Source: Wang et al., ICLR 2025, arXiv 2502.02723.

    1  learn      a layer keeps about gamma directions of its outputs A = x W^T [T, M] for each window:
                      A' = U diag(s * g) V^T,   g_i = tanh(beta (gamma - i)) / 2 + 1/2
                  gamma, one number per layer, is trained by Adam on perplexity + penalty * |R(gamma) - size| + excess over [0, T']
    2  rebuild    an incremental PCA with k components joins the V of all windows; the layer is projected onto them:
                      W' = V_k V_k^T W,   two factors V_k and V_k^T W

A window has at most T' = min(T, M, N) directions and the layer K = min(M, N), so gamma stands for the rank k = gamma K / T'.
R is the storage of these ranks, relative to the dense layers. The learned ranks match the size only approximately, so a common factor
scales them to fit (ours; the penalty alone does not guarantee the size).

The gradient of step 1, with f = s g, P = U^T G V and G the gradient at A', is the chain rule of the SVD, without the gradients of U and V.
If fewer directions are computed than A has, the others are taken as zero, as in the authors' code:

    dA = U (X * sym P + Y * skew P) V^T + (1 - U U^T) G V diag(g) V^T + U diag(g) U^T G (1 - V V^T)
    X_ij = (f_i - f_j) / (s_i - s_j),  X_ii = g_i,  Y_ij = (f_i + f_j) / (s_i + s_j)

1 / (s_i^2 - s_j^2) is unbounded for close values; there, the first TERMS terms of its series replace it (as in the authors' code).

Legend: M = out features, N = in features, K = min(M, N), T = tokens of a window, q = directions computed, k = rank.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acip.base import Base
from acip.baselines.prefix_factors import Factors, Progress, allowed, feed, layers_at, require_calls, stored_at, swapped, uniform_ranks
from acip.calibration.losses import next_token
from acip.data import TokenBatches
from acip.errors import CalibrationError, DataError, RecipeError
from acip.layers.targets import find_linears, hooked, weight_MN
from acip.modeling_acip import accumulation_dtype, bias_of, widened

BETA = 10.0  # steepness of the gate
EXTRA = 5  # directions computed beyond gamma, where the gate is closed
TERMS = 11  # of the series 1 / (1 - r) = 1 + r + r^2 + ...
MIN_RATIO = 1e-6  # of the largest singular value: the square of a smaller value is lost to rounding
CLOSE = 1e-10  # difference of squares below which the series is used


def run(
    base: Base,
    windows: Tensor,
    sizes: Sequence[float],
    progress: Progress,
    *,
    exclude: tuple[str, ...] = (),
    sample_windows: int = 256,
    epochs: int = 20,
    accumulate: int = 32,
    lr: float = 5.0,
    lr_end: float = 4.0,
    penalty: float = 200.0,
) -> Iterator[tuple[float, nn.Module]]:
    """Yield (size, model) for each size.

    Gamma is trained on the first `sample_windows` windows for `epochs`, `accumulate` windows per step (the authors use 8 on each of 4
    GPUs). `lr` falls to `lr_end` by a cosine; its unit is directions of a window of 2048 tokens as in the paper, so shorter windows need
    a smaller one. `penalty` is the weight of the deviation from the size. Raises RecipeError for invalid options, and DataError if the
    windows have fewer directions than a layer.
    """
    for option, value, least in (("sample_windows", sample_windows, 1), ("epochs", epochs, 0), ("accumulate", accumulate, 1)):
        if value < least:
            raise RecipeError(f"{option} is {value}; it must be at least {least}.")
    model, windows = base.model, windows[:sample_windows]
    linears = find_linears(model, exclude)
    scales = {name: RankScale(linear, windows.shape[1]) for name, linear in linears.items()}
    needed = max(scale.windows for scale in scales.values())
    if len(windows) < needed and min(sizes) < 1:
        raise DataError(
            f"{len(windows)} windows of {windows.shape[1]} tokens have too few directions for the largest layer. "
            f"Use at least {needed} windows, or longer ones."
        )
    for size in sizes:
        if size == 1:
            yield size, model
            continue
        start = uniform_ranks(linears, size)
        gammas = {name: scale.gamma(start[name] or 0) for name, scale in scales.items()}
        gammas = learned(model, linears, scales, gammas, windows, size, progress, epochs, accumulate, (lr, lr_end), penalty)
        ranks = within(linears, scales, gammas, size)
        factors = rebuilt(model, linears, scales, gammas, ranks, windows, progress)
        with swapped(model, layers_at(linears, factors, ranks)):
            yield size, model


class RankScale:
    """The relation of gamma, rank and storage of a layer, for windows of T tokens."""

    def __init__(self, linear: nn.Module, T: int) -> None:
        self.M, self.N = weight_MN(linear).shape
        self.K = min(self.M, self.N)
        self.most = min(T, self.K)  # directions of one window: T'

    @property
    def windows(self) -> int:
        """The number of windows that together have as many directions as the layer."""
        return -(-self.K // self.most)

    def gamma(self, rank: int) -> float:
        """Return the gamma that stands for a rank."""
        return rank * self.most / self.K

    def numbers(self, gamma: Any) -> Any:
        """Return the stored numbers r (M + N), for gamma as a number or a tensor."""
        return gamma * self.K / self.most * (self.M + self.N)


# ---- step 1: learn


class Truncation(torch.autograd.Function):
    """A -> U diag(s g) V^T, g = gate(gamma - i), i = 1 ... q; A [..., T, M] float32 or float64, gamma a scalar."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, gamma: Tensor) -> Tensor:
        U, s, V = leading(A, int(max(0.0, float(gamma.detach()))) + EXTRA)
        g = gate(gamma.to(A.dtype), s.shape[-1])
        ctx.save_for_backward(U, s, V, g)
        ctx.dtype = gamma.dtype
        return (U * (s * g)[..., None, :]) @ V.mT

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, Tensor]:
        U, s, V, g = ctx.saved_tensors
        f = s * g
        GV, UtG = G @ V, U.mT @ G
        P = U.mT @ GV
        inverse = inverse_differences(s)
        s_i, s_j, f_i, f_j = s[..., :, None], s[..., None, :], f[..., :, None], f[..., None, :]
        X = (f_i - f_j) * (s_i + s_j) * inverse
        X.diagonal(dim1=-2, dim2=-1).copy_(g.expand(s.shape))
        Y = (f_i + f_j) / (s_i + s_j).clamp_min(torch.finfo(s.dtype).tiny)
        inner = (X * (P + P.mT) + Y * (P - P.mT)) / 2
        dA = U @ (inner @ V.mT + g[:, None] * (UtG - P @ V.mT)) + ((GV - U @ P) * g) @ V.mT
        slope = 2 * BETA * g * (1 - g)  # derivative of the gate
        dgamma = (P.diagonal(dim1=-2, dim2=-1) * s * slope).sum()
        return dA, dgamma.to(ctx.dtype)


def gate(gamma: Tensor, count: int) -> Tensor:
    """Return the gate [count]: near 1 up to gamma, near 0 beyond."""
    i = torch.arange(1, count + 1, device=gamma.device, dtype=gamma.dtype)
    return torch.tanh(BETA * (gamma - i)) / 2 + 0.5


def leading(A: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [..., T, q], s, V [..., M, q] of the q largest singular values; for small q by random projection, as in the paper."""
    return torch.svd_lowrank(A, q, niter=2) if 2 * q < min(A.shape[-2:]) else exactly_leading(A, q)


def exactly_leading(A: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `leading` returns, without random projection, which can miss some of many nearly equal values."""
    if A.shape[-2] > A.shape[-1]:
        U, s, V = exactly_leading(A.mT, q)
        return V, s, U
    B = A.double()
    squares, U = torch.linalg.eigh(B @ B.mT)  # faster than the SVD, and as accurate while float64 resolves the squares
    s, U = squares.flip(-1)[..., :q].clamp_min(0.0).sqrt(), U.flip(-1)[..., :q]
    if bool((s[..., -1] <= MIN_RATIO * s[..., 0]).any()):
        U, s, Vh = torch.linalg.svd(B, full_matrices=False)
        U, s, V = U[..., :q], s[..., :q], Vh[..., :q, :].mT
    else:
        V = B.mT @ (U / s[..., None, :])
    return U.to(A.dtype), s.to(A.dtype), V.to(A.dtype)


def inverse_differences(s: Tensor) -> Tensor:
    """Return 1 / (s_i^2 - s_j^2) [..., q, q], bounded for close values; 0 on the diagonal."""
    squares = s.square()
    difference = squares[..., :, None] - squares[..., None, :]
    larger = torch.maximum(squares[..., :, None], squares[..., None, :])
    ratio = torch.minimum(squares[..., :, None], squares[..., None, :]) / larger.clamp_min(CLOSE)
    series = sum(ratio**n for n in range(TERMS)) / larger.clamp_min(CLOSE)
    close = difference.abs() <= CLOSE
    # equal values take the sign of their order, since they are sorted
    sign = torch.where(difference != 0, difference.sign(), torch.ones_like(difference).triu(1) - torch.ones_like(difference).tril(-1))
    return torch.where(close, sign * series, 1 / torch.where(close, 1.0, difference))


def truncating(linears: Mapping[str, nn.Module], gammas: Mapping[str, Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
    """Register hooks that truncate the outputs of each layer per window, before the bias is added. Return the handles."""

    def hook(name: str) -> Callable[..., Tensor]:
        def truncate(linear: nn.Module, _args: Any, y: Tensor) -> Tensor:
            bias_M = bias_of(linear)
            A = y if bias_M is None else y - bias_M
            out: Tensor = Truncation.apply(widened(A), gammas[name]).to(y.dtype)
            return out if bias_M is None else out + bias_M

        return truncate

    return [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]


def learned(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    scales: Mapping[str, RankScale],
    start: Mapping[str, float],
    windows: Tensor,
    size: float,
    progress: Progress,
    epochs: int,
    accumulate: int,
    lr: tuple[float, float],
    penalty: float,
) -> dict[str, float]:
    """Train the gammas from `start`. Return those with the lowest loss of all steps."""
    weight = next(model.parameters())
    dtype, device = accumulation_dtype(weight.dtype), weight.device
    gammas = {name: nn.Parameter(torch.tensor(value, dtype=dtype, device=device)) for name, value in start.items()}
    optimizer = torch.optim.Adam(gammas.values(), lr=lr[0])
    accumulate = min(accumulate, len(windows))
    steps = epochs * len(windows) // accumulate
    batches = TokenBatches(windows, 1)
    best, best_gammas = math.inf, dict(start)
    torch.manual_seed(0)  # for the random projections
    with hooked(truncating(linears, gammas)):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr[1] + (lr[0] - lr[1]) * (1 + math.cos(math.pi * step / steps)) / 2
            total = 0.0
            for i in range(accumulate):
                loss = next_token(model, batches[step * accumulate + i].to(device)).exp()
                loss = (loss + constraint(gammas, scales, size, penalty)) / accumulate
                loss.backward()
                total += float(loss.detach())
            if not math.isfinite(total):
                raise CalibrationError(
                    f"the loss is {total} at step {step + 1} of learning the ranks; it must be finite. Lower lr, or use dtype float32."
                )
            if total < best:
                best, best_gammas = total, {name: float(gamma.detach()) for name, gamma in gammas.items()}
            optimizer.step()
            optimizer.zero_grad()
            progress(f"ranks for {size}", step + 1, steps)
    return best_gammas


def constraint(gammas: Mapping[str, Tensor], scales: Mapping[str, RankScale], size: float, penalty: float) -> Tensor:
    """Return penalty * |R - size|, plus the squared excess of each gamma below 0 or above T'."""
    stored = torch.stack([scale.numbers(gammas[name]).clamp_max(scale.M * scale.N) for name, scale in scales.items()]).sum()
    outside = torch.stack(
        [gammas[name].neg().relu().square() + (gammas[name] - scale.most).relu().square() for name, scale in scales.items()]
    )
    return penalty * (stored / sum(scale.M * scale.N for scale in scales.values()) - size).abs() + outside.sum()


def within(
    linears: Mapping[str, nn.Module], scales: Mapping[str, RankScale], gammas: Mapping[str, float], size: float
) -> dict[str, int | None]:
    """Return the ranks of the gammas, scaled by the largest common factor that fits the size; None = dense, if factors save nothing."""

    def ranks(factor: float) -> dict[str, int | None]:
        kept: dict[str, int | None] = {}
        for name, scale in scales.items():
            rank = max(1, min(scale.K, int(factor * gammas[name] * scale.K / scale.most)))
            kept[name] = None if rank * (scale.M + scale.N) >= scale.M * scale.N else rank
        return kept

    most = allowed(size, stored_at(linears, dict.fromkeys(linears)))
    low, high = 0.0, 2.0 * max(scale.most for scale in scales.values())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if stored_at(linears, ranks(middle)) <= most else (low, middle)
    return ranks(low)


# ---- step 2: rebuild


class IncrementalPCA:
    """Principal components of rows in batches, with the memory of one batch (Ross et al., 2008).

    After m rows, n new ones update the components to those of [s V^T ; new - mean of new ; sqrt(n m / (n + m)) (mean - mean of new)].
    """

    def __init__(self, components: int) -> None:
        self.components, self.count = components, 0
        self.mean_M, self.s_k, self.V_kM = (torch.zeros(0) for _ in range(3))

    def fit(self, rows_nM: Tensor) -> None:
        """Update the components with a batch of rows."""
        n, mean_M = len(rows_nM), rows_nM.mean(0)
        stack = rows_nM - mean_M
        if self.count:
            shift = math.sqrt(n * self.count / (n + self.count)) * (self.mean_M - mean_M)
            stack = torch.cat([self.s_k[:, None] * self.V_kM, stack, shift[None]])
            mean_M = (self.count * self.mean_M + n * mean_M) / (self.count + n)
        _, self.s_k, V_Mk = exactly_leading(stack, min(self.components, *stack.shape))
        self.mean_M, self.V_kM = mean_M, V_Mk.T
        self.count += n


@torch.no_grad()
def rebuilt(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    scales: Mapping[str, RankScale],
    gammas: Mapping[str, float],
    ranks: Mapping[str, int | None],
    windows: Tensor,
    progress: Progress,
) -> dict[str, Factors]:
    """Project each layer onto the components of the right singular vectors of its outputs, in the truncated model."""
    pca = {name: IncrementalPCA(rank) for name, rank in ranks.items() if rank is not None}
    waiting: dict[str, list[Tensor]] = {name: [] for name in pca}

    def hook(name: str) -> Callable[..., Tensor]:
        scale, kept = scales[name], max(1, min(scales[name].most, math.ceil(gammas[name])))

        def truncate(linear: nn.Module, _args: Any, y: Tensor) -> Tensor:
            bias_M = bias_of(linear)
            A = widened((y if bias_M is None else y - bias_M).flatten(0, -2))
            U, s, V_Mq = leading(A, kept + EXTRA)
            waiting[name].append(V_Mq[:, :kept].T)
            if len(waiting[name]) == scale.windows:
                pca[name].fit(torch.cat(waiting[name]))
                waiting[name].clear()
            out = ((U * (s * gate(torch.tensor(gammas[name], device=A.device), len(s)))) @ V_Mq.T).view_as(y).to(y.dtype)
            return out if bias_M is None else out + bias_M

        return truncate

    with hooked(linears[name].register_forward_hook(hook(name)) for name in pca):
        feed(model, windows, lambda done, total: progress("components", done, total))
    for name, rest in waiting.items():
        if rest and pca[name].count:  # not as the first batch: a batch that is not full is too small
            pca[name].fit(torch.cat(rest))
    require_calls(pca_layers := {name: linears[name] for name in pca}, [name for name in pca if pca[name].count])
    factors: dict[str, Factors] = {}
    for name, linear in pca_layers.items():
        V_Mk = pca[name].V_kM.T
        factors[name] = Factors.of(linear, V_Mk, V_Mk.T @ widened(weight_MN(linear)))
    return factors
