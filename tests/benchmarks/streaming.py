"""Calibrate a model that is larger than the memory, and compare the memory with that of a run which holds the model.

    python tests/benchmarks/streaming.py --quick             0.4 GB of weights, streamed and held, minutes on 2 cores
    python tests/benchmarks/streaming.py                     6 GB of weights, streamed, in 1.5 GB; hours of CPU time, resumable
    python tests/benchmarks/streaming.py --size-gb 1.2 --limit-gb 0.8 --held
    python tests/benchmarks/streaming.py --code ranks --size-gb 0.4 --limit-gb 1.1     bases and scores, or "both"
    python tests/benchmarks/streaming.py --serve             after 6 GB: export and serve two sizes in 4 GB

The checkpoint is a Llama with random weights in bfloat16, in files of at most 500 MB. The job is `code: bits` with code_tune_steps 0, or
another `--code` with post_tune_steps 0 and without adapters, run as jobs/calibrate_all.py runs it, without Ray. It runs in a memory control
group (Linux, root) with a limit, so that the page cache counts, too, and is not told to stream: it finds out that the model does not fit.
Everything is kept in --home; a run that was stopped continues there.

*Anonymous* memory is what a process cannot give back; mapped files are not part of it. The last line is the ratio of the anonymous memory
above that at the start of the job, held over streamed. Without --held, it is the ratio of the weights to it. `--check` exits with 1 if the
job fails, or if the ratio is below 2.

With --serve, the artifact is exported by jobs/materialize.py, and loaded by the embedded engine, without Ray and HTTP.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPE: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}  # fmt: skip
BLOCK_BYTES, REST_BYTES = 2 * (3 * 1024**2 + 3 * 1024 * 2816), 2 * 32000 * 1024
LEAST_BLOCKS = 2
PHASES = {  # begin with the stage of this text
    "loading": "loading", "codes of": "saving", "fisher basis of": "scores", "fisher basis and": "saving",
    "artifact saved": "measuring the curve",
}  # fmt: skip
GOAL = 2.0
SAMPLE_S = 0.2
SERVED = (0.37, 0.33)  # sizes that are exported and served, as shares of the bytes
ROOT = Path(__file__).parents[2]


def write_base(folder: Path, size_gb: float) -> None:
    """Write a checkpoint of about `size_gb` to `folder`, block by block."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.small import byte_tokenizer

    blocks = round((size_gb * 1e9 - REST_BYTES) / BLOCK_BYTES)
    config = LlamaConfig(**SHAPE, num_hidden_layers=blocks, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    where: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    names = list(shapes)
    for name in names:
        part[name] = torch.ones(shapes[name]) if len(shapes[name]) == 1 else torch.randn(shapes[name], generator=generator) * 0.02
        part[name] = part[name].bfloat16()
        if name == names[-1] or sum(tensor.nbytes for tensor in part.values()) > 400e6:
            file = f"model-{len(set(where.values())):05}.safetensors"
            save_file(part, folder / file, {"format": "pt"})
            where |= dict.fromkeys(part, file)
            part = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    byte_tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)


def run_job(base: str, home: str, code: Any) -> None:
    """Run the job in this process, and print its events as lines of JSON."""
    from acip_platform.scheduling.fleet import Job
    from acip_platform.settings import Settings
    from acip_platform.tracking.runs import Tracking
    from acip_platform.training.worker import calibrate_one

    from acip.recipe import Recipe

    recipe = Recipe(code=code, code_tune_steps=0, sample_windows=8, seq_len=128)
    if code != "bits":
        recipe = replace(recipe, post_tune_steps=0, adapter_rank=0)
    sizes = (1.0,) if code == "bits" else (1.0, 0.8, 0.6)
    job = Job("streamed", base, recipe, "package:wikipedia", eval_context=128, eval_windows=4, sizes=sizes, byte_sizes=(0.5, 0.33), cpus=1)
    settings = Settings.from_env({**os.environ, "ACIP_HOME": home})
    run = Tracking(settings, "streaming").start(job.name, job.fingerprint, {})

    def emit(event: dict[str, Any]) -> None:
        print(json.dumps({"time": time.time(), **event}), flush=True)

    emit({"kind": "start"})
    config = {
        "job": job.to_dict(),
        "settings": settings,
        "run": run.run_id,
        "attempt": "attempt",
        "threads": int(os.environ["OMP_NUM_THREADS"]),
    }
    queue = SimpleNamespace(put=SimpleNamespace(remote=emit))
    summary = calibrate_one(config | {"events": queue, "fingerprint": job.fingerprint})
    emit({"kind": "end", "uri": summary["uri"], "curve": [[row["got"], row["loss"]] for row in summary["curve"]]})


