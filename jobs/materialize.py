"""Write one size of a calibrated model as a folder that transformers or vLLM loads, or as a GGUF file for llama.cpp.

    python jobs/materialize.py smollm2-135m --size 0.6 --out small                        a name in the registry
    python jobs/materialize.py s3://bucket/artifacts/... --fit 8GB --out small            an artifact by its URI or path
    python jobs/materialize.py llama-2-7b --fit 8GB --context 4096 --batch 1 --quantize nf4 --out small
    python jobs/materialize.py smollm2-135m --size 0.4 --format compressed-tensors --out small   without code from acip; for vLLM
    python jobs/materialize.py smollm2-135m --fit 90MB --format gguf --out small          a GGUF file of at most 90 MB, for llama.cpp
    python jobs/materialize.py smollm2-135m --all-sizes --out all --push me/any-size      the artifact itself and its card, to the hub

--size 0.4 is a share of the base model's bytes if the artifact has coded layers, and of the layers' numbers otherwise; --convention
selects another count. A size in bytes is written in these bytes; --format compressed-tensors takes 8 or 4 bits per weight instead.
--fit alone limits the bytes of the weights. With --context it limits weights, KV cache and the overhead of serving together.
With --quantize, the size or budget counts matrices in that many bits. `--quantize best` selects the bits with the smallest measured loss at
this budget (jobs/evaluate.py --quantize measures the curves).
With --format gguf, the size is the bytes of the whole file, or their share of the base model's bytes. Each weight gets
the type of llama.cpp that saves the most loss per byte, measured on --text. This needs llama-cpp-python.

Exit codes: 0 the folder is written, 2 wrong arguments or a size that cannot be reached, 130 interrupted.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from acip_platform import cli
from acip_platform.settings import Settings, masked, this_python

from acip.errors import AcipError
from acip.utils.hub_ids import HUB_ID

KINDS = ("nf4", "fp4", "int8", "best")
CONVENTIONS = ("linear", "paper", "model", "bytes")
FORMATS = ("transformers", "compressed-tensors", "gguf")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("model", metavar="NAME[@ALIAS]", help="name in the registry, or path or URI of an artifact")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--size", help='"0.6", "60%%", "800M params" or "ppl<=20"')
    parser.add_argument(
        "--convention", choices=CONVENTIONS,
        help="count of a ratio: bytes of the model; or numbers of the layers (linear), of the layers without adapters (paper), of the "
        "model (default: bytes if the artifact has coded layers, else linear)",
    )  # fmt: skip
    size.add_argument("--fit", metavar="BYTES", help='"8GB" or "8GiB" of weights; with --context, of memory')
    size.add_argument("--all-sizes", action="store_true", help="copy the artifact itself, which holds every size")
    parser.add_argument("--context", type=cli.whole_number(1), help="tokens of a sequence, prompt and answer (with --fit)")
    parser.add_argument("--batch", type=cli.whole_number(1), help="sequences served at once (with --context; default: 1)")
    parser.add_argument(
        "--quantize", choices=KINDS, help="store the compressed layers' matrices in 4 or 8 bit; best = selected by the measured curves"
    )
    parser.add_argument("--format", choices=FORMATS, default="transformers", help="what to write (default: %(default)s)")
    parser.add_argument("--text", help="text on which the types of a GGUF file are chosen (default: package:wikipedia)")
    parser.add_argument("--alias", default="champion", help="alias or version number in the registry (default: %(default)s)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; an earlier export there is replaced")
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload to this repository of the hub; an export there is replaced")
    args = cli.parse(parser, argv)
    if args.context is not None and args.fit is None:
        parser.error("--context needs --fit, the memory that serving at this context may take.")
    if args.batch is not None and args.context is None:
        parser.error("--batch needs --context, the tokens of each sequence.")
    if args.all_sizes and args.convention is not None:
        parser.error(f"--all-sizes copies the artifact, which has every size; --convention {args.convention} counts one. Leave it out.")
    if args.all_sizes and args.quantize:
        parser.error("--all-sizes copies the artifact, which is not quantized; only its sizes are. Leave --quantize out.")
    if args.format == "gguf" and (args.all_sizes or args.quantize or args.context is not None):
        parser.error("--format gguf writes one size, whose types are chosen by itself. Leave --all-sizes, --quantize and --context out.")
    if args.format == "gguf" and args.convention not in (None, "bytes"):
        parser.error(f"--format gguf counts bytes, not --convention {args.convention}. Leave it out.")
    if args.format == "compressed-tensors" and (args.all_sizes or args.quantize):
        parser.error("--format compressed-tensors writes one size of coded layers. Leave --all-sizes and --quantize out.")
    if args.format != "gguf" and args.text is not None:
        parser.error("--text is for --format gguf.")
    if args.push and not re.fullmatch(HUB_ID, args.push):
        parser.error(f"--push is {args.push!r}; it must be OWNER/NAME.")
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", args.max_shard_size):
        parser.error(f'--max-shard-size is {args.max_shard_size!r}; it must be like "500MB" or "5GB".')
    try:
        args.budget = None if args.all_sizes else budget(args)
    except AcipError as error:
        parser.error(str(error))
    return args


def budget(args: argparse.Namespace) -> Any:
    """Return the budget that --size, --fit, --context, --batch and --quantize describe together."""
    from acip.errors import BudgetError
    from acip.sizing.budget import MEGA, Budget

    is_ratio = args.fit is not None and re.fullmatch(r"[\d.]+%?", args.fit.strip())
    parsed = None if is_ratio else Budget.parse(args.size if args.fit is None else args.fit, args.convention or "linear")
    if parsed is None or (args.fit is not None and parsed.stored_bytes is None):
        raise BudgetError(f'--fit is {args.fit!r}; it must be bytes, like "8GB" or "8GiB". A ratio goes with --size.')
    if args.convention is not None and parsed.ratio is None:
        raise BudgetError(f"--convention is the count of a ratio, such as --size 0.6; {parsed.kind} has none. Leave it out.")
    if args.context is not None:
        assert parsed.stored_bytes is not None
        parsed = Budget(memory_mb=parsed.stored_bytes / MEGA, context=args.context, batch=1 if args.batch is None else args.batch)
    if args.quantize is None:
        return parsed
    from acip.export.quantization import counted

    return counted(parsed, args.quantize)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    return cli.exit_code(lambda: run(args, Settings.from_env()))


def run(args: argparse.Namespace, settings: Settings) -> None:
    from acip_platform.storage.inputs import resolved
    from acip_platform.storage.store import Store

    from acip.export import hub
    from acip.export.compressed_tensors import export_compressed_tensors
    from acip.export.folder import check_target
    from acip.export.stored import export_size

    folder = Path(args.out).absolute() if args.all_sizes else check_target(args.out)
    uri = resolved(args.model) if args.model.startswith(("~", "./", "../")) else args.model
    version = None if is_artifact(uri) else registered(uri, args.alias, settings)
    uri = uri if version is None else version.uri
    print(f"artifact   {masked(uri)}", flush=True)
    artifact = Store.of(settings).open(uri)
    if args.all_sizes:
        hub.copy(artifact, folder)
        print(f"written    {folder}: {len(artifact.manifest['files'])} files, every size")
        push_and_show(folder, args.push)
        return
    if args.format == "gguf":
        write_gguf(artifact, args.budget, args.text or "package:wikipedia", folder)
        push(folder, args.push)
        return
    budget = args.budget
    if budget.ratio is not None and args.convention is None and args.quantize is None:
        budget = replace(budget, convention=artifact.table().convention)
    print_size(artifact, budget)  # before reading the weights, so that an impossible size fails at once
    if args.format == "compressed-tensors":
        provenance = export_compressed_tensors(artifact.load(size=budget), artifact, folder, args.max_shard_size)
    else:
        provenance = export_size(artifact, budget, folder, args.quantize, args.max_shard_size)
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"weights    {provenance['weight_bytes']:,} bytes ({stored_as(provenance)}); {on_disk:,} with all other files")
    print(f"written    {folder}")
    log_export(settings, version, provenance, args.push or str(folder), args.format)
    push_and_show(folder, args.push, "" if args.format == "compressed-tensors" else "import acip; ")


def print_size(artifact: Any, budget: Any) -> None:
    """Print the size that a budget gives: the requested and the actual amount, and what was counted."""
    from acip.sizing.budget import Budget

    table = artifact.table()
    cut = table.cut(budget)
    unit = "" if cut.unit == "ratio" else f" {cut.unit}"
    print(f"asked      {cut.asked:,}{unit} ({cut.convention}{f', {cut.bits} bit' if cut.bits else ''})")
    print(f"got        {cut.got:,.6g}{unit}" if isinstance(cut.got, float) else f"got        {cut.got:,}{unit}")
    if cut.versions is None:
        print(f"size       {cut.sizes['linear']:.4f} of the layers, {cut.sizes['model']:.4f} of the model, {cut.params:,} parameters")
    else:
        share = f"{cut.sizes['bytes']:.4f} of the base model's {table.base_bytes:,}"
        print(f"size       {cut.bytes:,} stored bytes with embeddings, {share}; {cut.bits_per_weight:.2f} bits per weight of the layers")
    if cut.predicted and "perplexity" in cut.predicted:
        print(f"predicted  perplexity {cut.predicted['perplexity']:.2f} by the measured curve")
    recipe = artifact.recipe
    if any(cut.ranks.values()) and cut.key > table.cut(Budget(ratio=recipe.stop_ratio, convention=recipe.convention)).key:
        print(f"note       below {recipe.stop_ratio:g}, where calibration stopped: the order of directions there is extrapolated")
    sys.stdout.flush()


def stored_as(provenance: dict[str, Any]) -> str:
    """Describe how the weights of an export are stored."""
    if provenance["size"]["bits_per_weight"] is None:
        return (provenance["quantize"] or provenance["dtype"]) + (", encoded without loss" if provenance["encoded"] else "")
    if provenance["format"] == "transformers":
        others = f"others in {provenance['dtype']}"
        return f"codes; {others}" + (", encoded without loss" if provenance["dtype"] == "bfloat16" else "")
    layers = ", ".join(f"{count} layers in {bits}" for bits, count in provenance["storage"].items())
    return f"{layers}, others in {provenance['dtype']}; {provenance['size']['bytes']:,} in the artifact"


def write_gguf(artifact: Any, budget: Any, text: str, folder: Path) -> None:
    """Write a GGUF file of the size that the budget describes, and print what it is."""
    from acip.data import documents, token_windows
    from acip.errors import BudgetError
    from acip.export.gguf import export_gguf

    if budget.ratio is None and budget.stored_bytes is None:
        raise BudgetError(f"--format gguf needs a size in bytes, not {budget.kind}: --fit 90MB, or --size 0.4 of the base model's bytes.")
    base_bytes = artifact.table().base_bytes
    limit_bytes = budget.stored_bytes or int(budget.ratio * base_bytes)
    recipe = artifact.recipe
    windows = token_windows(documents(text, "train"), artifact.tokenizer(), recipe.seq_len, recipe.sample_windows)
    print(f"asked      {limit_bytes:,} bytes, {limit_bytes / base_bytes:.4f} of the base model", flush=True)

    def progress(what: str, done: int, total: int) -> None:
        if done * 4 // total > (done - 1) * 4 // total:  # four lines of each kind
            print(f"{what:<10} {done} of {total}", flush=True)

    provenance = export_gguf(artifact, folder, limit_bytes, windows, progress)
    size = provenance["size"]
    print(f"got        {size['got']:,} bytes, {size['got'] / base_bytes:.4f} of the base model")
    print(f"types      {', '.join(f'{count} {name}' for name, count in provenance['types'].items())}")
    print(f"predicted  {size['predicted_loss_increase']:.4f} nats per token above the base model's loss")
    print(f"written    {folder}")


def push(folder: Path, repository: str | None) -> None:
    """Upload the folder to the hub if a repository is given."""
    from acip.export.hub import push_to_hub

    if repository:
        print(f"pushed     {push_to_hub(folder, repository)}")


def push_and_show(folder: Path, repository: str | None, imports: str = "import acip; ") -> None:
    """Upload the folder to the hub if a repository is given, and print a command that uses it."""
    push(folder, repository)
    print(f"\ntry it\n  {this_python()} -c {example(repository or str(folder), imports)}\n")


def is_artifact(model: str) -> bool:
    """Return whether `model` is the URI or the folder of an artifact, not a name in the registry."""
    # a folder with the model's name alone may be an export, so it needs a manifest
    return "://" in model or (Path(model).is_dir() and ("/" in model or (Path(model) / "manifest.json").is_file()))


def registered(model: str, alias: str, settings: Settings) -> Any:
    """Return the version of a registered model."""
    from acip_platform.tracking.registry import Registry, reached

    if "/" in model:
        raise AcipError(f"{model} is not a folder. Give a name in the registry, a folder, file:// or s3://bucket/prefix.")
    with reached(settings):
        return Registry(settings).named(model, alias)


def log_export(settings: Settings, version: Any, provenance: dict[str, Any], where: str, kind: str) -> None:
    """Record the export in MLflow if its artifact is a registered version. If MLflow fails, the export is complete all the same."""
    if version is None:
        return
    from acip_platform.tracking import logged_models

    try:
        logged_models.log_export(settings, version, provenance, where, kind)
    except AcipError as error:
        print(f"note       the export is not recorded in MLflow: {error}")


def example(model: str, imports: str) -> str:
    """Return Python code that generates text with `model`, quoted for the shell."""
    import shlex

    call = f"pipeline('text-generation', {model!r})('The capital of France is', max_new_tokens=24)"
    return shlex.quote(f"{imports}from transformers import pipeline; print({call})")


if __name__ == "__main__":
    sys.exit(main())
