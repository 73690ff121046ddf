"""Measure decoding: tokens/s of compressed models and of the dense base, in one run.

    python tests/benchmarks/decode.py --quick            a random Llama of 1B shape, bfloat16, few tokens: under 5 minutes on 2 cores
    python tests/benchmarks/decode.py --model smollm2    SmolLM2-135M's shape, whose speed is limited by Python
    python tests/benchmarks/decode.py --gpu              Llama-7B's shape, CUDA graphs on both sides

Weights are random, because speed does not depend on them. Every layer has the largest rank whose pivot form fits the size. It is measured
in the pivot form (used by exports), and as two factors of the same rank (used by the endpoint). On a CPU, batches larger than 1 are also
measured with packed copies of the weights (`acip.pack`), for the dense base, too. Ratios are relative to the base as transformers loads it.

The models take turns, and the medians of their decoding steps are compared. The bound of a ratio is the ratio of the bytes that a step
reads, output head included: dense / compressed. `--check` exits with 1 if a goal is missed.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from acip.layers.packing import pack
from acip.layers.targets import find_linears, weight_MN
from acip.modeling_acip import LowRankLinear, PivotLinear, set_module

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "7b": {},
}  # fmt: skip
GOALS = {"1b": {0.4: 1.7, 0.6: 1.3}, "smollm2": {0.4: 1.0}, "7b": {0.4: 1.5, 0.6: 1.15}}
PROMPT = 16  # tokens


def pivot_rank(M: int, N: int, size: float) -> int:
    """Return the largest rank whose pivot form stores at most size * M * N numbers."""
    return int((M + N - ((M + N) ** 2 - 4 * size * M * N) ** 0.5) / 2)


@torch.no_grad()
def compressed(dense: LlamaForCausalLM, size: float, form: str, multiple: int = 1) -> LlamaForCausalLM:
    """Return a model of this size with random weights that shares everything else with the dense one.

    Ranks are rounded down to a multiple of `multiple`.
    """
    linears = find_linears(dense)
    model = copy.deepcopy(dense, memo={id(p): p for p in dense.parameters()})
    for name, linear in linears.items():
        W_MN = weight_MN(linear)
        M, N = W_MN.shape
        r = pivot_rank(M, N, size) // multiple * multiple
        right_rN = torch.randn_like(W_MN[:1].expand(r, N)) * N**-0.5
        if form == "pivot":
            combine = torch.randn_like(W_MN[:1, :1].expand(M - r, r)) * r**-0.5
            layer: nn.Module = PivotLinear(right_rN, combine, torch.randperm(M, device=W_MN.device), None)
        else:
            layer = LowRankLinear(torch.randn_like(W_MN[:, :1].expand(M, r)) * r**-0.5, right_rN, None)
        set_module(model, name, layer)
    return model


def packed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a copy that shares the weights of the model and has packed copies of them."""
    model = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    pack(model)
    return model


def read_bytes(model: LlamaForCausalLM) -> int:
    """Return the bytes of weights that one decoding step reads: all except the token embeddings, unless they are tied to the head."""
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is model.get_output_embeddings().weight
    return sum(p.numel() * p.itemsize for p in model.parameters() if tied or p is not embeddings)


class Side:
    """A model that has processed `batch` prompts and decodes further tokens."""

    def __init__(self, model: LlamaForCausalLM, batch: int, steps: int, cuda: bool) -> None:
        self.model, self.batch, self.cuda = model, batch, cuda
        self.cache = StaticCache(config=model.config, max_cache_len=PROMPT + steps + 8)
        device = next(model.parameters()).device
        ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=device)
        self.place = torch.arange(PROMPT, device=device)
        self.token = self.run(ids)
        self.place = torch.tensor([PROMPT], device=device)
        self.step: Callable[[], None] = self.eager
        if cuda:
            self.step = self.graph()

    @torch.no_grad()
    def run(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        logits = model(input_ids=ids, past_key_values=self.cache, position_ids=self.place[None], use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def eager(self) -> None:
        self.token = self.run(self.token)
        self.place += 1

    def graph(self) -> Callable[[], None]:
        """Return the step as one CUDA graph, which writes the next token to the tensor it reads from."""
        side, token = torch.cuda.Stream(), self.token.clone()

        def once() -> None:
            token.copy_(self.run(token))

        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        return graph.replay

    def seconds(self, steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self.step()
            if self.cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return times


def compare(shape: str, batch: int, rounds: int, steps: int, cuda: bool) -> dict[tuple[float, str], float]:
    """Print the tokens/s of all models with ratios and bounds. Return the ratios."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if cuda else "cpu"):
        dense = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    models = {("dense", 1.0): dense} | {(form, size): compressed(dense, size, form) for size in (0.4, 0.6) for form in ("pivot", "factors")}
    if batch > 1 and not cuda:
        models |= {(f"{form}, packed", size): packed(model) for (form, size), model in models.items()}
    sides = {key: Side(model, batch, rounds * steps + 4, cuda) for key, model in models.items()}
    times: dict[tuple[str, float], list[float]] = {key: [] for key in sides}
    for side in sides.values():
        side.seconds(2)
    for _ in range(rounds):
        for key, side in sides.items():
            times[key] += side.seconds(steps)
    base = statistics.median(times["dense", 1.0])
    print(f"\n{shape}, batch {batch}, {torch.get_num_threads()} threads")
    print(f"dense: {batch / base:.1f} tokens/s, {read_bytes(dense) / 1e9:.2f} GB a step")
    print(f"{'form':<18}{'size':>4}{'tokens/s':>12}{'ratio':>8}{'bound':>8}")
    ratios = {}
    for (form, size), model in models.items():
        if model is dense:
            continue
        median = statistics.median(times[form, size])
        ratios[size, form] = base / median
        print(f"{form:<18}{size:>4}{batch / median:>12.1f}{base / median:>8.2f}{read_bytes(dense) / read_bytes(model):>8.2f}")
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--batch", type=int, action="append", help="sequences per step; repeatable (default: 1 and 8; 1 and 64 with --gpu)")
    parser.add_argument("--gpu", action="store_true", help="Llama-7B's shape on a GPU")
    parser.add_argument("--quick", action="store_true", help="few tokens")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a GPU.")
    shape = "7b" if args.gpu else args.model
    rounds, steps = (3, 6) if args.quick else (6, 12)
    missed, best = [], []
    for batch in args.batch or ([1, 64] if args.gpu else [1, 8]):
        ratios = compare(shape, batch, rounds, steps, args.gpu)
        for size, goal in GOALS[shape].items():
            form, ratio = max(((form, ratio) for (key, form), ratio in ratios.items() if key == size), key=lambda pair: pair[1])
            best.append(f"{ratio:.2f}x at {size}, batch {batch} ({form})")
            if ratio < goal:
                missed.append(f"{ratio:.2f} < {goal} at {size}, batch {batch}")
    if missed:
        print(f"\ngoals missed: {', '.join(missed)}")
    print(f"\ndecoding speed, relative to the dense base: {'; '.join(best)}")
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