@contextmanager
def limited(limit_bytes: float) -> Iterator[Path]:
    """Create a memory control group (v1 or v2) with a limit, and yield its folder."""
    version_1 = Path("/sys/fs/cgroup/memory")
    root, name = (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
    group = root / f"acip-streaming-{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(int(limit_bytes)))
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:  # the kernel still releases the last process
                time.sleep(0.1)


def measured(arguments: list[str], folder: Path, limit_bytes: float, environment: Mapping[str, str] = os.environ) -> dict[str, float]:
    """Run a program within a limit, and print its events. Its output goes to `folder`.

    Return in bytes: its anonymous memory at the event "start", the highest, and the highest use of the control group, with page cache.
    `memory.json` in `folder` gets [seconds, phase, anonymous megabytes] of each sample.
    """
    import psutil

    folder.mkdir(parents=True, exist_ok=True)
    output, log = folder / "events.jsonl", folder / "errors.log"
    with limited(limit_bytes) as group, output.open("w") as events, log.open("w") as errors:
        child = subprocess.Popen(
            [sys.executable, *arguments], stdout=events, stderr=errors, env=environment,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),  # noqa: PLW1509
        )  # fmt: skip
        process, start, highest, began, rows, seen, phase = psutil.Process(child.pid), 0.0, 0.0, time.time(), [], 0, "start"
        while child.poll() is None:
            try:
                memory = process.memory_info()
            except psutil.NoSuchProcess:
                break
            anonymous = memory.rss - memory.shared
            lines = output.read_text().splitlines()
            for line in lines[seen:]:
                event = json.loads(line) if line.startswith("{") else {"kind": "stage", "text": line}
                start = anonymous if event["kind"] == "start" else start
                phase = phase_of(event) or phase
                text = f"curve {event['curve']}" if event["kind"] == "end" else event.get("text")
                if text:
                    print(
                        f"{time.time() - began:8.0f} s {anonymous / 1e9:6.2f} GB now, {highest / 1e9:6.2f} at most: {text[:170]}",
                        flush=True,
                    )
            seen = len(lines)
            highest = max(highest, anonymous)
            rows.append((round(time.time() - began, 1), phase, round(anonymous / 1e6)))
            time.sleep(SAMPLE_S)
        peak = next(group / name for name in ("memory.max_usage_in_bytes", "memory.peak") if (group / name).is_file())
        used = float(peak.read_text())
        (folder / "memory.json").write_text(json.dumps(rows))
    if child.wait():
        raise SystemExit(f"{arguments} ended with {child.returncode}: {log.read_text()[-1500:]}")
    return {"start": start, "highest": highest, "group": used, "seconds": time.time() - began}


def phase_of(event: dict[str, Any]) -> str | None:
    """Return the phase of a job that begins with an event, or None."""
    if event["kind"] == "parametrize":
        return "basis"
    if event["kind"] == "code":
        ends = event["what"] == "statistics" and event["done"] == event["total"]
        return None if event["what"] == "curve" else "codes" if ends else str(event["what"])
    return next((phase for text, phase in PHASES.items() if event.get("text", "").startswith(text)), None)


