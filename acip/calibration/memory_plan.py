"""A prediction of the peak memory of a calibration, from shapes alone.

A calibration has phases. The peak of each phase is a sum of parts:

    sample        text that the base model writes, if it is the calibration text: keys and values (acip.self_text)
    code          statistics of layer inputs, and codes of one layer, if the recipe asks for codes (acip.coding). The moments of the Fisher
                  basis may be summed in the same passes (`predict_shared`)
    tune          a training step for the step sizes of the codes
    parametrize   second moments of layer inputs, and of gradients for the Fisher basis, and eigenvectors
    scores        Fisher scores: forward and backward pass through the base model
    prune         a step with masks; every calibration takes at least one, the trial step
    post-tune     a step with adapters, and the optimizer state of them
    measure       the curve of the saved artifact: the base model, the directions, the codes of one size, and logits

Some phases can be *streamed*: the weights of one block are in memory at a time (acip.layers.block_chain). These are `measure`, and, if the
recipe does not train, `code`, `parametrize` and `scores`. They are streamed together, without the trial step (`prune`).

The peak of a step is at the loss, or in the first block of the backward pass. Activations are counted layer by layer, as autograd
keeps them (`_Block`, `_Prediction.kept`); tests/acip/calibration/test_memory_plan.py measures them. Not counted are the context of the
device, buffers of cuBLAS and LAPACK beyond `solve`, and the losses of allocators (`acip.calibration.memory_check.HEADROOM`).
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
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from acip.calibration.bases import STACK
from acip.calibration.fixed_scores import scored_at_once
from acip.calibration.losses import CHUNK
from acip.layers.directions import QUANT_BLOCK
from acip.layers.targets import find_linears, require_matches, weight_MN
from acip.modeling_acip import accumulation_dtype
from acip.recipe import Recipe
from acip.self_text import TOGETHER
from acip.sizing.budget import Decoder

COVARIANCES = 8 << 30  # bytes of covariances that `acip.calibration.bases` holds at once, at most
STATISTICS = 8 << 30  # bytes of statistics that are in memory at once, at most, or those of one block
CODED_AT_ONCE = 2**25  # numbers of all versions of a layer that `acip.coding.error_feedback` codes together, at most, or one version
CODED_AT_ONCE_CPU = 2**23  # the same for each thread of a CPU, where more is not faster
CODING_BLOCK = 128  # columns of a weight that are coded before those behind them are updated
VERSIONS = 5  # of a coded layer, at most
KEPT_LOGITS_BYTES = 1 << 30  # bytes of the base model's logits that `acip.evaluate.curve` keeps, at most
STREAMED_HIDDEN = 1 << 28  # bytes of hidden states that a streamed curve has in memory, at most, or one window at all sizes
STREAMED_SIZES = 12  # of a streamed curve, at most, for this prediction
CODED_BYTES = 0.5  # of a version per weight, in the mean
UNSAVED_CODES = 1 << 26  # bytes of finished codes that a job holds in memory, at most, and one layer
KERNELS = 0.5e9  # bytes of code that oneDNN compiles for 16-bit products on a CPU, for each shape, and each rank is a shape
FOUR_BIT = 0.5 + 4 / QUANT_BLOCK  # bytes per number, scales included
ATTENTION = re.compile(r"[^.]*att(n|ention)[^.]*", re.IGNORECASE)
ACTIVATION = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 2}  # tensors that autograd keeps of an activation function; others: 1

Source = Literal["own", "sibling", "kept"]


@dataclass(frozen=True)
class Phase:
    """The peak of a phase by part, in bytes."""

    name: str
    rest: float = 0.0  # embeddings, head, norms, layers that are not compressed
    originals: float = 0.0  # the weights of the target layers
    statistics: float = 0.0  # of the layers to be coded, and other second moments that are gathered with them
    codes: float = 0.0  # 8-bit codes of one version of each layer
    directions: float = 0.0  # their left and right rows
    trainable: float = 0.0  # masks and adapters, in the accumulation dtype
    optimizer: float = 0.0  # AdamW's two moments of the trainable parts
    gradients: float = 0.0  # of the trainable parts
    activations: float = 0.0  # kept by autograd
    loss: float = 0.0  # logits of the model and the base model, their gradients, probabilities in the accumulation dtype
    transient: float = 0.0  # covariances, eigenvectors, dequantized weights, gradients of activations
    streamed: bool = False  # with the weights of one block in memory

    @property
    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)[1:-1]}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        """Return the name and the parts of 1 % or more, in GB, largest first."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        return f"{self.name}: " + ", ".join(f"{name} {part / 1e9:.2f}" for name, part in parts if part >= 0.01 * self.total)


