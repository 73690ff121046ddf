"""An export is the model of its size and nothing less: the same logits, falling bytes, no foreign code, nothing half written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from acip_platform.settings import Settings
from acip_platform.tracking import Registry
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from transformers.utils import logging as transformers_logging

import acip
from acip.artifact import Artifact
from acip.budget import Budget
from acip.errors import ArtifactError, BudgetError
from acip.export import PROVENANCE, export, tensor_bytes
from acip.linear import LowRankLinear, PivotLinear
from acip.materialise import AnySize
from acip.modeling_acip import CODE, QuantLinear, plain_linear
from acip.quantise import quantised as as_quantised
from acip.source import Folder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def any_size(small_artifact: Artifact) -> AnySize:
    return small_artifact.load()


@pytest.fixture(scope="module")
def exported(any_size: AnySize, small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model at 0.6."""
    any_size.resize(0.6)
    folder = tmp_path_factory.mktemp("exports") / "small-0.6"
    export(any_size, small_artifact, folder)
    return folder


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("storage", ["pivot", "factors"])
@pytest.mark.parametrize("size", [1.0, 0.85, 0.45])
def test_an_export_is_what_was_materialised(
    small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path: Path, size: float, storage: Any
) -> None:
    """Bit for bit; and its weights take the bytes that the cut counted, not one more."""
    sizes = small_artifact.load()
    sizes.table = replace(sizes.table, storage=storage, _kept={})
    cut = sizes.resize(size)
    provenance = export(sizes, small_artifact, tmp_path / "out")
    loaded = read(tmp_path / "out")
    assert torch.equal(logits(loaded, heldout_tokens[:4]), logits(sizes.materialise(), heldout_tokens[:4]))
    assert tensor_bytes(tmp_path / "out") == cut.bytes == provenance["weight_bytes"]
    assert sum(p.numel() for p in loaded.parameters()) == cut.params
    kinds = {type(loaded.get_submodule(name)) for name, rank in cut.ranks.items() if rank is not None}
    assert kinds == (set() if size == 1.0 else {PivotLinear if storage == "pivot" else LowRankLinear})
    assert all(p.requires_grad for p in loaded.parameters()), "as every loaded model's"


def test_bytes_fall_with_the_size(any_size: AnySize, small_artifact: Artifact, tmp_path: Path) -> None:
    on_disk = []
    for size in (1.0, 0.8, 0.6, 0.4):
        any_size.resize(size)
        export(any_size, small_artifact, tmp_path / str(size))
        on_disk.append(sum(path.stat().st_size for path in (tmp_path / str(size)).glob("*.safetensors")))
    assert on_disk == sorted(on_disk, reverse=True) and on_disk[-1] < 0.6 * on_disk[0]


def test_shards_hold_the_same(any_size: AnySize, small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path: Path) -> None:
    cut = any_size.resize(0.6)
    export(any_size, small_artifact, tmp_path / "out", max_shard_size="300KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert tensor_bytes(tmp_path / "out") == cut.bytes
    assert torch.equal(logits(read(tmp_path / "out"), heldout_tokens[:2]), logits(any_size.materialise(), heldout_tokens[:2]))


def test_what_is_in_the_folder(exported: Path, any_size: AnySize, small_artifact: Artifact, small_base: str) -> None:
    cut = any_size.resize(0.6)
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"], config["architectures"]) == ("acip", "llama", ["AcipLlamaForCausalLM"])
    described = {name: row["rank"] for name, row in config["acip"]["layers"].items()}
    assert described == cut.ranks
    provenance = json.loads((exported / PROVENANCE).read_text())
    assert provenance["base"]["source"] == Path(small_base).name and provenance["recipe"] == small_artifact.manifest["recipe"]
    assert provenance["size"]["asked"] == 0.6 >= provenance["size"]["got"]
    for path in exported.iterdir():
        assert str(Path(small_base).parent).encode() not in path.read_bytes(), "nothing of this machine's paths is published"
    there = {path.name for path in exported.iterdir()}
    assert there == {PROVENANCE, *provenance["files"]}
    assert {"README.md", CODE, "model.safetensors", "tokenizer.json", "generation_config.json"} <= there
    assert not {path.name for path in exported.parent.iterdir()} - {exported.name}
    assert (exported / CODE).read_bytes() == (ROOT / "acip" / CODE).read_bytes(), "one copy of the code"


def test_the_card(small_artifact: Artifact, tmp_path: Path) -> None:
    artifact = Artifact.open(shutil.copytree(small_artifact.folder, tmp_path / "artifact"))
    row = {"got": 1.0, "params": 10, "perplexity": 4.0, "stderr": 0.1, "corpus": "books", "windows": 8, "context": 64}
    artifact.record_curve([{**row, "asked": 1.0}, {**row, "asked": 0.5, "got": 0.4999, "perplexity": 6.0, "extrapolated": True}])
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
        "license: mit", "library_name: transformers", "pipeline_tag: text-generation", "- nf4", "| asked | 0.5000 (linear ratio) |",
        "| 0.50 | 0.4999 | 10 | 6.00 ± 0.60 | nearest to this model, below what was calibrated |", "books, held out", "import acip",
    ):  # fmt: skip
        assert expected in card, expected
    assert str(tmp_path) not in card, "no paths of this machine"


