"""The peak memory of a calibration, from shapes alone, before it runs.

A calibration has phases, and each phase its largest moment, a sum of parts:

    parametrize   second moments of the layers' inputs, and eigenvectors
    scores        Fisher scores: forward and backward through the base model
    prune         a step with masks. Every calibration takes one at least, the trial step
    post-tune     a step with adapters, and the optimizer's moments of them

The largest moment of a step is when the loss is computed, or when the backward pass is in its first block. Activations are
counted layer by layer, as autograd keeps them (`_Block`, `_Prediction.kept`), and measured in tests/acip/calibration/test_memory_plan.py.
Not counted: the device's context, buffers inside of cuBLAS and LAPACK beyond `solve`, and what allocators lose
(`acip.calibration.memory_check.HEADROOM`).
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from acip.calibration.bases import STACK
from acip.calibration.fixed_scores import scored_at_once
from acip.calibration.losses import CHUNK
from acip.layers.directions import QUANT_BLOCK
from acip.layers.targets import find_linears, weight_MN
from acip.modeling_acip import accumulation_dtype
from acip.recipe import Recipe

COVARIANCES = 8 << 30  # bytes; `acip.calibration.bases` holds no more of them at once
SAMPLE_BATCH = 4  # windows that feed them at once
KERNELS = 0.5e9  # bytes of code that oneDNN compiles and keeps for 16-bit products on a CPU: some for each shape, and a rank is one
FOUR_BIT = 0.5 + 4 / QUANT_BLOCK  # bytes per number, scales included
ATTENTION = re.compile(r"[^.]*att(n|ention)[^.]*", re.IGNORECASE)
ACTIVATION = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 2}  # tensors that autograd keeps of one; others: 1

Source = Literal["own", "sibling", "kept"]


@dataclass(frozen=True)
class Phase:
    """The largest moment of a phase, by part, in bytes."""

    name: str
    rest: float = 0.0  # embeddings, head, norms, layers that aren't compressed
    originals: float = 0.0  # the weights of the target layers
    directions: float = 0.0  # their left and right rows
    trainable: float = 0.0  # masks and adapters, in the accumulation dtype
    optimizer: float = 0.0  # AdamW's two moments of them
    gradients: float = 0.0  # of them
    activations: float = 0.0  # what autograd keeps
    loss: float = 0.0  # logits, the base model's, their gradients, probabilities in the accumulation dtype
    transient: float = 0.0  # covariances, eigenvectors, dequantized weights, gradients of activations

    @property
    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        """Its name, and its parts down to one percent, largest first."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        return f"{self.name}: " + ", ".join(f"{name} {part / 1e9:.2f}" for name, part in parts if part >= 0.01 * self.total)


@dataclass(frozen=True)
class Memory:
    """What a calibration will need, phase by phase. Prints as a table in GB (1e9 bytes)."""

    phases: tuple[Phase, ...]

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> float:
        """Bytes."""
        return self.worst.total

    def __str__(self) -> str:
        columns = [(phase.name, [*phase.parts.values(), phase.total]) for phase in self.phases]
        rows = ["GB".ljust(12) + "".join(name.rjust(13) for name, _ in columns)]
        for i, part in enumerate([*self.worst.parts, "total"]):
            rows.append(part.ljust(12) + "".join(f"{values[i] / 1e9:13.2f}" for _, values in columns))
        return "\n".join(rows)


def predict(model: nn.Module, recipe: Recipe, device: str | torch.device | None = None, workers: int = 1) -> Memory:
    """The memory of calibrating `model`, not parametrized yet, on `device`: None = where it is; meta counts as an accelerator.

    On a CPU, 4-bit layers stand beside the exact ones, in one memory. Of several `workers` this is one: it holds its part of
    the target layers, and is fed its part of each batch.
    """
    kind = torch.device(device or next(model.parameters()).device).type
    return _Prediction(model, recipe, kind == "cpu", workers).memory()


@dataclass(frozen=True)
class _Layer:
    """A target layer M x N, and whose its input is: its `own`, a `sibling`'s (k and v are fed q's; up gate's), or `kept` by
    autograd for another operation anyhow (attention, relu)."""

    M: int
    N: int
    source: Source
    bias: bool
    share: float = 1.0  # of the tokens: an expert sees some

    @property
    def K(self) -> int:
        return min(self.M, self.N)

    @property
    def moment(self) -> float:
        """Numbers in its own second moment: of its outputs, or inputs (see `acip.calibration.activation_covariance.of_outputs`)."""
        return float(self.M**2 if self.M < self.N and not self.bias else self.N**2 * (self.source != "sibling"))


