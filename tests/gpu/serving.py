"""Part 4: speed of the engine in this process, without Ray and HTTP, for concurrent sequences of mixed sizes and of single sizes."""

import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from acip_platform.serve.engine.engine import Engine
from acip_platform.serve.engine.events import RequestDone, RequestFailed, TokenEvent, TokenSampled
from acip_platform.serve.engine.request import GenerationRequest
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import SamplingParams

from acip.artifact.artifact import Artifact
from acip.base import Base
from acip.calibration.loop import calibrate
from acip.data import TokenBatches
from acip.recipe import Recipe
from acip.sizing.budget import Budget
from tests.gpu.correctness import Small
from tests.gpu.report import Report, Row
from tests.gpu.scale import Scale, free, parametrize_quickly, random_llama, text_windows
from tests.support.small import byte_tokenizer

RATIOS = (1.0, 0.8, 0.6, 0.4)
PROMPT_TOKENS = 64
WAIT_S = 60.0


def greedy(prompt: list[int], ratio: float, max_tokens: int) -> GenerationRequest:
    """Return a request for exactly `max_tokens` greedy tokens, without an end token."""
    sampling = SamplingParams(temperature=0.0)
    return GenerationRequest([prompt], Budget(ratio=ratio), max_tokens=max_tokens, sampling=sampling, end_tokens=frozenset())


def run(report: Report, scale: Scale) -> None:
    with report.row("mixed sizes generate the same greedy texts as single sizes, float32") as row:
        compare_greedy_texts(row, scale)
    with tempfile.TemporaryDirectory() as folder:
        artifact = None
        with report.row("a random model, calibrated and saved") as row:
            artifact = save_random_artifact(row, scale, Path(folder))
        free(scale)
        if artifact is not None:
            with report.row("the engine loads and checks the artifact") as row:
                start = time.perf_counter()
                served = ResidentModel(model_version("random"), artifact, scale.device, packed=False)
                row.show(f"{served.bytes / 1e9:.2f} GB resident", f"{time.perf_counter() - start:.1f} s")
            if row.ok is not False:
                speeds(report, scale, served)


def model_version(name: str) -> Any:
    return SimpleNamespace(name=name, version="1", uri="", aliases=(), tags={})


def save_random_artifact(row: Row, scale: Scale, folder: Path) -> Artifact:
    model = random_llama(scale.served, scale)
    recipe = Recipe(sample_windows=4, dtype=scale.dtype, batch_size=2, seq_len=128, post_tune_steps=2)
    parametrize_quickly(model, recipe)
    calibration = calibrate(model, TokenBatches(text_windows(128, 8), recipe.batch_size), recipe)
    artifact = Artifact.save(folder / "artifact", Base(model, byte_tokenizer(), "random", None, "0" * 12), calibration, {})
    size = sum(file["bytes"] for file in artifact.manifest["files"].values())
    row.show(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion numbers, {size / 1e9:.2f} GB on disk")
    return artifact


def speeds(report: Report, scale: Scale, served: ResidentModel) -> None:
    engine = Engine()
    engine.add(served)
    try:
        run_all(engine, served, scale, RATIOS)  # warm up: load kernels and allocate the KV cache
        single: dict[float, float] = {}
        for ratio in RATIOS:
            with report.row(f"{scale.sequences} sequences at {ratio}") as row:
                single[ratio] = tokens_per_s(row, engine, served, scale, (ratio,))
        with report.row(f"{scale.sequences} sequences of mixed sizes") as row:
            mixed = tokens_per_s(row, engine, served, scale, RATIOS)
            alone = len(single) / sum(1 / speed for speed in single.values())
            row.reference += f"; {mixed / alone:.2f} of the harmonic mean of single sizes"
            row.numbers["share"] = mixed / alone
    finally:
        engine.close()


def tokens_per_s(row: Row, engine: Engine, served: ResidentModel, scale: Scale, ratios: tuple[float, ...]) -> float:
    taken, answers = run_all(engine, served, scale, ratios)
    generated = sum(answer.completion_tokens for answer in answers)
    row.show(
        f"{generated / taken:,.0f} tokens/s",
        f"{generated} tokens in {taken:.2f} s, prompts of {PROMPT_TOKENS} tokens",
        tokens_per_s=generated / taken,
    )
    row.require(generated == scale.sequences * scale.answer_tokens, row.value, row.reference)
    return generated / taken


def run_all(engine: Engine, served: ResidentModel, scale: Scale, ratios: tuple[float, ...]) -> tuple[float, list[RequestDone]]:
    """Submit all sequences at once. Return the seconds until all have ended, and the last event of each."""
    prompts = text_windows(PROMPT_TOKENS, scale.sequences).tolist()
    ended: list[TokenEvent] = []
    done = threading.Event()

    def on_event(events: list[TokenEvent]) -> None:
        ended.extend(event for event in events if isinstance(event, RequestDone | RequestFailed))
        if len(ended) == scale.sequences:
            done.set()

    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.submit(served, greedy(prompt, ratios[i % len(ratios)], scale.answer_tokens), on_event)
    if not done.wait(WAIT_S):
        raise TimeoutError(f"only {len(ended)} of {scale.sequences} sequences ended within {WAIT_S:.0f} s")
    taken = time.perf_counter() - start
    if errors := [event.error for event in ended if isinstance(event, RequestFailed)]:
        raise RuntimeError(f"{len(errors)} sequences failed, the first with {errors[0]}")
    return taken, [event for event in ended if isinstance(event, RequestDone)]


def compare_greedy_texts(row: Row, scale: Scale) -> None:
    """Compare sequences of four sizes in one batch with the tokens that each size generates alone."""
    with tempfile.TemporaryDirectory() as folder:
        small = Small(scale, Path(folder))
        base, calibration = small.calibrated()
        artifact = Artifact.save(Path(folder) / "artifact", base, calibration, {})
        elastic = artifact.load(scale.device)
        served = ResidentModel(model_version("small"), artifact, scale.device, packed=False)
        engine = Engine()
        engine.add(served)
        windows, equal = small.windows[:8, :24].tolist(), 0
        sampled: list[list[int]] = [[] for _ in windows]
        waiting = threading.Semaphore(0)
        try:
            for i, prompt in enumerate(windows):

                def on_event(events: list[TokenEvent], tokens: list[int] = sampled[i]) -> None:
                    tokens.extend(event.token.token for event in events if isinstance(event, TokenSampled))
                    if isinstance(events[-1], RequestDone | RequestFailed):
                        waiting.release()

                engine.submit(served, greedy(prompt, RATIOS[i % len(RATIOS)], 16), on_event)
            for _ in windows:
                if not waiting.acquire(timeout=WAIT_S):
                    raise TimeoutError("the engine did not respond")
        finally:
            engine.close()
        for i, prompt in enumerate(windows):
            elastic.resize(RATIOS[i % len(RATIOS)])
            ids = torch.tensor([prompt], device=scale.device)
            out: Any = elastic.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None
            )  # type: ignore[operator]
            equal += sampled[i] == out[0, len(prompt) :].tolist()
        row.require(equal >= len(windows) - 1, f"{equal} of {len(windows)} texts are equal")  # rounding may change one of them
