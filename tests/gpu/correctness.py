"""Part 1: correctness of the product on this device, with the small trained model of tests/golden, in float32 and float64."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from acip_platform.serve.engine.sampling import Sampler, SamplingParams, sample
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from acip.artifact.artifact import Artifact
from acip.base import Base, load_base
from acip.calibration.activation_covariance import activation_covariances
from acip.calibration.bases import accuracy, solve
from acip.calibration.block_pass import PassFiles
from acip.calibration.loop import Calibration, calibrate, trial_step
from acip.calibration.parametrize import parametrize, restore
from acip.calibration.state import CalibrationState, StepReport
from acip.coding.block_statistics import block_statistics
from acip.coding.coded_model import CodedLayer, code_layers, step_scales
from acip.coding.statistics import LayerStatistics
from acip.data import TokenBatches
from acip.export.quantization import quantized
from acip.layers.adapters import LoRA
from acip.layers.block_chain import BlockChain
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.mixed_sizes import Mixer, Size
from acip.layers.targets import find_linears, targets, weight_MN
from acip.recipe import Recipe
from acip.sizing.cut_table import Budget
from acip.sizing.model_sizes import cut_table, set_size
from tests.gpu.golden import replay, same_result
from tests.gpu.report import Report, Row
from tests.gpu.scale import Scale, random_llama, text_windows
from tests.support.small import GOLDEN, write_small_base

RECIPE = Recipe(
    sample_windows=32, adapter_rank=4, adapter_alpha=4.0, dtype="float32", batch_size=4, seq_len=64, lr=3e-3, lambda_factor=1.3,
    lambda_interval=2, post_tune_steps=12, scores="order",
)  # fmt: skip
RATIOS = (1.0, 0.8, 0.6, 0.4)


class KilledError(Exception):
    """The exception that stops a calibration at a given step."""


class Small:
    """The small model and its text on the device, shared by all checks."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        self.scale, self.folder = scale, folder
        self.source = str(write_small_base(folder / "base"))
        self.windows = load_file(GOLDEN / "batches.safetensors")["batches"][:256].long()
        self.tokens = load_file(GOLDEN / "probe.safetensors")["probe"].long().to(scale.device)

    def base(self, recipe: Recipe = RECIPE) -> Base:
        """Load the base model, parametrized by `recipe`, on the device."""
        base = load_base(self.source, recipe.dtype)
        base.model.to(self.scale.device)  # type: ignore[arg-type]
        parametrize(base.model, recipe, self.windows)
        return base

    def calibrated(self, recipe: Recipe = RECIPE, **options: Any) -> tuple[Base, Calibration]:
        base = self.base(recipe)
        return base, calibrate(base.model, TokenBatches(self.windows, recipe.batch_size), recipe, **options)

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=self.tokens.to(model.device)).logits
        return logits


def run(report: Report, scale: Scale) -> None:
    for dtype in ("float64", "float32"):
        with report.row(f"golden replay in {dtype}") as row:
            replay(row, scale, dtype)
    with tempfile.TemporaryDirectory() as folder, deterministic():
        small = Small(scale, Path(folder))
        checks: dict[str, Callable[[Row, Small], None]] = {
            "size 1.0 is the base model, bit for bit": full_size,
            "a resumed calibration equals a straight one, bit for bit": resumed,
            "the sync interval does not change the result": sync_interval,
            "cuts equal those of the CPU and never exceed the budget": cuts,
            "an artifact saved and loaded": artifact,
            "materialized models compute the same logits as the resident model": materialized,
            "mixed sizes equal single sizes": mixed_sizes,
            "gradient checkpointing changes nothing": recomputed,
            "bases solved in batches are as accurate as on the CPU": bases,
            "8-bit matrices equal those of the CPU": eight_bit,
            "codes are as good as those of the CPU": codes,
            "sampled tokens equal those of the CPU": sampled,
        }
        for name, check in checks.items():
            with report.row(name) as row:
                check(row, small)
    with report.row("a calibration in bfloat16 gives finite logits") as row, tempfile.TemporaryDirectory() as folder:
        sixteen_bit(row, Small(scale, Path(folder)))


@contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic kernels in the body, so that equal inputs give equal bits."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def close(row: Row, what: str, actual: Tensor, expected: Tensor, limit: float) -> None:
    """Require that two tensors differ by at most `limit` times the largest absolute value. They may be on different devices."""
    error = float((actual.double().cpu() - expected.double().cpu()).abs().max() / expected.double().abs().max().cpu())
    if not error <= limit:  # this also refuses NaN
        row.require(False, f"{what}: {error:.1e}", f"at most {limit:.0e}")
        return
    worst = max(error, row.numbers.get("worst", 0.0))
    row.numbers["worst"] = worst
    row.require(True, f"differs by {worst:.1e}", f"at most {limit:.0e}")


# ---- the checks


