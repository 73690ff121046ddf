"""Measure decoding under load in vLLM: exports of single sizes, and every size from one engine; and the embedded engine (for serve.py).

    clients --request--> [engine in a process of its own: step, step, ...] --tokens--> the next request of the client

Engines are compared without HTTP, because Ray Serve and vLLM's server have different processes, which share the cores with the engines.
Every engine runs in a process of its own, with as many threads, and gets the same prompts of random tokens, greedily, with the same number
of tokens per answer. A client sends its next request when an answer is complete. The first answers have different lengths, so that clients
are out of step. Engines take turns, window by window; the best window counts, so that other programs disturb all engines alike.

Ratios and goals are of tokens per second of CPU time. With one thread, this is tokens/s of an idle machine.

`--prefill` measures how fast `PREFILLED` prompts that arrive together get their first tokens. The best of `PREFILLS` times counts.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, Self

DENSE, EXPORT, ANY_SIZE, EMBEDDED = "vLLM, dense", "vLLM, export", "vLLM, any size", "embedded engine"
SIZES = ("1.0", "0.4", "0.42 bytes")
PIVOTS = "0.4 pivots"  # the export at 0.4 in the form that jobs/materialize.py writes by default
MIXED = ("1.0", "0.4")  # sizes of a batch of mixed sizes
MAX_TOKENS = 48
PROMPTS, SHORTEST, LONGEST = 199, 20, 60  # number of prompts, and their tokens
KV_BYTES = 256 << 20
PREFILLED, PREFILLS = 32, 6  # prompts that arrive together, and repetitions
PREFILL_GOAL = 1.0  # time of the embedded engine / time of vLLM, both dense
WARM_STEPS = 40  # before a window, at least: sizes that stay in use for some steps get copies (acip_vllm.size_copies)
EXPORT_GOAL, ANY_SIZE_GOAL, MIXED_GOAL = 1.25, 0.9, 0.85  # export at 0.4 in pivots / dense; any size / export of that size; mixed / mean


@dataclass
class Window:
    """The measurements of one engine under one load."""

    engine: str
    size: str
    clients: int
    seconds: float = 0.0
    cpu_s: float = 0.0
    steps: int = 0
    tokens: dict[str, int] = field(default_factory=dict)  # by size
    first_s: list[float] = field(default_factory=list)  # time from a request to its first token

    @property
    def tokens_per_cpu_s(self) -> float:
        return sum(self.tokens.values()) / self.cpu_s

    def row(self) -> str:
        first = sorted(self.first_s)
        p50, p95 = (f"{1000 * first[min(len(first) - 1, int(share * len(first)))]:.0f}" if first else "" for share in (0.5, 0.95))
        count = sum(self.tokens.values())
        fields = (self.engine, self.size, str(self.clients), f"{count / self.seconds:.1f}", f"{self.tokens_per_cpu_s:.1f}")
        return "| " + " | ".join((*fields, f"{1000 * self.cpu_s / max(self.steps, 1):.1f}", p50, p95)) + " |"


HEAD = """| | size | clients | tokens/s | tokens per CPU second | CPU time per step, ms | first token p50, ms | p95 |
|---|---|---|---|---|---|---|---|"""


# ---- models


def budget(size: str) -> Any:
    from acip.sizing.budget import Budget

    ratio, _, convention = size.partition(" ")
    return Budget(ratio=float(ratio), convention="bytes" if convention == "bytes" or ratio == "1.0" else "linear")


def write_artifact(folder: Path, small: bool) -> None:
    """Write an artifact with ranks and codes of SmolLM2-135M, or of the small model of the serving tests.

    It is made without a calibration, because speed depends on the ranks, not on the quality.
    """
    import torch

    from acip.artifact.artifact import Artifact
    from acip.base import load_base
    from acip.calibration.loop import calibrate
    from acip.calibration.parametrize import parametrize
    from acip.data import TokenBatches
    from acip.layers.targets import find_linears
    from acip.recipe import Recipe
    from tests.benchmarks.servers import SOURCE
    from tests.support.coded import rounded
    from tests.support.engines import write_wide_base

    recipe = Recipe(basis="svd", scores="singular_values", adapter_rank=0, post_tune_steps=0)
    base = load_base(str(write_wide_base(folder / "base")) if small else SOURCE)
    codes = rounded(find_linears(base.model))
    parametrize(base.model, recipe)
    calibration = calibrate(base.model, TokenBatches(torch.zeros(4, 64, dtype=torch.long), 1), recipe)
    Artifact.save(folder / "artifact", base, calibration, {}, codes)


def write_exports(artifact: Path, folder: Path) -> None:
    """Write exports to `folder`/SIZE. Ranks are written as factors, the form in which an any-size model computes them, except `PIVOTS`."""
    from acip.artifact.artifact import Artifact
    from acip.export.folder import export

    opened = Artifact.open(artifact)
    for size in (*SIZES, PIVOTS):
        if not (folder / size).exists():
            any_size = opened.load(size=budget(size))
            any_size.table = replace(any_size.table, storage="pivot" if size == PIVOTS else "factors")
            export(any_size, opened, folder / size)


def write_wide_exports(folder: Path) -> None:
    """Write exports of random weights to `folder`/SIZE: four layers as wide as those of a 1B model, and a head in proportion."""
    import torch
    from transformers import LlamaConfig

    from tests.support.exports import write_export

    config = LlamaConfig(
        vocab_size=32768, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip

    def row(form: str, name: str, side: int) -> dict[str, Any]:
        other = 8192 if "mlp" in name else 2048
        product, total = 0.4 * side * other, side + other  # numbers of a layer, and of one direction
        rank = product / total if form == "factors" else (total - (total**2 - 4 * product) ** 0.5) / 2
        return {"form": form, "rank": None if form == "dense" else int(rank)}

    def chosen(form: str, number: int, name: str, side: int) -> dict[str, Any]:
        del number
        return row(form, name, side)

    for size, form in (("1.0", "dense"), ("0.4", "factors"), (PIVOTS, "pivot")):
        if not (folder / size).exists():
            write_export(folder / size, config, partial(chosen, form), dtype=torch.bfloat16)


# ---- engines, in their own processes


class Engine(Protocol):
    vocabulary: int

    def add(self, ids: list[int], size: str, max_tokens: int) -> object: ...  # return a key of the request
    def step(self) -> list[object]: ...  # return the keys of the requests that got a token
    def clear(self) -> None: ...  # drop all requests


class ExportEngine:
    """vLLM with an export."""

    def __init__(self, folder: Path, compiled: bool) -> None:
        from acip_vllm import register
        from acip_vllm.resident_model import MAX_SEQUENCES
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        register()
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder), skip_tokenizer_init=True, generation_config="vllm", async_scheduling=False, disable_log_stats=True,
                enforce_eager=not compiled, max_num_seqs=MAX_SEQUENCES, kv_cache_memory_bytes=KV_BYTES,
            )
        )  # fmt: skip
        self.vocabulary = self.engine.model_config.get_vocab_size()
        self.active: set[str] = set()
        self.count = 0

    def add(self, ids: list[int], size: str, max_tokens: int) -> object:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        del size
        self.count += 1
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        name = str(self.count)
        self.engine.add_request(name, TokensPrompt(prompt_token_ids=ids), params)
        self.active.add(name)
        return name

    def step(self) -> list[object]:
        outputs: list[Any] = self.engine.step()
        self.active.difference_update(output.request_id for output in outputs if output.finished)
        return [output.request_id for output in outputs for _ in output.outputs[0].token_ids]

    def clear(self) -> None:
        self.engine.abort_request(list(self.active))
        self.active.clear()


class _Owner:
    """A request of `ResidentEngine`."""

    done = False

    def __init__(self, got: list[object]) -> None:
        self.got = got

    def on_prompt(self, sequence: Any) -> None: ...

    def on_drafts(self, count: int) -> None: ...

    def on_token(self, sequence: Any, token: Any) -> None:
        self.got.append(self)

    def on_end(self, sequence: Any, reason: str) -> None: ...

    def on_no_token(self, reason: str) -> None:
        raise RuntimeError(reason)

    def on_error(self, error: Exception) -> None:
        raise error


class ResidentEngine:
    """A resident model of every size, computed by vLLM or by the embedded engine."""

    def __init__(self, artifact: Path, kind: str) -> None:
        from acip_platform.serve.replica import model_kind

        from acip.artifact.artifact import Artifact
        from acip.layers.mixed_sizes import Size

        class Unchecked(model_kind(kind)):  # type: ignore[misc]
            def _check(self) -> None:
                """Leave the check of logits out: it is not about speed, and rounding may exceed its limit."""

        self.model = Unchecked(SimpleNamespace(name="measured", version="1", uri=""), Artifact.open(artifact))
        self.vocabulary = self.model.vocabulary
        cuts = {size: self.model.cut(budget(size)) for size in SIZES}
        for cut in cuts.values():
            self.model.weights.hold(cut)
        self.sizes = {size: Size(cut.key, cut.ranks, cut.versions) for size, cut in cuts.items()}
        self.got: list[object] = []

    def add(self, ids: list[int], size: str, max_tokens: int) -> object:
        from acip_platform.serve.engine.batch import Sequence as Generated
        from acip_platform.serve.engine.sampling import Sampler, SamplingParams

        owner = _Owner(self.got)
        sampler = Sampler(SamplingParams(temperature=0.0))
        self.model.batch.waiting.append(Generated(list(ids), self.sizes[size], sampler, max_tokens, frozenset(), owner))
        return owner

    def step(self) -> list[object]:
        self.got.clear()
        self.model.batch.step()
        return list(self.got)

    def clear(self) -> None:
        self.model.batch.clear()


class Here:
    """An engine in a process of its own."""

    engine: Engine
    prompts: list[list[int]]


def start(make: Callable[[], Engine], threads: int) -> None:
    """Start the engine of this process."""
    import torch

    torch.set_num_threads(threads)
    Here.engine = make()
    torch.set_num_threads(threads)  # vLLM may change it
    generator = torch.Generator().manual_seed(0)
    lengths = [SHORTEST + (i * 17) % (LONGEST - SHORTEST + 1) for i in range(PROMPTS)]
    Here.prompts = [torch.randint(Here.engine.vocabulary, (length,), generator=generator).tolist() for length in lengths]


def measure(window: Window, sizes: Sequence[str], warm_s: float, window_s: float) -> Window:
    """Keep the clients of a window busy, and measure."""
    sent: dict[object, tuple[str, float, int]] = {}  # size, time, tokens that are missing
    waiting = deque((1 + (i * MAX_TOKENS) // window.clients) for i in range(window.clients))  # tokens of the next requests
    first: set[object] = set()
    number, steps, begin, cpu = 0, 0, 0.0, 0.0
    start_s = time.perf_counter()
    while True:
        now = time.perf_counter()
        if not begin and now - start_s >= warm_s and steps >= WARM_STEPS:
            begin, cpu = now, time.process_time()
        if begin and now - begin >= window_s:
            break
        while waiting:
            size, max_tokens = sizes[number % len(sizes)], waiting.popleft()
            key = Here.engine.add(Here.prompts[number % PROMPTS], size, max_tokens)
            sent[key] = (size, time.perf_counter(), max_tokens)
            number += 1
        got = Here.engine.step()
        after = time.perf_counter()
        steps += 1
        window.steps += bool(begin)
        for key in got:
            size, at, missing = sent.pop(key)
            if begin:
                window.tokens[size] = window.tokens.get(size, 0) + 1
                if key not in first:
                    window.first_s.append(after - at)
            first.add(key)
            if missing > 1:
                sent[key] = (size, at, missing - 1)
            else:
                first.remove(key)
                waiting.append(MAX_TOKENS)
    window.seconds, window.cpu_s = now - begin, time.process_time() - cpu
    Here.engine.clear()
    return window


def prefill(size: str) -> tuple[float, float]:
    """Return the best numbers of prompt tokens per second and per CPU second, until `PREFILLED` new prompts have their first tokens."""
    per_s = per_cpu_s = 0.0
    for repeat in range(PREFILLS):
        prompts = [Here.prompts[(repeat * PREFILLED + i) % PROMPTS] for i in range(PREFILLED)]
        begin, cpu_begin, first = time.perf_counter(), time.process_time(), 0
        for prompt in prompts:
            Here.engine.add(prompt, size, 1)
        while first < PREFILLED:
            first += len(Here.engine.step())
        tokens = sum(map(len, prompts))
        per_s = max(per_s, tokens / (time.perf_counter() - begin))
        per_cpu_s = max(per_cpu_s, tokens / (time.process_time() - cpu_begin))
    Here.engine.clear()
    return per_s, per_cpu_s


# ---- the run


@dataclass(frozen=True)
class Plan:
    clients: tuple[int, ...]
    warm_s: float
    window_s: float
    rounds: int


QUICK = Plan((8,), 0.5, 1.5, 1)
FULL = Plan((1, 8, 32), 3, 6, 2)
WIDE = Plan((1, 8, 32), 2, 8, 2)


class Run:
    """The engines in their processes, and the best window of each load."""

    def __init__(self, plan: Plan, artifact: Path | None, exports: Path, threads: int, compiled: bool) -> None:
        """Start the engines: of all `exports`, and of every size of `artifact`."""
        from functools import partial

        self.plan = plan
        self.best: dict[tuple[str, str, int], Window] = {}
        made: dict[tuple[str, str], Callable[[], Engine]] = {
            (DENSE if size == "1.0" else EXPORT, size): partial(ExportEngine, exports / size, compiled)
            for size in (*SIZES, PIVOTS)
            if (exports / size).exists()
        }
        if artifact is not None:
            made |= {(ANY_SIZE, ""): partial(ResidentEngine, artifact, "vllm"), (EMBEDDED, ""): partial(ResidentEngine, artifact, "acip")}
        self.pools = {key: ProcessPoolExecutor(1, mp_context=get_context("spawn")) for key in made}
        first = next(iter(made))
        self.pools[first].submit(start, made.pop(first), threads).result()  # it fills vLLM's cache of model classes, which takes long
        started: list[Future[None]] = [self.pools[key].submit(start, make, threads) for key, make in made.items()]
        for each in started:
            each.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools.values():
            pool.shutdown()

    def measure(self) -> None:
        print(HEAD, flush=True)
        for clients in self.plan.clients:
            for _ in range(self.plan.rounds):
                for (engine, only), pool in self.pools.items():
                    for size in (only,) if only else (*SIZES, "mixed"):
                        sizes = MIXED if size == "mixed" else (size,)
                        window = Window(engine, size, clients)
                        window = pool.submit(measure, window, sizes, self.plan.warm_s, self.plan.window_s).result()
                        before = self.best.get((engine, size, clients))
                        if before is None or window.tokens_per_cpu_s > before.tokens_per_cpu_s:
                            self.best[engine, size, clients] = window
            for (_, _, count), window in self.best.items():
                if count == clients:
                    print(window.row(), flush=True)

    def prefill(self) -> bool:
        """Measure the first tokens of `PREFILLED` prompts, and print the table and the ratios. Return whether the goal is met."""
        print(f"| {PREFILLED} prompts | size | prompt tokens/s | per CPU second |\n|---|---|---|---|", flush=True)
        speeds: dict[tuple[str, str], float] = {}  # per CPU second
        for (engine, only), pool in self.pools.items():
            for size in (only,) if only else SIZES:
                per_s, speeds[engine, size] = pool.submit(prefill, size).result()
                print(f"| {engine} | {size} | {per_s:.0f} | {speeds[engine, size]:.0f} |", flush=True)
        print(f"\nCPU time of {EMBEDDED} / vLLM at the same size (goal at 1.0: {PREFILL_GOAL}):")
        ratios = {size: speeds[DENSE if size == "1.0" else EXPORT, size] / speeds[EMBEDDED, size] for size in SIZES}
        print("; ".join(f"{size}: {ratio:.2f}" for size, ratio in ratios.items()))
        return ratios["1.0"] <= PREFILL_GOAL

    def speed(self, engine: str, size: str, clients: int) -> float:
        return self.best[engine, size, clients].tokens_per_cpu_s

    def ratios(self) -> list[tuple[str, dict[int, float], float | None]]:
        """Return (what, ratio by number of clients, goal or None)."""
        clients = self.plan.clients
        single = {"1.0": DENSE, "0.4": EXPORT, "0.42 bytes": EXPORT}
        found: list[tuple[str, dict[int, float], float | None]] = [
            (f"export {size} / dense", {n: self.speed(EXPORT, size, n) / self.speed(DENSE, "1.0", n) for n in clients}, goal)
            for size, goal in ((PIVOTS, EXPORT_GOAL), ("0.4", None))
        ]
        if (ANY_SIZE, "") not in self.pools:
            return found
        for size, engine in single.items():
            ratios = {n: self.speed(ANY_SIZE, size, n) / self.speed(engine, size, n) for n in clients}
            found.append((f"any size {size} / {'dense' if engine == DENSE else 'export'}", ratios, ANY_SIZE_GOAL))
        for engine, goal in ((ANY_SIZE, MIXED_GOAL), (EMBEDDED, None)):
            name = "any size" if engine == ANY_SIZE else "embedded"
            found.append((f"{name}, mixed / mean of single sizes", {n: self.mixed(engine, n) for n in clients}, goal))
        for size in (*SIZES, "mixed"):
            ratios = {n: self.speed(ANY_SIZE, size, n) / self.speed(EMBEDDED, size, n) for n in clients}
            found.append((f"any size {size} / embedded", ratios, None))
        return found

    def mixed(self, engine: str, clients: int) -> float:
        """Return the speed of mixed sizes over the mean of the single sizes, weighted by tokens."""
        window = self.best[engine, "mixed", clients]
        return sum(tokens / self.speed(engine, size, clients) for size, tokens in window.tokens.items()) / window.cpu_s


def run(quick: bool, wide: bool, clients: Sequence[int] | None, seconds: float | None, artifact: Path | None, folder: Path, threads: int,
        compiled: bool, prefill_only: bool) -> bool:  # fmt: skip
    """Measure all engines, print the table and the ratios, and return whether all goals are met. The last line printed is the figure."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(folder / "vllm")}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from acip_vllm.resident_model import SETTINGS

    from acip.utils.malloc import HUGE_PAGES

    os.environ.update(SETTINGS | HUGE_PAGES)  # the engines' processes start with them
    plan = QUICK if quick else WIDE if wide else FULL
    plan = replace(plan, clients=tuple(clients or plan.clients), window_s=seconds or plan.window_s)
    if wide:
        artifact = None
        in_process(write_wide_exports, folder / "exports")
    else:
        if artifact is None:
            artifact = folder / "artifact"
            if not artifact.exists():
                in_process(write_artifact, folder, quick)
        in_process(write_exports, artifact, folder / "exports")
    mode = "compiled for dense and exports, eager for any size" if compiled else "eager"
    what = artifact.name if artifact else "wide layers"
    print(f"{what}, {MAX_TOKENS} tokens per answer; {threads} thread(s) per engine; vLLM {mode}; best of {plan.rounds} "
          f"windows of {plan.window_s:g} s\n", flush=True)  # fmt: skip
    with Run(plan, artifact, folder / "exports", threads, compiled) as measured:
        if prefill_only:
            return measured.prefill()
        measured.measure()
        ratios = measured.ratios()
    print("\nratios of tokens per CPU second (clients):")
    lines, missed = [], False
    for what, by_clients, goal in ratios:
        line = f"{what}: " + ", ".join(f"{ratio:.2f} ({n})" for n, ratio in by_clients.items())
        failed = goal is not None and min(by_clients.values()) < goal
        missed = missed or failed
        print(f"  {line}" + ("" if goal is None else f"; goal {goal}{', MISSED' if failed else ''}"))
        if goal is not None:
            lines.append(line)
    print(f"\ntokens per CPU second in vLLM: {'; '.join(lines)}")
    return not missed


def in_process(function: Callable[..., None], *args: object) -> None:
    """Call a function in a process of its own, whose memory is freed at its end."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(function, *args).result()
