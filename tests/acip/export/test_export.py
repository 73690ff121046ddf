"""An export has the logits and bytes of its size, needs only its own code, and is never written partially."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, GenerationConfig, pipeline

from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Folder
from acip.errors import ArtifactError
from acip.export.folder import PROVENANCE, export, tensor_bytes
from acip.export.hub import copy
from acip.modeling_acip import CODE, LowRankLinear, PivotLinear
from acip.sizing.elastic_model import ElasticModel
from tests.conftest import logits, read
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("storage", ["pivot", "factors"])
@pytest.mark.parametrize("size", [1.0, 0.85, 0.45])
def test_an_export_equals_the_materialized_model(
    small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path: Path, size: float, storage: Any
) -> None:
    """The logits are equal bit for bit, and the weights have exactly the bytes of the cut."""
    sizes = small_artifact.load()
    sizes.table = replace(sizes.table, storage=storage, _kept={})
    cut = sizes.resize(size)
    provenance = export(sizes, small_artifact, tmp_path / "out")
    loaded = read(tmp_path / "out")
    assert torch.equal(logits(loaded, heldout_tokens[:4]), logits(sizes.materialize(), heldout_tokens[:4]))
    assert tensor_bytes(tmp_path / "out") == cut.bytes == provenance["weight_bytes"]
    assert sum(p.numel() for p in loaded.parameters()) == cut.params
    kinds = {type(loaded.get_submodule(name)) for name, rank in cut.ranks.items() if rank is not None}
    assert kinds == (set() if size == 1.0 else {PivotLinear if storage == "pivot" else LowRankLinear})
    assert all(p.requires_grad for p in loaded.parameters()), "parameters of a loaded model must be trainable"


def test_smaller_sizes_have_smaller_files(any_size: ElasticModel, small_artifact: Artifact, tmp_path: Path) -> None:
    on_disk = []
    for size in (1.0, 0.8, 0.6, 0.4):
        any_size.resize(size)
        export(any_size, small_artifact, tmp_path / str(size))
        on_disk.append(sum(path.stat().st_size for path in (tmp_path / str(size)).glob("*.safetensors")))
    assert on_disk == sorted(on_disk, reverse=True) and on_disk[-1] < 0.6 * on_disk[0]


def test_shards_give_the_same_model(any_size: ElasticModel, small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path: Path) -> None:
    cut = any_size.resize(0.6)
    export(any_size, small_artifact, tmp_path / "out", max_shard_size="300KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert tensor_bytes(tmp_path / "out") == cut.bytes
    assert torch.equal(logits(read(tmp_path / "out"), heldout_tokens[:2]), logits(any_size.materialize(), heldout_tokens[:2]))


def test_an_export_holds_the_expected_files(exported: Path, any_size: ElasticModel, small_artifact: Artifact, small_base: str) -> None:
    cut = any_size.resize(0.6)
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"], config["architectures"]) == ("acip", "llama", ["AcipLlamaForCausalLM"])
    described = {name: row["rank"] for name, row in config["acip"]["layers"].items()}
    assert described == cut.ranks
    provenance = json.loads((exported / PROVENANCE).read_text())
    assert provenance["base"]["source"] == Path(small_base).name and provenance["recipe"] == small_artifact.manifest["recipe"]
    assert provenance["size"]["asked"] == 0.6 >= provenance["size"]["got"]
    for path in exported.iterdir():
        assert str(Path(small_base).parent).encode() not in path.read_bytes(), f"{path.name} contains a path of this machine"
    files = {path.name for path in exported.iterdir()}
    assert files == {PROVENANCE, *provenance["files"]}
    assert {"README.md", CODE, "model.safetensors", "tokenizer.json", "generation_config.json"} <= files
    assert not {path.name for path in exported.parent.iterdir()} - {exported.name}
    assert (exported / CODE).read_bytes() == (ROOT / "acip" / CODE).read_bytes(), "the code differs from that of acip"


def test_a_copy_contains_no_path_of_this_machine(small_artifact: Artifact, tmp_path: Path) -> None:
    part = {"kind": "perplexity", "corpus": "/home/me/text.txt", "what": {"text": {"source": "/home/me/text.txt"}}}
    samples = {"kind": "samples", "samples": [{"prompt": "Where?", "text": "/etc is a folder"}]}
    manifest = {
        **small_artifact.manifest,
        "provenance": {
            "job": {"base": "/models/llama", "data": "file:///home/me/text.txt", "eval_data": "package:austen"},
            "checkpoint": "s3://bucket/runs/7", "finetuned": {"uri": "s3://bucket/a/small", "code": "https://example.org/code"},
        },
        "curve": [{"got": 1.0, "loss": 2.0, "corpus": "/home/me/text.txt", "evaluation": [part, samples]}],
    }  # fmt: skip
    copied = Artifact.open(copy(replace(small_artifact, manifest=manifest), tmp_path / "copy"), verify=True)
    assert copied.manifest["base"] == {**manifest["base"], "source": Path(manifest["base"]["source"]).name}
    assert copied.manifest["provenance"] == {
        "job": {"base": "llama", "data": "text.txt", "eval_data": "package:austen"},
        "checkpoint": "7", "finetuned": {"uri": "small", "code": "https://example.org/code"},
    }  # fmt: skip
    (row,) = copied.curve
    assert row["corpus"] == row["evaluation"][0]["corpus"] == row["evaluation"][0]["what"]["text"]["source"] == "text.txt"
    assert row["evaluation"][1] == samples
    for path in copied.folder.iterdir():
        for private in (str(small_artifact.folder.parent), str(Path(manifest["base"]["source"]).parent), "/home/me", "s3://"):
            assert private.encode() not in path.read_bytes()


def test_the_card_describes_the_model(small_artifact: Artifact, tmp_path: Path) -> None:
    artifact = Artifact.open(shutil.copytree(small_artifact.folder, tmp_path / "artifact"))
    row = {"got": 1.0, "params": 10, "perplexity": 4.0, "stderr": 0.1, "corpus": "books", "windows": 8, "context": 64}
    half = {**row, "asked": 0.5, "got": 0.4999, "perplexity": 6.0, "extrapolated": True, "domains": {"code": {"kl_nats": 0.1234}}}
    artifact.record_curve([{**row, "asked": 1.0}, half])
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    manifest["base"]["source"] = str(base)
    (artifact.folder / "manifest.json").write_text(json.dumps(manifest))
    artifact = Artifact.open(artifact.folder)
    any_size = artifact.load()
    any_size.resize(0.5)
    export(any_size, artifact, tmp_path / "out", kind="nf4")
    card = (tmp_path / "out" / "README.md").read_text()
    for expected in (
        "license: mit", "library_name: transformers", "pipeline_tag: text-generation", "- nf4",
        "| requested size | 0.5000 (linear ratio) |",
        "| 0.50 | 0.4999 | 10 | 6.00 ± 0.60 | code, 0.123 | closest to this model, below the calibrated sizes |",
        "books, held out", "import acip",
        "perplexity | worst domain, KL | |", "(nats per token) of code.",
    ):  # fmt: skip
        assert expected in card, expected
    assert str(tmp_path) not in card, "the card contains a path of this machine"


def clean_environment() -> dict[str, str]:
    """Return an environment without this project, in which a process computes with the same instructions and threads."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"}


