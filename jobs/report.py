"""One self-contained HTML file (and JSON) about a calibrated model, or about several, their curves over each other.

    python jobs/report.py smollm2-135m --out report.html                       the champion; also NAME@candidate, NAME@3
    python jobs/report.py smollm2-135m@1 smollm2-135m@2 --out report.html      two versions
    python jobs/report.py --artifact s3://bucket/artifacts/... --out report.html
    python jobs/report.py --sweep RUN_ID --out report.html                     all runs inside a sweep's (or fleet's) MLflow run
    python jobs/report.py smollm2-135m --baselines rows.json --out report.html [{method, got, perplexity}, ...] dashed beside it

It opens offline and prints; report.json is written beside it. Only the artifacts' small files are read.
"""

import argparse
import json
import sys
from pathlib import Path

from acip_platform.reporting.report import Subject, baseline_rows, facts, page
from acip_platform.settings import Settings
from acip_platform.storage.inputs import placed
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import CHAMPION, Registry, reached
from acip_platform.tracking.runs import artifacts_inside

from acip.errors import AcipError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME[@VERSION]", help=f"registered models, with a version or alias ({CHAMPION})")
    parser.add_argument("--artifact", nargs="+", default=[], metavar="URI", help="artifacts by URI or path")
    parser.add_argument("--sweep", metavar="RUN_ID", help="MLflow run of a sweep or fleet")
    parser.add_argument("--baselines", type=Path, metavar="FILE", help="JSON rows of other methods, like ACIP_HOME/arenas/demo.json")
    parser.add_argument("--title", help="(default: the first model's name)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="(default: %(default)s)")
    args = parser.parse_args()
    if not args.names and not args.artifact and not args.sweep:
        parser.error("name a registered model, or give --artifact or --sweep.")
    if args.out.suffix != ".html":
        parser.error(f"--out is {args.out}; it must end in .html: the JSON goes beside it.")
    try:
        subjects = chosen(args, Settings.from_env())
        corpus = next((row.get("corpus", "") for subject in subjects for row in subject.artifact.curve), "")
        baselines = baseline_rows(args.baselines, corpus) if args.baselines else {}
        found = facts(subjects, baselines, args.title or subjects[0].label)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page(found, subjects), encoding="utf-8")
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    except (AcipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130
    print(f"report  {args.out}\ndata    {args.out.with_suffix('.json')}")
    return 0


@reached()
def chosen(args: argparse.Namespace, settings: Settings) -> list[Subject]:
    store, registry = Store.of(settings), Registry(settings)
    subjects = []
    for asked in args.names:
        version = registry.named(asked)
        subjects.append(Subject(asked, version.uri, store.open(version.uri), version))
    uris = {uri.rstrip("/").rpartition("/")[2]: placed(uri) for uri in args.artifact}
    if len(uris) < len(args.artifact):
        uris = {uri: placed(uri) for uri in args.artifact}
    if args.sweep:
        uris |= artifacts_inside(settings, args.sweep)
    return subjects + [Subject(label, uri, store.open(uri)) for label, uri in uris.items()]


if __name__ == "__main__":
    sys.exit(main())
