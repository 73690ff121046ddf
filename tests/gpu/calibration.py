"""Part 2: how fast a calibration of Llama-7B's shape is, how much memory it takes, and the paper's algorithm to the letter beside it.

Seconds, tokens/s, the share of the measured matmul peak, and the peak memory beside the prediction of acip.calibration.memory_plan.
FLOPs are those of linear layers and head: 2 x tokens x numbers multiplied, once forward, once for the gradients of the inputs, once
more for those of the adapters.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from acip.calibration.loop import Calibration, Loop, calibrate, training
from acip.calibration.losses import next_token
from acip.calibration.memory_plan import Memory, predict
from acip.calibration.parametrize import parametrize
from acip.calibration.state import CalibrationState, StepReport
from acip.data import TokenBatches
from acip.layers.targets import find_linears, targets, weight_MN
from acip.recipe import Recipe
from acip.sizing.cut_table import Budget
from acip.sizing.model_sizes import set_size
from tests.benchmarks import literal
from tests.benchmarks.sides import head, literal_multiplied, ours_multiplied
from tests.gpu.report import Report, Row
from tests.gpu.scale import (
    QuickBases,
    Scale,
    free,
    matmul_peak,
    parametrize_quickly,
    peak,
    random_llama,
    reset_peak,
    seconds,
    settle,
    text_windows,
)

REAL_BASES_S = 75.0  # of 190: where finding all bases would take longer, the basis is one that costs nothing


class Batches:
    """Batches that say when they are fetched: the host is then about to run the pass over them."""

    def __init__(self, windows: Tensor, batch_size: int, fetched: Callable[[int], None]) -> None:
        self.batches, self.fetched, self.count = TokenBatches(windows, batch_size), fetched, 0

    def __getitem__(self, i: int) -> Tensor:
        self.fetched(self.count)
        self.count += 1
        return self.batches[i]


def recipe_of(scale: Scale) -> Recipe:
    return Recipe(
        sample_windows=scale.sample_windows, dtype=scale.dtype, batch_size=scale.batch, seq_len=scale.seq_len, post_tune_steps=scale.steps
    )


def run(report: Report, scale: Scale) -> None:
    recipe, windows = recipe_of(scale), text_windows(scale.seq_len, 4 * scale.batch)
    top = 0.0
    with report.row("matmul peak") as row:
        top = matmul_peak(scale)
        row.show(f"{top / 1e12:.0f} TFLOP/s", f"{scale.dtype}, {scale.matmul} x {scale.matmul}, random data", flop_per_s=top)
    block_s = [float("inf")]
    with report.row("parametrization of one block") as row:
        block_s[0] = one_block(row, recipe, windows, scale)
    free(scale)
    ours = Ours(scale, recipe, windows, top)
    ours.run(report, block_s[0])
    del ours.model
    free(scale)
    with report.row("the paper's algorithm to the letter, the same batches") as row:
        literal_side(row, ours)
    free(scale)
    if scale.larger:
        with report.row("13B's shape with gradient checkpointing") as row:
            larger(row, report, ours)
        free(scale)
    with report.row("SVD of one layer, float32") as row:
        svd(row, report, ours, block_s[0])


def one_block(row: Row, recipe: Recipe, windows: Tensor, scale: Scale) -> float:
    """Return the seconds that the bases of one block take, once everything is warm."""
    taken = []
    for layers in (1, 2):  # the first one loads cuSOLVER
        model = random_llama({**scale.llama, "num_hidden_layers": layers}, scale)
        taken.append(seconds(scale, partial(parametrize, model, recipe, windows)))
        del model
        free(scale)
    per_block = taken[1] / 2
    blocks = LlamaConfig(**scale.llama).num_hidden_layers
    row.show(f"{per_block:.2f} s", f"{blocks} blocks: {per_block * blocks:.0f} s", seconds=per_block)
    return per_block


class Ours:
    """One calibration of ours, watched, and the same post-tuning as the paper's after it."""

    def __init__(self, scale: Scale, recipe: Recipe, windows: Tensor, top: float) -> None:
        self.scale, self.recipe, self.windows, self.top = scale, recipe, windows, top
        self.tokens = scale.batch * scale.seq_len
        self.model: Any = None
        self.step_s = float("nan")  # of the same post-tuning
        self.peak: float | None = None

    def run(self, report: Report, block_s: float) -> None:
        scale, recipe = self.scale, self.recipe
        self.model = random_llama(scale.llama, scale)
        dense = head(self.model) + sum(weight_MN(linear).numel() for linear in find_linears(self.model).values())
        memory = predict(self.model, recipe)
        free(scale)
        reset_peak(scale)
        real = block_s * len(self.model.model.layers) <= min(REAL_BASES_S, report.left() - 60)
        with report.row("parametrization") as row:
            find = (lambda: parametrize(self.model, recipe, self.windows)) if real else (lambda: parametrize_quickly(self.model, recipe))
            taken = seconds(scale, find)
            row.show(f"{taken:.1f} s", "" if real else "random bases: the real ones would take too long here", seconds=taken, real=real)
            if real:
                beside_prediction(row, memory, "parametrize", peak(scale))
        with report.row("post-tuning, default recipe") as tuned, report.row("Fisher scores") as scores:
            calibration = self.watched(scores, tuned, memory, dense)
        with report.row("post-tuning as the paper does") as row:
            self.same_post_tuning(row, calibration)

    def watched(self, scores: Row, tuned: Row, memory: Memory, dense: int) -> Calibration:
        """Run scores and post-tuning, and tell the time, the speed and the memory of each."""
        scale, recipe = self.scale, self.recipe
        passes = -(-recipe.sample_windows // recipe.batch_size)
        multiplied: list[tuple[int, int]] = []
        starts: list[float] = []
        peaks: list[float | None] = []

        def fetched(count: int) -> None:
            multiplied.append(ours_multiplied(self.model))
            if count in (0, passes):
                if count:
                    peaks.append(peak(scale))
                reset_peak(scale)
                starts.append(seconds_now(scale))

        calibration = calibrate(self.model, Batches(self.windows, recipe.batch_size, fetched), recipe)
        end = seconds_now(scale)
        peaks.append(peak(scale))
        if scale.cuda:
            self.peak = max(p for p in peaks if p is not None)
        flop = [2 * self.tokens * (2 * (frozen + head(self.model)) + 3 * trained) for frozen, trained in multiplied]
        teacher = 2 * self.tokens * dense
        speed(scores, sum(flop[:passes]), passes * self.tokens, starts[1] - starts[0], self.top)
        speed(tuned, sum(flop[passes:]) + recipe.post_tune_steps * teacher, recipe.post_tune_steps * self.tokens, end - starts[1], self.top)
        for row, phase, found in ((scores, "scores", peaks[0]), (tuned, "post-tune", peaks[1])):
            beside_prediction(row, memory, phase, found)
        losses = [step.loss for step in calibration.history]
        tuned.numbers["losses"] = losses
        tuned.require(all(map(math.isfinite, losses)), tuned.value, tuned.beside)
        return calibration

    def same_post_tuning(self, row: Row, calibration: Calibration) -> None:
        """The paper's post-tuning: next-token loss at the stop size, without the base model as a teacher."""
        scale, recipe = self.scale, replace(self.recipe, distill_weight=0.0, post_tune="stop")
        cut = calibration.table.cut(Budget(recipe.stop_ratio, recipe.convention))
        set_size(targets(self.model), cut)
        state = CalibrationState.tuning(self.model, calibration.scores, recipe)
        batches = TokenBatches(self.windows, recipe.batch_size)
        loop = Loop.of(self.model, batches, recipe, next_token, calibration.scores.score.device, None)
        frozen, trained = ours_multiplied(self.model)
        settle(scale)
        reset_peak(scale)
        with training(self.model, recipe):
            taken = seconds(scale, lambda: loop.post_tune(state, lambda: recipe.stop_ratio, nobody))
        self.step_s = taken / recipe.post_tune_steps
        flop = 2 * self.tokens * (2 * (frozen + head(self.model)) + 3 * trained) * recipe.post_tune_steps
        speed(row, flop, self.tokens * recipe.post_tune_steps, taken, self.top)
        row.beside += f", at size {cut.sizes['linear']:.2f}"


def nobody(reports: list[StepReport], state: CalibrationState) -> None:
    """Observe nothing."""


def seconds_now(scale: Scale) -> float:
    """Return the time at which the device is done with what it was asked."""
    settle(scale)
    return time.perf_counter()


def speed(row: Row, flop: float, tokens: float, taken: float, top: float) -> None:
    share = flop / taken / top if top else float("nan")
    row.show(f"{taken:.2f} s, {tokens / taken:,.0f} tokens/s", f"{share:.0%} of the matmul peak", seconds=taken, flop=flop, share=share)


def beside_prediction(row: Row, memory: Memory, phase: str, found: float | None) -> None:
    """Add the peak memory to a row, beside what acip.calibration.memory_plan predicted for this phase."""
    predicted = {part.name: part.total for part in memory.phases}[phase]
    row.numbers |= {"peak_bytes": found, "predicted_bytes": predicted}
    if found is not None:
        row.value += f"; {found / 1e9:.1f} GB at most"
        row.beside += f"{', ' if row.beside else ''}predicted {predicted / 1e9:.1f} GB ({predicted / found:.2f} of it)"


# ---- the other side, the larger model, the SVD


def literal_side(row: Row, ours: Ours) -> None:
    """As many steps of the paper's algorithm on as many tokens: every direction is multiplied in every step, before and after the stop."""
    scale, recipe = ours.scale, ours.recipe
    model = random_llama(scale.llama, scale)
    free(scale)
    reset_peak(scale)
    try:
        basis = QuickBases()  # the SVD of a large model takes minutes, and the speed of the steps does not depend on it
        with patch.object(torch.linalg, "svd", lambda W_MN, full_matrices: SimpleNamespace(U=basis(W_MN))):
            layers = literal.parametrize(model, recipe.adapter_rank, recipe.adapter_alpha)
        frozen, trained = literal_multiplied(layers)
        marks: list[float] = []

        def fetched(count: int) -> None:
            if count == 2:  # the first two load kernels
                marks.append(seconds_now(scale))

        batches = Batches(ours.windows, scale.batch, fetched)
        literal.calibrate(
            model, layers, batches, lr=recipe.lr, lambda_=recipe.lambda_start, lambda_factor=recipe.lambda_factor,
            lambda_interval=recipe.lambda_interval, stop_ratio=1.0, post_tune_steps=scale.steps - 1,
        )  # fmt: skip
        taken = seconds_now(scale) - marks[0]
    except torch.OutOfMemoryError as error:
        row.show("it does not fit on this GPU", str(error).splitlines()[0][:120])
        return
    steps = scale.steps - 2
    flop = 2 * ours.tokens * (2 * (frozen + head(model)) + 3 * trained) * steps
    speed(row, flop, ours.tokens * steps, taken, ours.top)
    found = peak(scale)
    ratio = taken / steps / ours.step_s
    row.beside += f"; a step takes {ratio:.2f} times as long as ours at its stop size"
    row.numbers |= {"ratio": ratio, "peak_bytes": found}
    if found is not None and ours.peak is not None:
        row.value += f"; {found / 1e9:.1f} GB at most"
        row.beside += f"; ours took {ours.peak / found:.2f} of its memory"


def larger(row: Row, report: Report, ours: Ours) -> None:
    scale, recipe = ours.scale, replace(ours.recipe, gradient_checkpointing=True, post_tune_steps=max(4, ours.scale.steps // 4))
    if scale.cuda and report.left() < 45:
        row.show(f"left out: {report.left():.0f} s are left")
        return
    with torch.device("meta"):
        shapes: Any = LlamaForCausalLM(LlamaConfig(**scale.larger))
    memory = predict(shapes.to(scale.torch_dtype), recipe, scale.device)
    tuning = next(phase.total for phase in memory.phases if phase.name == "post-tune")
    if scale.cuda and 1.05 * tuning > torch.cuda.mem_get_info()[0]:
        row.show(f"left out: it needs {tuning / 1e9:.0f} GB, and {torch.cuda.mem_get_info()[0] / 1e9:.0f} are free")
        return
    model = random_llama(scale.larger, scale)
    parametrize_quickly(model, recipe)
    free(scale)
    marks: list[float] = []
    passes = -(-recipe.sample_windows // recipe.batch_size)

    def fetched(count: int) -> None:
        if count == passes:
            reset_peak(scale)
            marks.append(seconds_now(scale))

    calibration = calibrate(model, Batches(ours.windows, recipe.batch_size, fetched), recipe)
    taken = seconds_now(scale) - marks[0]
    row.show(f"{taken / len(calibration.history):.2f} s a step, {ours.tokens * len(calibration.history) / taken:,.0f} tokens/s")
    beside_prediction(row, memory, "post-tune", peak(scale))


def svd(row: Row, report: Report, ours: Ours, block_s: float) -> None:
    """The paper's bases: the SVD of a square layer, beside all of ours of a whole block."""
    if ours.scale.cuda and report.left() < 30:
        row.show(f"left out: {report.left():.0f} s are left")
        return
    model = random_llama({**ours.scale.llama, "num_hidden_layers": 1}, ours.scale)
    linear: nn.Linear = model.model.layers[0].self_attn.q_proj
    taken = seconds(ours.scale, lambda: torch.linalg.svd(linear.weight.detach().float(), full_matrices=False))
    row.show(f"{taken:.2f} s for {tuple(linear.weight.shape)}", f"ours: {block_s:.2f} s for all seven layers of a block", seconds=taken)
