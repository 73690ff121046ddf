"""Measure pivot storage: its gain over two factors at equal numbers of stored values, and its rounding error at equal ranks.

    python tests/benchmarks/pivot.py [--quick] [--check] [--artifact FOLDER]

This needs a calibrated artifact: by default the champion `smollm2-135m` that `bash infra/demo` writes to ACIP_HOME. Its score map is
cut to every size twice: a layer of rank r stores r (M + N) numbers as two factors, and r (M + N - r) as pivots. Both exports are measured
on held-out text in the artifact's dtype.

Then three models with the ranks of the pivot form are compared: factors in float32 (the reference), factors in the artifact's dtype, and
pivots. The table shows the relative error of the pivots' weights, and of the logits of both. --check exits with 1 if factors have the
lower perplexity at a size, or if the rounding of pivots costs more than LIMIT nats. The last line is the result: the ratio of perplexities
at 0.5.
"""

import argparse
import os
import sys
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import CHAMPION, Registry

from acip.artifact.artifact import Artifact
from acip.data import documents, token_windows
from acip.errors import AcipError
from acip.evaluate import perplexity
from acip.modeling_acip import PivotLinear
from acip.recipe import Storage
from acip.sizing.elastic_model import ElasticModel

LIMIT = 0.02  # nats per token
SIZES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, 8 windows")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a claim does not hold")
    parser.add_argument("--artifact", help="folder of an artifact")
    args = parser.parse_args()
    try:
        artifact = open_artifact(args.artifact)
    except AcipError as error:
        print(f"error: {error} Run `bash infra/demo` first, or give --artifact.")
        return 2
    any_size = artifact.load()
    windows = token_windows(documents("package:wikipedia", "heldout"), artifact.tokenizer(), 512, 8 if args.quick else 24)
    dtype = str(any_size.model.dtype).removeprefix("torch.")
    print(f"{artifact.manifest['base']['source']}, {dtype}, {len(windows)} windows of 512 tokens of held-out Wikipedia\n")
    exact = artifact.load()
    torch.nn.Module.to(exact.model, torch.float32)
    failed = compare(any_size, exact, windows, (0.8, 0.5) if args.quick else SIZES)
    return 1 if args.check and failed else 0


def open_artifact(folder: str | None) -> Artifact:
    if folder:
        return Artifact.open(folder)
    settings = Settings.from_env()
    return Store(settings.store, settings.home / "cache").open(Registry(settings).resolve("smollm2-135m", CHAMPION).uri)


def compare(any_size: ElasticModel, exact: ElasticModel, windows: torch.Tensor, sizes: tuple[float, ...]) -> bool:
    """Print the table. Return True if a claim does not hold."""
    print(f"{'':>5} | {'equal stored numbers':^28} | {'equal ranks: float32, factors, pivots; errors':^50}")
    heads = ("factors", "pivots", "ratio"), ("exact", "factors", "pivots", "weights", "logits", "logits")
    print(f"{'size':>5} | " + " | ".join("".join(f"{head:>{width}}" for head in row) for row, width in zip(heads, (9, 9), strict=True)))
    ratios, failed = {}, False
    ids = windows[:2].long()
    for size in sizes:
        factors = perplexity(exported(any_size, size, "factors"), windows)
        pivots_model = exported(any_size, size, "pivot")
        pivots = perplexity(pivots_model, windows)
        ratios[size] = pivots.perplexity / factors.perplexity
        exact.resize(size)
        same = [perplexity(model, windows) for model in (exact.model, any_size.model)]
        reference = logits(exact.model, ids)
        errors = [relative_error(logits(model, ids), reference) for model in (any_size.model, pivots_model)]
        weights = weight_error(any_size, pivots_model)
        failed |= ratios[size] > 1 or pivots.loss - same[1].loss > LIMIT
        print(
            f"{size:>5.2f} | {factors.perplexity:>9.2f}{pivots.perplexity:>9.2f}{ratios[size]:>9.3f}  | {same[0].perplexity:>9.2f}"
            f"{same[1].perplexity:>9.2f}{pivots.perplexity:>9.2f}{weights:>9.4f}{errors[0]:>9.4f}{errors[1]:>9.4f}",
            flush=True,
        )  # fmt: skip
    print(f"perplexity at 0.5, pivots / factors at equal stored numbers: {ratios[0.5]:.3f}")
    return failed


def exported(any_size: ElasticModel, size: float, storage: Storage) -> Any:
    """Return the plain model of `size`, whose layers are counted and stored as `storage`."""
    table = any_size.table
    any_size.table = replace(table, storage=storage, _kept={})
    try:
        any_size.resize(size)
        return any_size.materialize()
    finally:
        any_size.table = table


@torch.no_grad()
def weight_error(any_size: ElasticModel, pivots_model: Any) -> float:
    """Return the relative error of the stored pivot layers' matrices, over all layers."""
    error, total = torch.zeros(()), torch.zeros(())
    for name, layer in any_size.layers.items():
        pivot_layer = pivots_model.get_submodule(name)
        if isinstance(pivot_layer, PivotLinear):
            W_qN = pivot_layer.pivots.weight.float()
            left_qM, right_qN = layer.folded(layer.rank or 0)
            W_MN = left_qM.T @ right_qN
            stored_MN = torch.cat([W_qN, pivot_layer.combine.weight.float() @ W_qN])[pivot_layer.place]
            error, total = error + (stored_MN - W_MN).square().sum(), total + W_MN.square().sum()
    return float((error / total).sqrt()) if total else 0.0


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(ids).logits.float()
    return result


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


if __name__ == "__main__":
    sys.exit(main())