def print_phases(runs: Mapping[str, Path]) -> None:
    """Print a table of the seconds and of the highest anonymous memory above that at the start, by phase, of the jobs in folders."""
    columns = {}
    for name, folder in runs.items():
        rows = json.loads((folder / "memory.json").read_text())
        phases = dict.fromkeys(phase for _, phase, _ in rows)
        least = max(megabytes for _, phase, megabytes in rows if phase == "start")
        columns[name] = {
            each: (
                sum(phase == each for _, phase, _ in rows) * rows[-1][0] / len(rows),
                max(mb for _, phase, mb in rows if phase == each) - least,
            )
            for each in phases
        }
    print(f"| phase | {' | '.join(f'{name}: GB above the start, seconds' for name in runs)} |\n|---|{'---|' * len(runs)}")
    for phase in next(iter(columns.values())):
        cells = (f"{columns[name][phase][1] / 1e3:.2f}, {columns[name][phase][0]:.0f}" for name in runs)
        print(f"| {phase} | {' | '.join(cells)} |")


def job(base: Path, home: Path, limit_bytes: float, code: str) -> dict[str, float]:
    """Run the job within a limit (see `measured`)."""
    found = measured([__file__, "--job", str(base), "--home", str(home), "--code", code], home, limit_bytes)
    if last_event(home)["kind"] != "end":
        raise SystemExit(f"the job did not end: {(home / 'errors.log').read_text()[-1500:]}")
    return found


def last_event(folder: Path) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    return event


def run_server(uri: str, home: str, memory_gb: float) -> None:
    """Load an artifact in the embedded engine, generate tokens at the `SERVED` sizes, and print events as lines of JSON."""
    import asyncio

    from acip_platform.serve.http.requests import CompletionRequest
    from acip_platform.serve.replica import EngineReplica
    from acip_platform.tracking.registry import ModelVersion

    os.environ["ACIP_HOME"] = home
    print(json.dumps({"kind": "start"}), flush=True)
    largest, version = str(max(SERVED)), ModelVersion("streamed", "1", uri, (), {})

    def stage(text: str) -> None:
        print(json.dumps({"kind": "stage", "text": text}), flush=True)

    async def generate() -> None:
        began = time.time()
        threads = int(os.environ["OMP_NUM_THREADS"])
        replica = EngineReplica([version], 3600.0, "cpu", threads, memory_gb, default_size=largest, max_size=largest)
        while not (state := await replica.ready())["warm"]:
            if state["failed"]:
                raise SystemExit(str(state["failed"]))
            await asyncio.sleep(0.2)
        stage(f"loaded and checked in {time.time() - began:.0f} s")
        for size in SERVED:
            request = CompletionRequest.parse({"prompt": "The", "size_ratio": size, "max_tokens": 8, "temperature": 0.0, "seed": 0})
            events = [event async for batch in replica.stream(version, request) for event in batch]
            if events[-1].kind != "done":
                raise SystemExit(str(events[-1].data))
            facts, done = events[0].data["size"], events[-1].data
            stage(
                f"{done['usage']['completion_tokens']} tokens at {facts['got']:.4f} of the bytes, {done['timings']['tokens_per_s']:.2f} a "
                f"second, the first after {done['timings']['queued_s'] + done['timings']['first_token_s']:.0f} s"
            )

    asyncio.run(generate())
    os._exit(0)  # the engine's threads do not end


