"""Serving under load: our endpoint at any size against `transformers serve` on the dense base, in one run.

    python tests/benchmarks/serve.py --quick --check     sizes 1.0 and 0.4, short windows, 300 clients that vanish: 5 minutes on 2 cores
    python tests/benchmarks/serve.py --check             four sizes, long windows, the baseline before and after, 10,000 that vanish
    python tests/benchmarks/serve.py --side theirs --clients 8 --seconds 5     a part of it

Clients stream completions one after the other, from a process of their own (clients.py): the same prompts on both sides, as many
tokens each, temperature 0. They never are in step, as their first answers are cut at differing lengths. Counted is what arrives in
a window; they stay until it is over. The servers (servers.py) run one at a time, with the threads that each chooses itself. Of
what `transformers serve` offers, the fastest counts: with continuous batching, and for one client also without.

Mixed sizes are compared with the mean of the single sizes, each weighted by its tokens (harmonic, as tokens take time). At last,
clients vanish at random moments from requests of random sizes, and the engine has to be back where it was. `--check` ends with 1
where a goal is missed.
"""

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.clients import Ask, Load, load
from tests.benchmarks.servers import NAME, Server, hardware, ours, prepare, theirs
from tests.benchmarks.vanishing import MEMORY, left_behind, settled, vanish

GOALS = {1.0: 1.0, 0.4: 1.5}  # times the baseline's tokens/s
MIXED_GOAL = 0.85  # of the mean of the single sizes
MAX_TOKENS = 48
WARM_UP_S = 8.0

BATCHING, ONE_BY_ONE = "transformers serve, continuous batching", "transformers serve, one by one"


@dataclass(frozen=True)
class Plan:
    clients: tuple[int, ...]
    sizes: tuple[float, ...]
    warm_s: float
    window_s: float
    vanish: int
    again: bool  # the baseline after ours, too


QUICK = Plan((1, 8, 32), (1.0, 0.4), 2, 6, 300, False)
FULL = Plan((1, 8, 32), (1.0, 0.8, 0.6, 0.4), 5, 30, 10_000, True)


@dataclass
class Row:
    side: str
    size: str  # "1.0", "mixed"
    load: Load


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def show(row: Row, ratio: float | None = None) -> None:
    at, cells = row.load, []
    for values in (at.first_s, at.per_token_s):
        cells += [f"{1000 * quantile(values, share):.0f}" for share in (0.5, 0.95)]
    against = "" if ratio is None else f"{ratio:.2f}"
    fields = (row.side, row.size, str(at.clients), f"{at.tokens_per_s:.1f}", against, *cells, f"{1000 * at.burst_s:.0f}")
    fields += (str(at.requests), str(len(at.errors)))
    print("| " + " | ".join(fields) + " |", flush=True)
    for error in dict.fromkeys(at.errors[:3]):
        print(f"    {error}")


