"""How large the parts of check.py are, and what all of them share: shapes, random models, text, clocks."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from acip.calibration.parametrize import adapters
from acip.data import documents, token_windows
from acip.layers.svd_linear import SVDLinear
from acip.layers.targets import find_linears, weight_MN
from acip.modeling_acip import set_module
from acip.recipe import Dtype, Recipe
from tests.support.small import byte_tokenizer

Shape = dict[str, Any]
SEVEN: Shape = {}  # LlamaConfig's own defaults
THIRTEEN: Shape = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824}
SERVED: Shape = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 32, "num_key_value_heads": 4,
    "vocab_size": 256,
}  # fmt: skip
TINY: Shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256}


@dataclass(frozen=True)
class Scale:
    """The sizes of all parts on one device."""

    device: str = "cuda"
    dtype: Dtype = "bfloat16"
    llama: Shape = field(default_factory=lambda: SEVEN)  # calibrated and decoded
    larger: Shape = field(default_factory=lambda: THIRTEEN)  # calibrated with gradient checkpointing
    served: Shape = field(default_factory=lambda: SERVED)
    batch: int = 4  # windows in a step
    seq_len: int = 1024
    sample_windows: int = 16
    steps: int = 20  # of post-tuning
    matmul: int = 8192  # of the measured peak
    copied: int = 1 << 30  # float32 numbers of the measured bandwidth
    basis: tuple[int, int] = (512, 1376)  # of the layers whose bases are compared with the CPU's
    batches: tuple[int, ...] = (1, 64)  # sequences that are decoded at once
    rounds: int = 5
    decoded: int = 12  # tokens in a round
    prompt: int = 2048  # tokens of a prefill
    sequences: int = 32  # that the engine answers at once
    answer: int = 64  # tokens

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


FULL = Scale()
DRY = Scale(
    llama=TINY, larger=TINY, served=TINY, batch=2, seq_len=64, sample_windows=4, steps=8, matmul=256, copied=1 << 16, basis=(48, 80),
    batches=(1, 4), rounds=2, decoded=3, prompt=64, sequences=8, answer=8,
)  # fmt: skip


def at(scale: Scale, device: str) -> Scale:
    return replace(scale, device=device)


# ---- clocks and limits of the device


def settle(scale: Scale) -> None:
    """Wait until the device has done what it was asked."""
    if scale.cuda:
        torch.cuda.synchronize()


def seconds(scale: Scale, work: Callable[[], Any]) -> float:
    """Return how long `work` takes until the device is done with it."""
    settle(scale)
    start = time.perf_counter()
    work()
    settle(scale)
    return time.perf_counter() - start


def matmul_peak(scale: Scale) -> float:
    """Return the FLOP/s of a large product of random matrices, the best of several."""
    n = scale.matmul
    a, b = (torch.randn(n, n, device=scale.device).to(scale.torch_dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(scale, lambda: a @ b) for _ in range(8))


def bandwidth(scale: Scale) -> float:
    """Return the bytes/s that the device reads and writes while it copies, the best of several."""
    source = torch.zeros(scale.copied, device=scale.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(scale, lambda: target.copy_(source)) for _ in range(5))


def reset_peak(scale: Scale) -> None:
    if scale.cuda:
        torch.cuda.reset_peak_memory_stats()


def peak(scale: Scale) -> float | None:
    """Return the bytes that were allocated at most since the last reset; None on a CPU, where nothing counts them."""
    return float(torch.cuda.max_memory_allocated()) if scale.cuda else None


def free(scale: Scale) -> None:
    """Give the memory of deleted tensors back to the device."""
    import gc

    gc.collect()
    if scale.cuda:
        torch.cuda.empty_cache()


# ---- models and text


@torch.no_grad()
def random_llama(shape: Shape, scale: Scale) -> LlamaForCausalLM:
    """Return a Llama of this shape with random weights whose singular values decay."""
    torch.manual_seed(0)
    torch.set_default_dtype(scale.torch_dtype)
    try:
        with torch.device(scale.device):
            model = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    model.config.dtype = scale.torch_dtype
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            (M, N), K = module.weight.shape, min(module.weight.shape)
            decay_K = torch.arange(1, K + 1, device=scale.device) ** -0.5
            W_MN = (torch.randn(M, K, device=scale.device) * decay_K) @ torch.randn(K, N, device=scale.device)
            W_MN += 0.1 * torch.randn(M, N, device=scale.device)
            module.weight.copy_(W_MN * (N**-0.5 / W_MN.square().mean().sqrt()))
    return model


def text_windows(seq_len: int, count: int) -> Tensor:
    """Return [count, seq_len] tokens, the bytes of the Wikipedia text that ships with acip."""
    return token_windows(documents("package:wikipedia", "train"), byte_tokenizer(), seq_len, count)


class QuickBases:
    """Orthonormal, complete bases that cost next to nothing to find: random ones, or Cholesky's where a layer is tall.

    The speed and the memory of a calibration do not depend on its basis.
    """

    def __init__(self) -> None:
        self.rotations: dict[int, Tensor] = {}

    def __call__(self, W_MN: Tensor) -> Tensor:
        """Return U [M, K] in float32, whose columns span W's."""
        M, N = W_MN.shape
        if M > N:  # W = Q R with R = L^T, W^T W = L L^T
            W = W_MN.float()
            return torch.linalg.solve_triangular(torch.linalg.cholesky(W.T @ W), W.T, upper=False).T
        if M not in self.rotations:
            self.rotations[M] = torch.linalg.qr(torch.randn(M, M, device=W_MN.device)).Q
        return self.rotations[M]


@torch.no_grad()
def parametrize_quickly(model: nn.Module, recipe: Recipe) -> None:
    """Swap every target layer for an `SVDLinear` in one of `QuickBases`."""
    model.requires_grad_(False)
    torch.manual_seed(recipe.seed)
    basis = QuickBases()
    for name, linear in find_linears(model, recipe.exclude).items():
        W_MN = weight_MN(linear)
        U_MK = basis(W_MN)
        with torch.enable_grad():
            core = SVDLinear(linear, W_MN, U_MK, recipe.mask_scale, adapters(W_MN, recipe), recipe.quantize)
        set_module(model, name, core)
