"""The current code reads artifacts of earlier versions and reproduces their recorded results (tests/support/stored.py)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST, SCHEMA
from acip.errors import ArtifactError
from acip.sizing.budget import Budget
from tests.conftest import GOLDEN, logits
from tests.support.coded import load_bytes

pytestmark = pytest.mark.filterwarnings("ignore:the recipe field")  # stored recipes use old field names
STORED = sorted(GOLDEN.parent.glob("schema-*"))


def test_the_current_schema_is_stored() -> None:
    assert GOLDEN.parent / f"schema-{SCHEMA}" in STORED, "a new schema needs a stored artifact: python -m tests.support.stored"


@pytest.fixture(params=STORED, ids=lambda folder: folder.name)
def stored(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_every_size_reproduces_the_recorded_results(stored: Path) -> None:
    artifact = Artifact.open(stored / "artifact", verify=True)
    table, any_size = artifact.table(), artifact.load()
    recorded = load_file(stored / "expected.safetensors")
    for expected, logits_TV in zip(json.loads((stored / "expected.json").read_text()), recorded["logits"], strict=True):
        cut = table.cut(Budget(ratio=expected["size"]))
        assert {key: getattr(cut, key) for key in ("got", "params", "bytes", "ranks")}.items() <= expected.items()
        for model in (any_size, artifact.load(size=Budget(ratio=expected["size"]))):
            model.resize(Budget(ratio=expected["size"]))
            torch.testing.assert_close(logits(model.model, recorded["tokens"][None])[0], logits_TV, rtol=0, atol=1e-4)


def test_models_of_any_bytes_reproduce_the_recorded_results(stored: Path) -> None:
    artifact = Artifact.open(stored / "artifact")
    recorded = load_file(stored / "expected.safetensors")
    if artifact.manifest["schema"] < 5:
        assert "coded_bytes" not in recorded
        with pytest.raises(ArtifactError, match="code: both"):
            artifact.coded()
    for limit, logits_TV in zip(recorded.get("coded_bytes", ()), recorded.get("coded_logits", ()), strict=True):
        model, stored_bytes = load_bytes(artifact, int(limit))
        assert stored_bytes == limit
        torch.testing.assert_close(logits(model, recorded["tokens"][None])[0], logits_TV, rtol=0, atol=1e-4)


def test_the_tokenizer_the_curve_and_the_recipe_are_read(stored: Path) -> None:
    artifact = Artifact.open(stored / "artifact")
    assert artifact.tokenizer()("any size")["input_ids"] == list(b"any size")
    assert [row["asked"] for row in artifact.curve] == [expected["size"] for expected in json.loads((stored / "expected.json").read_text())]
    limit = artifact.curve[-2]["loss"] - artifact.curve[0]["loss"]
    assert artifact.table().cut(Budget(max_loss_increase=limit)).got <= limit
    assert (artifact.recipe.adapter_rank, artifact.recipe.dtype, artifact.recipe.storage) == (2, "float32", "pivot")


def change(stored: Path, tmp_path: Path, **fields: Any) -> Path:
    folder = Path(shutil.copytree(stored / "artifact", tmp_path / "changed"))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **fields}))
    return folder


def test_additions_of_a_later_version_are_ignored(stored: Path, tmp_path: Path) -> None:
    folder = change(stored, tmp_path, notes={"of": "a later version"})
    (folder / "notes.json").write_text("{}")
    assert Artifact.open(folder).load(size=Budget(0.4, "linear")).table.dense_params > 0


def test_a_newer_schema_is_refused_with_advice(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"has schema {SCHEMA + 1}; this acip reads 3 to {SCHEMA}. Upgrade acip."):
        Artifact.open(change(stored, tmp_path, schema=SCHEMA + 1))