def test_an_export_loads_without_acip(exported: Path, any_size: ElasticModel, heldout_tokens: torch.Tensor, tmp_path: Path) -> None:
    """A process that cannot import acip loads the export with the code of the folder, saves it and loads it again."""
    any_size.resize(0.6)
    torch.save({"tokens": heldout_tokens[:2], "logits": logits(any_size.materialize(), heldout_tokens[:2])}, tmp_path / "expected.pt")
    script = f"""
import sys, torch
sys.modules |= dict.fromkeys(("acip", "bitsandbytes", "peft"))  # can't be imported
from transformers import AutoModelForCausalLM, pipeline
expected = torch.load({str(tmp_path / "expected.pt")!r})
try:
    AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=False)
except ValueError as error:
    print("refused")
for folder in ({str(exported)!r}, {str(tmp_path / "again")!r}):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(input_ids=expected["tokens"]).logits, expected["logits"])
    model.save_pretrained({str(tmp_path / "again")!r})
print(pipeline("text-generation", model={str(exported)!r}, trust_remote_code=True)("It is", max_new_tokens=4)[0]["generated_text"])
"""
    env = {**clean_environment(), "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=PATIENCE_S, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "refused" in result.stdout and "It is" in result.stdout


def test_importing_acip_is_fast_and_registers_its_config(exported: Path) -> None:
    script = f"""
import sys, acip
assert not {{"torch", "transformers"}} & sys.modules.keys()
from transformers import AutoConfig
config = AutoConfig.from_pretrained({str(exported)!r})
assert type(config).__module__ == "acip.modeling_acip", type(config)
"""
    env = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=PATIENCE_S, check=False)
    assert result.returncode == 0, result.stderr


