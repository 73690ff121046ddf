"""Write one self-contained HTML file (and JSON) about a calibrated model, or about several models with their curves in one plot.

    python jobs/report.py smollm2-135m --out report.html                       the champion; NAME@candidate and NAME@3 work, too
    python jobs/report.py smollm2-135m@1 smollm2-135m@2 --out report.html      two versions
    python jobs/report.py --artifact s3://bucket/artifacts/... --out report.html
    python jobs/report.py --sweep RUN_ID --out report.html                     all runs below the MLflow run of a sweep or a fleet
    python jobs/report.py smollm2-135m --baselines rows.json --out report.html rows [{method, got, perplexity}, ...] as dashed curves

The curves are also printed. The file opens offline and prints well; report.json is written beside it.
Only the small files of the artifacts are read.

Exit codes: 0 the report is written, 2 wrong arguments or no such model, 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from acip_platform import cli
from acip_platform.reporting.console import console, curve_tables, lines
from acip_platform.reporting.report import Subject, baseline_rows, facts, page
from acip_platform.settings import Settings
from acip_platform.storage.inputs import placed
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import CHAMPION, Registry, reached
from acip_platform.tracking.runs import artifacts_inside


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME[@VERSION]", help=f"names in the registry, with a version or alias (default: {CHAMPION})"
    )
    parser.add_argument("--artifact", nargs="+", default=[], metavar="URI", help="artifacts by URI or path")
    parser.add_argument("--sweep", metavar="RUN_ID", help="MLflow run of a sweep or a fleet")
    parser.add_argument("--baselines", type=Path, metavar="FILE", help="JSON rows of other methods, like ACIP_HOME/arenas/demo.json")
    parser.add_argument("--title", help="title of the page (default: the name of the first model)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: %(default)s)")
    args = cli.parse(parser, argv)
    if not args.names and not args.artifact and not args.sweep:
        parser.error("give the name of a registered model, --artifact or --sweep.")
    if args.out.suffix != ".html":
        parser.error(f"--out is {args.out}; it must end in .html, because the JSON file goes beside it.")
    return cli.exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    subjects = subjects_of(args, Settings.from_env())
    corpus = next((row.get("corpus", "") for subject in subjects for row in subject.artifact.curve), "")
    baselines = baseline_rows(args.baselines, corpus) if args.baselines else {}
    content = facts(subjects, baselines, args.title or subjects[0].label)
    data = args.out.with_suffix(".json")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(content, subjects), encoding="utf-8")
    data.write_text(json.dumps(content, indent=1), encoding="utf-8")
    out = console()
    for subject in subjects:
        if subject.artifact.curve:
            out.print(curve_tables(subject.label, subject.artifact.curve, subject.artifact.recipe.stop_ratio))
    lines(out, {"report": str(args.out), "data": str(data)})


@reached()
def subjects_of(args: argparse.Namespace, settings: Settings) -> list[Subject]:
    """Return the models that the report is about."""
    store, registry = Store.of(settings), Registry(settings)
    subjects = []
    for name in args.names:
        version = registry.named(name)
        subjects.append(Subject(name, version.uri, store.open(version.uri), version))
    uris = {uri.rstrip("/").rpartition("/")[2]: placed(uri) for uri in args.artifact}
    if len(uris) < len(args.artifact):  # equal last parts: the whole URIs are the labels
        uris = {uri: placed(uri) for uri in args.artifact}
    if args.sweep:
        uris |= artifacts_inside(settings, args.sweep)
    return subjects + [Subject(label, uri, store.open(uri)) for label, uri in uris.items()]


if __name__ == "__main__":
    sys.exit(main())
