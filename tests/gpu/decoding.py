"""Part 3: decoding speed of exported models with Llama-7B's shape: dense, and at 0.6 and 0.4 as factors and pivots, with CUDA graphs.

Tokens/s are compared with the bound from the measured bandwidth: a step reads every weight once. `factors of 64` round ranks down to
multiples of 64, which shows the cost of ranks that do not fit the tensor cores.
"""

import statistics
from typing import Any

import torch

from tests.benchmarks.decode import Side, compressed, read_bytes
from tests.gpu.report import Report
from tests.gpu.scale import Scale, bandwidth, free, random_llama, seconds

FORMS: dict[str, tuple[str, int]] = {"factors": ("factors", 1), "pivots": ("pivot", 1), "factors of 64": ("factors", 64)}
SIZES = (0.6, 0.4)


def run(report: Report, scale: Scale) -> None:
    per_s = 0.0
    with report.row("bandwidth") as row:
        per_s = bandwidth(scale)
        row.show(f"{per_s / 1e12:.2f} TB/s", "bytes read and written by a copy", bytes_per_s=per_s)
    dense = random_llama(scale.llama, scale)
    for size in SIZES:  # one size at a time: all models and their caches do not fit into 80 GB
        models: dict[str, Any] = {"dense": dense}
        for label, (form, multiple) in FORMS.items():
            models[label] = compressed(dense, size, form, multiple if scale.cuda else min(multiple, 8))
        for batch in scale.batches:
            measure_decoding(report, scale, models, size, batch, per_s)
            free(scale)
        with report.row(f"prefill of {scale.prompt_tokens} tokens at {size}") as row:
            times = {label: prefill(scale, model) for label, model in models.items()}
            flop = 2 * scale.prompt_tokens * sum(p.numel() for p in dense.model.layers.parameters())
            found = "; ".join(f"{label} {1000 * taken:.0f} ms" for label, taken in times.items())
            row.show(found, f"dense: {flop / times['dense'] / 1e12:.0f} TFLOP/s", seconds=times)
        del models
        free(scale)


def measure_decoding(report: Report, scale: Scale, models: dict[str, Any], size: float, batch: int, per_s: float) -> None:
    """Record the tokens/s of every model, measured in alternating rounds. A model whose graph capture fails decodes without a graph."""
    steps = scale.rounds * scale.tokens_per_round + 4
    sides: dict[str, Side] = {}
    graphs = dict.fromkeys(models, scale.cuda)
    for label, model in models.items():
        with report.row(f"{label}, {size}, batch {batch}: graph capture") as row:
            try:
                sides[label] = Side(model, batch, steps, scale.cuda)
            except Exception:
                torch.cuda.synchronize()
                graphs[label] = False
                sides[label] = Side(model, batch, steps, cuda=False)
                raise
            row.show("captured as a CUDA graph" if scale.cuda else "skipped: not on CUDA")
    taken: dict[str, list[float]] = {label: [] for label in sides}
    for side in sides.values():
        side.seconds(2)
    for _ in range(scale.rounds):
        for label, side in sides.items():
            taken[label] += step_seconds(scale, side)
    base = statistics.median(taken["dense"])
    for label, side in sides.items():
        with report.row(f"{label} at {1.0 if label == 'dense' else size}, batch {batch}") as row:
            median, bound = statistics.median(taken[label]), per_s * batch / read_bytes(side.model)
            ratio = base / median
            row.show(
                f"{batch / median:,.0f} tokens/s, {ratio:.2f} times dense",
                f"bound by bandwidth {bound:,.0f}, {read_bytes(models['dense']) / read_bytes(side.model):.2f} times",
                tokens_per_s=batch / median, ratio=ratio, bound=bound, graph=graphs[label],
            )  # fmt: skip


def step_seconds(scale: Scale, side: Side) -> list[float]:
    """Return the mean seconds per step of one round. The host waits only at its end."""

    def steps() -> None:
        for _ in range(scale.tokens_per_round):
            side.step()

    return [seconds(scale, steps) / scale.tokens_per_round]


@torch.no_grad()
def prefill(scale: Scale, model: Any) -> float:
    ids = torch.randint(0, model.config.vocab_size, (1, scale.prompt_tokens), device=scale.device)
    return min(seconds(scale, lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)) for _ in range(4))
