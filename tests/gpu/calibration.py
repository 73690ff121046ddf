"""Part 2: speed and memory of a calibration of Llama-7B's shape, compared with the literal algorithm of the paper.

Rows show seconds, tokens/s, the share of the measured matmul peak, and the peak memory with its prediction by
acip.calibration.memory_plan. FLOPs count the linear layers and the head: 2 x tokens x weights for the forward pass, the same for the
gradients of the inputs, and the same for the gradients of the adapters.
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
from acip.coding.coded_model import code_layer, step_scales
from acip.coding.statistics import layer_statistics
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
    synchronize,
    text_windows,
)

MAX_BASES_S = 75.0  # of 190 s; if the real bases would take longer, QuickBases replace them


class Batches:
    """Batches with a callback before each fetch, which is when the host starts the pass over that batch."""

    def __init__(self, windows: Tensor, batch_size: int, on_fetch: Callable[[int], None]) -> None:
        self.batches, self.on_fetch, self.count = TokenBatches(windows, batch_size), on_fetch, 0

    def __getitem__(self, i: int) -> Tensor:
        self.on_fetch(self.count)
        self.count += 1
        return self.batches[i]


def recipe_of(scale: Scale) -> Recipe:
    return Recipe(
        sample_windows=scale.sample_windows, dtype=scale.dtype, batch_size=scale.batch, seq_len=scale.seq_len, post_tune_steps=scale.steps
    )


def run(report: Report, scale: Scale) -> None:
    recipe, windows = recipe_of(scale), text_windows(scale.seq_len, 4 * scale.batch)
    peak_flop_per_s = 0.0
    with report.row("matmul peak") as row:
        peak_flop_per_s = matmul_peak(scale)
        row.show(
            f"{peak_flop_per_s / 1e12:.0f} TFLOP/s",
            f"{scale.dtype}, {scale.matmul} x {scale.matmul}, random data",
            flop_per_s=peak_flop_per_s,
        )
    block_s = [float("inf")]
    with report.row("parametrization of one block") as row:
        block_s[0] = one_block(row, recipe, windows, scale)
    free(scale)
    benchmark = CalibrationBenchmark(scale, recipe, windows, peak_flop_per_s)
    benchmark.run(report, block_s[0])
    del benchmark.model
    free(scale)
    with report.row("the literal algorithm of the paper, same batches") as row:
        literal_algorithm(row, benchmark)
    free(scale)
    if scale.larger:
        with report.row("13B's shape with gradient checkpointing") as row:
            larger(row, report, benchmark)
        free(scale)
    with report.row("codes of two layers, all versions") as row:
        codes(row, report, recipe, windows, scale)
    free(scale)
    with report.row("SVD of one layer, float32") as row:
        svd(row, report, benchmark, block_s[0])


def one_block(row: Row, recipe: Recipe, windows: Tensor, scale: Scale) -> float:
    """Return the seconds to compute the bases of one block after a warm-up."""
    taken = []
    for layers in (1, 2):  # the first run loads cuSOLVER
        model = random_llama({**scale.llama, "num_hidden_layers": layers}, scale)
        taken.append(seconds(scale, partial(parametrize, model, recipe, windows)))
        del model
        free(scale)
    per_block = taken[1] / 2
    blocks = LlamaConfig(**scale.llama).num_hidden_layers
    row.show(f"{per_block:.2f} s", f"{blocks} blocks: {per_block * blocks:.0f} s", seconds=per_block)
    return per_block


class CalibrationBenchmark:
    """The benchmark of one acip calibration, followed by post-tuning as in the paper."""

    def __init__(self, scale: Scale, recipe: Recipe, windows: Tensor, peak_flop_per_s: float) -> None:
        self.scale, self.recipe, self.windows, self.peak_flop_per_s = scale, recipe, windows, peak_flop_per_s
        self.tokens = scale.batch * scale.seq_len
        self.model: Any = None
        self.step_s = float("nan")  # per step of the post-tuning as in the paper
        self.peak: float | None = None

    def run(self, report: Report, block_s: float) -> None:
        scale, recipe = self.scale, self.recipe
        self.model = random_llama(scale.llama, scale)
        dense = head(self.model) + sum(weight_MN(linear).numel() for linear in find_linears(self.model).values())
        memory = predict(self.model, recipe)
        free(scale)
        reset_peak(scale)
        use_real_bases = block_s * len(self.model.model.layers) <= min(MAX_BASES_S, report.remaining_s() - 60)
        with report.row("parametrization") as row:
            find_bases = (
                (lambda: parametrize(self.model, recipe, self.windows))
                if use_real_bases
                else (lambda: parametrize_quickly(self.model, recipe))
            )
            taken = seconds(scale, find_bases)
            row.show(
                f"{taken:.1f} s",
                "" if use_real_bases else "random bases: the real ones would take too long",
                seconds=taken,
                real=use_real_bases,
            )
            if use_real_bases:
                add_memory(row, memory, "parametrize", peak(scale))
        with report.row("post-tuning, default recipe") as tuning_row, report.row("Fisher scores") as scores_row:
            calibration = self.timed_calibration(scores_row, tuning_row, memory, dense)
        with report.row("post-tuning as in the paper") as row:
            self.paper_post_tuning(row, calibration)

    def timed_calibration(self, scores_row: Row, tuning_row: Row, memory: Memory, dense: int) -> Calibration:
        """Run the scores and the post-tuning. Record the time, speed, and memory of each."""
        scale, recipe = self.scale, self.recipe
        passes = -(-recipe.score_windows // recipe.batch_size)
        multiplied: list[tuple[int, int]] = []
        starts: list[float] = []
        peaks: list[float | None] = []

        def on_fetch(count: int) -> None:
            multiplied.append(ours_multiplied(self.model))
            if count in (0, passes):
                if count:
                    peaks.append(peak(scale))
                reset_peak(scale)
                starts.append(seconds_now(scale))

        calibration = calibrate(self.model, Batches(self.windows, recipe.batch_size, on_fetch), recipe)
        end = seconds_now(scale)
        peaks.append(peak(scale))
        if scale.cuda:
            self.peak = max(p for p in peaks if p is not None)
        flop = [2 * self.tokens * (2 * (frozen + head(self.model)) + 3 * trained) for frozen, trained in multiplied]
        teacher = 2 * self.tokens * dense
        show_speed(scores_row, sum(flop[:passes]), passes * self.tokens, starts[1] - starts[0], self.peak_flop_per_s)
        show_speed(
            tuning_row,
            sum(flop[passes:]) + recipe.post_tune_steps * teacher,
            recipe.post_tune_steps * self.tokens,
            end - starts[1],
            self.peak_flop_per_s,
        )
        for row, phase, peak_bytes in ((scores_row, "scores", peaks[0]), (tuning_row, "post-tune", peaks[1])):
            add_memory(row, memory, phase, peak_bytes)
        losses = [step.loss for step in calibration.history]
        tuning_row.numbers["losses"] = losses
        tuning_row.require(all(map(math.isfinite, losses)), tuning_row.value, tuning_row.reference)
        return calibration

    def paper_post_tuning(self, row: Row, calibration: Calibration) -> None:
        """Run the post-tuning of the paper: next-token loss at the stop size, without distillation."""
        scale, recipe = self.scale, replace(self.recipe, distill_weight=0.0, post_tune="stop")
        cut = calibration.table.cut(Budget(recipe.stop_ratio, recipe.convention))
        set_size(targets(self.model), cut)
        state = CalibrationState.tuning(self.model, calibration.scores, recipe)
        batches = TokenBatches(self.windows, recipe.batch_size)
        loop = Loop.of(self.model, batches, recipe, next_token, calibration.scores.score.device, None)
        frozen, trained = ours_multiplied(self.model)
        synchronize(scale)
        reset_peak(scale)
        with training(self.model, recipe):
            taken = seconds(scale, lambda: loop.post_tune(state, lambda: recipe.stop_ratio, ignore_reports))
        self.step_s = taken / recipe.post_tune_steps
        flop = 2 * self.tokens * (2 * (frozen + head(self.model)) + 3 * trained) * recipe.post_tune_steps
        show_speed(row, flop, self.tokens * recipe.post_tune_steps, taken, self.peak_flop_per_s)
        row.reference += f", at size {cut.sizes['linear']:.2f}"


def ignore_reports(reports: list[StepReport], state: CalibrationState) -> None:
    """Ignore the reports."""


def seconds_now(scale: Scale) -> float:
    """Return the time after all queued work on the device has finished."""
    synchronize(scale)
    return time.perf_counter()


def show_speed(row: Row, flop: float, tokens: float, taken: float, peak_flop_per_s: float) -> None:
    share = flop / taken / peak_flop_per_s if peak_flop_per_s else float("nan")
    row.show(f"{taken:.2f} s, {tokens / taken:,.0f} tokens/s", f"{share:.0%} of the matmul peak", seconds=taken, flop=flop, share=share)


def add_memory(row: Row, memory: Memory, phase: str, peak_bytes: float | None) -> None:
    """Add the peak memory of a phase to a row, with the prediction of acip.calibration.memory_plan."""
    predicted = {part.name: part.total for part in memory.phases}[phase]
    row.numbers |= {"peak_bytes": peak_bytes, "predicted_bytes": predicted}
    if peak_bytes is not None:
        row.value += f"; {peak_bytes / 1e9:.1f} GB peak"
        row.reference += f"{', ' if row.reference else ''}predicted {predicted / 1e9:.1f} GB ({predicted / peak_bytes:.2f} of the peak)"


# ---- the literal algorithm, the larger model, the SVD


def literal_algorithm(row: Row, benchmark: CalibrationBenchmark) -> None:
    """Run the literal algorithm of the paper for the same number of steps and tokens. It multiplies every direction in every step."""
    scale, recipe = benchmark.scale, benchmark.recipe
    model = random_llama(scale.llama, scale)
    free(scale)
    reset_peak(scale)
    try:
        basis = QuickBases()  # the SVD of a large model takes minutes, and the speed of the steps is independent of the basis
        with patch.object(torch.linalg, "svd", lambda W_MN, full_matrices: SimpleNamespace(U=basis(W_MN))):
            layers = literal.parametrize(model, recipe.adapter_rank, recipe.adapter_alpha)
        frozen, trained = literal_multiplied(layers)
        start_times: list[float] = []

        def on_fetch(count: int) -> None:
            if count == 2:  # the first two batches load kernels
                start_times.append(seconds_now(scale))

        batches = Batches(benchmark.windows, scale.batch, on_fetch)
        literal.calibrate(
            model, layers, batches, lr=recipe.lr, lambda_=recipe.lambda_start, lambda_factor=recipe.lambda_factor,
            lambda_interval=recipe.lambda_interval, stop_ratio=1.0, post_tune_steps=scale.steps - 1,
        )  # fmt: skip
        taken = seconds_now(scale) - start_times[0]
    except torch.OutOfMemoryError as error:
        row.show("not enough memory on this GPU", str(error).splitlines()[0][:120])
        return
    steps = scale.steps - 2
    flop = 2 * benchmark.tokens * (2 * (frozen + head(model)) + 3 * trained) * steps
    show_speed(row, flop, benchmark.tokens * steps, taken, benchmark.peak_flop_per_s)
    peak_bytes = peak(scale)
    ratio = taken / steps / benchmark.step_s
    row.reference += f"; a step takes {ratio:.2f} times as long as an acip step at the stop size"
    row.numbers |= {"ratio": ratio, "peak_bytes": peak_bytes}
    if peak_bytes is not None and benchmark.peak is not None:
        row.value += f"; {peak_bytes / 1e9:.1f} GB peak"
        row.reference += f"; acip used {benchmark.peak / peak_bytes:.2f} of this memory"


def larger(row: Row, report: Report, benchmark: CalibrationBenchmark) -> None:
    scale = benchmark.scale
    recipe = replace(benchmark.recipe, gradient_checkpointing=True, post_tune_steps=max(4, scale.steps // 4))
    if scale.cuda and report.remaining_s() < 45:
        row.show(f"skipped: only {report.remaining_s():.0f} s are left")
        return
    with torch.device("meta"):
        shapes: Any = LlamaForCausalLM(LlamaConfig(**scale.larger))
    memory = predict(shapes.to(scale.torch_dtype), recipe, scale.device)
    tuning = next(phase.total for phase in memory.phases if phase.name == "post-tune")
    if scale.cuda and 1.05 * tuning > torch.cuda.mem_get_info()[0]:
        row.show(f"skipped: it needs {tuning / 1e9:.0f} GB, and {torch.cuda.mem_get_info()[0] / 1e9:.0f} GB are free")
        return
    model = random_llama(scale.larger, scale)
    parametrize_quickly(model, recipe)
    free(scale)
    start_times: list[float] = []
    passes = -(-recipe.score_windows // recipe.batch_size)

    def on_fetch(count: int) -> None:
        if count == passes:
            reset_peak(scale)
            start_times.append(seconds_now(scale))

    calibration = calibrate(model, Batches(benchmark.windows, recipe.batch_size, on_fetch), recipe)
    taken = seconds_now(scale) - start_times[0]
    row.show(f"{taken / len(calibration.history):.2f} s a step, {benchmark.tokens * len(calibration.history) / taken:,.0f} tokens/s")
    add_memory(row, memory, "post-tune", peak(scale))


def codes(row: Row, report: Report, recipe: Recipe, windows: Tensor, scale: Scale) -> None:
    """Time the statistics of one block, and the codes of its first and its widest layer, and compare the peak with its prediction."""
    if scale.cuda and report.remaining_s() < 60:
        row.show(f"skipped: only {report.remaining_s():.0f} s are left")
        return
    model = random_llama({**scale.llama, "num_hidden_layers": 1}, scale)
    memory, linears = predict(model, replace(recipe, code="both"), scale.device), find_linears(model)
    free(scale)
    reset_peak(scale)
    start = seconds_now(scale)
    statistics = layer_statistics(model, linears, windows[:4])
    gathered = seconds_now(scale)
    chosen = {name: linears[name] for name in linears if name.endswith(("q_proj", "down_proj"))}
    scales = step_scales(chosen, statistics)
    taken = []
    for name, linear in chosen.items():
        began = seconds_now(scale)
        code_layer(linear, statistics[name], scales)
        taken.append(f"{seconds_now(scale) - began:.1f} s for {' x '.join(map(str, weight_MN(linear).shape))}")
    row.show(", ".join(taken), f"statistics of a block: {(gathered - start) / 4:.2f} s a window", statistics_s=gathered - start)
    add_memory(row, memory, "code", peak(scale))


def svd(row: Row, report: Report, benchmark: CalibrationBenchmark, block_s: float) -> None:
    """Time the SVD of one square layer, the basis of the paper, against all acip bases of one block."""
    if benchmark.scale.cuda and report.remaining_s() < 30:
        row.show(f"skipped: only {report.remaining_s():.0f} s are left")
        return
    model = random_llama({**benchmark.scale.llama, "num_hidden_layers": 1}, benchmark.scale)
    linear: nn.Linear = model.model.layers[0].self_attn.q_proj
    taken = seconds(benchmark.scale, lambda: torch.linalg.svd(linear.weight.detach().float(), full_matrices=False))
    row.show(
        f"{taken:.2f} s for {tuple(linear.weight.shape)}", f"acip bases: {block_s:.2f} s for all seven layers of a block", seconds=taken
    )