def full_size(row: Row, small: Small) -> None:
    plain = small.logits(load_base(small.source, "float32").model.to(small.scale.device))  # type: ignore[arg-type]
    base, calibration = small.calibrated()
    for core in targets(base.model).values():
        assert isinstance(core, ElasticLinear)
        core.set_rank(None)
    row.require(torch.equal(small.logits(base.model), plain), "the calibrated model at full rank")
    elastic = Artifact.save(small.folder / "full", base, calibration, {}).load(small.scale.device)
    elastic.resize(1.0)
    row.require(torch.equal(small.logits(elastic.model), plain), "equal")
    restore(base.model)
    row.require(torch.equal(small.logits(base.model), plain), "equal: calibrated, loaded from the artifact, restored")


def resumed(row: Row, small: Small) -> None:
    _, straight = small.calibrated()
    for kill_step in (8, straight.stop_step + 6):
        folder = small.folder / f"state-{kill_step}"
        folder.mkdir()

        def kill_at_step(reports: list[StepReport], state: CalibrationState, kill_step: int = kill_step, folder: Path = folder) -> None:
            if state.step >= kill_step:
                state.save(folder)
                raise KilledError

        with suppress(KilledError):
            small.calibrated(observe=kill_at_step)
        _, again = small.calibrated(resume=folder)
        equal = same_result(again, straight) and same_adapters(again, straight)
        first = next((actual.step for actual, expected in zip(again.history, straight.history, strict=False) if actual != expected), None)
        row.require(equal, f"killed at {kill_step} of {len(straight.history)} steps" + ("" if equal else f", diverges at step {first}"))


def sync_interval(row: Row, small: Small) -> None:
    _, every_step = small.calibrated(look_every=1)
    for every in (2, 4):
        _, every_few_steps = small.calibrated(look_every=every)
        row.require(
            same_result(every_step, every_few_steps) and same_adapters(every_step, every_few_steps),
            f"sync every 1, 2, 4 steps; stop at {every_step.stop_step}",
        )


def same_adapters(first_run: Calibration, second_run: Calibration) -> bool:
    second_layers = targets(second_run.model)
    pairs: list[tuple[LoRA, LoRA]] = [
        (lora, second_layers[name].loras[key]) for name, core in targets(first_run.model).items() for key, lora in core.loras.items()
    ]
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True))


def cuts(row: Row, small: Small) -> None:
    base, calibration = small.calibrated()
    scores = calibration.scores
    on_cpu = replace(scores, score=scores.score.cpu(), crossing=scores.crossing.cpu())
    row.require(torch.equal(scores.removal_order().cpu(), on_cpu.removal_order()), "removal order")
    table = cut_table(base.model, on_cpu, calibration.recipe)
    for ratio in RATIOS:
        actual, expected = calibration.table.cut(Budget(ratio)), table.cut(Budget(ratio))
        row.require(actual == expected and actual.got <= ratio, f"sizes {', '.join(map(str, RATIOS))}")


def artifact(row: Row, small: Small) -> None:
    base, calibration = small.calibrated()
    saved = Artifact.save(small.folder / "saved", base, calibration, {})
    on_device, on_cpu = saved.load(small.scale.device), saved.load("cpu")
    for ratio in RATIOS:
        cut = on_device.resize(ratio)
        on_cpu.resize(ratio)
        set_size(targets(base.model), cut)
        close(row, f"calibrated against loaded, {ratio}", small.logits(on_device.model), small.logits(base.model), 1e-4)
        close(row, f"loaded on the device against the CPU, {ratio}", small.logits(on_device.model), small.logits(on_cpu.model), 1e-4)
    for (name, actual), expected in zip(on_device.model.state_dict().items(), on_cpu.model.state_dict().values(), strict=True):
        if not torch.equal(actual.cpu(), expected):
            row.require(False, f"{name} differs from the saved tensor")


def materialized(row: Row, small: Small) -> None:
    for storage in ("pivot", "factors"):
        base, calibration = small.calibrated(replace(RECIPE, storage=storage))
        elastic = Artifact.save(small.folder / storage, base, calibration, {}).load(small.scale.device)
        for ratio in RATIOS:
            elastic.resize(ratio)
            close(row, f"{storage}, {ratio}", small.logits(elastic.materialize()), small.logits(elastic.model), 1e-3)


def mixed_sizes(row: Row, small: Small) -> None:
    base, calibration = small.calibrated()
    elastic = Artifact.save(small.folder / "mixed", base, calibration, {}).load(small.scale.device)
    cuts = [elastic.table.cut(Budget(ratio)) for ratio in RATIOS]
    mixer = Mixer(elastic.layers)
    for counts in ((1, 1, 1, 1), (3, 1, 20, 2), (40, 1, 1, 30)):
        runs = [(Size(cut.key, cut.ranks), count) for cut, count in zip(cuts, counts, strict=True)]
        for name, layer in elastic.layers.items():
            x = torch.randn(1, sum(counts), layer.right.values.shape[1], device=small.scale.device)
            alone, start = [], 0
            mixer.clear()
            for size, count in runs:
                layer.set_rank(size.ranks[name])
                alone.append(layer(x[:, start : start + count]))
                start += count
            mixer.set(runs)
            close(row, f"{name}, {counts}", layer(x), torch.cat(alone, 1), 1e-4)
    mixer.clear()