@dataclass(frozen=True)
class Memory:
    """The predicted memory of a calibration by phase. `str` formats it as a table in GB (1e9 bytes)."""

    phases: tuple[Phase, ...]

    @property
    def streamed(self) -> tuple[str, ...]:
        """The names of the streamed phases."""
        return tuple(phase.name for phase in self.phases if phase.streamed)

    @property
    def by_block(self) -> bool:
        """Whether the calibration is streamed, and not only the measurement of its result."""
        return any(name != "measure" for name in self.streamed)

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> float:
        """The peak of the worst phase, in bytes."""
        return self.worst.total

    def __str__(self) -> str:
        columns = [(phase.name, [*phase.parts.values(), phase.total]) for phase in self.phases]
        rows = ["GB".ljust(12) + "".join(name.rjust(13) for name, _ in columns)]
        for i, part in enumerate([*self.worst.parts, "total"]):
            rows.append(part.ljust(12) + "".join(f"{values[i] / 1e9:13.2f}" for _, values in columns))
        return "\n".join(rows)


def predict(
    model: nn.Module,
    recipe: Recipe,
    device: str | torch.device | None = None,
    workers: int = 1,
    context: int = 0,
    sampled: bool = False,
) -> Memory:
    """Predict the memory of the calibration of `model`, which is not parametrized yet, on `device`.

    `device` None = the device of the model; meta counts as an accelerator. On a CPU, 4-bit layers and the exact layers share one memory.
    With several `workers`, the prediction is for one of them, which holds its part of the target layers and gets its part of each batch.
    `context` is the number of tokens in a window of the curve; 0 = the curve is not measured. `sampled` says whether the calibration text
    is sampled from the model. No phase is streamed.
    """
    return _Prediction(model, recipe, _is_cpu(model, device), workers).memory(context, sampled)


def predict_streamed(
    model: nn.Module, recipe: Recipe, device: str | torch.device | None = None, workers: int = 1, context: int = 0
) -> dict[str, Phase]:
    """Predict the phases of `predict` that can be streamed, as they are then, by name."""
    return {phase.name: phase for phase in _Prediction(model, recipe, _is_cpu(model, device), workers).streamed(context)}


def predict_shared(model: nn.Module, recipe: Recipe, device: str | torch.device | None = None) -> Phase | None:
    """Predict the phase `code` if the moments of the Fisher basis are summed in the same passes (`acip.calibration.bases`).

    None: the recipe has no use for them, or they or the statistics are too large to be in memory at once.
    """
    return _Prediction(model, recipe, _is_cpu(model, device), 1).coded.shared()


def _is_cpu(model: nn.Module, device: str | torch.device | None) -> bool:
    return torch.device(device or next(model.parameters()).device).type == "cpu"


@dataclass(frozen=True)
class _Layer:
    """A target layer M x N.

    `source` is the owner of its input: the layer itself (`own`), a `sibling` with the same input (k and v share that of q, up that of
    gate), or another operation for which autograd keeps it in any case (`kept`: attention, relu).
    """

    M: int
    N: int
    source: Source
    bias: bool
    share: float = 1.0  # of the tokens that reach it; below 1 for an expert

    @property
    def K(self) -> int:
        return min(self.M, self.N)

    @property
    def moment(self) -> float:
        """Numbers in the second moment that it owns (see `acip.calibration.activation_covariance.of_outputs`)."""
        return float(self.M**2 if self.M < self.N and not self.bias else self.N**2 * (self.source != "sibling"))


