"""Let every method of the paper's Table 1 compress one base model, and print the table.

    python jobs/arena.py                                       SmolLM2-135M, on the text that ships with acip
    python jobs/arena.py --arena jobs/arenas/paper.yaml        LLaMA-7B as in the paper, its own numbers beside: GPUs and the hub
    ray job submit -- python jobs/arena.py --only asvd acip    on a running Ray

Methods run side by side as Ray tasks. What is done is not done again (--force does); what fails is said, and the others go on.
Table, rows and plot are left in ACIP_HOME/arenas/. Exit code 0 = every row is there.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from acip_platform.cluster import connect
from acip_platform.evaluation import method_comparison_report
from acip_platform.evaluation.method_comparison import Arena, ArenaError, Results, entries, hold
from acip_platform.reporting.console import Watch, console, exit_code, lines
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.job_queue import nodes, pool
from acip_platform.settings import Settings

from acip.utils.coerce import did_you_mean

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arena", default=str(ROOT / "jobs" / "arenas" / "demo.yaml"), help="arena file (default: the embedded demo)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="only these methods of the arena")
    parser.add_argument("--force", action="store_true", help="do again what is done already")
    parser.add_argument("--pool", metavar="8xGPU:1,CPU:14", help="nodes that an autoscaler may start (default: the nodes there are)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    args = parser.parse_args()
    out = console()
    return exit_code(out, lambda: run(args, out))


def run(args: argparse.Namespace, out: Any) -> int:
    settings, whole = Settings.from_env(), Arena.load(args.arena)
    there = pool(args.pool) if args.pool else None
    for name in args.only or ():
        if name not in whole.methods:
            raise ArenaError(f"--only names {name!r}{did_you_mean(name, whole.methods)}; the arena has {', '.join(whole.methods)}.")
    arena = dataclasses.replace(whole, methods={name: whole.methods[name] for name in args.only or whole.methods})
    folder = settings.home / "arenas"
    results = Results(folder / f"{arena.name}.json")
    if args.force:
        results.forget(arena)
    todo = entries(arena, results)
    out.print(
        f"arena {arena.name}: {len(arena.methods)} methods, {len(results.of(arena))} rows done, {len(todo)} tasks to do", markup=False
    )
    for entry in todo:
        out.print(f"[{entry.method}] sizes {', '.join(f'{size:g}' for size in entry.sizes)}", markup=False)
    if args.dry_run:
        return 0
    failures = []
    if todo:
        connect(settings)
        inbox = open_event_queue()
        with Watch(out, inbox):
            failures = hold(arena, results, inbox, there or nodes(), lambda text: out.print(text, markup=False))
    rows = results.of(whole)  # those of other methods, too
    if rows:
        out.print(method_comparison_report.table(rows, whole))
        out.print(method_comparison_report.costs(rows))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{arena.name}.md").write_text(method_comparison_report.markdown(rows, whole), encoding="utf-8")
        method_comparison_report.figure(rows, whole).savefig(folder / f"{arena.name}.png", dpi=150)
        lines(out, {kind: str(folder / f"{arena.name}.{suffix}") for kind, suffix in (("rows", "json"), ("table", "md"), ("plot", "png"))})
    for entry, error in failures:
        out.print(f"[{entry.method} {', '.join(f'{size:g}' for size in entry.sizes)}] FAILED: {error}", markup=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
