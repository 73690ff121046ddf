"""Measure the start of a serving replica: seconds from the start of its process to the first token, and the memory of two replicas.

    python tests/benchmarks/start.py --artifact FOLDER --quick --check      an artifact of SmolLM2, one warm start, minutes on 2 cores
    python tests/benchmarks/start.py                                        make an artifact with ranks and codes; the best of three starts

A replica is a process with an `EngineReplica`, without Ray. It loads one version and generates a token of the prompt "a", as at the start
of a deployment. It records no samples for the page, which a server does while it is idle. The starts are

    private    no resident files: the artifact is decoded, and the engine compared with transformers. This is the baseline
    first      the same, and the files are written
    warm       the files are mapped

*Imports* are everything until the module of the replica is imported, *model* is until the model is in memory, *token* is until the first
token. Wall and CPU seconds; the CPU seconds depend less on other programs. *PSS* is the memory of a process in which each shared page
counts in parts. The goals are 3 CPU seconds from the imports to the first token of a warm start, and a second replica that adds at most
`COPY` of the bytes of the weights to the memory of a process that has only imported its modules. The last line is the speed-up of a warm
start after its imports.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parents[2]))

from acip.utils.malloc import HUGE_PAGES

GOAL_S = 3.0
COPY = 0.25
TOKENS, REPEATS = 24, 4  # of the answers that measure the speed


def pss_mb(pid: int | str) -> float:
    """Return the proportional memory of a process in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 * 1.024 for line in lines if line.startswith("Pss:"))


def replica(artifact: str, size: str, private: bool) -> None:
    """Start a replica, print its times and memory as JSON, and run until stdin is closed."""
    started, marks = float(os.environ["STARTED"]), dict[str, tuple[float, float]]()

    def mark(name: str) -> None:
        marks[name] = (time.time() - started, time.process_time())

    from acip_platform.serve.replica import EngineReplica, ModelVersion

    mark("imports")
    imported_mb = pss_mb("self")
    engine = EngineReplica([], 600.0, "cpu", 1, None, default_size=size)
    engine.models.on_load = lambda _: None  # no recording of samples
    if private:
        engine.models.files = None
    version = ModelVersion("model", "1", artifact, (), {})
    model = engine.models.get(version)
    mark("model")
    engine._warm(version)
    mark("token")
    facts = {"marks": marks, "imported_mb": imported_mb, "weights_mb": engine.models.used_bytes / 1e6, "token_ms": token_ms(engine, model)}
    print(json.dumps(facts), flush=True)
    sys.stdin.read()
    os._exit(0)


def token_ms(engine: Any, model: Any) -> float:
    """Return the CPU milliseconds per token of one sequence, at best."""
    from acip_platform.serve.http.requests import CompletionRequest

    best = float("inf")
    for _ in range(REPEATS):
        begun = time.process_time()
        list(
            engine.engine.events(
                model, CompletionRequest(prompt="a", max_tokens=TOKENS, temperature=0.0, ignore_eos=True, speculative="off")
            )
        )
        best = min(best, (time.process_time() - begun) / TOKENS)
    return 1000 * best


class Started:
    """A replica that has generated a token, until the end of the block."""

    def __init__(self, artifact: Path, home: Path, size: str, private: bool) -> None:
        command = [sys.executable, __file__, "--artifact", str(artifact), "--size", size, "--replica", *(["--private"] if private else [])]
        env = os.environ | HUGE_PAGES | {"ACIP_HOME": str(home), "STARTED": str(time.time())}
        with tempfile.TemporaryFile("w+") as log:  # a pipe that nobody reads could fill up
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            assert self.process.stdout is not None
            self.facts: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
            if not self.facts:
                self.process.wait()
                log.seek(0)
                raise SystemExit(log.read()[-2000:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    @property
    def seconds(self) -> float:
        """CPU seconds from the imports to the first token."""
        marks = self.facts["marks"]
        return float(marks["token"][1] - marks["imports"][1])

    def row(self, name: str) -> str:
        """Return a row of the table: wall (CPU) seconds of each phase."""
        ends = [(0.0, 0.0), *self.facts["marks"].values()]
        parts = [f"{wall - before[0]:.1f} ({cpu - before[1]:.1f})" for before, (wall, cpu) in pairwise(ends)]
        return f"| {name} | {' | '.join(parts)} | {ends[-1][0]:.1f} ({ends[-1][1]:.1f}) | {self.facts['token_ms']:.1f} |"


def measure(artifact: Path, size: str, repeats: int) -> tuple[float, float, float]:
    """Print the tables. Return `Started.seconds` of private and warm starts, and the copies of the weights that a second replica adds."""
    with tempfile.TemporaryDirectory(prefix="acip-start-") as home:

        def start(private: bool) -> Started:
            return Started(artifact, Path(home), size, private)

        print("| start | imports, s (CPU) | model | token | first token after | then per token, CPU ms |\n|---|---|---|---|---|---|")
        with start(True):  # the files of Python's modules and of the artifact are in memory afterwards
            pass
        best: dict[str, Started] = {}
        for name in ("private", "first", *["warm"] * repeats):
            with start(name == "private") as one:
                if name not in best or one.seconds < best[name].seconds:
                    best[name] = one
        for name, each in best.items():
            print(each.row(name), flush=True)
        print("\n| replicas | PSS of one, MB | of two together | the second adds |\n|---|---|---|---|")
        imported = added = 0.0
        weights = float(best["warm"].facts["weights_mb"])
        for private in (True, False):
            with ExitStack() as pair:
                first = pair.enter_context(start(private))
                alone = pss_mb(first.process.pid)
                second = pair.enter_context(start(private))
                both = pss_mb(first.process.pid) + pss_mb(second.process.pid)
            imported, added = float(second.facts["imported_mb"]), both - alone
            print(f"| {'private' if private else 'shared'} | {alone:.0f} | {both:.0f} | {added:.0f} |", flush=True)
        print(
            f"\nA process that has imported the modules, beside a replica: {imported:.0f} MB. Weights with packed copies: {weights:.0f} MB."
        )
        return best["private"].seconds, best["warm"].seconds, (added - imported) / weights


def main() -> int:
    """Measure, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="folder of an artifact (default: make one of SmolLM2 with ranks and codes)")
    parser.add_argument("--size", default="1.0", help="size of the first token (default 1.0)")
    parser.add_argument("--quick", action="store_true", help="one warm start instead of three")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--replica", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--private", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.artifact and not (args.artifact / "manifest.json").is_file():
        parser.error(f"--artifact is {args.artifact}, which is not the folder of an artifact.")
    if args.replica:
        replica(str(args.artifact), args.size, args.private)
    with tempfile.TemporaryDirectory(prefix="acip-start-") as folder:
        if args.artifact is None:
            from tests.benchmarks.vllm_engines import in_process, write_artifact

            in_process(write_artifact, Path(folder), False)
            args.artifact = Path(folder) / "artifact"
        private_s, warm_s, copies = measure(args.artifact.resolve(), args.size, 1 if args.quick else 3)
    met = warm_s <= GOAL_S and copies <= COPY
    print(f"\nA second replica adds {copies:.2f} copies of the weights (goal: {COPY}). Goal for a warm start: {GOAL_S} s. Met: {met}")
    print(f"warm start after the imports: {warm_s:.1f} CPU s, {private_s / warm_s:.1f} times as fast as without resident files")
    return 1 if args.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
