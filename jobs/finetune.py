"""Train the adapters of a calibrated model further at one size, by next-token loss, on Ray Train (paper 3.3 and 3.4).

    python jobs/finetune.py smollm2-135m --size 0.5 --steps 1000            the champion, on the text of its calibration
    ray job submit -- python jobs/finetune.py llama-2-7b@3 --size 0.4       version 3, 25,000 steps as in the paper
    python jobs/finetune.py llama-2-7b --size 0.5 --quantize nf4            with the directions in 4 bit during training

The result is a new version of the same model with the alias `candidate`. It still has every size, and is best at this one. The
champion does not change. Coded layers stay those of the base model: only sizes of ranks are trained. A finished fine-tuning is
skipped (--force repeats it), an interrupted one resumes.

Exit codes: 0 the version is registered, 1 the training failed, 2 wrong arguments or no such version, 130 interrupted.
"""

import argparse
import dataclasses
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Any, get_args

from acip_platform import cli
from acip_platform.cluster import connect
from acip_platform.reporting.console import Watch, console, duration, lines, shell, trade_off_table
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Nodes, Outcome, nodes, resources_of, run_all
from acip_platform.settings import Settings, masked
from acip_platform.storage.inputs import resolved
from acip_platform.storage.store import Store
from acip_platform.tracking.logged_models import experiment_name
from acip_platform.tracking.registry import CANDIDATE, ModelVersion, Registry, reached
from acip_platform.tracking.runs import Tracking, runs_page
from acip_platform.training.fine_tuning import fingerprint, lineage, tune_one, tuning_job
from acip_platform.training.worker import run_job

from acip.data import HUB, SELF, documents
from acip.evaluate.heldout_text import Protocol
from acip.finetune import LR, STEPS, tuning
from acip.mixture import Mixture
from acip.recipe import Recipe

