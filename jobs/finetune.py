"""Tune a calibrated model further, at one size: adapters alone, next-token loss, on Ray Train (paper 3.3 and 3.4).

    python jobs/finetune.py smollm2-135m --size 0.5 --steps 1000            the champion, on the text of its calibration
    ray job submit -- python jobs/finetune.py llama-2-7b@3 --size 0.4       version 3, 25,000 steps as in the paper
    python jobs/finetune.py llama-2-7b --size 0.5 --quantise nf4            directions in 4 bit meanwhile

The result is a new version of the same model, alias `candidate`: an any-size model that is best at this size. The champion stays
what it is. What is done already is not done again (--force does), what was interrupted goes on. Exit code 0 = it is there.
"""

import argparse
import dataclasses
import secrets
import sys
import time
from typing import Any, get_args

from acip_platform.cluster import connect
from acip_platform.reporting.console import Watch, console, duration, exit_code, lines, shell, trade_off_table
from acip_platform.scheduling.events import open_event_queue
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import nodes, pool, resources_of, run_all
from acip_platform.settings import Settings, masked
from acip_platform.storage.inputs import resolved
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import CANDIDATE, ModelVersion, Registry, check_registers, reached
from acip_platform.tracking.runs import Tracking, runs_page
from acip_platform.training.fine_tuning import fingerprint, lineage, tune_one, tuning_job
from acip_platform.training.worker import run_job