def test_the_shipped_code_is_enough(exported: Path, any_size: AnySize, heldout_tokens: torch.Tensor, tmp_path: Path) -> None:
    """In a process that can't import acip: loaded with the folder's code, saved again, loaded again."""
    any_size.resize(0.6)
    torch.save({"tokens": heldout_tokens[:2], "logits": logits(any_size.materialise(), heldout_tokens[:2])}, tmp_path / "expected.pt")
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
    env = {"PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "refused" in result.stdout and "It is" in result.stdout


def test_importing_acip_is_cheap_and_enough(exported: Path) -> None:
    script = f"""
import sys, acip
assert not {{"torch", "transformers"}} & sys.modules.keys()
from transformers import AutoConfig
config = AutoConfig.from_pretrained({str(exported)!r})
assert type(config).__module__ == "acip.modeling_acip", type(config)
"""
    env = {"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


def test_end_ids_are_kept(small_artifact: Artifact, tmp_path: Path) -> None:
    """The base stops at 2; its generation config says 7 and 9, too."""
    folder = shutil.copytree(small_artifact.folder, tmp_path / "artifact")
    any_size = small_artifact.load()
    any_size.model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    any_size.resize(0.5)
    export(any_size, Artifact.open(folder), tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [7, 9, 2]
    assert read(tmp_path / "out").generation_config.eos_token_id == [7, 9, 2]


def test_an_end_id_that_would_be_lost_is_told(
    any_size: AnySize, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_size.resize(0.5)
    write = GenerationConfig.save_pretrained

    def forgetful(self: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        self.eos_token_id = None
        write(self, *args, **kwargs)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", forgetful)
    with pytest.raises(ArtifactError, match=r"end-of-sequence ids \[2\] would be lost"):
        export(any_size, small_artifact, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    any_size.model.generation_config.eos_token_id = 2


def test_a_chat_template_comes_along(small_artifact: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(small_artifact.folder, tmp_path / "artifact")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    any_size = small_artifact.load()
    export(any_size, Artifact(folder, small_artifact.manifest, Folder(folder)), tmp_path / "out")
    read_back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read_back.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi"


def test_a_crash_leaves_nothing(
    any_size: AnySize, small_artifact: Artifact, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    any_size.resize(0.5)
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    monkeypatch.setattr("acip.export.card", full)
    for folder in (tmp_path / "new", exported):
        with pytest.raises(OSError, match="no space"):
            export(any_size, small_artifact, folder)
    assert not list(tmp_path.iterdir())
    assert before == {path.name: path.read_bytes() for path in exported.iterdir()}, "the earlier one is whole"
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_only_an_earlier_export_is_replaced(any_size: AnySize, small_artifact: Artifact, tmp_path: Path) -> None:
    any_size.resize(0.5)
    out = tmp_path / "out"
    out.mkdir()
    export(any_size, small_artifact, out)  # an empty folder is free
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


def test_generate_pipeline_and_saving_again(exported: Path, heldout_tokens: torch.Tensor, tmp_path: Path) -> None:
    model, tokenizer = read(exported), AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("It is a truth universally", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    said = pipeline("text-generation", model=str(exported))("It is a truth universally", max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert said[0]["generated_text"] == tokenizer.decode(out[0], skip_special_tokens=True)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(read(tmp_path / "again"), heldout_tokens[:2]), logits(model, heldout_tokens[:2]))


def test_fine_tuning_with_peft(exported: Path, golden_tokens: torch.Tensor, tmp_path: Path) -> None:
    model: Any = get_peft_model(read(exported), LoraConfig(r=4, target_modules="all-linear"))
    assert any(name.endswith("pivots.lora_A.default.weight") for name, _ in model.named_parameters())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = golden_tokens[:8], []
    for _ in range(6):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02, losses
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(logits(read(tmp_path / "tuned"), batch[:2]), logits(merged.eval(), batch[:2]))


def test_a_foreign_description_of_layers_is_refused(exported: Path, tmp_path: Path) -> None:
    for change, says in (
        ({"form": "pivot", "rank": 10**9}, "allowed are form"),
        ({"form": "exec", "rank": 1}, "allowed are form"),
        (None, "does not have"),
    ):
        folder = shutil.copytree(exported, tmp_path / "copy", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config["acip"]["layers"]["model.layers.0.mlp.up_proj" if change else "model.no"] = change or {"form": "pivot", "rank": 1}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=says):
            read(folder)


# ---- quantised


@pytest.mark.parametrize(("kind", "bits", "near"), [("nf4", 4, 0.2), ("fp4", 4, 0.35), ("int8", 8, 0.03)])
def test_a_quantised_export_is_close_and_as_small_as_counted(
    any_size: AnySize, small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path: Path, kind: Any, bits: Any, near: float
) -> None:
    most = {4: 400_000, 8: 500_000}[bits]
    cut = any_size.resize(Budget(stored_bytes=most, bits=bits))
    export(any_size, small_artifact, tmp_path / "out", kind=kind)
    assert cut.bytes is not None and tensor_bytes(tmp_path / "out") == cut.bytes <= most
    loaded = read(tmp_path / "out")
    exact = logits(any_size.materialise(), heldout_tokens[:4])
    assert (logits(loaded, heldout_tokens[:4]) - exact).norm() < near * exact.norm()
    assert PivotLinear in {type(loaded.get_submodule(name)) for name in cut.ranks} <= {PivotLinear, QuantLinear}
    assert not any(type(part) is nn.Linear for name in cut.ranks for part in loaded.get_submodule(name).modules())
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(read(tmp_path / "again"), heldout_tokens[:2]), logits(loaded, heldout_tokens[:2]))


@pytest.mark.parametrize(("M", "N"), [(128, 96), (64, 32), (37, 37), (192, 51), (5, 1), (64, 64)])
@pytest.mark.parametrize(("kind", "near"), [("nf4", 0.15), ("fp4", 0.25), ("int8", 0.02)])
def test_quantised_matrices_of_every_shape(M: int, N: int, kind: str, near: float) -> None:
    """Of rows on very different scales: misplaced blocks would show."""
    torch.manual_seed(0)
    W_MN = torch.randn(M, N) * torch.exp(2 * torch.randn(M, 1))
    quantised = as_quantised(plain_linear(W_MN, torch.ones(M)), kind)
    assert ((quantised.dequantised(torch.float32) - W_MN).norm(dim=1) <= near * W_MN.norm(dim=1) + 1e-6).all()
    x = torch.randn(3, N)
    torch.testing.assert_close(quantised(x), nn.functional.linear(x, quantised.dequantised(torch.float32), torch.ones(M)))


def test_a_cut_in_4_bit_is_exported_in_4_bit(any_size: AnySize, small_artifact: Artifact, tmp_path: Path) -> None:
    any_size.resize(Budget(ratio=0.5, bits=4))
    assert export(any_size, small_artifact, tmp_path / "out")["quantise"] == "nf4"
    with pytest.raises(ArtifactError, match="int8 needs 8"):
        export(any_size, small_artifact, tmp_path / "other", kind="int8")
    with pytest.raises(ArtifactError, match="allowed are nf4, fp4, int8"):
        export(any_size, small_artifact, tmp_path / "other", kind="int3")  # type: ignore[arg-type]


# ---- the paper's three lines


def test_sizes_come_and_go(small_artifact: Artifact, heldout_tokens: torch.Tensor, any_size: AnySize) -> None:
    tokens = heldout_tokens[:2]
    model: Any = acip.from_pretrained(small_artifact.folder)
    whole = logits(model, tokens)
    half = logits(model.prune_model_by_score(size_ratio=0.5), tokens)
    assert model.cut.got <= 0.5 and not torch.equal(whole, half)
    assert torch.equal(logits(model.prune_model_by_score(compression_rate=0.0), tokens), whole)
    assert torch.equal(logits(model.prune_model_by_score(compression_rate=0.5), tokens), half)
    footprint = model.get_memory_footprint()
    small = model.compress()
    any_size.resize(0.5)
    assert small is model and torch.equal(logits(model, tokens), logits(any_size.materialise(), tokens))
    assert model.get_memory_footprint() < 0.6 * footprint
    quantised = logits(model.quantize("nf4"), tokens)
    assert (quantised - half).norm() < 0.2 * half.norm()
    with pytest.raises(ArtifactError, match="quantised to nf4 already"):
        model.quantize("fp4")
    assert torch.equal(logits(model.prune_model_by_score(1.0), tokens), whole), "compress and quantize are reversible, too"
    assert model.generate(tokens[:1, :8], max_new_tokens=4, pad_token_id=0).shape[1] <= 12


def test_from_pretrained_takes_budgets_and_writes_exports(small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path: Path) -> None:
    tokens = heldout_tokens[:2]
    model: Any = acip.from_pretrained(str(small_artifact.folder), size="1MB")
    assert model.cut.bytes <= 10**6
    model.save_pretrained(tmp_path / "elastic")
    model.compress().save_pretrained(tmp_path / "compressed", max_shard_size="300KB")
    for folder in ("elastic", "compressed"):
        assert (tmp_path / folder / PROVENANCE).is_file()
        loaded: Any = acip.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    model.save_pretrained(tmp_path / "trainer", state_dict=model.state_dict())
    assert torch.equal(logits(read(tmp_path / "trainer"), tokens), logits(model, tokens))
    ready: Any = acip.from_pretrained(small_artifact.folder, size=Budget(ratio=0.5), quantize="int8")
    ready.save_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(read(tmp_path / "quantised"), tokens), logits(ready, tokens))


def test_wrong_sizes_and_places_are_told(small_artifact: Artifact, exported: Path, small_base: str, tmp_path: Path) -> None:
    model: Any = acip.from_pretrained(small_artifact.folder)
    for wrong in ({}, {"size_ratio": 0.5, "compression_rate": 0.5}, {"compression_rate": 1}, {"size_ratio": 0}, {"size_ratio": "half"}):
        with pytest.raises(BudgetError):
            model.prune_model_by_score(**wrong)
    with pytest.raises(BudgetError, match="is a model of one size"):
        acip.from_pretrained(exported, size=0.5)
    with pytest.raises(ArtifactError, match="neither an artifact nor an export"):
        acip.from_pretrained(small_base)
    with pytest.raises(ArtifactError, match="not an artifact"):
        acip.from_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute 'from_pretraind'"):
        acip.from_pretraind  # noqa: B018


# ---- the command


class Command:
    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self.monkeypatch, self.capsys = home, monkeypatch, capsys
        for name in ("ACIP_STORE", "ACIP_RUNS", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("ACIP_HOME", str(home))

    def __call__(self, *args: str | Path) -> tuple[int, str]:
        from jobs import materialise

        self.monkeypatch.setattr(sys, "argv", ["materialise.py", *map(str, args)])
        try:
            code = materialise.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = self.capsys.readouterr()
        return code, said.out + said.err


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    (tmp_path / "home").mkdir()
    return Command(tmp_path / "home", monkeypatch, capsys)


def test_the_command_takes_names_paths_and_uris(command: Command, small_artifact: Artifact, tmp_path: Path) -> None:
    settings = Settings.from_env()
    version = Registry(settings).register("small", str(small_artifact.folder), "", {})
    Registry(settings).set_alias(version)
    outputs = []
    for model in ("small", small_artifact.folder, small_artifact.folder.as_uri()):
        code, said = command(model, "--size", "60%", "--out", tmp_path / "out")
        assert code == 0, said
        assert "asked      0.6 (linear)" in said and "got        0.59" in said and "try it\n  python -c " in said
        outputs.append(json.loads((tmp_path / "out" / PROVENANCE).read_text())["weight_bytes"])
        assert f"weights    {outputs[-1]:,} bytes" in said
    assert len(set(outputs)) == 1
    assert command("small", "--alias", "1", "--size", "0.5", "--out", tmp_path / "out")[0] == 0
    code, said = command("smal", "--size", "0.5", "--out", tmp_path / "out")
    assert code == 1 and "no model 'smal' in the registry (did you mean 'small'?)" in said


def test_the_command_fits_bytes_memory_and_bits(command: Command, small_artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(small_artifact.folder, "--fit", "1MB", "--out", out)[0] == 0
    assert 900_000 < tensor_bytes(out) <= 10**6
    assert command(small_artifact.folder, "--fit", "450KB", "--quantize", "nf4", "--out", out)[0] == 0
    assert 400_000 < tensor_bytes(out) <= 450_000
    code, said = command(small_artifact.folder, "--fit", "258MB", "--context", "128", "--out", out)
    assert code == 0 and "MB (memory_mb)" in said


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--size", "0.5", "--fit", "1GB"], 2, "not allowed with"),
        ([], 2, "one of the arguments --size --fit is required"),
        (["--size", "big"], 2, "is not a budget"),
        (["--size", "1.5"], 2, "size ratio is 1.5"),
        (["--fit", "0.6"], 2, "A ratio goes with --size"),
        (["--size", "0.5", "--context", "64"], 2, "--context goes with --fit"),
        (["--fit", "1GB", "--batch", "2"], 2, "--batch goes with --context"),
        (["--fit", "1GB", "--context", "0"], 2, "context is 0"),
        (["--size", "0.5", "--quantize", "int3"], 2, "invalid choice"),
        (["--size", "0.5", "--push", "nobody"], 2, "must be OWNER/NAME"),
        (["--size", "0.5", "--max-shard-size", "5"], 2, "must be like"),
        (["--fit", "1KB"], 1, "can't be reached: the smallest is"),
        (["--size", "ppl<=20"], 1, "no curve was measured"),
    ],
)
def test_the_command_refuses(command: Command, small_artifact: Artifact, tmp_path: Path, args: list[str], code: int, says: str) -> None:
    got, said = command(small_artifact.folder, *args, "--out", tmp_path / "out")
    assert (got, says in said) == (code, True), said
    assert not (tmp_path / "out").exists()


def test_the_command_touches_nothing_of_others(command: Command, small_artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, said = command(small_artifact.folder, "--size", "0.5", "--out", tmp_path / "mine")
    assert code == 1 and "not an earlier export" in said
    code, said = command(tmp_path / "mine", "--size", "0.5", "--out", tmp_path / "out")
    assert code == 1 and "holds no manifest.json" in said
    code, said = command(str(tmp_path / "nowhere"), "--size", "0.5", "--out", tmp_path / "out")
    assert code == 1 and "there is no folder" in said


def test_the_command_pushes(command: Command, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without the hub can tell: what is called, and what is said where it fails."""
    calls: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, name, **kwargs: calls.append((name, kwargs)))
    held = [".gitattributes"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda _, name: held)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **kwargs: calls.append(kwargs["repo_id"]))
    code, said = command(small_artifact.folder, "--size", "0.5", "--out", tmp_path / "out", "--push", "me/small")
    assert code == 0 and calls == [("me/small", {"exist_ok": True}), "me/small"] and "https://huggingface.co/me/small" in said
    held.append("thesis.tex")
    code, said = command(small_artifact.folder, "--size", "0.5", "--out", tmp_path / "out", "--push", "me/small")
    assert code == 1 and "holds something else than an export of ours (thesis.tex)" in said
    monkeypatch.undo()
