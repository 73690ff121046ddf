"""The cost of a model (paper D.1, Table A5): bytes, peak memory, latency, tokens/s, FLOPs.

The model is measured in its exported form (`ElasticModel.materialize`). Coded layers take fewer bytes on disk than in memory. The model
decodes `batch` equal prompts greedily, after a warm-up; times are medians over `repeats`. They depend on the device, its other load, and
`batch`; FLOPs and bytes do not.

    the paper's settings: batch 64, 64 new tokens, FLOPs of 512 tokens. Its GigaFLOPs are multiply-adds / 2^30: half of these FLOPs
"""

import gc
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from acip.base import positions, require_positions
from acip.errors import EvaluationError
from acip.evaluate.measurement import Measurement, Part, Subject, label, saved_bytes, stored_bytes

LABEL_FIELDS = ("batch", "prompt", "new_tokens")  # speed depends on them; values other than the defaults are part of the label


@dataclass(frozen=True)
class Efficiency(Measurement):
    """Bytes, memory, speed and FLOPs of a model."""

    kind: ClassVar[str] = "efficiency"
    batch: int = 1  # sequences at once
    prompt: int = 128  # tokens each
    new_tokens: int = 32  # decoded per sequence
    repeats: int = 3
    flop_tokens: int = 512  # length of the sequence whose FLOPs are counted, at most the context of the model
    device: str = ""  # name of the device, if measurements on several devices must have different keys

    def __post_init__(self) -> None:
        if min(self.batch, self.prompt, self.repeats, self.flop_tokens) < 1 or self.new_tokens < 2:
            raise EvaluationError(f"{self}: new_tokens must be at least 2 (the first belongs to the prompt), the other fields at least 1.")

    @torch.no_grad()
    def measure(self, subject: Subject) -> Part:
        tokens, what = self.prompt + self.new_tokens, f"the prompt has {self.prompt:,} tokens, and {self.new_tokens:,} new ones follow"
        require_positions(subject.model.config, tokens, EvaluationError, what, "Use fewer of both.")
        flop_tokens = min(self.flop_tokens, positions(subject.model.config) or self.flop_tokens)
        model, cut = subject.plain(), None if subject.any_size is None else subject.any_size.cut
        weights, vocabulary = stored_bytes(model), model.config.get_text_config().vocab_size
        prompt_BT = torch.arange(self.batch * self.prompt, device=model.device).view(self.batch, -1) % vocabulary
        with rise(model.device) as peak:  # also the warm-up; later, the allocator of a CPU already holds the memory
            decode(model, prompt_BT, self.new_tokens)
        times = [decode(model, prompt_BT, self.new_tokens) for _ in range(self.repeats)]
        prefill_s, decode_s = (statistics.median(column) for column in zip(*times, strict=True))
        values = {
            "stored_bytes": saved_bytes(model) if cut is None or cut.versions is None else cut.bytes,
            "resident_bytes": weights,
            "latency_s": statistics.median(sum(pair) for pair in times),
            "prefill_tokens_per_s": self.batch * self.prompt / prefill_s,
            "decode_tokens_per_s": self.batch * (self.new_tokens - 1) / decode_s,
            "tokens_per_s": self.batch * self.new_tokens / (prefill_s + decode_s),
            "flops": flops(model, flop_tokens),
        }
        if peak:
            values["peak_memory_bytes"] = weights + peak[0]
        dtype = str(model.dtype).removeprefix("torch.")
        facts = {"device": device_name(model.device), "threads": torch.get_num_threads(), "dtype": dtype, "flop_tokens": flop_tokens}
        defaults = Efficiency()
        chosen = label(*(f"{key}{value}" for key, value in vars(self).items() if key in LABEL_FIELDS and value != getattr(defaults, key)))
        return {"label": f"{self.kind}/{chosen}" if chosen else self.kind, "values": values, **facts}


def decode(model: Any, prompt_BT: Tensor, new_tokens: int) -> tuple[float, float]:
    """Decode greedily. Return (seconds until the first new token, seconds for the others)."""
    start = _now(prompt_BT.device)
    output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    first = _now(prompt_BT.device)
    for _ in range(new_tokens - 1):
        ids_B1 = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=ids_B1, past_key_values=output.past_key_values, use_cache=True)
    output.logits[:, -1].argmax(-1)
    return first - start, _now(prompt_BT.device) - first


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def flops(model: Any, tokens: int) -> int:
    """Return the floating point operations of a forward pass over one sequence: 2 per multiply-add of every matrix product.

    Attention is counted in its eager form, since fused kernels are not counted on every device, and without savings from causality.
    """
    attention = model.config._attn_implementation
    ids_1T = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids_1T, use_cache=False)
    finally:
        model.set_attn_implementation(attention)
    return counter.get_total_flops()


def reset_peak(device: torch.device) -> bool:
    """Reset the peak of memory to the present use. Return False if the system does not support it (Linux does)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def rise(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds, after the context, the peak rise of memory in bytes: of the allocator on a GPU, of the process on a CPU.

    The list stays empty if the system does not report it (Linux does).
    """
    peak: list[int] = []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        reset_peak(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - start)
        return
    if not reset_peak(device):
        yield peak
        return
    start = psutil.Process().memory_info().rss
    yield peak
    high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    peak.append(max(0, int(high.split()[1]) * 1024 - start))


def device_name(device: torch.device) -> str:
    """Return the model name of a GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
