"""One size of a calibrated model as a folder that transformers loads.

    python jobs/materialize.py smollm2-135m --size 0.6 --out small                    a name in the registry
    python jobs/materialize.py s3://bucket/artifacts/... --fit 8GB --out small        an artifact by its URI or path
    python jobs/materialize.py smollm2-135m --size any --out all --push me/any-size   the artifact itself, with its card, to the hub
    python jobs/materialize.py llama-2-7b --fit 8GB --context 4096 --batch 1 --quantize nf4 --out small

--fit alone limits the weights; with --context, weights, KV cache and the overhead of serving. With --quantize, a size or budget
is cut for matrices in these bits; with --quantize best, in those that lose least by the curves (jobs/evaluate.py --quantize).
Exit code 0 = the folder is there, 1 = it could not be made, 2 = wrong arguments.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from acip_platform.settings import Settings, masked, this_python

from acip.errors import AcipError
from acip.utils.hub_ids import HUB_ID

KINDS = ("nf4", "fp4", "int8", "best")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="NAME[@ALIAS]", help="name in the registry, or path or URI of an artifact")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--size", help='"0.6", "60%%", "800M params", "ppl<=20", or "any": the artifact, of every size')
    size.add_argument("--fit", metavar="BYTES", help='"8GB" or "8GiB" of weights; with --context, of memory')
    parser.add_argument("--context", type=int, help="tokens of a sequence, prompt and answer (with --fit)")
    parser.add_argument("--batch", type=int, help="sequences served at once (with --context; default: 1)")
    what = "the compressed layers' matrices in 4 or 8 bit; best = in what the curves measured in these bits say, if at all"
    parser.add_argument("--quantize", "--quantise", choices=KINDS, help=what)
    parser.add_argument("--alias", default="champion", help="alias or version number in the registry (default: %(default)s)")
    parser.add_argument("--max-shard-size", default="5GB", help="(default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write; an earlier export there is replaced")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the folder to this repository of the hub, too; an export there is replaced"
    )
    args = parser.parse_args()
    if args.context is not None and args.fit is None:
        parser.error("--context goes with --fit: how much memory may serving at this context take?")
    if args.batch is not None and args.context is None:
        parser.error("--batch goes with --context (tokens of each sequence).")
    args.any = args.size == "any"
    if args.any and args.quantize:
        parser.error("--size any is the artifact, which is not quantized: its sizes are. Leave --quantize out.")
    if args.push and not re.fullmatch(HUB_ID, args.push):
        parser.error(f"--push is {args.push!r}; it must be OWNER/NAME.")
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", args.max_shard_size):
        parser.error(f'--max-shard-size is {args.max_shard_size!r}; it must be like "500MB" or "5GB".')
    try:
        args.budget = None if args.any else budget(args)
    except AcipError as error:
        parser.error(str(error))
    return args


def budget(args: argparse.Namespace) -> Any:
    """What --size, --fit, --context, --batch and --quantize ask for, together."""
    from acip.errors import BudgetError
    from acip.sizing.budget import MEGA, Budget

    number = args.fit is not None and re.fullmatch(r"[\d.]+%?", args.fit.strip())
    asked = None if number else Budget.parse(args.size if args.fit is None else args.fit)
    if asked is None or (args.fit is not None and asked.stored_bytes is None):
        raise BudgetError(f'--fit is {args.fit!r}; it must be bytes, like "8GB" or "8GiB". A ratio goes with --size.')
    if args.context is not None:
        assert asked.stored_bytes is not None
        asked = Budget(memory_mb=asked.stored_bytes / MEGA, context=args.context, batch=1 if args.batch is None else args.batch)
    if args.quantize is None:
        return asked
    from acip.export.quantization import counted

    return counted(asked, args.quantize)


def main() -> int:
    args = arguments()
    try:
        return run(args, Settings.from_env())
    except (AcipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130


def run(args: argparse.Namespace, settings: Settings) -> int:
    from acip_platform.storage.store import Store

    from acip.export import hub
    from acip.export.folder import check_target, export
    from acip.sizing.budget import Budget

    folder = Path(args.out).absolute() if args.any else check_target(args.out)
    uri = find(args.model, args.alias, settings)
    print(f"artifact   {masked(uri)}", flush=True)
    artifact = Store.of(settings).open(uri)
    if args.any:
        hub.copy(artifact, folder)
        print(f"written    {folder}: {len(artifact.manifest['files'])} files, every size")
        return finished(folder, args.push)
    table = artifact.table()
    cut = table.cut(args.budget)  # before the weights are read: what can't be reached is refused at once
    unit = "" if cut.unit == "ratio" else f" {cut.unit}"
    print(f"asked      {cut.asked:,}{unit} ({cut.convention}{f', {cut.bits} bit' if cut.bits else ''})")
    print(f"got        {cut.got:,.6g}{unit}" if isinstance(cut.got, float) else f"got        {cut.got:,}{unit}")
    print(f"size       {cut.sizes['linear']:.4f} of the layers, {cut.sizes['model']:.4f} of the model, {cut.params:,} parameters")
    if cut.predicted:
        print(f"predicted  perplexity {cut.predicted['perplexity']:.2f} by the measured curve")
    if cut.removed > table.cut(Budget(ratio=artifact.recipe.stop_ratio, convention=artifact.recipe.convention)).removed:
        print(f"note       below {artifact.recipe.stop_ratio:g}, where calibration stopped: what is left out there is a guess")
    sys.stdout.flush()
    any_size = artifact.load(size=args.budget)
    provenance = export(any_size, artifact, folder, args.quantize, args.max_shard_size)
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    stored_as = provenance["quantize"] or provenance["dtype"]
    print(f"weights    {provenance['weight_bytes']:,} bytes ({stored_as}); {on_disk:,} with everything else")
    print(f"written    {folder}")
    return finished(folder, args.push)


def finished(folder: Path, repository: str | None) -> int:
    from acip.export.hub import push_to_hub

    if repository:
        print(f"pushed     {push_to_hub(folder, repository)}")
    print(f"\ntry it\n  {this_python()} -c {try_it(repository or str(folder))}\n")
    return 0


def find(model: str, alias: str, settings: Settings) -> str:
    """The URI of an artifact: `model` itself where it is a URI or an artifact's folder, else what the registry says."""
    from acip_platform.storage.inputs import resolved

    if model.startswith(("~", "./", "../")):
        model = resolved(model)
    if "://" in model or (Path(model).is_dir() and ("/" in model or (Path(model) / "manifest.json").is_file())):
        return model  # a folder with the model's name may be an export of it
    if "/" in model:
        raise AcipError(f"there is no folder {model}. Give a name in the registry, a folder, file:// or s3://bucket/prefix.")
    from acip_platform.tracking.registry import Registry, reached

    with reached(settings):
        return Registry(settings).named(model, alias).uri


def try_it(model: str) -> str:
    """As the shell reads it."""
    import shlex

    say = f"pipeline('text-generation', {model!r})('The capital of France is', max_new_tokens=24)"
    return shlex.quote(f"import acip; from transformers import pipeline; print({say})")


if __name__ == "__main__":
    sys.exit(main())