class _Block:
    """One element of a ModuleList: its target layers, and the numbers per token that autograd keeps for everything else.

    attention    q, k, v, and what it returns
    perceptron   what enters the activation; where gated, what leaves it and what that is multiplied with
    norms        their inputs, in float32 if they are RMSNorms
    """

    def __init__(self, name: str, block: nn.Module, found: Mapping[str, nn.Module], config: Any) -> None:
        self.name, self.found = name, found
        self.layers: list[_Layer] = []
        self.numbers, self.float32 = 0.0, 0.0  # per token, in the model's dtype, and in float32
        self.shapes = {key: weight_MN(m).shape for key, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        self.width = next(reversed(self.shapes.values()))[0] if self.shapes else 0  # of its input
        self.experts = min(config("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_top_k") or 1, 64)
        attention: dict[str, list[str]] = {}
        for key in self.shapes:
            if match := ATTENTION.search(key):
                attention.setdefault(key[: match.end()], []).append(key)
        for keys in attention.values():
            self.attend(keys)
        inside = {key for keys in attention.values() for key in keys}
        activation = str(config("hidden_act", "activation_function", "hidden_activation"))
        self.perceptrons([key for key in self.shapes if key not in inside], block, activation)
        for key, module in block.named_modules():
            self.norm(key, module)
            self.fused(module)

    def add(self, keys: list[str], source: Source = "own", share: float = 1.0) -> None:
        """Target layers that are fed the same, where they are as wide."""
        widths: set[int] = set()
        for key in keys:
            M, N = self.shapes[key]
            if (layer := self.found.get(f"{self.name}.{key}")) is not None:
                self.layers.append(_Layer(M, N, "sibling" if N in widths else source, layer.bias is not None, share))
                widths.add(N)

    def attend(self, keys: list[str]) -> None:
        *projections, out = keys
        self.numbers += sum(self.shapes[key][0] for key in projections) + self.shapes[out][1]
        self.add(projections)
        self.add([out], "kept")

    def perceptrons(self, keys: list[str], block: nn.Module, activation: str) -> None:
        ups: list[str] = []
        for key in keys:
            N = self.shapes[key][1]
            if not ups or self.shapes[ups[-1]][0] not in (N, 2 * N):
                ups.append(key)
                continue
            expert = re.match(r"(.*experts)\.\d+\.", key)
            share = min(1.0, self.experts / len(list(block.get_submodule(expert[1]).children()))) if expert else 1.0
            gated = sum(self.shapes[up][0] for up in ups) >= 2 * N
            self.numbers += share * N * (ACTIVATION.get(activation, 1) + 2 * gated)
            self.add(ups, share=share)
            self.add([key], "kept" if activation == "relu" else "own", share)
            ups = []
        self.add(ups)

    def norm(self, key: str, module: nn.Module) -> None:
        kind = type(module).__name__
        if "Norm" not in kind:
            return
        weight, projection = getattr(module, "weight", None), self.shapes.get(key.replace("norm", "proj"))
        dim = projection[0] if projection else self.width if weight is None else weight.numel()
        if kind == "LayerNorm":
            self.numbers += dim
        else:
            self.float32 += dim

    def fused(self, module: nn.Module) -> None:
        """Experts in one tensor [E, M, N], which are frozen: gate, up, what leaves the activation, and what each expert returns."""
        experts = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        if experts and self.width:
            self.numbers += self.experts * (sum(p.numel() / len(p) for p in experts) / self.width + self.width)


class _Prediction:
    def __init__(self, model: nn.Module, recipe: Recipe, cpu: bool, workers: int) -> None:
        self.recipe, self.cpu, self.workers = recipe, cpu, workers
        dtype: torch.dtype = getattr(torch, recipe.dtype)
        self.s, self.wide = dtype.itemsize, accumulation_dtype(dtype).itemsize
        self.four_bit = recipe.quantize != "none"
        self.tokens = max(1, recipe.batch_size // workers) * recipe.seq_len
        found = find_linears(model, recipe.exclude)
        names = list(_block_names(model, found))

        def config(*keys: str) -> Any:
            return next((value for key in keys if (value := getattr(getattr(model, "config", None), key, None))), None)

        self.blocks = [_Block(name, model.get_submodule(name), found, config) for name in names]
        self.layers = [layer for block in self.blocks for layer in block.layers]
        inside = tuple(f"{name}." for name in names)
        norms = [type(m).__name__ for name, m in model.named_modules() if "Norm" in type(m).__name__ and not name.startswith(inside)]
        self.last_norm: float = self.blocks[-1].width * (self.s if norms[-1] == "LayerNorm" else 4) * self.tokens if norms else 0
        self.dense = self.s * sum(layer.M * layer.N for layer in self.layers)
        weights = {id(linear.weight) for linear in found.values()}
        self.rest = self.s * sum(p.numel() for p in model.parameters() if id(p) not in weights)
        self.rest += sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
        head = getattr(model, "get_output_embeddings", lambda: None)()
        classes = weight_MN(head).shape[0] if isinstance(head, nn.Linear | Conv1D) else 0
        self.logits = self.tokens * classes

        R, factors = recipe.adapter_rank, recipe.adapter == "factors"
        self.masks = float(self.wide) * sum(layer.K for layer in self.layers)
        self.A = float(self.wide) * R * sum(layer.N + factors * layer.K for layer in self.layers)
        self.B = float(self.wide) * R * sum(layer.M + factors * layer.K for layer in self.layers)

    @property
    def scored(self) -> "_Prediction":
        """This, with as many windows as are scored at once."""
        one = copy.copy(self)
        windows = max(1, self.recipe.batch_size // self.workers)
        one.tokens = scored_at_once(windows, self.recipe.seq_len) * self.recipe.seq_len
        one.logits = self.logits // self.tokens * one.tokens
        one.last_norm = self.last_norm / self.tokens * one.tokens
        return one

    def memory(self) -> Memory:
        recipe, masks, A, B = self.recipe, self.masks, self.A, self.B
        start = masks + A + B
        phases = [self.parametrize()]
        if recipe.scores == "fisher":
            phases.append(self.scored.step("scores", 0.0, start, 0.0, 0.0))
        phases.append(self.step("prune", recipe.prune_distill_weight, start, start, 2 * start * recipe.prunes))
        if recipe.adapter_rank and (recipe.post_tune_steps or recipe.total_steps):
            phases.append(self.step("post-tune", recipe.distill_weight, A + B, A + B, 2 * (A + B)))
        return Memory(tuple(phases))

    # frozen weights

    def rows(self, n: int, width: int) -> float:
        """Bytes of a frozen matrix."""
        return n * math.ceil(width / QUANT_BLOCK) * QUANT_BLOCK * FOUR_BIT if self.four_bit else float(self.s * n * width)

    def frozen(self) -> dict[str, float]:
        """Parts of a parametrized model."""
        originals = sum(self.rows(layer.M, layer.N) for layer in self.layers) + self.dense * (self.four_bit and self.cpu)
        directions = sum(self.rows(layer.K, layer.M) + self.rows(layer.K, layer.N) for layer in self.layers)
        return {"rest": self.rest, "originals": originals / self.workers, "directions": directions / self.workers}

    # moments

    def parametrize(self) -> Phase:
        """While moments are summed, while a group of layers is solved, or at the end, when 4-bit layers are still dense, too."""
        recipe, s, w, frozen = self.recipe, self.s, self.wide, self.frozen()
        dense = self.dense / self.workers
        moments = w * sum(layer.moment for layer in self.layers) if recipe.basis == "covariance" else 0.0
        group = min(1.0, COVARIANCES / max(1.0, moments))  # share of the layers that are solved at once
        widest = max(max(4 * s, s + w) * layer.N + 3 * s * layer.M for layer in self.layers)
        forward = widest * min(SAMPLE_BATCH, recipe.sample_windows) * recipe.seq_len if moments else 0.0
        solved = group * s * sum(layer.K * layer.M for layer in self.layers)
        gathered = group * self.dense / self.workers if self.workers > 1 else 0.0
        start = Phase("parametrize", self.rest, dense, (1 - group) * frozen["directions"], trainable=self.masks + self.A + self.B)
        built = frozen["originals"] + (dense if self.four_bit and not self.cpu else 0.0)
        copies = solved if self.four_bit or self.workers > 1 else 0.0
        coordinates = max(float(w) * (3 * layer.M * layer.N + 2 * layer.K * (layer.M + layer.N)) for layer in self.layers)
        phases = (
            replace(start, transient=group * moments + max(forward, gathered + solved + self.solving())),
            replace(start, originals=built, directions=frozen["directions"], transient=copies + coordinates),
        )
        return max(phases, key=lambda phase: phase.total)

    def solving(self) -> float:
        """Bytes of the layers that are solved at the same time: a stack on an accelerator, as many as there are threads on a CPU."""
        if self.cpu:
            threads = torch.get_num_threads()
            return sum(sorted((self.solve(layer) for layer in self.layers), reverse=True)[:threads])
        alike = Counter((layer.M, layer.N) for layer in self.layers)
        stacked = {(M, N): min(count, max(1, STACK // max(M, N) ** 2)) for (M, N), count in alike.items()}
        return max(self.solve(layer) * stacked[layer.M, layer.N] for layer in self.layers)

    def solve(self, layer: _Layer) -> float:
        """Bytes for one layer's eigenvectors: see `acip.calibration.bases.basis`. They may have to be float64."""
        M, N, K, w = layer.M, layer.N, layer.K, self.wide
        C = 0 if self.recipe.basis == "svd" else (M if M < N and not layer.bias else N) ** 2
        weights = (self.s + w * (self.s < w)) * M * N + w * C  # stacked, in the accumulation dtype
        tall = w * (M * N + K * K) * (M > N)  # QR
        energy = 8 * (3 * C + 2 * K * N)
        return float(weights + tall + max(energy, 8 * 5 * K * K))

    def step(self, phase: str, distill_weight: float, trainable: float, gradients: float, optimizer: float) -> Phase:
        """At the loss, or in the backward pass of the first block that it reaches, or of the last."""
        at_loss, block = self.activations(phase)
        before = gradients * (self.recipe.gradient_accumulation_steps > 1)
        L, s, w = self.logits, self.s, self.wide
        chunk = float(w) * min(4 * L, 6 * CHUNK)
        divergence = 3 * s * L + chunk if distill_weight else 0.0  # the model's logits, the base's, and the gradient
        entropy = max((3 if distill_weight else 1) * s + 2 * w, s * (distill_weight > 0) + 3 * w) * L if distill_weight < 1 else 0.0
        kernels = KERNELS * (self.cpu and s == 2 and phase == "post-tune")
        start = Phase(phase, **self.frozen(), trainable=trainable, gradients=before, optimizer=optimizer, transient=kernels)
        back = replace(start, loss=s * L * (distill_weight > 0), transient=kernels + self.flow(phase))
        moments = (
            replace(start, activations=at_loss, loss=max(divergence, entropy)),
            replace(
                back, activations=at_loss + block * self.recipe.gradient_checkpointing, gradients=max(before, gradients / len(self.blocks))
            ),
            replace(back, activations=block, gradients=gradients),
        )
        return max(moments, key=lambda moment: moment.total)

    def flow(self, phase: str) -> float:
        """Bytes that a layer's backward pass needs for a moment: gradients, its scores, weights out of 4 bit or of all workers."""
        largest = max(layer.M * layer.N for layer in self.layers)
        weights = (4 + self.s) * largest if self.four_bit else 2 * self.s * largest if self.workers > 1 else 0
        numbers = self.s + 3 * self.wide * (phase == "scores")
        return weights + self.tokens * max(2 * self.s * (layer.M + layer.N) + numbers * layer.K for layer in self.layers)

    # activations

    def activations(self, phase: str) -> tuple[float, float]:
        """Bytes that autograd keeps when the loss is computed, and in the largest block, which may be among them or yet to come."""
        blocks = [sum(self.kept(layer, phase) for layer in block.layers) + self.around(block) for block in self.blocks]
        if not self.recipe.gradient_checkpointing:
            return self.last_norm + sum(blocks), max(blocks)
        inputs = float(sum(block.width for block in self.blocks))
        if phase == "scores":  # its hooks keep the layers' inputs
            inputs += sum(layer.N * layer.share for layer in self.layers if layer.source != "sibling")
        return self.last_norm + self.s * self.tokens * inputs, max(blocks)

    def around(self, block: _Block) -> float:
        return self.tokens * (self.s * block.numbers + 4 * block.float32)

    def kept(self, layer: _Layer, phase: str) -> float:
        """Bytes that autograd keeps of one layer. Where a layer's adapter drops some of its input, it keeps its own copy, and the mask."""
        recipe, s, R = self.recipe, self.s, self.recipe.adapter_rank
        x = float(s * layer.N * (layer.source == "own"))
        if phase == "scores":
            return x * layer.share * self.tokens
        dropped = s + (s if self.cpu else 1)  # bytes of a dropped number
        pruning, factors = phase == "prune", recipe.adapter == "factors"
        k = layer.K if pruning else self.rank(layer)
        per_token = s * k * pruning  # what is multiplied with the mask
        if R:
            per_token += dropped * layer.N if recipe.adapter_dropout else x
            per_token += s * R * (1 + factors)
            per_token += factors * k * (dropped if recipe.adapter_dropout else s)
        casts = R * (layer.N + layer.M + 2 * layer.K * factors) * s if s < 4 else 0
        return per_token * layer.share * self.tokens + casts

    def rank(self, layer: _Layer) -> float:
        """The largest rank in post-tuning."""
        M, N, recipe = layer.M, layer.N, self.recipe
        size = recipe.stop_ratio if recipe.post_tune == "stop" else 1.0
        if recipe.storage == "factors":
            return size * M * N / (M + N)
        return (M + N - math.sqrt((M + N) ** 2 - 4 * size * M * N)) / 2


def _block_names(model: nn.Module, found: Mapping[str, nn.Module]) -> Iterator[str]:
    """Elements of the outermost ModuleLists that hold target layers."""
    last = ""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (last and name.startswith(last)) and any(key.startswith(f"{name}.") for key in found):
            last = f"{name}."
            yield from (f"{name}.{i}" for i in range(len(module)))
