"""What pivot storage gains over two factors at equal stored numbers, and what it loses by rounding at equal ranks.

    python tests/benchmarks/pivot.py [--quick] [--check] [--artifact FOLDER]

Needs a calibrated artifact: by default the champion `smollm2-135m` that `bash infra/demo` leaves in ACIP_HOME. Its score map is cut
twice to every size, with a layer's rank r stored as r (M + N) and as r (M + N - r) numbers, and both exports are measured on
held-out text in the artifact's dtype. Then, at the ranks of the pivot cut: the stored factors multiplied in float32 (exact),
in the artifact's dtype, and the pivots; relative errors of the pivots' weights, and of the logits of both. --check fails where
the factors are better at a size, or the pivot form's rounding costs more than LIMIT nats. The last line is the figure: the ratio
of perplexities at 0.5.
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
    parser.add_argument("--check", action="store_true", help="exit with 1 where a claim does not hold")
    parser.add_argument("--artifact", help="folder of an artifact")
    args = parser.parse_args()
    try:
        artifact = opened(args.artifact)
    except AcipError as error:
        print(f"error: {error} Run `bash infra/demo` first, or give --artifact.")
        return 2
    any_size = artifact.load()
    windows = token_windows(documents("package:wikipedia", "heldout"), artifact.tokenizer(), 512, 8 if args.quick else 24)
    dtype = str(any_size.model.dtype).removeprefix("torch.")
    print(f"{artifact.manifest['base']['source']}, {dtype}, {len(windows)} windows of 512 tokens of held-out Wikipedia\n")
    exact = artifact.load()
    torch.nn.Module.to(exact.model, torch.float32)
    failed = compared(any_size, exact, windows, (0.8, 0.5) if args.quick else SIZES)
    return 1 if args.check and failed else 0


def opened(folder: str | None) -> Artifact:
    if folder:
        return Artifact.open(folder)
    settings = Settings.from_env()
    return Store(settings.store, settings.home / "cache").open(Registry(settings).resolve("smollm2-135m", CHAMPION).uri)


def compared(any_size: ElasticModel, exact: ElasticModel, windows: torch.Tensor, sizes: tuple[float, ...]) -> bool:
    print(f"{'':>5} | {'equal stored numbers':^28} | {'the same ranks, in float32, as factors, as pivots':^50}")
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
        true = logits(exact.model, ids)
        off = [relative(logits(model, ids), true) for model in (any_size.model, pivots_model)]
        failed |= ratios[size] > 1 or pivots.loss - same[1].loss > LIMIT
        print(
            f"{size:>5.2f} | {factors.perplexity:>9.2f}{pivots.perplexity:>9.2f}{ratios[size]:>9.3f}  | {same[0].perplexity:>9.2f}"
            f"{same[1].perplexity:>9.2f}{pivots.perplexity:>9.2f}{in_weights(any_size, pivots_model):>9.4f}{off[0]:>9.4f}{off[1]:>9.4f}",
            flush=True,
        )  # fmt: skip
    print(f"perplexity at 0.5, pivots / factors at equal stored numbers: {ratios[0.5]:.3f}")
    return failed


def exported(any_size: ElasticModel, size: float, storage: Storage) -> Any:
    """The plain model of `size`, its layers counted and stored as `storage`."""
    own = any_size.table
    any_size.table = replace(own, storage=storage, _kept={})
    try:
        any_size.resize(size)
        return any_size.materialize()
    finally:
        any_size.table = own


@torch.no_grad()
def in_weights(any_size: ElasticModel, pivots_model: Any) -> float:
    """Relative error of the pivot layers' matrices as they are stored, all layers together."""
    wrong, whole = torch.zeros(()), torch.zeros(())
    for name, layer in any_size.layers.items():
        made = pivots_model.get_submodule(name)
        if isinstance(made, PivotLinear):
            W_qN = made.pivots.weight.float()
            left_qM, right_qN = layer.folded(layer.rank or 0)
            W_MN = left_qM.T @ right_qN
            found = torch.cat([W_qN, made.combine.weight.float() @ W_qN])[made.place]
            wrong, whole = wrong + (found - W_MN).square().sum(), whole + W_MN.square().sum()
    return float((wrong / whole).sqrt()) if whole else 0.0


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids).logits.float()
    return found


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm())


if __name__ == "__main__":
    sys.exit(main())