HEAD = """
| | size | clients | tokens/s | times theirs | first token p50, ms | p95 | per token p50, ms | p95 | all at once, ms | requests | errors |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


class Run:
    """What was measured, and the process that the clients live in."""

    def __init__(self, plan: Plan, folder: Path, threads: int | None, pool: ProcessPoolExecutor) -> None:
        self.plan, self.folder, self.threads, self.pool = plan, folder, threads, pool
        self.prompts = (folder / "prompts").read_text().split("\0")
        self.rows: list[Row] = []
        self.vanished: dict[str, Any] | None = None

    def ask(self, server: Server, sizes: tuple[float | None, ...]) -> Ask:
        if sizes == (None,):
            return Ask(server.url, str(self.folder / "base"), self.prompts, sizes, MAX_TOKENS)
        return Ask(server.url, NAME, self.prompts, sizes, MAX_TOKENS, {"ignore_eos": True})

    def of(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.pool.submit(function, *args).result()

    def measure(self, server: Server, side: str, label: str, sizes: tuple[float | None, ...], clients: int) -> None:
        result: Load = self.of(load, self.ask(server, sizes), clients, self.plan.warm_s, self.plan.window_s)
        row = Row(side, label, result)
        self.rows.append(row)
        base = self.baseline(clients)
        show(row, result.tokens_per_s / base if base and side == "ours" else None)

    def baseline(self, clients: int) -> float:
        """The best that `transformers serve` gave with as many clients."""
        return max((row.load.tokens_per_s for row in self.rows if row.side != "ours" and row.load.clients == clients), default=0.0)

    def speed(self, size: str, clients: int) -> float | None:
        found = [row.load.tokens_per_s for row in self.rows if (row.side, row.size, row.load.clients) == ("ours", size, clients)]
        return found[0] if found else None

    def mixed(self, clients: int) -> float | None:
        """Tokens/s of mixed sizes over the mean of the single sizes."""
        found = [row for row in self.rows if (row.side, row.size, row.load.clients) == ("ours", "mixed", clients)]
        if not found or not found[0].load.tokens_per_s:
            return None
        single = {size: self.speed(size, clients) for size in found[0].load.tokens}
        if not all(single.values()):
            return None
        alone_s = sum(tokens / (single[size] or 1) for size, tokens in found[0].load.tokens.items())
        return alone_s / found[0].load.seconds

    # ---- sides

    def theirs(self, batching: bool) -> None:
        side = BATCHING if batching else ONE_BY_ONE
        with theirs(self.folder, self.threads, batching) as server:
            self.of(load, self.ask(server, (None,)), 2, 1.0, 0.5)  # the cache is made at the first request
            for clients in self.plan.clients if batching else (1,):
                self.measure(server, side, "1.0", (None,), clients)

    def ours(self) -> None:
        with ours(self.folder, self.threads) as server:
            # long enough for a recording that the idle server may have begun; while it is asked it begins no other
            self.of(load, self.ask(server, self.plan.sizes), 4, WARM_UP_S, 1.0)
            for clients in self.plan.clients:
                for size in self.plan.sizes:
                    self.measure(server, "ours", str(size), (size,), clients)
                self.measure(server, "ours", "mixed", self.plan.sizes, clients)
            if self.plan.vanish:
                self.vanish(server)

    def vanish(self, server: Server) -> None:
        """First some, so that every pool has its size; then all, and what they left behind."""
        ask = self.ask(server, self.plan.sizes)
        self.of(vanish, ask, max(100, self.plan.vanish // 20), 16, 1)
        before = settled(server)
        began = time.monotonic()
        left = self.of(vanish, ask, self.plan.vanish, 16, 2)
        seconds = time.monotonic() - began
        after = settled(server)
        alive: Load = self.of(load, replace(ask, sizes=self.plan.sizes[:1]), 1, 0.0, 1.0)
        self.vanished = {"before": before, "after": after, "left": left, "alive": not alive.errors}
        print(f"\n{self.plan.vanish} clients vanished in {seconds:.0f} s: " + ", ".join(f"{n} {how}" for how, n in sorted(left.items())))
        for what, was in before.items():
            print(f"  {what}: {was:g} before, {after[what]:g} after")

    # ---- goals

    def missed(self) -> list[str]:
        found = [
            f"{len(row.load.errors)} errors: {row.side} {row.size}, {row.load.clients} clients" for row in self.rows if row.load.errors
        ]
        for clients in self.plan.clients:
            base = self.baseline(clients)
            for size, goal in GOALS.items():
                speed = self.speed(str(size), clients)
                if base and speed is not None and speed < goal * base:
                    found.append(f"{speed / base:.2f} < {goal} at {size}, {clients} clients")
            mixed = self.mixed(clients)
            if mixed is not None and mixed < MIXED_GOAL:
                found.append(f"mixed sizes {mixed:.2f} < {MIXED_GOAL}, {clients} clients")
        return found + (left_behind(self.vanished) if self.vanished else [])

    def figure(self) -> str:
        parts = []
        for size in GOALS:
            at = [(clients, self.speed(str(size), clients), self.baseline(clients)) for clients in self.plan.clients]
            ratios = [f"{speed / base:.2f}x ({clients})" for clients, speed, base in at if speed and base]
            parts += [f"size {size} {' '.join(ratios)}"] if ratios else []
        mixed = [(clients, self.mixed(clients)) for clients in self.plan.clients]
        shares = [f"{share:.2f} ({clients})" for clients, share in mixed if share is not None]
        parts += [f"mixed sizes {' '.join(shares)} of single ones"] if shares else []
        if self.vanished:
            grown = self.vanished["after"][MEMORY] - self.vanished["before"][MEMORY]
            parts.append(f"{grown:+.0f} MiB after {self.plan.vanish} vanished")
        return "tokens/s of ours over transformers serve, (clients): " + "; ".join(parts or ["only one side was measured"])


@contextlib.contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="acip-serve-") as made:
        yield Path(made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes and short windows")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    parser.add_argument("--side", choices=("ours", "theirs"), help="this one alone")
    parser.add_argument("--clients", type=int, action="append", help="at once; may be given more than once (default: 1, 8, 32)")
    parser.add_argument("--sizes", type=float, nargs="+", help="of ours (default: 1.0 0.8 0.6 0.4; 1.0 0.4 with --quick)")
    parser.add_argument("--seconds", type=float, help="that are counted, of each load")
    parser.add_argument("--vanish", type=int, help="clients that vanish (default: 10000; 300 with --quick; 0 = none)")
    parser.add_argument("--threads", type=int, help="OpenMP threads of either server (default: what each chooses)")
    parser.add_argument("--folder", type=Path, help="for models and logs, to be used again (default: a temporary one)")
    args = parser.parse_args()
    given: dict[str, Any] = {"clients": args.clients and tuple(args.clients), "sizes": args.sizes and tuple(args.sizes)}
    given |= {"window_s": args.seconds, "vanish": args.vanish}
    plan = replace(QUICK if args.quick else FULL, **{key: value for key, value in given.items() if value is not None})

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then, too
    print(hardware(args.threads))
    print(f"SmolLM2-135M, bfloat16, {MAX_TOKENS} tokens an answer; {plan.window_s:g} s of each load are counted")
    spawn = get_context("spawn")
    with place(args.folder) as folder:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # in a process of its own: what it loads is not needed here
            pool.submit(prepare, folder).result()
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            run = Run(plan, folder, args.threads, pool)
            print(HEAD)
            if args.side != "ours":
                run.theirs(batching=True)
                if 1 in plan.clients:
                    run.theirs(batching=False)
            if args.side != "theirs":
                run.ours()
            if plan.again and args.side is None:
                run.theirs(batching=True)
    busiest = max(run.rows, key=lambda row: row.load.client_cpu_s)
    print(f"\nthe clients took {busiest.load.client_cpu_s:.1%} of one core at most; prompts had {busiest.load.prompt_tokens:.0f} tokens")
    missed = run.missed()
    if missed:
        print(f"\ngoals missed: {'; '.join(missed)}")
    print(f"\n{run.figure()}")
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