def serve(home: Path, uri: str, limit_bytes: float, memory_gb: float) -> float:
    """Export the `SERVED` sizes of an artifact, and generate tokens at them, each within a limit; print what they take.

    Return the highest anonymous memory of the server in bytes.
    """
    settings = {**os.environ, "ACIP_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    for size in SERVED:
        out = home / f"export-{size:g}"
        command = [str(ROOT / "jobs" / "materialize.py"), uri, "--size", str(size), "--out", str(out)]
        taken = measured(command, home / "cut", limit_bytes, settings)
        weights = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        print(f"cut to {size:g}: {weights / 1e9:.2f} GB written; {described(taken)}", flush=True)
    taken = measured([__file__, "--server", uri, "--home", str(home), "--memory-gb", str(memory_gb)], home / "serve", limit_bytes)
    print(f"served: {described(taken)}")
    return taken["highest"]


def described(taken: dict[str, float]) -> str:
    return (
        f"{taken['highest'] / 1e9:.2f} GB of anonymous memory at most, {taken['group'] / 1e9:.2f} GB in the control group with page cache; "
        f"{taken['seconds']:.0f} s"
    )


def main() -> int:
    from acip_platform.cli import positive_number

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.4 GB of weights in 1 GB, and the same held in memory")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 if the ratio is below {GOAL:g}")
    parser.add_argument("--size-gb", type=positive_number, default=6.0, help="of the weights (default: 6)")
    parser.add_argument("--limit-gb", type=positive_number, default=1.5, help="of the control group (default: 1.5)")
    parser.add_argument("--code", choices=("bits", "ranks", "both"), default="bits", help="of the recipe (default: bits)")
    parser.add_argument("--held", action="store_true", help="also run the job without a limit")
    parser.add_argument("--home", type=Path, default=Path("/tmp/acip-streaming"), help="of checkpoint and results")
    parser.add_argument(
        "--serve",
        action="store_true",
        help=f"export the sizes {' and '.join(map(str, SERVED))} of the artifact of a job that has ended, and serve both",
    )
    parser.add_argument("--serve-gb", type=positive_number, default=4.0, help="of the control group of each of these (default: 4)")
    parser.add_argument("--memory-gb", type=positive_number, help="of them, for the weights that are served (default: 0.8 less)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--server", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.server:
        run_server(args.server, str(args.home), args.memory_gb)
        return 0
    if args.job:
        run_job(args.job, str(args.home), args.code)
        return 0
    if args.quick:
        args.size_gb, args.limit_gb, args.held = 0.4, 1.0, True
    if args.size_gb < (least := (REST_BYTES + LEAST_BLOCKS * BLOCK_BYTES) / 1e9):
        parser.error(f"--size-gb is {args.size_gb:g}; it must be at least {math.ceil(least * 100) / 100:g}, for {LEAST_BLOCKS} blocks.")
    base = args.home / f"base-{args.size_gb:g}"
    if not (base / "config.json").is_file():
        base.mkdir(parents=True, exist_ok=True)
        write_base(base, args.size_gb)
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    name = f"{args.size_gb:g}" if args.code == "bits" else f"{args.code}-{args.size_gb:g}"
    home, held_home = args.home / f"streamed-{name}", args.home / f"held-{name}"
    if args.serve:
        if not (home / "events.jsonl").is_file() or last_event(home)["kind"] != "end":
            parser.error(f"no job has ended in {home}. Run it first, without --serve.")
        highest = serve(home, last_event(home)["uri"], args.serve_gb * 1e9, args.memory_gb or args.serve_gb - 0.8)
        print(f"memory, weights over served: {weights / highest:.2f}")
        return 0
    print(f"{weights / 1e9:.2f} GB of weights in a control group of {args.limit_gb:g} GB")
    streamed = job(base, home, args.limit_gb * 1e9, args.code)
    above = streamed["highest"] - streamed["start"]
    print(f"streamed: {above / 1e9:.2f} GB above the {streamed['start'] / 1e9:.2f} GB of the process; {streamed['seconds']:.0f} s")
    ratio = weights / above
    if args.held:
        held = job(base, held_home, 1e13, args.code)
        print(f"held: {(held['highest'] - held['start']) / 1e9:.2f} GB above; {held['seconds']:.0f} s")
        print_phases({"held": held_home, "streamed": home})
        ratio = (held["highest"] - held["start"]) / above
    print(f"memory, {'held' if args.held else 'weights'} over streamed: {ratio:.2f} (goal: {GOAL:g})")
    return int(args.check and ratio < GOAL)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
    sys.exit(main())
