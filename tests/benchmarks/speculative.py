"""Measure speculative decoding: tokens/s with drafts against the same engine without, and how often drafts are right.

    python tests/benchmarks/speculative.py --quick --check          a random Llama of 1B shape, one sequence: under 5 minutes on 2 cores
    python tests/benchmarks/speculative.py --artifact FOLDER        shares of right drafts by size, and sizes within a request

The random model has the engine's own batch, with weights in the forms of a resident model: dense with packed copies, and integers that
draft. Its layers add little to the token's embedding, so that almost all drafts are right. A part of them is then replaced by other
tokens, so that the share of right drafts is `--right`, as it was measured for SmolLM2-135M. Everything else is computed as in serving.

With and without drafts take turns. One thread computes, and tokens per second of CPU time are compared: on an idle machine, that is
tokens/s. `--check` exits with 1 if the ratio is below the goal.
"""

import argparse
import copy
import math
import os
import random
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "platform")]

from tests.benchmarks import replica_environment

if __name__ == "__main__":
    replica_environment.enter()

import torch
import torch.nn.functional as F
from acip_platform.serve.engine.batch import Batch, Sequence
from acip_platform.serve.engine.kv_cache import ATTENTION, CachePiece
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.resident_weights import DRAFT_KEY, DRAFT_VERSION
from acip_platform.serve.engine.sampling import Sampler, SamplingParams
from acip_platform.serve.engine.speculation import Speculation
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from acip.artifact.artifact import Artifact
from acip.data import documents, token_windows
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.integer_linear import IntegerLinear, PreciseIntegerLinear, rounded
from acip.layers.mixed_sizes import Mixer, Size
from acip.layers.packing import pack
from acip.layers.targets import find_linears
from acip.modeling_acip import set_module
from acip.sizing.budget import Budget
from acip.sizing.cut_table import Cut
from tests.benchmarks.decode import SHAPES
from tests.benchmarks.servers import hardware

GOAL = 1.4
RIGHT = 0.93  # share of right drafts of SmolLM2-135M, see SPECULATIVE.md
ROWS = (1, 2, 4, 8, 16)
RANK_SHARE = 0.4
PROMPT = 32  # tokens
CODED, DENSE = (1, 0), (0, 0)
DRAFTED = 3  # tokens in each step of `Always`
DRAFT_SIZES: dict[Any, tuple[float, ...]] = {"bytes": (0.5, 0.42, 0.37, 0.33), "linear": (0.9, 0.7, 0.4)}
PART_SIZES: dict[Any, tuple[float, ...]] = {"bytes": (1.0, 0.42, 0.37, 0.33), "linear": (1.0, 0.8, 0.6, 0.4)}
HALF = 256  # tokens


class Collector:
    """An owner of sequences that counts."""

    done = False
    drafted = accepted = 0

    def on_prompt(self, sequence: Sequence) -> None: ...
    def on_end(self, sequence: Sequence, reason: str) -> None: ...

    def on_token(self, sequence: Sequence, token: Any) -> None:
        self.accepted += token.drafted

    def on_drafts(self, count: int) -> None:
        self.drafted += count


class Calibrated(Batch):
    """A batch whose drafts are made wrong with a given probability, after they were computed."""

    keep = 1.0

    def _draft(self, size: Size, count: int) -> list[list[int]]:
        drafts = super()._draft(size, count)
        return [[token if random.random() < self.keep else (token + 1) % 1000 for token in draft] for draft in drafts]


