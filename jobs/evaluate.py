"""Measure sizes of a calibrated model, or any other model: perplexity, divergence from the base model, tasks, speed, samples.

    python jobs/evaluate.py --model smollm2-135m --sizes 1.0 0.6 0.4 --tasks package:paper --limit 500
    python jobs/evaluate.py --artifact s3://bucket/artifacts/... --data wikitext2 c4 --protocol field paper --context 4096 --tasks paper
    python jobs/evaluate.py --base HuggingFaceTB/SmolLM2-135M --tasks package:piqa            an export's folder works, too
    python jobs/evaluate.py --base small --reference HuggingFaceTB/SmolLM2-135M               also its divergence from that model
    python jobs/evaluate.py --base small --data wiki.test.txt --all-documents                 all of your own text

Sizes run side by side as Ray tasks. Finished measurements are not repeated. Rows go to MLflow, to a JSON file, and into the curve
of the artifact.

Exit codes: 0 every size is measured, 1 some sizes failed, 2 wrong arguments, 130 interrupted.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import ray
import torch
from acip_platform import cli
from acip_platform.cluster import connect
from acip_platform.evaluation.measure import Model, Row, log_models, log_rows, measure_sizes, record, shown
from acip_platform.reporting.console import Watch, console, duration, evaluation_table, lines
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.fleet import known_domains
from acip_platform.scheduling.job_queue import Nodes, nodes
from acip_platform.settings import Settings, masked
from acip_platform.storage.disk import Disk
from acip_platform.storage.inputs import placed, resolved
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.logged_models import experiment_of
from acip_platform.tracking.registry import CHAMPION, Registry, reached
from acip_platform.tracking.runs import Run, Tracking, models_page, runs_page
from filelock import FileLock

from acip.artifact.artifact import Artifact
from acip.base import base_positions, positions
from acip.data import documents
from acip.errors import BudgetError, EvaluationError
from acip.evaluate import DivergenceOn, Efficiency, Measurement, OnDomains, PerplexityOn, QuantizedOn, Samples, Text
from acip.evaluate.domains import EVERY_DOMAIN
from acip.evaluate.efficiency import device_name
from acip.evaluate.samples import PROMPTS
from acip.evaluate.tasks import check, expand
from acip.evaluate.tasks import measurements as task_measurements
from acip.mixture import Mixture
from acip.recipe import Dtype
from acip.sizing.budget import Budget, Convention, is_coded

KINDS = ("perplexity", "divergence", "efficiency", "samples")
NO_REFERENCE = " (divergence from another model with --reference)"
SIZES = (1.0, 0.8, 0.6, 0.4)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="NAME[@ALIAS]", help=f"name in the registry, with an alias or version (default: {CHAMPION})")
    model.add_argument("--artifact", metavar="URI", help="path or URI of an artifact")
    model.add_argument("--base", metavar="ID", help="an uncompressed or exported model: hub id, folder, .gguf file or package:NAME")
    parser.add_argument("--reference", metavar="ID", help="model that --base is compared with (KL, equal top tokens): hub id, folder, ...")
    parser.add_argument(
        "--sizes", nargs="+", type=cli.ratio, help="size ratios, 0.6 or 60%% (default: those of the curve, else 1.0 0.8 0.6 0.4)"
    )
    parser.add_argument(
        "--convention",
        choices=get_args(Convention),
        help="what --sizes count (default: bytes if the artifact has codes, else linear; linear with --quantize)",
    )
    text = parser.add_argument_group("text (default: that of the curve, else package:wikipedia)")
    text.add_argument("--data", nargs="+", metavar="SOURCE", help="package:wikipedia (or austen, code), wikitext2, c4, or local text")
    text.add_argument("--protocol", nargs="+", help="packed, spread, field, paper: see acip/evaluate/heldout_text.py (default: packed)")
    text.add_argument(
        "--context", type=cli.whole_number(2), help="tokens per window (default: 2048, or the model's maximum if that is smaller)"
    )
    text.add_argument(
        "--all-documents", action="store_true", help="all of a text that was not used for calibration (default: every eighth document)"
    )
    text.add_argument("--windows", type=cli.whole_number(0), help="largest number of windows; 0 = all (default: all)")
    text.add_argument(
        "--quantize", nargs="+", choices=("nf4", "int8"), default=[], help="also measure perplexity in these bits (artifacts only)"
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="names of lm-eval, package:NAME, generated:NAME, paper, ...")
    tasks.add_argument("--task-folder", default="", metavar="FOLDER", help="folder with your own task files")
    tasks.add_argument("--shots", type=cli.whole_number(0), help="examples in the prompt (default: as the task defines)")
    tasks.add_argument("--limit", type=cli.whole_number(0), default=0, help="largest number of items per task; 0 = all (default: all)")
    speed = parser.add_argument_group("speed and samples")
    speed.add_argument("--batch", type=cli.whole_number(1), default=1, help="sequences at once (default: %(default)s; the paper: 64)")
    speed.add_argument("--prompt-tokens", type=cli.whole_number(1), default=128, help="(default: %(default)s)")
    speed.add_argument("--new-tokens", type=cli.whole_number(2), default=32, help="(default: %(default)s; the paper: 64)")
    speed.add_argument("--prompts", nargs="+", default=list(PROMPTS), help="prompts of the samples")
    parser.add_argument(
        "--domains", nargs="*", metavar="SOURCE",
        help="also measure these domains of text, `chat` among them (default: none; without a SOURCE: " + " ".join(EVERY_DOMAIN) + ")",
    )  # fmt: skip
    parser.add_argument("--skip", nargs="+", choices=KINDS, default=[], help="measurements to leave out")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="dtype that --base is loaded in (default: bfloat16)")
    cli.add_pool(parser)
    parser.add_argument("--cpus", type=cli.number_from_zero, default=0.0, help="CPUs per size; 0 = divided evenly (default: 0)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with --base")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the rows (default: ACIP_HOME/evaluations/...)")
    args = cli.parse(parser, argv)
    check_combinations(parser, args)
    return args


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error for options that do not go together."""
    if args.base and args.quantize:
        parser.error("--quantize measures the cost of quantizing a size: give --model or --artifact.")
    if (args.limit or args.shots is not None or args.task_folder) and not args.tasks:
        parser.error("--limit, --shots and --task-folder need --tasks.")
    if args.dtype and not args.base:
        parser.error("--dtype needs --base; an artifact has its own dtype.")
    if args.convention and not args.sizes:
        parser.error("--convention needs --sizes.")
    if args.domains is not None and args.base:
        parser.error("--domains compares sizes of an artifact with its base model: give --model or --artifact.")
    if args.reference and not args.base:
        parser.error("--reference needs --base; an artifact is compared with its own base model.")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    return cli.exit_code(lambda: run(args, Settings.from_env()))


