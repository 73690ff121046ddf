"""SVD-LLM: the SVD in coordinates where the inputs are white, so that dropping a singular value costs its square.

Source: Wang et al., ICLR 2025, arXiv 2403.07378.

    S S^T = C = sum of x x^T,  W S = U Sigma V^T        truncated at r, the same share of every layer
    y = (U_r Sigma_r^1/2) (Sigma_r^1/2 V_r^T S^-1) x

|(W - W_r) X|^2 is then the sum of the squares of the dropped singular values. Two corrections are made for each size:

    update    block by block: the left factor of each layer becomes the least-squares fit to the output of the dense layer, on the
              inputs X that the compressed blocks before it produce
    lora      train LoRA on all left factors and merge it, then on all right ones; on the calibration text (the authors use 50,000
              instructions of Alpaca, at most 256 tokens each)

S is computed in float64 from sums in the accumulation dtype. If C is not positive definite, the magnitude of its lowest eigenvalue and
1e-6 are added to the diagonal.

In one forward pass, a hook compresses each block and runs it again. The next block therefore gets the input that it has in the compressed
model, for every architecture. A block that runs several times is updated in its first run.

Legend: M = out features, N = in features, K = min(M, N), r = kept rank, S = samples (tokens).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acip.base import Base
from acip.baselines.prefix_factors import Factors, Progress, blocks_of, each, layers_at, require_calls, swapped, uniform_ranks
from acip.calibration.activation_covariance import activation_covariances, feed_tokens, grouped, probe
from acip.calibration.losses import next_token
from acip.data import TokenBatches
from acip.errors import CalibrationError, RecipeError
from acip.layers.adapters import LoRA
from acip.layers.targets import find_linears, hooked, weight_MN
from acip.modeling_acip import LowRankLinear, bias_of, set_module, widened

JITTER = 1e-6  # added to the shift that makes the eigenvalues of C positive; C is a sum over tokens


def run(
    base: Base,
    windows: Tensor,
    sizes: Sequence[float],
    progress: Progress,
    *,
    update: bool,
    lora: bool,
    exclude: tuple[str, ...] = (),
    sample_windows: int = 256,
    update_windows: int = 16,
    lora_windows: int | None = None,
    lora_epochs: int = 3,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.05,
    lora_lr: float = 1e-4,
    lora_batch: int = 64,
    lora_micro: int = 4,
) -> Iterator[tuple[float, nn.Module]]:
    """Yield (size, model) for each size.

    C uses the first `sample_windows` windows, the update `update_windows` (in one forward pass), and LoRA `lora_windows` (None = all).
    The learning rate is constant. A LoRA step takes `lora_batch` windows, `lora_micro` per forward pass. RecipeError for invalid options.
    """
    counts = {"sample_windows": sample_windows, "update_windows": update_windows, "lora_rank": lora_rank}
    for option, value in (counts | {"lora_windows": lora_windows, "lora_batch": lora_batch, "lora_micro": lora_micro}).items():
        if value is not None and value < 1:
            raise RecipeError(f"{option} is {value}; it must be at least 1.")
    model = base.model
    linears = find_linears(model, exclude)
    factors: dict[str, Factors] = {}
    for name, layer_factors in whitened(model, linears, windows[:sample_windows]):
        factors[name] = layer_factors
        progress("whitening", len(factors), len(linears))
    for size in sizes:
        ranks = uniform_ranks(linears, size)
        layers = layers_at(linears, factors, ranks)
        if update and size < 1:
            layers = updated(model, linears, layers, windows[:update_windows], lambda done, total: progress("update", done, total))
        with swapped(model, layers):
            if lora and size < 1:
                low_rank = [layer for layer in layers.values() if isinstance(layer, LowRankLinear)]
                adapter = (lora_rank, lora_alpha, lora_dropout)
                tuned(model, low_rank, windows[:lora_windows], adapter, lora_lr, lora_epochs, lora_batch, lora_micro, progress)
            yield size, model


# ---- whitening


def whitened(
    model: nn.Module, linears: Mapping[str, nn.Module], windows: Tensor, covariance_bytes: int = 8 * 2**30
) -> Iterator[tuple[str, Factors]]:
    """Yield the factors of every layer. Each group of layers, whose C take at most `covariance_bytes`, takes one forward pass."""
    trace = probe(model, linears, windows, inputs_only=True)
    require_calls(linears, {name for name, _ in trace})
    calls = Counter(name for name, _ in trace)
    for group in grouped(linears, trace, covariance_bytes, inputs_only=True):
        layers = {name: linears[name] for name in group}
        C = activation_covariances(model, layers, windows, calls=calls, inputs_only=True)
        shared = {id(C_NN): C_NN for C_NN in C.values()}
        S = {key: whitening(C_NN.double() * windows.numel()) for key, C_NN in shared.items()}
        S_of = {name: S[id(C_NN)] for name, C_NN in C.items()}
        yield from each(layers, partial(_whitened, S_of))


def _whitened(S: Mapping[str, Tensor], name: str, linear: nn.Module) -> Factors:
    return whitened_svd(linear, S[name])


@torch.no_grad()
def whitening(C_NN: Tensor) -> Tensor:
    """Return S, lower triangular, with S S^T = C. If C is not positive definite, its eigenvalues are shifted to be positive."""
    if not torch.isfinite(C_NN).all():
        raise CalibrationError("the input of a layer is not finite on this text. Use dtype float32.")
    S_NN, failed = torch.linalg.cholesky_ex(C_NN)
    if failed:
        lowest, shift = min(0.0, float(torch.linalg.eigvalsh(C_NN)[0])), JITTER
        eye = torch.eye(len(C_NN), dtype=C_NN.dtype, device=C_NN.device)
        while failed:
            S_NN, failed = torch.linalg.cholesky_ex(C_NN + (shift - lowest) * eye)
            shift *= 10  # rounding can cancel a shift that is small relative to the largest eigenvalue
    return S_NN


@torch.no_grad()
def whitened_svd(linear: nn.Module, S_NN: Tensor) -> Factors:
    """Return the factors; W = left right at full rank."""
    U_MK, sigma_K, Vh_KN = torch.linalg.svd(weight_MN(linear).double() @ S_NN, full_matrices=False)
    root_K = sigma_K.sqrt()
    right_KN = torch.linalg.solve_triangular(S_NN, root_K[:, None] * Vh_KN, upper=False, left=False)
    return Factors.of(linear, U_MK * root_K, right_KN)


# ---- update


@torch.no_grad()
def updated(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
    windows: Tensor,
    progress: Callable[[int, int], None],
) -> dict[str, nn.Module]:
    """Return `layers` with fitted left factors. The model itself is unchanged."""
    blocks, fitted = blocks_of(model, list(linears)), dict(layers)
    done: set[str] = set()

    def fit(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(linear: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            layer = layers[name]
            if fitted[name] is layer and isinstance(layer, LowRankLinear):
                fitted[name] = least_squares(layer, linear, args[0].flatten(0, -2), y.flatten(0, -2))

        return hook

    def compress(block: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _out: Any) -> Any:
            if block in done:
                return None
            done.add(block)
            for name in blocks[block]:
                set_module(model, name, fitted[name])
            progress(len(done), len(blocks))
            return module.forward(*args, **kwargs)

        return hook

    handles = [linear.register_forward_hook(fit(name)) for name, linear in linears.items()]
    handles += [model.get_submodule(block).register_forward_hook(compress(block), with_kwargs=True) for block in blocks]
    with hooked(handles), swapped(model, linears):  # restores the original layers, which the hooks replace
        feed_tokens(model, windows.long().to(next(model.parameters()).device))
    return fitted


def least_squares(layer: LowRankLinear, linear: nn.Module, x_SN: Tensor, y_SM: Tensor) -> LowRankLinear:
    """Return the layer with the left factor that best fits y on x. With fewer tokens than ranks, it is unchanged."""
    if len(x_SN) < layer.rank:
        return layer
    bias_M = bias_of(linear)
    Wx_SM = y_SM.double() if bias_M is None else y_SM.double() - bias_M.double()
    z_Sr = x_SN.double() @ layer.right.weight.double().T
    G_rr = z_Sr.T @ z_Sr
    left_rM = torch.linalg.pinv(G_rr, hermitian=True) @ (z_Sr.T @ Wx_SM)
    return LowRankLinear(left_rM.T.to(layer.left.weight.dtype).contiguous(), layer.right.weight.data, bias_M)


# ---- LoRA


class Adapted(nn.Module):
    """A frozen linear layer and an adapter beside it."""

    def __init__(self, linear: nn.Linear, lora: LoRA) -> None:
        super().__init__()
        self.linear, self.lora = linear, lora

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.lora(x)
        return y


def tuned(
    model: nn.Module,
    layers: Sequence[LowRankLinear],
    windows: Tensor,
    adapter: tuple[int, float, float],
    lr: float,
    epochs: int,
    batch: int,
    micro: int,
    progress: Progress,
) -> None:
    """Train adapters (rank, alpha, dropout) on the left factors and merge them, in place; then on the right factors."""
    rank, alpha, dropout = adapter
    batch = min(batch, len(windows))
    micro = min(micro, batch)
    parts = -(-batch // micro)
    steps = max(1, epochs * len(windows) // batch) if epochs else 0
    batches, device = TokenBatches(windows, micro), next(model.parameters()).device
    torch.manual_seed(0)
    for part in ("left", "right"):
        adapted = []
        for layer in layers:
            linear: Any = getattr(layer, part)
            lora = LoRA(linear.in_features, linear.out_features, rank, alpha / rank, dropout, device, linear.weight.dtype)
            adapted.append(Adapted(linear, lora))
            setattr(layer, part, adapted[-1].train())
        optimizer = torch.optim.AdamW([p for layer in adapted for p in layer.lora.parameters()], lr=lr, weight_decay=0.0)
        for step in range(steps):
            for i in range(parts):
                loss = next_token(model, batches[step * parts + i].to(device)) / parts
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress(f"LoRA on the {part} factors", step + 1, steps)
        for layer, adapted_part in zip(layers, adapted, strict=True):
            weight = adapted_part.linear.weight
            weight.data = (widened(weight) + adapted_part.lora.product().detach()).to(weight.dtype)
            setattr(layer, part, adapted_part.linear)
