"""Check the product on one GPU: one command, at most eight minutes, one JSON file and one table.

    python tests/gpu/check.py                     all parts on the GPU; results.json and table.md in ./gpu-check
    python tests/gpu/check.py --only decoding     one part (the option may be repeated)
    python tests/gpu/check.py --dry               the same code on a CPU with tiny shapes, about two minutes
    python tests/gpu/check.py --dry --device cuda tiny shapes on the GPU

It needs torch, transformers (5.16 or newer), peft, accelerate, safetensors, and this repository. It does not need a network, Ray, MLflow,
bitsandbytes, or pydantic. Weights are random with decaying singular values. The text ships with acip.

The most important part runs first. Each part has its own process and time limit. The files are rewritten after every new row, so a run
that is stopped early keeps its results. A failed part is recorded with its traceback, and the next part runs.
The exit code is 0 if every part passed, and 1 otherwise.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

from tests.gpu.report import Part, rows_of, write

LIMITS_S = {"correctness": 110.0, "calibration": 190.0, "decoding": 100.0, "serving": 80.0}  # the most important first
TOTAL_S = 480.0
PACKAGES = ("torch", "transformers", "peft", "safetensors", "accelerate")


def facts(device: str, dry: bool) -> dict[str, Any]:
    """Return the device, versions, and commit that the results depend on."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "shapes": "tiny" if dry else "full",
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found["gpu"] = output(query).replace(",", ";") or "unknown"
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    found["commit"] = output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]) or "unknown"
    return found


def output(command: list[str]) -> str:
    """Return the output of a command, or an empty string if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def run(part: Part, folder: Path, scratch: Path, device: str, dry: bool, update: Any) -> None:
    """Run one part in its own process until it ends or reaches its time limit."""
    rows, log = scratch / f"{part.name}.jsonl", scratch / f"{part.name}.log"
    command = [sys.executable, "-m", "tests.gpu.part", part.name, "--rows", str(rows), "--seconds", str(part.limit_s), "--device", device]
    paths = [str(ROOT), str(ROOT / "platform"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TMPDIR": str(scratch)}
    start, exit_code = time.monotonic(), None
    part.status = "running"
    with log.open("w") as out:
        process = subprocess.Popen(command + (["--dry"] if dry else []), cwd=ROOT, env=env, stdout=out, stderr=out)
        try:
            while exit_code is None and time.monotonic() - start < part.limit_s:
                try:
                    exit_code = process.wait(0.5)
                except subprocess.TimeoutExpired:
                    if len(found := rows_of(rows)) > len(part.rows):
                        part.rows, part.seconds = found, time.monotonic() - start
                        update()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    part.rows, part.seconds = rows_of(rows), time.monotonic() - start
    part.set_status(exit_code)
    printed_text = log.read_text(errors="replace")
    print(printed_text, end="", flush=True)
    if part.status != "passed":
        part.log = "\n".join(printed_text.splitlines()[-30:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*LIMITS_S], action="append", help="run only this part (may be repeated)")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for results.json and table.md (default: gpu-check)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on a CPU unless --device is given")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda, or cpu with --dry")
    parser.add_argument("--slow", type=float, default=1.0, help="factor for all time limits, for a slow or busy machine")
    args = parser.parse_args()
    device = args.device or ("cpu" if args.dry else "cuda")
    if device == "cpu" and not args.dry:
        parser.error("the full shapes need a GPU; --dry runs the same code with tiny shapes on a CPU.")
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [Part(name, limit_s=limit * args.slow) for name, limit in LIMITS_S.items() if name in (args.only or LIMITS_S)]
    machine, start = facts(device, args.dry), time.monotonic()

    def update() -> None:
        write(args.out, machine, parts)

    update()
    with tempfile.TemporaryDirectory(prefix="acip-gpu-") as scratch:
        for part in parts:
            part.limit_s = min(part.limit_s, TOTAL_S * args.slow - (time.monotonic() - start))
            if part.limit_s <= 0:
                part.status = "failed: no time was left"
                continue
            print(f"{part.name}, at most {part.limit_s:.0f} s", flush=True)
            run(part, args.out, Path(scratch), device, args.dry, update)
            print(f"{part.name}: {part.status}, {part.seconds:.0f} s\n", flush=True)
            update()
    update()
    print(f"the table: {args.out / 'table.md'}, after {time.monotonic() - start:.0f} s")
    return int(any(part.status != "passed" for part in parts))


if __name__ == "__main__":
    sys.exit(main())