@reached()
def run(args: argparse.Namespace, settings: Settings) -> int:
    began, out = time.monotonic(), console()
    name, model, artifact = model_of(args, settings)
    sizes = sizes_of(args, artifact)
    texts = texts_of(args, artifact)
    check(expand(args.tasks), args.task_folder)
    if args.out:
        check_writable(args.out)  # before the work
    connect(settings)
    cluster = args.pool or nodes()
    what = model.reads(artifact, measurements(args, texts, artifact, cluster))
    mlflow_run, identity = start_run(settings, name, model, artifact, what)
    file = settings.home / "evaluations" / f"{name}-{identity}.json"
    check_writable(file)
    lines(out, {
        "model": name + (f" at {masked(model.uri)}" if model.uri else ""),
        "sizes": ", ".join(map(shown, sizes)),
        "measured": ", ".join(dict.fromkeys(part.kind for part in what)) + ("" if artifact or args.reference else NO_REFERENCE),
        "run": f"{mlflow_run.run_id} in experiment {mlflow_run.experiment_id} of {masked(settings.tracking_uri)}",
    })  # fmt: skip
    events = open_event_queue()
    rows, errors, notes = list[dict[str, Any]](), dict[str, str | None](), list[str]()
    with mlflow_run.ending(lambda: "FAILED" if errors else "FINISHED"), Watch(out, events):
        for outcome in measure_sizes(model, sizes, what, settings, events, cluster, args.cpus):
            if outcome.row is None:
                errors[shown(outcome.size)] = outcome.error
                continue
            rows.append(outcome.row)
            rows.sort(key=_order)
            with FileLock(f"{file}.lock"):  # another evaluation may measure other sizes
                kept = merged(read(file, out), rows)
                for each in dict.fromkeys((file, args.out or file)):
                    Disk().write(str(each), json.dumps(kept, indent=1).encode())
        if rows:
            log_rows(mlflow_run, kept)
            log_models(mlflow_run, name, model, artifact, kept)
        if model.uri and rows:
            notes = recorded(Store.of(settings), model.uri, rows)
    last_screen(out, name, rows, errors, notes, args.out or file, time.monotonic() - began)
    experiment_id = experiment_of(mlflow_run, artifact)
    lines(out, {"table of runs": runs_page(settings, mlflow_run.experiment_id), "table of models": models_page(settings, experiment_id)})
    return cli.FAILED if errors else 0