from acip.data import HUB, documents
from acip.errors import AcipError, BudgetError
from acip.evaluate.heldout_text import Protocol
from acip.finetune import LR, STEPS, tuning
from acip.sizing.budget import Budget


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", metavar="NAME[@VERSION]", help="name in the registry, and a version number or alias (default: the champion)"
    )
    parser.add_argument("--size", required=True, help='"0.5" or "50%%" of the target layers, adapters counted')
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=LR, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, help="order of the text, adapters' start, dropout (default: another than the calibration's)")
    parser.add_argument("--distill", type=float, default=0.0, help="share of KL to the base model's distribution (default: %(default)s)")
    parser.add_argument(
        "--quantise", "--quantize", choices=("none", "nf4", "fp4"), default="none", help="directions in 4 bit (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, help="windows of a forward pass (default: the calibration's)")
    parser.add_argument("--seq-len", type=int, help="tokens of a window (default: the calibration's)")
    parser.add_argument("--recompute", action="store_true", help="less memory for one more forward pass a step")
    parser.add_argument("--data", help="text, see acip/data.py (default: the calibration's)")
    parser.add_argument("--eval-data", help="its held-out part is measured on (default: as the calibration's curve)")
    parser.add_argument("--eval-context", type=int, help="tokens per window of it")
    parser.add_argument("--eval-windows", type=int, help="at most so many; 0 = all")
    parser.add_argument("--eval-protocol", choices=get_args(Protocol), help="that it is cut by, see acip/evaluate/heldout_text.py")
    parser.add_argument("--cpus", type=float, help="of the worker (default: a node's, where there is no GPU)")
    parser.add_argument("--pool", metavar="8xGPU:1,CPU:14", help="nodes that an autoscaler may start (default: the nodes there are)")
    parser.add_argument("--force", action="store_true", help="tune again what is done already")
    args = parser.parse_args()
    if args.cpus is not None and not args.cpus > 0:
        parser.error(f"--cpus is {args.cpus:g}; it must be above 0.")
    return args


def main() -> int:
    args, out = arguments(), console()
    return exit_code(out, lambda: run(args, Settings.from_env(), out))


@reached()
def run(args: argparse.Namespace, settings: Settings, out: Any) -> None:
    began = time.monotonic()
    check_registers(settings)
    registry, store = Registry(settings), Store.of(settings)
    version = registry.named(args.model)
    name, artifact = version.name, store.open(version.uri)
    recipe = tuning(artifact, ratio(args.size), **given(
        post_tune_steps=args.steps, lr=args.lr, seed=args.seed, distill_weight=args.distill_weight, quantize=args.quantize,
        batch_size=args.batch_size, seq_len=args.seq_len, gradient_checkpointing=args.gradient_checkpointing or None,
    ))  # fmt: skip
    changes = given(
        data=args.data and resolved(args.data), eval_data=args.eval_data and resolved(args.eval_data),
        eval_context=args.eval_context, eval_windows=args.eval_windows,
        eval_protocol=args.eval_protocol, cpus=args.cpus,
    )  # fmt: skip
    job = tuning_job(version, artifact, recipe, changes)
    code = fingerprint(job, artifact)
    done = [] if args.force else [each for each in registry.versions(name, {"fingerprint": code}) if whole(each) and store.exists(each.uri)]
    if done:
        out.print(f"[{name}] done already: version {done[0].version} (--force tunes again)", markup=False)
        last_lines(out, settings, done[0], job.recipe.stop_ratio)
        return

    for source, split in ((job.data, "train"), (job.heldout.source, "heldout")):
        if source not in HUB:
            next(documents(source, split))  # type: ignore[arg-type]  # what can't be read is known before anything is begun
    there = pool(args.pool) if args.pool else []
    cluster = connect(settings)
    look = (lambda: there) if there else nodes
    part = resources_of(job, look())
    attempt = f"{name}-tuned-{code}" + (f"-{secrets.token_hex(4)}" if args.force else "")
    mlflow_run = Tracking(settings, "acip/finetune").start(
        f"{name} at {recipe.stop_ratio:g}", attempt, {"model": name, **lineage(job, version)}
    )
    mlflow_run.params({**recipe.to_dict(), "base": job.base, "data": job.data})
    out.print(f"acip: tuning version {version.version} of {name} at {recipe.stop_ratio:g}", markup=False)
    lines(out, {
        "dashboard": cluster.dashboard or "none",
        "tracking": masked(settings.tracking_uri),
        "run": f"{mlflow_run.run_id} in experiment {mlflow_run.experiment_id}",
        "from": masked(version.uri),
        "text": f"{job.data}, {recipe.post_tune_steps} steps of "
        f"{recipe.batch_size * recipe.gradient_accumulation_steps} x {recipe.seq_len} tokens",
        "worker": f"{part.gpus:g} GPU, {part.cpus:g} CPU",
    })  # fmt: skip

    inbox = open_event_queue()
    facts = {"version": dataclasses.asdict(version), "fingerprint": code}

    def tune(job: Job) -> dict[str, Any]:
        return run_job(job, part, settings, mlflow_run, attempt, inbox, tune_one, **facts)

    with mlflow_run.ending(), Watch(out, inbox):
        (outcome,) = run_all([job], {job.name: part}, tune, look)  # in a thread: Ray Train would answer Ctrl-C by itself
        if outcome.summary is None:
            raise AcipError(f"the fine-tuning failed: {outcome.error}")
    summary = outcome.summary
    out.print()
    out.print(trade_off_table(outcome))
    measured = summary["finetuned"]["perplexity"]
    kinds = {"": f"at {recipe.stop_ratio:g}"} | ({f"_{recipe.quantize}": f"in {recipe.quantize}"} if recipe.quantize != "none" else {})
    found = {
        f"perplexity {where}": f"{measured[f'before{kind}']:.2f} before, {measured[f'after{kind}']:.2f} after"
        for kind, where in kinds.items()
    }
    page = runs_page(settings, mlflow_run.experiment_id)
    registered = f"version {summary['version']} of {name}, alias {CANDIDATE}, tuned from version {version.version}"
    lines(out, {"registered": registered, **found, "took": duration(time.monotonic() - began), "the runs' table": page})
    last_lines(out, settings, registry.resolve(name, summary["version"]), recipe.stop_ratio)


def last_lines(out: Any, settings: Settings, version: ModelVersion, size: float) -> None:
    name, number, run = version.name, version.version, shell(settings)
    lines(out, {
        "export it": f"{run} jobs/materialize.py {name} --alias {number} --size {size:g} --out {name}-{size * 100:g}-tuned",
        "serve it": f"{run} jobs/serve.py --model {name} --alias {CANDIDATE if CANDIDATE in version.aliases else number}",
    })  # fmt: skip


def whole(version: ModelVersion) -> bool:
    """Was its registration ended? A job that was killed meanwhile ends it when it goes on."""
    return {"verdict", "finetuned_from"} <= version.tags.keys()


def ratio(text: str) -> float:
    budget = Budget.parse(text)
    if budget.ratio is None:
        raise BudgetError(
            f'--size is {text!r}; a fine-tuning takes a ratio, like "0.5" or "50%". `jobs/materialize.py` shows that of a budget.'
        )
    return budget.ratio


def given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