class _Block:
    """An element of a ModuleList: its target layers, and the numbers per token that autograd keeps for its other operations.

    attention    q, k, v, and its output
    perceptron   the input of the activation function; if gated, also its output and the factor of the output
    norms        their inputs, in float32 for RMSNorm
    """

    def __init__(self, name: str, block: nn.Module, linears: Mapping[str, nn.Module], config: Any) -> None:
        self.name, self.linears = name, linears
        self.layers: list[_Layer] = []
        self.numbers, self.float32 = 0.0, 0.0  # per token, in the dtype of the model and in float32
        self.shapes = {key: weight_MN(m).shape for key, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        self.width = next(reversed(self.shapes.values()))[0] if self.shapes else 0  # features of its input
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
        """Add target layers. Those of equal width share one input."""
        widths: set[int] = set()
        for key in keys:
            M, N = self.shapes[key]
            if (layer := self.linears.get(f"{self.name}.{key}")) is not None:
                self.layers.append(_Layer(M, N, "sibling" if N in widths else source, layer.bias is not None, share))
                widths.add(N)

    def attend(self, keys: list[str]) -> None:
        """Count an attention module; the last of `keys` is the output projection."""
        *projections, out = keys
        self.numbers += sum(self.shapes[key][0] for key in projections) + self.shapes[out][1]
        self.add(projections)
        self.add([out], "kept")

    def perceptrons(self, keys: list[str], block: nn.Module, activation: str) -> None:
        """Count perceptrons: up layers, and gates, up to the down layer, whose input width is their output width."""
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
        """Count the input of `module` if it is a norm."""
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
        """Count frozen experts in one tensor [E, M, N]: gate, up, the output of the activation function, and the output of each expert."""
        experts = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        if experts and self.width:
            self.numbers += self.experts * (sum(p.numel() / len(p) for p in experts) / self.width + self.width)


class _Prediction:
    """The bytes of each phase, from the shapes of a model and a recipe."""

    def __init__(self, model: nn.Module, recipe: Recipe, cpu: bool, workers: int) -> None:
        self.recipe, self.cpu, self.workers = recipe, cpu, workers
        dtype: torch.dtype = getattr(torch, recipe.dtype)
        self.s, self.wide = dtype.itemsize, accumulation_dtype(dtype).itemsize
        self.four_bit = recipe.quantize != "none"
        self.tokens = max(1, recipe.batch_size // workers) * recipe.seq_len
        self.windows = recipe.sample_windows
        require_matches(model, recipe.exclude)
        linears = find_linears(model, recipe.exclude)
        names = list(_block_names(model, linears))

        def config(*keys: str) -> Any:
            return next((value for key in keys if (value := getattr(getattr(model, "config", None), key, None))), None)

        self.blocks = [_Block(name, model.get_submodule(name), linears, config) for name in names]
        self.layers = [layer for block in self.blocks for layer in block.layers]
        inside = tuple(f"{name}." for name in names)
        norms = [type(m).__name__ for name, m in model.named_modules() if "Norm" in type(m).__name__ and not name.startswith(inside)]
        self.last_norm: float = self.blocks[-1].width * (self.s if norms[-1] == "LayerNorm" else 4) * self.tokens if norms else 0
        self.dense = self.s * sum(layer.M * layer.N for layer in self.layers)
        weights = {id(linear.weight) for linear in linears.values()}
        self.rest = self.s * sum(p.numel() for p in model.parameters() if id(p) not in weights)
        self.rest += sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.classes = weight_MN(head).shape[0] if isinstance(head, nn.Linear | Conv1D) else 0
        self.logits = self.tokens * self.classes
        self.decoder = Decoder.of(model.config, self.s) if isinstance(model, PreTrainedModel) else None

        R, factors = recipe.adapter_rank, recipe.adapter == "factors"
        self.masks = float(self.wide) * sum(layer.K for layer in self.layers)
        self.A = float(self.wide) * R * sum(layer.N + factors * layer.K for layer in self.layers)
        self.B = float(self.wide) * R * sum(layer.M + factors * layer.K for layer in self.layers)

    @property
    def scored(self) -> "_Prediction":
        """Return this prediction for as many windows as are scored at once."""
        scored = copy.copy(self)
        windows = max(1, self.recipe.batch_size // self.workers)
        scored.tokens = scored_at_once(windows, self.recipe.seq_len) * self.recipe.seq_len
        scored.windows = -(-self.recipe.score_windows // self.recipe.batch_size) * self.recipe.batch_size
        scored.logits = self.logits // self.tokens * scored.tokens
        scored.last_norm = self.last_norm / self.tokens * scored.tokens
        return scored

    @property
    def coded(self) -> "_Prediction":
        """Return this prediction for one window at a time, as the statistics of codes are gathered, without gradient checkpointing."""
        coded = copy.copy(self)
        coded.recipe = replace(self.recipe, gradient_checkpointing=False)
        coded.tokens = self.recipe.seq_len
        coded.logits = self.logits // self.tokens * coded.tokens
        coded.last_norm = self.last_norm / self.tokens * coded.tokens
        return coded

    def reading(self, tokens: int) -> "_Prediction":
        """Return this prediction for one window of this number of tokens."""
        read = copy.copy(self)
        read.tokens = tokens
        read.logits = self.logits // self.tokens * tokens
        return read

    def memory(self, context: int, sampled: bool) -> Memory:
        """Return the phases of the calibration."""
        recipe, masks, A, B = self.recipe, self.masks, self.A, self.B
        start = masks + A + B
        measure = [self.reading(context).measure()] if context else []
        phases = [self.sample()] if sampled else []
        if recipe.code != "ranks":
            phases.append(self.coded.code())
        if recipe.code != "ranks" and recipe.code_tune_steps:
            phases.append(self.coded.tune())
        if recipe.code == "bits":  # nothing is parametrized
            return Memory((*phases, *measure))
        phases.append(self.parametrize())
        if recipe.scores == "fisher":
            phases.append(self.scored.step("scores", 0.0, start, 0.0, 0.0))
        phases.append(self.step("prune", recipe.prune_distill_weight, start, start, 2 * start * recipe.prunes))
        if recipe.adapter_rank and (recipe.post_tune_steps or recipe.total_steps):
            phases.append(self.step("post-tune", recipe.distill_weight, A + B, A + B, 2 * (A + B)))
        return Memory((*phases, *measure))

    def streamed(self, context: int) -> Iterator[Phase]:
        """Yield the phases that can be streamed."""
        recipe = self.recipe
        trains = recipe.trains or (recipe.code == "both" and recipe.code_tune_steps > 0)
        if not self.four_bit and self.workers == 1 and (recipe.code == "bits" or not trains):
            if recipe.code != "ranks":
                yield self.coded.code_streamed()
            if recipe.code != "bits":
                yield self.coded.parametrize_streamed()
            if recipe.code != "bits" and recipe.scores == "fisher":
                yield self.scored.scores_streamed()
        if context:
            yield self.reading(context).measure_streamed()

    # frozen weights

    def rows(self, n: int, width: int) -> float:
        """Return the bytes of a frozen matrix [n, width]."""
        return n * math.ceil(width / QUANT_BLOCK) * QUANT_BLOCK * FOUR_BIT if self.four_bit else float(self.s * n * width)

    def start(self, phase: str) -> Phase:
        """Return a phase with the frozen parts of a parametrized model."""
        originals = sum(self.rows(layer.M, layer.N) for layer in self.layers) + self.dense * (self.four_bit and self.cpu)
        directions = sum(self.rows(layer.K, layer.M) + self.rows(layer.K, layer.N) for layer in self.layers)
        return Phase(phase, self.rest, originals / self.workers, directions=directions / self.workers)

    def sample(self) -> Phase:
        """Return the peak of sampling: the last token of the texts, where the keys and values of one layer are copied."""
        cache = self.decoder.cache(self.recipe.seq_len, TOGETHER) if self.decoder is not None else 0
        logits = (self.s + 4 * 4) * TOGETHER * self.classes  # also in float32: scores, sorted and as probabilities
        copied = cache / len(self.blocks)
        return Phase("sample", self.rest, self.dense, activations=float(cache), loss=float(logits), transient=copied)

    # moments

    def moment_bytes(self, layers: list[_Layer]) -> float:
        """Return the bytes of the second moments from which the bases of `layers` are computed."""
        if self.recipe.basis == "svd":
            return 0.0
        return float(self.wide * sum(layer.moment + (self.recipe.basis == "fisher") * layer.K**2 for layer in layers))

    def shared(self) -> Phase | None:
        """Return the peak of coding if the moments of the Fisher basis are summed in the same passes. See `predict_shared`."""
        recipe, moments = self.recipe, self.moment_bytes(self.layers)
        if (recipe.code, recipe.basis) != ("both", "fisher") or self.gathered() > STATISTICS or moments > COVARIANCES:
            return None
        solving = self.s * sum(layer.K * layer.M for layer in self.layers) + self.solving(self.layers)
        solved = Phase("code", self.rest, self.dense, statistics=self.gathered() + moments, transient=solving)
        return max(self.code(moments), solved, key=lambda phase: phase.total)

    def gathered(self) -> float:
        """Return the bytes of the statistics of all layers."""
        return float(sum(statistics_bytes(layer.M, layer.N) for layer in self.layers))

    def code(self, moment_bytes: float = 0.0) -> Phase:
        """Return the peak of coding: at the loss or in the backward pass of a window, or while one layer is coded.

        `moment_bytes` are those of other second moments that are summed in the same passes.
        """
        gathered = self.gathered()
        if gathered > STATISTICS:  # they are gathered a block at a time, and are in files
            return replace(self.code_streamed(), originals=self.dense, streamed=False)
        s, L = self.s, self.logits
        widened = 4 * (s != 4)  # bytes of a float32 copy
        at_loss, _ = self.activations("scores")  # the inputs of the layers, and what the other operations of the base model keep
        flow = max((2 * s + 4 + widened) * (layer.M + layer.N) for layer in self.layers) * self.tokens
        start = Phase("code", self.rest, self.dense, statistics=gathered)
        gathering = replace(start, statistics=gathered + moment_bytes, activations=at_loss)
        moments = (
            replace(gathering, loss=12.0 * L),
            replace(gathering, loss=float(s * L), transient=flow),
            replace(start, transient=self.coded_at_once()),
        )
        return max(moments, key=lambda phase: phase.total)

    def code_streamed(self) -> Phase:
        """Return the peak of coding with one block in memory: at the loss, in a block's backward pass, or while a layer is coded."""
        statistics = max(sum(statistics_bytes(layer.M, layer.N) for layer in block.layers) for block in self.blocks)
        start = Phase("code", self.rest, self.block(), streamed=True)
        at_loss, backward = self.differentiated(start)
        moments = (at_loss, replace(backward, statistics=2.0 * statistics), replace(start, transient=self.coded_at_once()))
        return max(moments, key=lambda phase: phase.total)

    def differentiated(self, start: Phase) -> tuple[Phase, Phase]:
        """Return the peaks of `acip.calibration.block_pass` beside `start`: at the loss, and in the backward pass of a block."""
        s, widened, hidden = self.s, 4 * (self.s != 4), self.hidden()
        flow = max((2 * s + 4 + widened) * (layer.M + layer.N) for layer in self.layers) * self.tokens
        kept = max(sum(self.kept(layer, "scores") for layer in block.layers) + self.around(block) for block in self.blocks)
        return (
            replace(start, activations=hidden + self.last_norm, loss=12.0 * self.logits),
            replace(start, activations=hidden + kept, transient=flow),
        )

    def hidden(self) -> float:
        """Return the bytes of the hidden states of all windows after a block, or of their gradients before it, and of a copy to write."""
        return 2.0 * self.s * self.windows * self.recipe.seq_len * max(block.width for block in self.blocks)

    def block(self) -> float:
        """Return the bytes of the target layers of the largest block."""
        return max(float(self.s) * sum(layer.M * layer.N for layer in block.layers) for block in self.blocks)

    def tune(self) -> Phase:
        """Return the peak of a training step for the step sizes: at the loss, where autograd keeps all codes as numbers of the model."""
        weights = float(sum(layer.M * layer.N for layer in self.layers))
        at_loss, _ = self.activations("scores")
        at_loss += (self.s + 4) * self.tokens * sum(layer.M for layer in self.layers)  # products before and after the step sizes
        loss = 3.0 * self.s * self.logits + self.wide * min(4 * self.logits, 6 * CHUNK)
        return Phase("tune", self.rest, self.dense, codes=weights, activations=at_loss, loss=loss, transient=self.s * weights)

    def measure(self) -> Phase:
        """Return the peak of measuring the curve: logits of the base model and of a size on one window."""
        coded = self.recipe.code != "ranks"
        directions = 0.0 if self.recipe.code == "bits" else float(self.s) * sum(layer.K * (layer.M + layer.N) for layer in self.layers)
        codes = float(coded * sum(layer.M * layer.N for layer in self.layers))
        return Phase("measure", self.rest, self.dense, codes=codes, directions=directions, loss=self.compared() + coded * KEPT_LOGITS_BYTES)

    def measure_streamed(self) -> Phase:
        """Return the peak of measuring the curve with one block in memory."""
        window = float(self.s) * self.tokens * max(block.width for block in self.blocks) * STREAMED_SIZES
        codes = self.block() / self.s * (self.recipe.code != "ranks")
        directions = max(float(self.s) * sum(layer.K * (layer.M + layer.N) for layer in block.layers) for block in self.blocks)
        directions *= self.recipe.code != "bits"
        hidden = max(STREAMED_HIDDEN, window) * (1 + 1 / STREAMED_SIZES)  # those of one size are there twice
        start = Phase("measure", self.rest, self.block(), codes=codes, activations=hidden, loss=self.compared(), streamed=True)
        return replace(start, directions=directions, transient=max(2 * self.block(), directions))

    def compared(self) -> float:
        """Return the bytes of the logits of two models on one window, and of a chunk of them in the accumulation dtype."""
        return 2.0 * self.s * self.logits + 4 * self.wide * min(self.logits, CHUNK)

    def coded_at_once(self) -> float:
        """Return the bytes to code layers, one per thread on a CPU, and of finished codes there."""
        each = sorted((self.coding(layer) for layer in self.layers), reverse=True)
        return sum(each[: torch.get_num_threads()]) + self.unsaved() if self.cpu else each[0]

    def coding(self, layer: _Layer) -> float:
        """Return the bytes to code one layer (`acip.coding.coded_model.code_layer`)."""
        MN, NN = layer.M * layer.N, layer.N**2
        together = MN * min(VERSIONS, max(1, (CODED_AT_ONCE_CPU if self.cpu else CODED_AT_ONCE) // MN))
        weights = MN * (1 + (self.s != 4))  # in float32, and in the order of coding
        block = 2 * together * min(1.0, CODING_BLOCK / layer.N)
        return 4.0 * max(4 * NN + MN, 3 * NN + weights + MN + max(5 * together + block, 4 * together + 4 * MN))

    def unsaved(self) -> float:
        """Return the bytes of finished codes in memory."""
        each = [VERSIONS * CODED_BYTES * layer.M * layer.N for layer in self.layers]
        return min(sum(each), UNSAVED_CODES + max(each))

    def parametrize(self) -> Phase:
        """Return the peak of parametrization: summing moments, solving layers, or the end, when 4-bit layers also exist in full."""
        recipe, s, w, frozen = self.recipe, self.s, self.wide, self.start("parametrize")
        dense = self.dense / self.workers
        fisher = recipe.basis == "fisher"
        moments = self.moment_bytes(self.layers)
        group = min(1.0, COVARIANCES / max(1.0, moments))  # share of the layers that are solved at once
        widest = max(max(4 * s, s + w) * layer.N + 3 * s * layer.M for layer in self.layers)
        forward = widest * recipe.seq_len if moments else 0.0
        solved = group * s * sum(layer.K * layer.M for layer in self.layers)
        gathered = group * self.dense / self.workers if self.workers > 1 else 0.0
        unsolved = (1 - group) * frozen.directions
        start = replace(frozen, originals=dense, directions=unsolved, trainable=self.masks + self.A + self.B)
        built = frozen.originals + (dense if self.four_bit and not self.cpu else 0.0)
        copies = solved if self.four_bit or self.workers > 1 else 0.0
        coordinates = max(
            (8.0 if fisher else float(w)) * (3 * layer.M * layer.N + 2 * layer.K * (layer.M + layer.N)) for layer in self.layers
        )
        at_loss = self.activations("scores")[0] if fisher else 0.0
        phases = (
            replace(start, activations=at_loss, loss=12.0 * self.logits * fisher, transient=group * moments),
            replace(start, transient=group * moments + max(forward, gathered + solved + self.solving(self.layers))),
            replace(start, originals=built, directions=frozen.directions, transient=copies + coordinates),
        )
        return max(phases, key=lambda phase: phase.total)

    def parametrize_streamed(self) -> Phase:
        """Return the peak of parametrization with one block in memory: of its passes, or while the layers of a block are solved."""
        recipe, s, w, fisher = self.recipe, self.s, self.wide, self.recipe.basis == "fisher"
        moments = []
        for block in (block for block in self.blocks if block.layers):
            layers = block.layers
            C = w * sum(layer.moment for layer in layers) * (recipe.basis != "svd")
            G = float(w * sum(layer.K**2 for layer in layers) * fisher)
            directions = float(s * sum(layer.K * (layer.M + layer.N) for layer in layers))
            solved = s * sum(layer.K * layer.M for layer in layers)
            coordinates = max((8.0 if fisher else w) * (3 * layer.M * layer.N + 2 * layer.K * (layer.M + layer.N)) for layer in layers)
            widest = max(max(4 * s, s + w) * layer.N + 3 * s * layer.M for layer in layers)
            forward = self.hidden() + widest * recipe.seq_len if C else 0.0
            start = Phase("parametrize", self.rest, self.block(), trainable=self.A + self.B, streamed=True)
            at_loss, backward = self.differentiated(start)
            moments += [at_loss, replace(backward, statistics=2 * G)] if fisher else []
            moments += [
                replace(start, statistics=C, activations=forward),
                replace(start, statistics=C + G, transient=solved + self.solving(layers)),
                replace(
                    start, statistics=C + G, directions=directions, transient=solved + max(coordinates, directions)
                ),  # a copy is written
            ]
        return max(moments, key=lambda phase: phase.total)

    def scores_streamed(self) -> Phase:
        """Return the peak of the scores with one block in memory: at the loss, in its backward pass, or while its directions are sorted."""
        directions = max(float(self.s) * sum(layer.K * (layer.M + layer.N) for layer in block.layers) for block in self.blocks)
        start = Phase("scores", self.rest, self.block(), directions=directions, trainable=self.A + self.B, streamed=True)
        at_loss, backward = self.differentiated(start)
        moments = (at_loss, replace(backward, transient=self.flow("scores")), replace(start, transient=directions))  # a copy is written
        return max(moments, key=lambda phase: phase.total)

    def solving(self, layers: list[_Layer]) -> float:
        """Return the bytes of the layers that are solved at once: a stack on an accelerator, one layer per thread on a CPU."""
        if self.cpu:
            threads = torch.get_num_threads()
            return sum(sorted((self.solve(layer) for layer in layers), reverse=True)[:threads])
        alike = Counter((layer.M, layer.N) for layer in layers)
        stacked = {(M, N): min(count, max(1, STACK // max(M, N) ** 2)) for (M, N), count in alike.items()}
        return max(self.solve(layer) * stacked[layer.M, layer.N] for layer in layers)

    def solve(self, layer: _Layer) -> float:
        """Return the bytes to solve one layer (`acip.calibration.bases.basis`), in float64, which it may need."""
        M, N, K, w = layer.M, layer.N, layer.K, self.wide
        C = 0 if self.recipe.basis == "svd" else (M if M < N and not layer.bias else N) ** 2
        weights = (self.s + w * (self.s < w)) * M * N + w * C  # stacked, in the accumulation dtype
        tall = w * (M * N + K * K) * (M > N)  # QR
        energy = 8 * (3 * C + 2 * K * N) + 8 * (4 * K * K + M * N) * (self.recipe.basis == "fisher")
        return float(weights + tall + max(energy, 8 * 5 * K * K))

    def step(self, phase: str, distill_weight: float, trainable: float, gradients: float, optimizer: float) -> Phase:
        """Return the peak of a step: at the loss, or in the backward pass of the first or the last block that it reaches."""
        at_loss, block = self.activations(phase)
        before = gradients * (self.recipe.gradient_accumulation_steps > 1)
        L, s, w = self.logits, self.s, self.wide
        chunk = float(w) * min(4 * L, 6 * CHUNK)
        divergence = 3 * s * L + chunk if distill_weight else 0.0  # logits of the model, of the base model, and the gradient
        entropy = max((3 if distill_weight else 1) * s + 2 * w, s * (distill_weight > 0) + 3 * w) * L if distill_weight < 1 else 0.0
        kernels = KERNELS * (self.cpu and s == 2 and phase == "post-tune")
        start = replace(self.start(phase), trainable=trainable, gradients=before, optimizer=optimizer, transient=kernels)
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
        """Return the transient bytes of a layer's backward pass: gradients, scores, weights dequantized or gathered from workers."""
        largest = max(layer.M * layer.N for layer in self.layers)
        weights = (4 + self.s) * largest if self.four_bit else 2 * self.s * largest if self.workers > 1 else 0
        numbers = self.s + 3 * self.wide * (phase == "scores")
        return weights + self.tokens * max(2 * self.s * (layer.M + layer.N) + numbers * layer.K for layer in self.layers)

    # activations

    def activations(self, phase: str) -> tuple[float, float]:
        """Return the bytes that autograd keeps at the loss, and those of the largest block (recomputed with checkpointing)."""
        blocks = [sum(self.kept(layer, phase) for layer in block.layers) + self.around(block) for block in self.blocks]
        if not self.recipe.gradient_checkpointing:
            return self.last_norm + sum(blocks), max(blocks)
        inputs = float(sum(block.width for block in self.blocks))
        if phase == "scores":  # the hooks of Fisher scores keep the inputs of the layers
            inputs += sum(layer.N * layer.share for layer in self.layers if layer.source != "sibling")
        return self.last_norm + self.s * self.tokens * inputs, max(blocks)

    def around(self, block: _Block) -> float:
        """Return the bytes that autograd keeps of a block beside its target layers."""
        return self.tokens * (self.s * block.numbers + 4 * block.float32)

    def kept(self, layer: _Layer, phase: str) -> float:
        """Return the bytes that autograd keeps of one layer. An adapter with dropout keeps a copy of its input, and the dropout mask."""
        recipe, s, R = self.recipe, self.s, self.recipe.adapter_rank
        x = float(s * layer.N * (layer.source == "own"))
        if phase == "scores":
            return x * layer.share * self.tokens
        dropped = s + (s if self.cpu else 1)  # bytes per number of a dropout: the copy and its mask
        pruning, factors = phase == "prune", recipe.adapter == "factors"
        k = layer.K if pruning else self.rank(layer)
        per_token = s * k * pruning  # the product with the mask
        if R:
            per_token += dropped * layer.N if recipe.adapter_dropout else x
            per_token += s * R * (1 + factors)
            per_token += factors * k * (dropped if recipe.adapter_dropout else s)
        casts = R * (layer.N + layer.M + 2 * layer.K * factors) * s if s < 4 else 0
        return per_token * layer.share * self.tokens + casts

    def rank(self, layer: _Layer) -> float:
        """Return the largest rank of a layer in post-tuning."""
        M, N, recipe = layer.M, layer.N, self.recipe
        size = recipe.stop_ratio if recipe.post_tune == "stop" else 1.0
        if recipe.storage == "factors":
            return size * M * N / (M + N)
        return (M + N - math.sqrt((M + N) ** 2 - 4 * size * M * N)) / 2


def statistics_bytes(M: int, N: int) -> int:
    """Return the bytes of the statistics of a layer M x N (`acip.coding.statistics.LayerStatistics`)."""
    return 4 * (N**2 + M)


def _block_names(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the names of the elements of the outermost ModuleLists that contain target layers."""
    last = ""
    for name, module in model.named_modules():
        inner = last and name.startswith(last)
        if isinstance(module, nn.ModuleList) and not inner and any(key.startswith(f"{name}.") for key in linears):
            last = f"{name}."
            yield from (f"{name}.{i}" for i in range(len(module)))