@torch.no_grad()
def random_model(shape: str, ranks: bool, codes: bool) -> tuple[Any, dict[str, ElasticLinear], list[tuple[str, Size]]]:
    """Return (model, its layers, its sizes): dense, integers that draft, and optionally codes and ranks."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    layers, kept = {}, {}
    for name, linear in find_linears(model).items():
        weight_MN = cast(Tensor, linear.weight)
        M, N = weight_MN.shape
        if name.endswith(("o_proj", "down_proj")):
            weight_MN.mul_(0.001)
        kept[name] = int(RANK_SHARE * M * N / (M + N)) // 32 * 32 if ranks else 0
        sides = [0.01 * torch.randn(kept[name], side).bfloat16() for side in (M, N)]
        layers[name] = ElasticLinear(linear, sides[0], sides[1])
        codes_MN, steps_M = rounded(weight_MN)
        layers[name].coded[str(DRAFT_VERSION)] = IntegerLinear(codes_MN, steps_M, None)  # type: ignore[assignment]
        if codes:
            layers[name].coded["0"] = PreciseIntegerLinear(codes_MN, steps_M, None)  # type: ignore[assignment]
        set_module(model, name, layers[name])
    linears = list(layers)
    layers["lm_head"] = ElasticLinear.without_ranks(model.lm_head)
    layers["lm_head"].coded[str(DRAFT_VERSION)] = IntegerLinear(*rounded(model.lm_head.weight), None)  # type: ignore[assignment]
    model.lm_head = layers["lm_head"]
    pack(model)
    model.set_attn_implementation(ATTENTION)
    sizes = [("1.0", Size(DENSE, {})), ("integers, which draft", Size(DRAFT_KEY, {}, dict.fromkeys(layers, DRAFT_VERSION)))]
    if codes:
        sizes.append(("codes", Size(CODED, {}, dict.fromkeys(linears, 0))))
    if ranks:
        sizes.append((f"{RANK_SHARE} in ranks", Size((0, 1), kept)))
    return model, layers, sizes


def start(batch: Batch, owner: Any, size: Size, tokens: int, speculative: bool, temperature: float = 0.0) -> Sequence:
    ids = torch.randint(0, 1000, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    sampler = Sampler(SamplingParams(temperature=temperature), 1, ids=ids)
    sequence = Sequence(ids, size, sampler, tokens, frozenset(), owner, speculative=speculative)
    batch.waiting.append(sequence)
    return sequence


def step_times(shape: str, repeats: int) -> None:
    """Print the CPU time of a pass over rows of one sequence, by size."""
    model, layers, sizes = random_model(shape, ranks=True, codes=True)
    batch = Batch(model, Mixer(layers), 1 << 14)
    times: dict[tuple[str, int], list[float]] = {}
    with torch.inference_mode():
        start(batch, Collector(), sizes[0][1], 64, speculative=False)
        batch.step()
        (sequence,) = batch.active
        for repeat in range(repeats + 1):
            for name, size in sizes:
                for rows in ROWS:
                    begin = time.thread_time()
                    piece = CachePiece(0, sequence.cached, 0, rows)
                    batch._forward([1] * rows, [piece], [(size, rows)], list(range(rows)))
                    if repeat:
                        times.setdefault((name, rows), []).append(time.thread_time() - begin)
    one = statistics.median(times["1.0", 1])
    print(f"\nCPU time of a pass over the tokens of one sequence, ms (relative to one token at 1.0: {1000 * one:.0f} ms)\n")
    print("| size | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("|---|" + "---|" * len(ROWS))
    for name, _ in sizes:
        cells = [statistics.median(times[name, rows]) for rows in ROWS]
        print(f"| {name} | " + " | ".join(f"{1000 * seconds:.0f} ({seconds / one:.2f})" for seconds in cells) + " |", flush=True)


def compare(shape: str, right: float, rounds: int, tokens: int) -> float:
    """Print tokens per CPU second with drafts and without, and return the ratio."""
    random.seed(0)
    model, layers, sizes = random_model(shape, ranks=False, codes=False)
    size, draft = sizes[0][1], sizes[1][1]
    batch = Calibrated(model, Mixer(layers), 1 << 14, lambda: draft)

    def window(speculative: bool, count: int) -> tuple[float, float, Collector]:
        owner = Collector()
        start(batch, owner, size, count, speculative)
        begin, cpu = time.perf_counter(), time.process_time()
        while batch:
            batch.step()
        return count / (time.perf_counter() - begin), count / (time.process_time() - cpu), owner

    for _ in range(2):  # the engine measures its passes
        window(True, tokens)
    assert batch.speculation is not None
    batch.keep = right / batch.speculation.share(size)
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    drafted = accepted = 0
    for _ in range(rounds):
        for speculative in (False, True):
            wall, cpu, owner = window(speculative, tokens)
            found[speculative].append((wall, cpu))
            drafted, accepted = drafted + owner.drafted, accepted + owner.accepted
    speculation = batch.speculation
    print(f"\n{shape}, one sequence, {tokens} tokens an answer, share of right drafts {speculation.share(size):.2f} (asked: {right})")
    print("\n| | tokens/s | tokens per CPU second |\n|---|---|---|")
    medians = {}
    for speculative, label in ((False, "without drafts"), (True, "with drafts")):
        medians[speculative] = [statistics.median(values) for values in zip(*found[speculative], strict=True)]
        print(f"| {label} | {medians[speculative][0]:.2f} | {medians[speculative][1]:.2f} |")
    passes = {key: statistics.median(times) for key, times in speculation.seconds.items() if len(times) > 2}
    names = {size.key: "1.0", draft.key: "integers"}
    print(
        "\nCPU time of passes: "
        + ", ".join(f"{names[key]} with {rows} rows {1000 * s:.0f} ms" for (key, rows), s in sorted(passes.items()))
    )
    ratios = [medians[True][i] / medians[False][i] for i in (0, 1)]
    print(f"\n{drafted} tokens drafted, {accepted} accepted; ratio of tokens/s {ratios[0]:.2f}, of tokens per CPU second {ratios[1]:.2f}")
    return ratios[1]


# ---- a real model


class Always(Speculation):
    """Drafts in every step."""

    def count(self, size: Size, sequences: int, most: int) -> int:
        return min(DRAFTED, most)


def heldout(artifact: Artifact, tokens: int, windows: int) -> Tensor:
    """Return windows [windows, tokens] of held-out text, spread over the corpus."""
    all_windows = token_windows(documents("package:wikipedia", "heldout"), artifact.tokenizer(), tokens).long()
    return all_windows[:: max(1, len(all_windows) // windows)][:windows]


def right_drafts(artifact: Artifact, sequences: int, tokens: int) -> None:
    """Print the share of right drafts by the size that drafts, for answers of size 1.0, greedy and sampled."""
    version: Any = SimpleNamespace(name="model", version="1", uri="")
    model = ResidentModel(version, artifact)
    batch: Any = model.batch
    if not model.weights.load_draft():
        raise SystemExit("there is no memory for the integers that draft.")
    integers = model.weights.draft()
    prompts = heldout(artifact, PROMPT, sequences).tolist()
    full = model.cut(Budget(ratio=1.0, convention=model.convention))
    drafts: list[tuple[str, Cut | None]] = [("integers", None)]
    conventions: list[Any] = [*(["bytes"] if model.convention == "bytes" else []), "linear"]
    for convention in conventions:
        drafts += [(f"{ratio} ({convention})", model.cut(Budget(ratio=ratio, convention=convention))) for ratio in DRAFT_SIZES[convention]]
    print(
        f"\nshare of right drafts, answers at 1.0 of {sequences} x {tokens} tokens\n\n| draft | greedy | temperature 0.7 | temperature 1 |"
    )
    print("|---|---|---|---|")
    with model.holding(full):
        for name, cut in drafts:
            with model.holding(cut) if cut is not None else nullcontext():
                size = integers if cut is None else Size(cut.key, cut.ranks, cut.versions)
                batch.draft = lambda size=size: size
                shares = []
                for temperature in (0.0, 0.7, 1.0):
                    batch.speculation = Always(cast(Size, size))
                    for seed, ids in enumerate(prompts):
                        sampler = Sampler(SamplingParams(temperature=temperature), seed, ids=list(ids))
                        whole = Size(full.key, full.ranks, full.versions)
                        batch.waiting.append(Sequence(sampler.ids, whole, sampler, tokens, frozenset(), cast(Any, Collector())))
                    while batch:
                        batch.step()
                    shares.append(batch.speculation.share(whole))
                batch.mixer.clear()
            print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |", flush=True)


@torch.no_grad()
def answers_after_prompts(artifact: Artifact, windows: int) -> None:
    """Print the perplexity of the second half of texts whose first half was read at another size."""
    any_size = artifact.load()
    texts = heldout(artifact, 2 * HALF, windows)
    conventions: list[Any] = ["bytes", "linear"] if any_size.table.byte_sizes is not None else ["linear"]
    for convention in conventions:
        sizes = [Budget(ratio=ratio, convention=convention) for ratio in PART_SIZES[convention]]
        print(f"\nperplexity of {HALF} tokens after {HALF} tokens read at another size, {windows} texts; sizes in {convention}\n")
        print("| prompt \\ answer | " + " | ".join(f"{size.ratio}" for size in sizes) + " |")
        print("|---|" + "---|" * len(sizes))
        for prompt in sizes:
            any_size.resize(prompt)
            caches = []
            for text in texts:
                caches.append(DynamicCache())
                any_size.model(input_ids=text[None, : HALF - 1], past_key_values=caches[-1], use_cache=True, logits_to_keep=1)
            cells = []
            for answer in sizes:
                any_size.resize(answer)
                loss = 0.0
                for text, cache in zip(texts, caches, strict=True):
                    logits = any_size.model(
                        input_ids=text[None, HALF - 1 : -1], past_key_values=copy.deepcopy(cache), use_cache=True
                    ).logits
                    loss += float(F.cross_entropy(logits[0].float(), text[HALF:])) / len(texts)
                cells.append(math.exp(loss))
            print(f"| {prompt.ratio} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--right", type=float, default=RIGHT, help="share of right drafts in the random model (default: %(default)s)")
    parser.add_argument("--artifact", type=Path, help="folder of an artifact: measure shares of right drafts, and sizes within a request")
    parser.add_argument("--quick", action="store_true", help="short windows, no table of passes")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the goal is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(hardware(1, "torch", "transformers"))
    if args.artifact:
        artifact = Artifact.open(args.artifact)
        right_drafts(artifact, 4 if args.quick else 16, 32 if args.quick else 64)
        answers_after_prompts(artifact, 4 if args.quick else 16)
        return 0
    if not args.quick:
        step_times(args.model, 5)
    ratio = compare(args.model, args.right, 3 if args.quick else 5, 64 if args.quick else 128)
    print(f"\nspeculative decoding, tokens per CPU second relative to the same engine without drafts: {ratio:.2f} (goal: {GOAL})")
    return int(args.check and ratio < GOAL)


if __name__ == "__main__":
    sys.exit(main())