def recomputed(row: Row, small: Small) -> None:
    batches = TokenBatches(small.windows, RECIPE.batch_size)
    losses = [trial_step(small.base(recipe).model, batches, recipe) for recipe in (RECIPE, replace(RECIPE, gradient_checkpointing=True))]
    row.require(losses[0] == losses[1], f"loss {losses[0]:.6f} and {losses[1]:.6f}")
    _, kept = small.calibrated()
    _, again = small.calibrated(replace(RECIPE, gradient_checkpointing=True))
    row.require(same_result(kept, again), f"{len(kept.history)} equal steps")


def bases(row: Row, small: Small) -> None:
    """Compare bases solved in float32 by their worst error above the optimum, as a fraction of the energy of the layer."""
    hidden, intermediate = small.scale.basis
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
    model = random_llama(shape, replace(small.scale, dtype="float32"))
    linears = find_linears(model)
    C = activation_covariances(model, linears, text_windows(256, 8))
    device_bases, excess = solve(linears, C), {"device": 0.0, "CPU": 0.0}
    cpu_bases = solve({name: linear.to("cpu") for name, linear in linears.items()}, {name: C_nn.cpu() for name, C_nn in C.items()})
    for side, solved in (("device", device_bases), ("CPU", cpu_bases)):
        for name, directions in solved.items():
            result = accuracy(weight_MN(linears[name]), C[name].cpu(), directions.cpu())
            excess[side] = max(excess[side], float(result.excess.max()))
            row.require(
                result.orthonormality < 1e-4, f"{side} {name}: deviates from orthonormal by {result.orthonormality:.1e}", "at most 1e-4"
            )
    limit = max(1e-5, 3 * excess["CPU"])
    row.require(
        excess["device"] <= limit, f"error above the optimum {excess['device']:.1e}, on the CPU {excess['CPU']:.1e}", f"at most {limit:.0e}"
    )


def eight_bit(row: Row, small: Small) -> None:
    model = load_base(small.source, "float32").model
    for linear in find_linears(model).values():
        on_cpu = quantized(linear, "int8").dequantized(torch.float32)
        on_device = quantized(linear.to(small.scale.device), "int8").dequantized(torch.float32)
        close(row, "int8", on_device, on_cpu, 1e-2)  # allows one step of 127, for different rounding


def codes(row: Row, small: Small) -> None:
    """Compare statistics that are gathered a block at a time, and the bytes and predicted losses of codes."""
    rates = (2.0, 4.0, 6.0)
    sides: list[tuple[Mapping[str, LayerStatistics], dict[str, CodedLayer]]] = []
    for device in ("cpu", small.scale.device):
        model = load_base(small.source, "float32").model.requires_grad_(False)
        linears, files = find_linears(model), PassFiles(small.folder / f"pass-{len(sides)}")
        statistics = block_statistics(BlockChain(model), linears, small.windows[:8], files, device)
        scales = step_scales(linears, statistics, rates, torch.device(device))
        sides.append((statistics, dict(code_layers(linears, statistics, scales, torch.device(device)))))
    (expected_statistics, expected), (found, coded) = sides
    worst = {"bytes": 0.0, "loss": 0.0}
    for name, layer in coded.items():
        close(row, f"metric of {name}", found[name].metric, expected_statistics[name].metric, 1e-3)
        close(row, f"importance of {name}", found[name].importance, expected_statistics[name].importance, 1e-3)
        for actual, reference in zip(layer.facts, expected[name].facts, strict=True):
            worst["bytes"] = max(worst["bytes"], abs(actual.bytes / reference.bytes - 1))
            worst["loss"] = max(worst["loss"], abs(actual.loss / reference.loss - 1))
    row.numbers |= {f"worst_{name}": value for name, value in worst.items()}
    # a code at the boundary of two steps may be rounded the other way, which changes the codes after it in its row
    row.require(
        worst["bytes"] < 0.01 and worst["loss"] < 0.05, f"bytes differ by {worst['bytes']:.1%}, losses by {worst['loss']:.1%}", "1% and 5%"
    )


def sampled(row: Row, small: Small) -> None:
    logits = small.logits(load_base(small.source, "float32").model)[0].cpu()
    settings = (SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=5, logprobs=2))
    tokens_by_device = []
    for device in ("cpu", small.scale.device):
        samplers = [Sampler(settings[i % len(settings)], seed=i % len(settings)) for i in range(len(logits))]
        tokens_by_device.append([choice.token for choice in sample(logits.to(device), samplers)])
    equal = sum(a == b for a, b in zip(*tokens_by_device, strict=True))
    row.require(equal >= len(logits) - 1, f"{equal} of {len(logits)} tokens are equal")  # rounding may change one of them


def sixteen_bit(row: Row, small: Small) -> None:
    recipe = replace(RECIPE, dtype="bfloat16", scores="fisher")
    base, calibration = small.calibrated(recipe)
    elastic = Artifact.save(small.folder / "bfloat16", base, calibration, {}).load(small.scale.device)
    for ratio in RATIOS:
        elastic.resize(ratio)
        row.require(bool(small.logits(elastic.model).isfinite().all()), f"loss {calibration.history[-1].loss:.3f} at the last step")
