"""Compare the methods of the paper's Table 1 on one base model, and print the table.

    python jobs/arena.py                                       SmolLM2-135M, on text included in acip
    python jobs/arena.py --arena jobs/arenas/paper.yaml        LLaMA-7B, with the paper's numbers in the table: needs GPUs and the hub
    ray job submit -- python jobs/arena.py --only asvd acip    two methods, on a running Ray

Methods run side by side as Ray tasks. Finished rows are skipped (--force measures them again). A method that fails does not stop
the others. Table, rows and plot are written to ACIP_HOME/arenas/, and the rows are models of MLflow's experiment acip/ARENA.

Exit codes: 0 all rows are measured, 1 some methods failed, 2 wrong arguments or files, 130 interrupted.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from acip_platform import cli
from acip_platform.cluster import connect
from acip_platform.evaluation import method_comparison_report
from acip_platform.evaluation.method_comparison import Arena, Results, entries, hold
from acip_platform.evaluation.method_comparison_models import log_arena
from acip_platform.reporting.console import Watch, console, lines
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.job_queue import nodes
from acip_platform.settings import Settings
from acip_platform.tracking.registry import reached
from acip_platform.tracking.runs import models_page

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--arena", default=str(ROOT / "jobs" / "arenas" / "demo.yaml"), help="arena file (default: the embedded demo)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="run only these methods of the arena")
    parser.add_argument("--force", action="store_true", help="measure finished rows again")
    cli.add_pool(parser)
    cli.add_dry_run(parser)
    args = cli.parse(parser, argv)
    return cli.exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    out, settings, complete = console(), Settings.from_env(), Arena.load(args.arena)
    cli.check_only(args.only, list(complete.methods), "arena")
    arena = dataclasses.replace(complete, methods={name: complete.methods[name] for name in args.only or complete.methods})
    folder = settings.home / "arenas"
    results = Results(folder / f"{arena.name}.json")
    if args.force:
        results.forget(arena)
    todo = entries(arena, results)
    out.print(f"arena {arena.name}: {len(arena.methods)} methods, {len(results.of(arena))} rows done, {len(todo)} tasks to do")
    for entry in todo:
        out.print(f"[{entry.method}] sizes {', '.join(f'{size:g}' for size in entry.sizes)}")
    if args.dry_run:
        return 0
    failures = []
    if todo:
        connect(settings)
        events = open_event_queue()
        with Watch(out, events):
            failures = hold(arena, results, events, args.pool or nodes(), out.print)
    rows = results.of(complete)  # rows of the other methods, too
    if rows:
        out.print(method_comparison_report.table(rows, complete))
        out.print(method_comparison_report.costs(rows))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{arena.name}.md").write_text(method_comparison_report.markdown(rows, complete), encoding="utf-8")
        method_comparison_report.figure(rows, complete).savefig(folder / f"{arena.name}.png", dpi=150)
        with reached(settings):
            page = models_page(settings, log_arena(settings, complete, rows).experiment_id)
        files = {kind: str(folder / f"{arena.name}.{suffix}") for kind, suffix in (("rows", "json"), ("table", "md"), ("plot", "png"))}
        lines(out, {**files, "models in MLflow": page})
    for entry, error in failures:
        out.print(f"[{entry.method} {', '.join(f'{size:g}' for size in entry.sizes)}] FAILED: {error}")
    return cli.FAILED if failures else 0


if __name__ == "__main__":
    sys.exit(main())