def test_end_ids_are_kept(small_artifact: Artifact, tmp_path: Path) -> None:
    """An export keeps the end id 2 of the base model and the ids 7 and 9 of its generation config."""
    folder = shutil.copytree(small_artifact.folder, tmp_path / "artifact")
    any_size = small_artifact.load()
    any_size.model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    any_size.resize(0.5)
    export(any_size, Artifact.open(folder), tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [7, 9, 2]
    assert read(tmp_path / "out").generation_config.eos_token_id == [7, 9, 2]


def test_a_lost_end_id_is_an_error(
    any_size: ElasticModel, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_size.resize(0.5)
    write = GenerationConfig.save_pretrained

    def save_without_end_ids(self: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        self.eos_token_id = None
        write(self, *args, **kwargs)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", save_without_end_ids)
    with pytest.raises(ArtifactError, match=r"end-of-sequence ids \[2\] would be lost"):
        export(any_size, small_artifact, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    any_size.model.generation_config.eos_token_id = 2


def test_a_chat_template_is_exported(small_artifact: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(small_artifact.folder, tmp_path / "artifact")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    any_size = small_artifact.load()
    export(any_size, Artifact(folder, small_artifact.manifest, Folder(folder)), tmp_path / "out")
    read_back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read_back.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi"


def test_a_crash_leaves_no_files(
    any_size: ElasticModel, small_artifact: Artifact, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def disk_full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    any_size.resize(0.5)
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    monkeypatch.setattr("acip.export.folder.card", disk_full)
    for folder in (tmp_path / "new", exported):
        with pytest.raises(OSError, match="no space"):
            export(any_size, small_artifact, folder)
    assert not list(tmp_path.iterdir())
    assert before == {path.name: path.read_bytes() for path in exported.iterdir()}, "the crash changed the earlier export"
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_only_an_earlier_export_is_replaced(any_size: ElasticModel, small_artifact: Artifact, tmp_path: Path) -> None:
    any_size.resize(0.5)
    out = tmp_path / "out"
    out.mkdir()
    export(any_size, small_artifact, out)  # an empty folder is accepted
    any_size.resize(0.7)
    assert export(any_size, small_artifact, out)["size"]["asked"] == 0.7
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"files added to it \(notes.txt\)"):
        export(any_size, small_artifact, out)
    (out / PROVENANCE).unlink()
    with pytest.raises(ArtifactError, match="not an earlier export"):
        export(any_size, small_artifact, out)
    with pytest.raises(ArtifactError, match="is not a folder"):
        export(any_size, small_artifact, out / "notes.txt")
    with pytest.raises(ArtifactError, match="not an earlier export"):
        export(any_size, small_artifact, small_artifact.folder)


def test_an_export_generates_and_is_saved_again(exported: Path, heldout_tokens: torch.Tensor, tmp_path: Path) -> None:
    model, tokenizer = read(exported), AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("It is a truth universally", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    texts = pipeline("text-generation", model=str(exported))("It is a truth universally", max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert texts[0]["generated_text"] == tokenizer.decode(out[0], skip_special_tokens=True)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(read(tmp_path / "again"), heldout_tokens[:2]), logits(model, heldout_tokens[:2]))


def test_an_export_is_fine_tuned_with_peft(exported: Path, golden_tokens: torch.Tensor, tmp_path: Path) -> None:
    model: Any = get_peft_model(read(exported), LoraConfig(r=4, target_modules="all-linear"))
    assert any(name.endswith("pivots.lora_A.default.weight") for name, _ in model.named_parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = golden_tokens[:8], []
    for _ in range(6):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02, losses
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(logits(read(tmp_path / "tuned"), batch[:2]), logits(merged.eval(), batch[:2]))


def test_a_malformed_description_of_layers_is_refused(exported: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"form": "pivot", "rank": 10**9}, "allowed are form"),
        ({"form": "exec", "rank": 1}, "allowed are form"),
        (None, "does not have"),
    ):
        folder = shutil.copytree(exported, tmp_path / "copy", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config["acip"]["layers"]["model.layers.0.mlp.up_proj" if change else "model.no"] = change or {"form": "pivot", "rank": 1}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            read(folder)
