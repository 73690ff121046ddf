"""A resident model and its engine, and an artifact with coded layers."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.text_engine import TextEngine
from acip_platform.tracking.registry import ModelVersion

from acip.artifact.artifact import Artifact
from acip.base import Base
from acip.layers.targets import find_linears
from acip.sizing.budget import BITS_PER_WEIGHT, Budget
from acip.sizing.cut_table import Cut, CutTable
from tests.acip.artifact.test_codes_file import RECIPE, calibrated_with_codes, llama
from tests.conftest import byte_tokenizer
from tests.support.coded import rounded
from tests.support.engines import ENGINE, HEAD_DIM, Resident

HEAD = None if ENGINE == "acip" else HEAD_DIM  # numbers per head of attention; None = a fourth of the width
LARGEST = (3, 7, 15, 31, 63, 127)  # the largest code of each version


@pytest.fixture(scope="module")
def served(small_artifact: Artifact) -> ResidentModel:
    return Resident(ModelVersion("small", "7", str(small_artifact.folder), ("champion",), {}), small_artifact)


@pytest.fixture(scope="module")
def engine(served: ResidentModel) -> Iterator[TextEngine]:
    engine = TextEngine()
    engine.add(served)
    yield engine
    engine.close()


def save_with_codes(folder: Path, width: int, dtype: torch.dtype) -> Artifact:
    """Save an artifact of a small Llama with random weights, with ranks and codes."""
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(llama(width, dtype=dtype, head_dim=HEAD), LARGEST)
    return Artifact.save(folder / "artifact", base, calibration, {}, codes)


def save_codes_only(folder: Path) -> Artifact:
    """Save an artifact in bfloat16 that has codes and no ranks."""
    torch.manual_seed(0)
    model = llama(64, dtype=torch.bfloat16, head_dim=HEAD)
    base = Base(model, byte_tokenizer(), "random", None, "0" * 12)
    recipe = replace(RECIPE, code="bits", dtype="bfloat16")
    return Artifact.save_coded(folder / "artifact", base, recipe, rounded(find_linears(model), LARGEST), {})


def in_bytes(table: CutTable, share: float) -> Cut:
    """Return the size of a share of the base model's bytes."""
    return table.cut(Budget(ratio=share, convention="bytes"))


@pytest.fixture(scope="session")
def coded_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Save an artifact in float32 with ranks and codes, and a curve over both. Its coded sizes are from 0.35 to 0.46."""
    artifact = save_with_codes(tmp_path_factory.mktemp("coded"), 64, torch.float32)
    table = artifact.table()
    text = {"corpus": "held-out", "context": 64, "windows": 8}
    rows: list[dict[str, Any]] = [{"asked": 1.0, "got": 1.0, "loss": 2.0}]
    rows += [{"asked": size, "got": table.cut(Budget(ratio=size)).got, "loss": 2.0 + 4 * (1 - size)} for size in (0.8, 0.6)]
    for share, loss in ((0.44, 2.1), (0.36, 2.4)):
        cut = in_bytes(table, share)
        rows.append({"asked": share, "got": cut.got, "loss": loss, BITS_PER_WEIGHT: cut.bits_per_weight})
    rows[-2]["domains"] = {"held-out": {"kl_nats": 0.1}, "code": {"kl_nats": 0.2}}
    return artifact.record_curve([{**text, **row, "perplexity": math.exp(row["loss"]), "stderr": 0.01} for row in rows])
