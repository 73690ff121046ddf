"""Artifacts are read back exactly as written. Broken, foreign and newer ones are refused with a reason."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import CamembertConfig, GPTJConfig, PreTrainedConfig

import acip
from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST
from acip.base import load_base
from acip.calibration.result import Calibration
from acip.errors import ArtifactError
from acip.layers.elastic_linear import ElasticLinear
from acip.layers.targets import find_linears, targets
from acip.modeling_acip import PivotLinear
from acip.recipe import Recipe
from acip.sizing.model_sizes import set_size
from tests.acip.layers.test_architectures import WIDE, random_model
from tests.conftest import byte_tokenizer, logits
from tests.support.coded import rounded


def test_size_one_is_the_base_bit_for_bit(small_artifact: Artifact, small_base: str, heldout_tokens: torch.Tensor) -> None:
    base = load_base(small_base, "float32").model
    any_size = small_artifact.load()
    any_size.resize(0.5)
    cut = any_size.resize(1.0)
    assert torch.equal(logits(any_size.model, heldout_tokens[:4]), logits(base, heldout_tokens[:4]))
    assert cut.params == sum(p.numel() for p in base.parameters())


@pytest.mark.parametrize(
    "config",
    [
        GPTJConfig(vocab_size=256, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),  # a computed table of positions
        CamembertConfig(**WIDE),  # its head, which is tied to the embeddings, comes before them
    ],
    ids=lambda config: config.model_type,
)
def test_size_one_in_16_bit_is_the_base_bit_for_bit(config: PreTrainedConfig, tmp_path: Path) -> None:
    random_model(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base, ids = load_base(str(tmp_path / "base"), "bfloat16"), torch.arange(3, 27)[None]
    artifact = Artifact.save_coded(tmp_path / "artifact", base, Recipe(code="bits"), rounded(find_linears(base.model)), {})
    assert torch.equal(artifact.load().model(input_ids=ids).logits, base.model(input_ids=ids).logits)


@pytest.mark.parametrize("size", [0.45, 0.6, 0.85])
def test_every_size_equals_the_calibrated_model(
    calibrated: tuple[Any, Calibration], small_artifact: Artifact, heldout_tokens: torch.Tensor, size: float
) -> None:
    """The calibrated model with its mask, the model loaded from disk, and the materialized model compute the same function."""
    _, calibration = calibrated
    any_size = small_artifact.load()
    cut = any_size.resize(size)
    set_size(targets(calibration.model), cut)
    resident = logits(any_size.model, heldout_tokens[:4])
    torch.testing.assert_close(resident, logits(calibration.model, heldout_tokens[:4]), rtol=0, atol=1e-4)
    plain = any_size.materialize()
    any_size.resize(1.0)
    torch.testing.assert_close(logits(plain, heldout_tokens[:4]), resident, rtol=0, atol=1e-4)
    assert sum(p.numel() for p in plain.parameters()) == cut.params
    assert not any(isinstance(module, ElasticLinear) for module in plain.modules())
    kinds = {name: type(plain.get_submodule(name)) for name in cut.ranks}
    assert kinds == {name: nn.Linear if rank is None else PivotLinear for name, rank in cut.ranks.items()}


def test_a_size_is_a_prefix_on_disk(small_artifact: Artifact) -> None:
    """No size needs more rows than are stored, and resizing copies no rows, because the rows on disk are in order of importance."""
    table = small_artifact.table()
    with safe_open(small_artifact.folder / "factors.safetensors", framework="pt") as factors:
        for layer in table.layers:
            rows = factors.get_slice(f"{layer.name}.left").get_shape()[0]
            assert rows == layer.stored_rank(table.adapter_rows, table.storage, table.dense_if_no_saving)
            assert rows == layer.K - 1, "in the pivot form every rank below K saves something"
    any_size = small_artifact.load()
    before = {name: layer.right.values.data_ptr() for name, layer in any_size.layers.items()}
    any_size.resize(0.5)
    any_size.resize(0.8)
    assert before == {name: layer.right.values.data_ptr() for name, layer in any_size.layers.items()}, "a size is a view, not a copy"


def test_an_artifact_loads_its_tokenizer_and_generates(small_artifact: Artifact) -> None:
    any_size, tokenizer = small_artifact.load(), small_artifact.tokenizer()
    model: Any = any_size.model
    any_size.resize(0.7)
    ids = tokenizer("It is a truth universally", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out.shape[1] <= ids.shape[1] + 8
    assert tokenizer.decode(out[0]).startswith("It is a truth universally")


def test_recording_a_curve_changes_nothing_else(small_artifact: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(small_artifact.folder, tmp_path / "copy")
    changed = Artifact.open(folder).record_curve([{"asked": 1.0, "perplexity": 4.0}])
    assert changed.curve == [{"asked": 1.0, "perplexity": 4.0}]
    assert {**changed.manifest, "curve": []} == small_artifact.manifest
    assert Artifact.open(folder, verify=True).curve == changed.curve
    for row in ({"got": 2.0, "loss": 1.0}, {"got": 0.5, "loss": "low"}):
        with pytest.raises(ArtifactError, match="malformed row of the curve"):
            changed.record_curve([row])
    assert Artifact.open(folder, verify=True).curve == changed.curve, "a curve that could not be read back is not written"


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return edit


def _flip(folder: Path) -> None:
    path = folder / "factors.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "holds no manifest.json"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\x80\x04pickle"), "is not JSON"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "not an acip manifest"),
        (lambda folder: (folder / "dense.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / "rest.safetensors").write_bytes(b"short"), "its size in the manifest is"),
        (_flip, "is corrupted"),
        (_edit(lambda m: m.update(schema=99)), "Upgrade acip"),
        (_edit(lambda m: m.pop("layers")), "'layers' is missing"),
        (_edit(lambda m: m["files"].update({"../outside": {"bytes": 1, "sha256": ""}})), "outside its folder"),
        (_edit(lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}})), "outside its folder"),
        (_edit(lambda m: m["layers"][0].update(M="many")), "malformed layer row"),
    ],
)
def test_a_damaged_artifact_is_refused(small_artifact: Artifact, tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    folder = shutil.copytree(small_artifact.folder, tmp_path / "copy")
    harm(folder)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(folder, verify=True)


def test_a_file_is_copied_in_pieces_and_compared(small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acip.artifact.reader.COPY_CHUNK_BYTES", 1000)
    file, target = "order.safetensors", tmp_path / "folder" / "copy"
    small_artifact.copy(file, target)
    assert target.read_bytes() == (small_artifact.folder / file).read_bytes() and target.stat().st_size % 1000
    facts = {**small_artifact.manifest["files"], file: {**small_artifact.manifest["files"][file], "sha256": "0" * 64}}
    with pytest.raises(ArtifactError, match="is corrupted"):
        replace(small_artifact, manifest={**small_artifact.manifest, "files": facts}).copy(file, tmp_path / "other")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "copy"], "the failed copy leaves no file"


def test_a_table_that_does_not_fit_its_order_is_refused(small_artifact: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(small_artifact.folder, tmp_path / "copy")
    _edit(lambda m: m["layers"].pop())(folder)
    with pytest.raises(ArtifactError, match="does not fit the layer table"):
        Artifact.open(folder).table()


def test_a_crash_while_writing_leaves_no_artifact(
    calibrated: tuple[Any, Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, calibration = calibrated

    def disk_full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(base.tokenizer, "save_pretrained", disk_full)
    with pytest.raises(OSError, match="no space"):
        Artifact.save(tmp_path / "half", base, calibration, {})
    with pytest.raises(ArtifactError, match="cut short"):
        Artifact.open(tmp_path / "half")


def test_files_of_others_do_not_become_a_part_of_an_artifact(
    calibrated: tuple[Any, Calibration], small_artifact: Artifact, tmp_path: Path
) -> None:
    base, calibration = calibrated
    folder = shutil.copytree(small_artifact.folder, tmp_path / "artifact")
    assert Artifact.save(folder, base, calibration, {"seed": 0}).manifest == small_artifact.manifest, "an earlier attempt is overwritten"
    with pytest.raises(ArtifactError, match=r"holds other files \(adapters.safetensors, .*Choose an empty folder"):
        small_artifact.tuned(folder, {}, {}, {})
    (folder / "chat_template.jinja").write_text("{{ messages }}")  # of another tokenizer
    with pytest.raises(ArtifactError, match=r"holds other files \(chat_template.jinja\)"):
        Artifact.save(folder, base, calibration, {})
    assert Artifact.open(folder, verify=True).manifest == small_artifact.manifest


def test_the_code_of_the_format_description_reads_an_artifact(small_artifact: Artifact) -> None:
    """The snippet of ARTIFACT.md reads the same weights as acip, and its rule for ranks gives the same ranks."""
    page = (Path(acip.__file__).parent / "ARTIFACT.md").read_text()
    snippet: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], snippet)
    any_size, folder = small_artifact.load(), str(small_artifact.folder)
    cut = any_size.resize(0.6)
    for name, layer in any_size.layers.items():
        if layer.rank is not None:
            left, right = layer.folded(layer.rank)
            torch.testing.assert_close(torch.from_numpy(snippet["weight"](folder, name, layer.rank)), left.T @ right, rtol=0, atol=1e-5)
    layers = small_artifact.manifest["layers"]
    ranks = [min(row["M"], row["N"]) for row in layers]
    dense = sum(row["M"] * row["N"] for row in layers)

    def stored() -> int:
        return sum(q * (row["M"] + row["N"] - q) for q, row in zip(ranks, layers, strict=True))

    for index in snippet["tensor"](folder, "order", "layer"):
        if stored() <= 0.6 * dense:
            break
        ranks[index] = max(1, ranks[index] - 1)
    expected = {row["name"]: None if q == min(row["M"], row["N"]) else q for q, row in zip(ranks, layers, strict=True)}
    assert expected == dict(cut.ranks)


def test_training_a_model_changes_no_other_model(small_artifact: Artifact, heldout_tokens: torch.Tensor) -> None:
    """Models loaded before and after it, and the files, stay the same."""
    before = small_artifact.load()
    before.resize(0.6)
    expected = logits(before.model, heldout_tokens[:2])
    changed = small_artifact.load()
    for parameter in changed.model.parameters():
        parameter.data.add_(1.0)
    after = Artifact.open(small_artifact.folder, verify=True).load()
    again = small_artifact.load()
    for any_size in (after, again):
        any_size.resize(0.6)
    assert all(torch.equal(logits(any_size.model, heldout_tokens[:2]), expected) for any_size in (before, after, again))