CODES_UNCHANGED = "those of the base model, as before: sizes in bytes are not trained, only sizes of ranks"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "model", metavar="NAME[@VERSION]", help="name in the registry, and a version number or alias (default: the champion)"
    )
    parser.add_argument("--size", required=True, type=cli.ratio, help='"0.5" or "50%%" of the target layers, adapters included')
    parser.add_argument("--steps", type=cli.whole_number(1), default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=cli.positive_number, default=LR, help="learning rate (default: %(default)s)")
    parser.add_argument(
        "--seed", type=cli.whole_number(0), help="of the text's order, the adapters and dropout (default: another than the calibration's)"
    )
    parser.add_argument(
        "--distill-weight", type=cli.number_from_zero, default=0.0, help="weight of the KL to the base model (default: %(default)s)"
    )
    parser.add_argument(
        "--quantize", choices=("none", "nf4", "fp4"), default="none", help="bits of the directions during training (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=cli.whole_number(1), help="windows per forward pass (default: as in the calibration)")
    parser.add_argument("--seq-len", type=cli.whole_number(1), help="tokens per window (default: as in the calibration)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory for one more forward pass per step")
    parser.add_argument("--data", help="training text, see acip/data.py (default: that of the calibration)")
    parser.add_argument("--eval-data", help="text whose held-out part is measured on (default: that of the calibration's curve)")
    parser.add_argument("--eval-context", type=cli.whole_number(2), help="tokens per window of held-out text")
    parser.add_argument("--eval-windows", type=cli.whole_number(0), help="largest number of held-out windows; 0 = all")
    parser.add_argument("--eval-protocol", choices=get_args(Protocol), help="how held-out text is cut, see acip/evaluate/heldout_text.py")
    parser.add_argument("--cpus", type=cli.positive_number, help="CPUs of the worker (default: those of a node if there is no GPU)")
    cli.add_pool(parser)
    parser.add_argument("--force", action="store_true", help="repeat a finished fine-tuning")
    return cli.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    return cli.exit_code(lambda: run(args, Settings.from_env()))


@reached()
def run(args: argparse.Namespace, settings: Settings) -> int:
    began, out = time.monotonic(), console()
    registry, store = Registry(settings), Store.of(settings)
    version = registry.named(args.model)
    name, artifact = version.name, store.open(version.uri)
    recipe = tuning(artifact, args.size, **_without_none(
        post_tune_steps=args.steps, lr=args.lr, seed=args.seed, distill_weight=args.distill_weight, quantize=args.quantize,
        batch_size=args.batch_size, seq_len=args.seq_len, gradient_checkpointing=args.gradient_checkpointing or None,
    ))  # fmt: skip
    changes = _without_none(
        data=args.data and resolved(args.data), eval_data=args.eval_data and resolved(args.eval_data),
        eval_context=args.eval_context, eval_windows=args.eval_windows, eval_protocol=args.eval_protocol, cpus=args.cpus,
    )  # fmt: skip
    job = tuning_job(version, artifact, recipe, changes)
    identity = fingerprint(job, artifact)
    versions = [] if args.force else registry.versions(name, {"fingerprint": identity})
    if done := [each for each in versions if is_registered(each) and store.exists(each.uri)]:
        out.print(f"[{name}] already done: version {done[0].version} (--force repeats it)")
        next_commands(out, settings, done[0], job.recipe.stop_ratio)
        return 0

    check_texts(job)
    cluster = connect(settings)

    def available_nodes() -> Nodes:
        return args.pool or nodes()

    part = resources_of(job, available_nodes())
    attempt = f"{name}-tuned-{identity}" + (f"-{secrets.token_hex(4)}" if args.force else "")
    experiment = experiment_name(settings, artifact, "acip/finetune")  # that of the calibration: one page compares the models of both
    mlflow_run = Tracking(settings, experiment).start(f"{name} at {recipe.stop_ratio:g}", attempt, {"model": name, **lineage(job, version)})
    mlflow_run.params({**recipe.to_dict(), "base": job.base, "data": job.data})
    if version.model_id:
        mlflow_run.uses(version.model_id)
    out.print(f"acip: fine-tuning version {version.version} of {name} at size {recipe.stop_ratio:g}")
    lines(out, {
        "dashboard": cluster.dashboard or "none",
        "tracking": masked(settings.tracking_uri),
        "run": f"{mlflow_run.run_id} in experiment {mlflow_run.experiment_id}",
        "from": masked(version.uri),
        "text": f"{job.data}, {recipe.post_tune_steps} steps of "
        f"{recipe.batch_size * recipe.gradient_accumulation_steps} x {recipe.seq_len} tokens",
        "worker": f"{part.gpus:g} GPU, {part.cpus:g} CPU",
    } | ({"codes": CODES_UNCHANGED} if artifact.table().byte_sizes else {}))  # fmt: skip

    events = open_event_queue()
    facts = {"version": dataclasses.asdict(version), "fingerprint": identity}

    def tune(job: Job) -> dict[str, Any]:
        return run_job(job, part, settings, mlflow_run, attempt, events, tune_one, **facts)

    state = "FAILED"
    with mlflow_run.ending(lambda: state), Watch(out, events):
        (outcome,) = run_all([job], {job.name: part}, tune, available_nodes)  # in a thread: Ray Train would handle Ctrl-C itself
        state = "FAILED" if outcome.summary is None else "FINISHED"
    if outcome.summary is None:
        out.print(f"[{name}] FAILED: {outcome.error}")
        return cli.FAILED
    seconds, page = time.monotonic() - began, runs_page(settings, mlflow_run.experiment_id)
    last_screen(out, outcome, version, recipe, seconds, page)
    next_commands(out, settings, registry.resolve(name, outcome.summary["version"]), recipe.stop_ratio)
    return 0


def check_texts(job: Job) -> None:
    """Raise DataError for a text that cannot be read, before any work starts. Data sets of the hub are not read."""
    for source, split in (*((source, "train") for source in Mixture.of(job.data).sources), (job.heldout.source, "heldout")):
        if source not in (*HUB, SELF):
            next(documents(source, split))  # type: ignore[arg-type]


def last_screen(out: Any, outcome: Outcome, version: ModelVersion, recipe: Recipe, seconds: float, page: str) -> None:
    """Print the curve of the new version, and its perplexity before and after the fine-tuning of `version`."""
    summary = outcome.summary
    assert summary is not None
    out.print()
    out.print(trade_off_table(outcome))
    measured = summary["finetuned"]["perplexity"]
    kinds = {"": f"at {recipe.stop_ratio:g}"} | ({f"_{recipe.quantize}": f"in {recipe.quantize}"} if recipe.quantize != "none" else {})
    changed = {
        f"perplexity {where}": f"{measured[f'before{kind}']:.2f} before, {measured[f'after{kind}']:.2f} after"
        for kind, where in kinds.items()
    }
    registered = f"version {summary['version']} of {version.name}, alias {CANDIDATE}, tuned from version {version.version}"
    lines(out, {"registered": registered, **changed, "took": duration(seconds), "table of runs": page})


def next_commands(out: Any, settings: Settings, version: ModelVersion, size: float) -> None:
    """Print the commands that use the new version."""
    name, number, run = version.name, version.version, shell(settings)
    tuned = f"--size {size:g} --convention linear --out {name}-{size * 100:g}-tuned"
    lines(out, {
        "export it": f"{run} jobs/materialize.py {name} --alias {number} {tuned}",
        "serve it": f"{run} jobs/serve.py --model {name} --alias {CANDIDATE if CANDIDATE in version.aliases else number}",
    })  # fmt: skip


def is_registered(version: ModelVersion) -> bool:
    """Return whether the registration of a fine-tuned version is complete. A job that was killed in between completes it later."""
    return {"verdict", "finetuned_from"} <= version.tags.keys()


def _without_none(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
