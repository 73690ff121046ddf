"""Import a model in the format of the paper's authors: convert it, measure its trade-off curve, store and register it.

    python jobs/import_published.py --checkpoint FOLDER --name llama-2-7b                     the base model comes from the hub
    python jobs/import_published.py --checkpoint FOLDER --name llama-2-7b --base path/to/base

The new version gets the alias `candidate`; the champion does not change. Code in FOLDER is never run. Ray is not needed.
A checkpoint that was imported before is not stored again.

Exit codes: 0 the version is registered, 2 wrong arguments or an unreadable checkpoint, 130 interrupted.
"""

import argparse
import functools
import hashlib
import re
import sys
from collections.abc import Sequence
from typing import get_args

import torch
from acip_platform import cli
from acip_platform.reporting.console import console, lines, shell, trade_off_table
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Outcome
from acip_platform.settings import Settings
from acip_platform.storage.inputs import resolved
from acip_platform.storage.store import Store
from acip_platform.tracking import run_descriptions
from acip_platform.tracking.provenance import provenance
from acip_platform.tracking.registry import CANDIDATE, reached
from acip_platform.tracking.runs import Tracking, runs_page
from acip_platform.training.completion import Heldout, finish, stored
from acip_platform.yaml_file import NAME

from acip.artifact.artifact import Artifact
from acip.artifact.published import open_published
from acip.artifact.read_back import read_back
from acip.base import Base
from acip.calibration.result import Calibration
from acip.evaluate.heldout_text import Protocol
from acip.layers.targets import targets
from acip.modeling_acip import widened


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="folder with config.json and model*.safetensors")
    parser.add_argument("--name", required=True, help="name in the registry")
    parser.add_argument(
        "--base", metavar="SOURCE", help="base model: org/name, folder or GGUF file (default: the one that the checkpoint names)"
    )
    parser.add_argument("--eval-data", default="package:wikipedia", help="text whose held-out part is measured on (default: %(default)s)")
    parser.add_argument("--eval-context", type=cli.whole_number(2), default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument("--eval-windows", type=cli.whole_number(0), default=0, help="largest number of windows (default: 0, all)")
    parser.add_argument(
        "--eval-protocol",
        default="packed",
        choices=get_args(Protocol),
        help="how held-out text is cut, see acip/evaluate/heldout_text.py (default: %(default)s)",
    )
    args = cli.parse(parser, argv)
    if not re.fullmatch(NAME, args.name):
        parser.error(f"--name is {args.name!r}; it may contain only letters, digits, '.', '_' and '-'.")
    return cli.exit_code(lambda: run(args))


@reached()
def run(args: argparse.Namespace) -> None:
    out, settings = console(), Settings.from_env()

    def emit(_kind: str, text: str) -> None:
        out.print(f"[{args.name}] {text}")

    emit("stage", f"opening {args.checkpoint}")
    base, calibration = open_published(resolved(args.checkpoint), args.base and resolved(args.base))
    read_back(base, calibration.recipe)
    recipe = calibration.recipe
    emit("stage", f"{len(calibration.table.layers)} layers of {base.source}, pruned to {recipe.stop_ratio} (paper), {recipe.dtype}")
    job = Job(
        args.name, base.source, recipe, resolved(args.eval_data),
        eval_context=args.eval_context, eval_windows=args.eval_windows, eval_protocol=args.eval_protocol,
    )  # fmt: skip
    heldout = Heldout.of(job, base)
    fingerprint = f"published-{identity(base, calibration)}"
    mlflow_run = Tracking(settings, "acip/published").start(job.name, f"{job.name}-{fingerprint}", {"model": job.name})
    mlflow_run.params(run_descriptions.settings(job))
    mlflow_run.tags({"checkpoint": resolved(args.checkpoint)})
    with mlflow_run.ending():
        store, key = Store.of(settings), f"{job.name}/{fingerprint}"
        uri = store.uri(key)
        if not store.exists(uri):
            origin = provenance(job) | {"checkpoint": resolved(args.checkpoint), "mlflow_run": mlflow_run.run_id}
            stored(settings, key, functools.partial(Artifact.save, base=base, calibration=calibration, provenance=origin))
        emit("stage", f"artifact: {uri}")
        del base, calibration
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        summary = finish(job, uri, mlflow_run, settings, heldout, device, emit, fingerprint, CANDIDATE)
    out.print(trade_off_table(Outcome(job, summary, None)))
    lines(out, {
        "registered": f"version {summary['version']} of {job.name}, alias {CANDIDATE}",
        "table of runs": runs_page(settings, mlflow_run.experiment_id),
        "serve it": f"{shell(settings)} jobs/serve.py --model {job.name} --alias {CANDIDATE}",
    })  # fmt: skip


def identity(base: Base, calibration: Calibration) -> str:
    """Return a hash of the base model, the scores and the adapters, which identifies a checkpoint."""
    sha = hashlib.sha256(base.digest.encode())
    adapters = [param for core in targets(calibration.model).values() for lora in core.loras.values() for param in lora.parameters()]
    for tensor in (calibration.scores.score, *adapters):
        sha.update(widened(tensor.detach()).numpy().tobytes())
    return sha.hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
