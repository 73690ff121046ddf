"""Measure sizes of a calibrated model, or any other model: perplexity, distance from the base, tasks, speed, samples.

    python jobs/evaluate.py --model smollm2-135m --sizes 1.0 0.6 0.4 --tasks package:paper --limit 500
    python jobs/evaluate.py --artifact s3://bucket/artifacts/... --data wikitext2 c4 --protocol field paper --context 4096 --tasks paper
    python jobs/evaluate.py --base HuggingFaceTB/SmolLM2-135M --tasks package:piqa            also an export's folder
    python jobs/evaluate.py --base small --reference HuggingFaceTB/SmolLM2-135M               its distance from that model, too

Sizes are Ray tasks, side by side; what is measured already is not measured again. Rows go to MLflow, to a JSON file, and beside the
artifact's curve. Exit code 0 = every size was measured, 1 = some were not, 2 = wrong arguments.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import ray
import torch
from acip_platform.cluster import connect
from acip_platform.evaluation.measure import Model, Row, log_rows, measure_sizes, record
from acip_platform.reporting.console import Watch, console, duration, evaluation_table, exit_code, lines
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.job_queue import Nodes, nodes, pool
from acip_platform.settings import Settings, masked
from acip_platform.storage.disk import Disk
from acip_platform.storage.inputs import placed, resolved
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.registry import CHAMPION, Registry, reached
from acip_platform.tracking.runs import Run, Tracking, runs_page
from filelock import FileLock

from acip.artifact.artifact import Artifact
from acip.base import base_positions, positions
from acip.data import documents
from acip.errors import BudgetError, EvaluationError
from acip.evaluate import DivergenceOn, Efficiency, Measurement, PerplexityOn, QuantizedOn, Samples, TaskScore, Text
from acip.evaluate.efficiency import device_name
from acip.evaluate.samples import PROMPTS
from acip.evaluate.tasks import check, expand
from acip.recipe import Dtype
from acip.sizing.budget import Budget

KINDS = ("perplexity", "divergence", "efficiency", "samples")
NO_REFERENCE = " (distance from another model with --reference)"
SIZES = (1.0, 0.8, 0.6, 0.4)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--model", metavar="NAME[@ALIAS]", help=f"name in the registry, with an alias or version (default: {CHAMPION})")
    of.add_argument("--artifact", metavar="URI", help="path or URI of an artifact")
    of.add_argument("--base", metavar="ID", help="a model as it is: hub id, folder, .gguf file or package:NAME")
    parser.add_argument("--reference", metavar="ID", help="what --base is compared with (KL, equal top tokens): hub id, folder, ...")
    parser.add_argument("--sizes", nargs="+", help="size ratios, 0.6 or 60%% (default: those of the curve, else 1.0 0.8 0.6 0.4)")
    text = parser.add_argument_group("text (default: that of the curve, else package:wikipedia)")
    text.add_argument("--data", nargs="+", metavar="SOURCE", help="package:wikipedia, package:austen, wikitext2, c4, or local text")
    text.add_argument("--protocol", nargs="+", help="packed, spread, field, paper: see acip/evaluate/heldout_text.py (default: packed)")
    text.add_argument("--context", type=int, help="tokens of a window (default: 2048, or as many as the model reads)")
    text.add_argument("--whole", action="store_true", help="all of a text that nothing was calibrated on (default: every eighth document)")
    text.add_argument("--windows", type=int, help="at most so many (default: all)")
    text.add_argument(
        "--quantize", "--quantise", nargs="+", choices=("nf4", "int8"), default=[], help="perplexity in these bits, too (with an artifact)"
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="lm-eval's names, package:NAME, paper, package:paper")
    tasks.add_argument("--task-folder", default="", metavar="FOLDER", help="task files of your own")
    tasks.add_argument("--shots", type=int, help="examples in the prompt (default: the task's own number)")
    tasks.add_argument("--limit", type=int, default=0, help="items of each task (default: all)")
    speed = parser.add_argument_group("speed, and what is said")
    speed.add_argument("--batch", type=int, default=1, help="sequences at once (default: %(default)s; the paper: 64)")
    speed.add_argument("--prompt-tokens", type=int, default=128, help="(default: %(default)s)")
    speed.add_argument("--new-tokens", type=int, default=32, help="(default: %(default)s; the paper: 64)")
    speed.add_argument("--prompts", nargs="+", default=list(PROMPTS), help="of the samples")
    parser.add_argument("--skip", nargs="+", choices=KINDS, default=[], help="leave these measurements out")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="that --base is loaded in (default: bfloat16)")
    parser.add_argument("--pool", metavar="8xGPU:1,CPU:14", help="nodes that an autoscaler may start (default: the nodes there are)")
    parser.add_argument("--cpus", type=float, default=0.0, help="CPUs of each size (default: shared out)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with --base")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the rows as JSON (default: ACIP_HOME/evaluations/...)")
    args = parser.parse_args()
    if args.base and args.quantize:
        parser.error("--quantize measures what quantizing a size costs: give --model or --artifact.")
    if min(args.cpus, args.limit, args.shots or 0) < 0 or min(args.batch, args.prompt_tokens) < 1 or args.new_tokens < 2:
        parser.error("--cpus, --limit and --shots are 0 or more, --batch and --prompt-tokens 1 or more, --new-tokens 2 or more.")
    if (args.limit or args.shots is not None or args.task_folder) and not args.tasks:
        parser.error("--limit, --shots and --task-folder are of --tasks: name some.")
    if args.dtype and not args.base:
        parser.error("--dtype is of --base: an artifact has its own.")
    if args.reference and not args.base:
        parser.error("--reference goes with --base: an artifact knows its base model.")
    return args


def main() -> int:
    args = arguments()
    out = console()
    return exit_code(out, lambda: run(args, out, Settings.from_env()))


@reached()
def run(args: argparse.Namespace, out: Any, settings: Settings) -> int:
    began = time.monotonic()
    name, model, artifact = found(args, settings)
    sizes = reachable(args, artifact)
    texts = texts_of(args, artifact)
    check(expand(args.tasks), args.task_folder)
    there = pool(args.pool) if args.pool else []
    if args.out:
        opened(args.out)  # where nothing can be written is known before the work
    connect(settings)
    there = there or nodes()
    what = model.reads(artifact, measurements(args, texts, artifact is not None, there))
    mlflow_run, identity = start_run(settings, name, model, artifact, what)
    file = settings.home / "evaluations" / f"{name}-{identity}.json"
    opened(file)
    lines(out, {
        "model": name + (f" at {masked(model.uri)}" if model.uri else ""),
        "sizes": ", ".join(f"{size:g}" for size in sizes),
        "measured": ", ".join(dict.fromkeys(one.kind for one in what)) + ("" if artifact or args.reference else NO_REFERENCE),
        "run": f"{mlflow_run.run_id} in experiment {mlflow_run.experiment_id} of {masked(settings.tracking_uri)}",
    })  # fmt: skip
    inbox = open_event_queue()
    rows, errors, notes = list[dict[str, Any]](), dict[float, str | None](), list[str]()
    with mlflow_run.ending(lambda: "FAILED" if errors else "FINISHED"), Watch(out, inbox):
        for outcome in measure_sizes(model, sizes, what, settings, inbox, there, args.cpus):
            if outcome.row is None:
                errors[outcome.size] = outcome.error
                continue
            rows.append(outcome.row)
            rows.sort(key=lambda row: -row["asked"])
            with FileLock(f"{file}.lock"):  # another evaluation may measure other sizes
                kept = merged(read(file, out), rows)
                for each in dict.fromkeys((file, args.out or file)):
                    Disk().write(str(each), json.dumps(kept, indent=1).encode())
        if rows:
            log_rows(mlflow_run, kept)
        if model.uri and rows:
            notes = recorded(Store.of(settings), model.uri, rows)
    last_screen(out, name, rows, errors, notes, args.out or file, time.monotonic() - began)
    out.print(f"the runs' table: {runs_page(settings, mlflow_run.experiment_id)}", markup=False)
    return 1 if errors else 0


def opened(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.open("a").close()


def read(file: Path, out: Any) -> list[Row]:
    """The rows that are there."""
    try:
        rows: list[Row] = json.loads(file.read_text()) if file.exists() and file.stat().st_size else []
        return [{**row, "asked": float(row["asked"])} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        out.print(f"{file} holds no rows ({error!r}); it is written anew.", markup=False)
        return []


def merged(before: list[Row], rows: list[Row]) -> list[Row]:
    """The rows of all runs that measured the same, largest size first; a size's newest one."""
    return sorted({row["asked"]: row for row in (*before, *rows)}.values(), key=lambda row: -row["asked"])