def check_writable(file: Path) -> None:
    """Create the file if it does not exist; OSError if it cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.open("a").close()


def read(file: Path, out: Any) -> list[Row]:
    """Return the rows in a file; none if it does not exist or is damaged."""
    try:
        rows: list[Row] = json.loads(file.read_text()) if file.exists() and file.stat().st_size else []
        return [{**row, "asked": float(row["asked"])} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        out.print(f"{file} does not hold rows ({error!r}); it is overwritten.")
        return []


def merged(before: list[Row], rows: list[Row]) -> list[Row]:
    """Return the newest row of each size: ranks, then codes, the largest first. `before` are rows of other runs with these measurements."""
    return sorted({_order(row): row for row in (*before, *rows)}.values(), key=_order)


def _order(row: Row) -> tuple[bool, float]:
    return is_coded(row), -row["asked"]


def recorded(store: Store, uri: str, rows: list[Row]) -> list[str]:
    """Add rows to the curve of the artifact. Returns notes about rows that could not be added."""
    try:
        left_out = ", ".join(f"{size:g}" for size in record(store, uri, rows)[1])
    except StoreError as error:  # the artifact may be read-only
        return [f"the curve of the artifact was not changed: {error}"]
    if not left_out:
        return []
    return [f"sizes {left_out} were not added to the artifact's curve; leave --data out, to measure on the text of the curve."]


def model_of(args: argparse.Namespace, settings: Settings) -> tuple[str, Model, Artifact | None]:
    """Return (display name, model, its artifact or None)."""
    if args.base:
        base = resolved(args.base)
        return Path(base.replace(":", "-")).name, Model("", base, args.dtype or Model.dtype, args.trust_remote_code), None
    uri, name = args.artifact, ""
    if args.model:
        version = Registry(settings).named(args.model)
        name, uri = version.name, version.uri
    else:
        uri = placed(uri)
    artifact = Store.of(settings).open(uri)
    return name or uri.rstrip("/").rpartition("/")[2], Model(uri), artifact


def sizes_of(args: argparse.Namespace, artifact: Artifact | None) -> list[Budget]:
    """Return the sizes; BudgetError for a size that the model cannot have."""
    if artifact is None:
        if args.sizes and args.sizes != [1.0]:
            raise BudgetError("--base has size 1.0 only. Calibrate it to have other sizes, and give --model.")
        return [Budget(1.0)]
    table = artifact.table()
    if args.sizes or not artifact.curve:
        convention = args.convention or ("linear" if args.quantize else table.convention)  # codes are not quantized
        sizes = [Budget(size, convention) for size in sorted(args.sizes or SIZES, reverse=True)]
    else:
        sizes = [Budget(row["asked"], row.get("convention", "linear")) for row in artifact.curve if not (args.quantize and is_coded(row))]
    for size in sizes:
        if table.cut(size).versions is not None and args.quantize:
            raise BudgetError(
                f"--quantize is for sizes of ranks, but size {shown(size)} is stored in codes. Use --convention linear, or leave it out."
            )
    return list(dict.fromkeys(sizes))


def texts_of(args: argparse.Namespace, artifact: Artifact | None) -> list[Text]:
    """Return the texts to measure on; DataError for one that cannot be read, before any long work starts."""
    if {"perplexity", "divergence"} <= set(args.skip) and not args.quantize:
        return []
    first = artifact.curve[0] if artifact is not None and artifact.curve and not args.data else {}
    if args.all_documents and (not args.data or trained_on(artifact) & {resolved(source) for source in args.data}):
        raise EvaluationError(
            "--all-documents needs --data with a text that was not used for calibration; only the held-out documents of the "
            "calibration text may be measured."
        )
    context = args.context or first.get("context")
    if not context:
        longest = base_positions(args.base, args.trust_remote_code) if artifact is None else positions(artifact.config)
        context = min(2048, longest or 2048)
    windows = first.get("windows", 0) if args.windows is None else args.windows
    sources = args.data or [first.get("corpus", "package:wikipedia")]
    texts = [
        Text(resolved(source), protocol, context, windows, "all" if args.all_documents else first.get("split", "heldout"))
        for source in sources
        for protocol in args.protocol or [first.get("protocol", "packed")]
    ]
    for source, split in dict.fromkeys((text.source, text.split) for text in texts):
        next(documents(source, split))
    return texts


def trained_on(artifact: Artifact | None) -> set[str]:
    """Return the texts that an artifact was calibrated and fine-tuned on."""
    sources, origin = set[str](), {} if artifact is None else artifact.manifest.get("provenance", {})
    while origin:
        sources |= {resolved(source) for source in Mixture.of(origin.get("job", {}).get("data", "")).sources}
        origin = origin.get("parent", {})
    return sources - {""}


def measurements(args: argparse.Namespace, texts: list[Text], artifact: Artifact | None, cluster: Nodes) -> list[Measurement]:
    """Return the measurements that the options select. Speeds on different kinds of device are different measurements."""
    kinds = [key.partition(":")[2] for key in ray.cluster_resources() if key.startswith("accelerator_type:")]
    folder = resolved(args.task_folder)
    what: list[Measurement] = [PerplexityOn(text) for text in texts if "perplexity" not in args.skip]
    reference = resolved(args.reference or "")
    what += [DivergenceOn(text, reference) for text in texts if (artifact or reference) and "divergence" not in args.skip]
    if args.domains is not None:
        what.append(OnDomains(known_domains(args.domains or EVERY_DOMAIN), calibrated_on=tuple(sorted(trained_on(artifact)))))
    what += [QuantizedOn(text, kind) for text in texts for kind in args.quantize]
    what += task_measurements(args.tasks, folder, args.shots, args.limit)
    if "samples" not in args.skip:
        what.append(Samples(tuple(args.prompts)))
    if "efficiency" not in args.skip:
        if not kinds:
            name = device_name(torch.device("cpu"))
            kinds = ["GPU" if any(node.get("GPU", 0) for node in cluster) else f"{name} x {max(node.get('CPU', 0) for node in cluster):g}"]
        what.append(Efficiency(args.batch, args.prompt_tokens, args.new_tokens, device="+".join(sorted(kinds))))
    if not what:
        raise EvaluationError("there is nothing to measure: give --tasks, or fewer kinds to --skip.")
    return what


def start_run(settings: Settings, name: str, model: Model, artifact: Artifact | None, what: list[Measurement]) -> tuple[Run, str]:
    """Start or continue the MLflow run of these measurements of this model. Returns it and the hash that identifies it."""
    # the device is a result, not a part of the request
    what = [replace(measurement, device="") if isinstance(measurement, Efficiency) else measurement for measurement in what]
    keys = [model.identity(artifact), *(measurement.key for measurement in what)]
    identity = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:12]
    run = Tracking(settings, "acip/evaluation").start(name, f"evaluation-{identity}", {"model": name, "artifact_uri": model.uri})
    return run, identity


def last_screen(out: Any, name: str, rows: list[Row], errors: dict[str, str | None], notes: list[str], file: Path, seconds: float) -> None:
    if rows:
        out.print()
        out.print(evaluation_table(name, rows))
    for size, error in errors.items():
        out.print(f"size {size} FAILED: {error}")
    for note in notes:
        out.print(note)
    if rows:
        out.print(f"rows: {file}")
    out.print(f"{len(rows)} of {len(rows) + len(errors)} sizes measured, after {duration(seconds)}.")
    if errors:
        out.print("Run the same command again for the others; finished measurements are not repeated.")


if __name__ == "__main__":
    sys.exit(main())