def recorded(store: Store, uri: str, rows: list[Row]) -> list[str]:
    """Put rows beside the artifact's curve; what of them it can't have is said, and ends nothing."""
    try:
        left_out = ", ".join(f"{size:g}" for size in record(store, uri, rows)[1])
    except StoreError as error:  # where the artifact is may be read only
        return [f"the artifact's curve stays as it was: {error}"]
    return [f"no place in the artifact's curve: {left_out}; leave --data out, for perplexity on the curve's own text."] if left_out else []


def found(args: argparse.Namespace, settings: Settings) -> tuple[str, Model, Artifact | None]:
    """(a name for it, the model, its artifact if it has one)."""
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


def reachable(args: argparse.Namespace, artifact: Artifact | None) -> list[float]:
    """The sizes, largest first; BudgetError for one that the model can't have."""
    sizes = [ratio(text) for text in args.sizes or ()]
    if artifact is None:
        if sizes and sizes != [1.0]:
            raise BudgetError("--base is measured as it is. Calibrate it to have it at other sizes, and give --model.")
        return [1.0]
    asked = sizes or [row["asked"] for row in artifact.curve] or SIZES
    table = artifact.table()
    for size in asked:
        table.cut(Budget(ratio=size))
    return sorted(set(asked), reverse=True)


def ratio(text: str) -> float:
    found = Budget.parse(text).ratio
    if found is None:
        raise BudgetError(f'a size is {text!r}; it must be a ratio, like "0.6" or "60%".')
    return found


def texts_of(args: argparse.Namespace, artifact: Artifact | None) -> list[Text]:
    """What is read; DataError for what is not there, before anything long is begun."""
    if {"perplexity", "divergence"} <= set(args.skip) and not args.quantize:
        return []
    like = artifact.curve[0] if artifact is not None and artifact.curve and not args.data else {}
    if args.whole and (not args.data or trained_on(artifact) & {resolved(source) for source in args.data}):
        raise EvaluationError("--whole is for a text of its own, by --data: what was calibrated on is measured where it is held out.")
    context = args.context or like.get("context")
    if not context:
        most = base_positions(args.base, args.trust_remote_code) if artifact is None else positions(artifact.config)
        context = min(2048, most or 2048)
    windows = like.get("windows", 0) if args.windows is None else args.windows
    sources = args.data or [like.get("corpus", "package:wikipedia")]
    texts = [
        Text(resolved(source), protocol, context, windows, "all" if args.whole else like.get("split", "heldout"))
        for source in sources
        for protocol in args.protocol or [like.get("protocol", "packed")]
    ]
    for source, split in dict.fromkeys((text.source, text.split) for text in texts):
        next(documents(source, split))
    return texts


def trained_on(artifact: Artifact | None) -> set[str]:
    """The texts that it was calibrated and tuned on."""
    found, origin = set[str](), {} if artifact is None else artifact.manifest.get("provenance", {})
    while origin:
        found.add(resolved(origin.get("job", {}).get("data", "")))
        origin = origin.get("parent", {})
    return found - {""}


def measurements(args: argparse.Namespace, texts: list[Text], has_base: bool, there: Nodes) -> list[Measurement]:
    """What is asked for. Speed is told apart by the kind of device that this cluster has."""
    kinds = [key.partition(":")[2] for key in ray.cluster_resources() if key.startswith("accelerator_type:")]
    folder = resolved(args.task_folder)
    what: list[Measurement] = [PerplexityOn(text) for text in texts if "perplexity" not in args.skip]
    reference = resolved(args.reference or "")
    what += [DivergenceOn(text, reference) for text in texts if (has_base or reference) and "divergence" not in args.skip]
    what += [QuantizedOn(text, kind) for text in texts for kind in args.quantize]
    what += [TaskScore(task, folder, args.shots, args.limit) for task in expand(args.tasks)]
    if "samples" not in args.skip:
        what.append(Samples(tuple(args.prompts)))
    if "efficiency" not in args.skip:
        if not kinds:
            name = device_name(torch.device("cpu"))
            kinds = ["GPU" if any(node.get("GPU", 0) for node in there) else f"{name} x {max(node.get('CPU', 0) for node in there):g}"]
        what.append(Efficiency(args.batch, args.prompt_tokens, args.new_tokens, device="+".join(sorted(kinds))))
    if not what:
        raise EvaluationError("there is nothing left to measure: give --tasks, or skip less.")
    return what


def start_run(settings: Settings, name: str, model: Model, artifact: Artifact | None, what: list[Measurement]) -> tuple[Run, str]:
    """The MLflow run of these measurements of this model, gone on with where there is one; and what identifies it."""
    what = [replace(one, device="") if isinstance(one, Efficiency) else one for one in what]  # where it runs is nothing that is asked
    keys = [model.identity(artifact), *(one.key for one in what)]
    identity = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:12]
    run = Tracking(settings, "acip/evaluation").start(name, f"evaluation-{identity}", {"model": name, "artifact_uri": model.uri})
    return run, identity


def last_screen(
    out: Any, name: str, rows: list[Row], errors: dict[float, str | None], notes: list[str], file: Path, seconds: float
) -> None:
    if rows:
        out.print()
        out.print(evaluation_table(name, rows))
    for size, error in sorted(errors.items(), reverse=True):
        out.print(f"size {size:g} FAILED: {error}", markup=False)
    for note in notes:
        out.print(note, markup=False)
    if rows:
        out.print(f"rows: {file}", markup=False)
    out.print(f"{len(rows)} of {len(rows) + len(errors)} sizes measured, after {duration(seconds)}.", markup=False)
    if errors:
        out.print("Run it again for the others: what is measured is not measured again.", markup=False)


if __name__ == "__main__":
    sys.exit(main())
