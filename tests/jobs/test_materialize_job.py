"""`python jobs/materialize.py` exports one size of an artifact, given by name, path, or URI, or prints a helpful error."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry

from acip.artifact.artifact import Artifact
from acip.export.folder import PROVENANCE, tensor_bytes
from tests.acip.artifact.test_codes_file import calibrated_with_codes, llama

ROOT = Path(__file__).parents[2]


class Command:
    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self.monkeypatch, self.capsys = home, monkeypatch, capsys
        for name in ("ACIP_ARTIFACT_URI", "ACIP_CHECKPOINT_URI", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("ACIP_HOME", str(home))

    def __call__(self, *args: str | Path) -> tuple[int, str]:
        from jobs import materialize

        try:
            code = materialize.main([*map(str, args)])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = self.capsys.readouterr()
        return code, captured.out + captured.err


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    (tmp_path / "home").mkdir()
    return Command(tmp_path / "home", monkeypatch, capsys)


def test_names_paths_and_uris_are_accepted(
    command: Command, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()  # not an artifact, so the name refers to the registry
    settings = Settings.from_env()
    version = Registry(settings).register("small", str(small_artifact.folder), "", {})
    Registry(settings).set_alias(version)
    outputs = []
    for model in ("small", small_artifact.folder, small_artifact.folder.as_uri()):
        code, output = command(model, "--size", "60%", "--out", tmp_path / "out")
        assert code == 0, output
        assert "asked      0.6 (linear)" in output and "got        0.59" in output and "try it\n  " in output and "python -c " in output
        outputs.append(json.loads((tmp_path / "out" / PROVENANCE).read_text())["weight_bytes"])
        assert f"weights    {outputs[-1]:,} bytes" in output
    assert len(set(outputs)) == 1
    code, output = command("small@1", "--size", f"{small_artifact.recipe.stop_ratio}", "--out", tmp_path / "out")
    assert code == 0 and "where calibration stopped" not in output
    code, output = command("small", "--alias", "1", "--size", "0.2", "--out", tmp_path / "out")
    assert code == 0 and f"below {small_artifact.recipe.stop_ratio:g}, where calibration stopped" in output and "shards" not in output
    assert "--fit is '8'; it must be bytes" in command("small", "--fit", "8", "--out", tmp_path / "out")[1]
    code, output = command("smal", "--size", "0.5", "--out", tmp_path / "out")
    assert code == 2 and "no model 'smal' in the registry (did you mean 'small'?)" in output


@pytest.mark.parametrize("options", [["--size", "0.5"], ["--all-sizes"]])
@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_current_folder_is_not_replaced(
    command: Command, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], out: str
) -> None:
    """Its shell, and this process, would be in a folder that no longer exists."""
    (tmp_path / "empty" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "here")
    code, output = command(small_artifact.folder, *options, "--out", out)
    assert code == 2 and "it is a mount point, the current folder, or above it. Name a folder in it." in output
    assert Path.cwd() == tmp_path / "empty" / "here"


def test_fit_to_bytes_quantized_bytes_and_memory(command: Command, small_artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(small_artifact.folder, "--fit", "1MB", "--out", out)[0] == 0
    assert 900_000 < tensor_bytes(out) <= 10**6
    assert command(small_artifact.folder, "--fit", "450KB", "--quantize", "nf4", "--out", out)[0] == 0
    assert 400_000 < tensor_bytes(out) <= 450_000
    code, output = command(small_artifact.folder, "--fit", "258MB", "--context", "128", "--out", out)
    assert code == 0 and "MB (memory_mb)" in output


def test_sizes_of_an_artifact_with_codes_are_bytes_by_default(command: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(llama(64, dtype=torch.bfloat16))
    artifact = Artifact.save(tmp_path / "artifact", base, calibration, {}, codes)
    base_bytes = artifact.table().base_bytes
    code, output = command(artifact.folder, "--size", "0.5", "--out", tmp_path / "out")
    assert code == 0, output
    provenance = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    stored, bits = provenance["size"]["bytes"], provenance["size"]["bits_per_weight"]
    assert 0.4 * base_bytes < stored == tensor_bytes(tmp_path / "out") <= 0.5 * base_bytes
    assert (
        "asked      0.5 (bytes)" in output and f"size       {stored:,} stored bytes" in output and f"{bits:.2f} bits per weight" in output
    )
    assert (
        f"weights    {stored:,} bytes (codes; others in bfloat16, encoded without loss)" in output
        and "import acip" in output
        and "where calibration stopped" not in output
    )
    code, output = command(artifact.folder, "--size", "0.5", "--convention", "linear", "--out", tmp_path / "out")
    assert code == 0 and "asked      0.5 (linear)" in output and "of the layers" in output, output
    code, output = command(artifact.folder, "--size", "1.0", "--out", tmp_path / "out")
    assert code == 0 and "(bfloat16, encoded without loss)" in output, output
    code, output = command(artifact.folder, "--size", "0.5", "--format", "compressed-tensors", "--out", tmp_path / "out")
    assert code == 0 and f"others in bfloat16; {stored:,} in the artifact" in output and "import acip" not in output, output
    assert tensor_bytes(tmp_path / "out") > stored


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--fit", "1MB", "--convention", "model"], 2, "--convention is the count of a ratio"),
        (["--size", "0.5", "--format", "compressed-tensors"], 2, "this size has none"),
        (["--size", "0.5", "--format", "compressed-tensors", "--quantize", "nf4"], 2, "Leave --all-sizes and --quantize out"),
        (["--size", "0.5", "--format", "gguf", "--convention", "linear"], 2, "--format gguf counts bytes"),
        (["--size", "0.5", "--fit", "1GB"], 2, "not allowed with"),
        ([], 2, "one of the arguments --size --fit --all-sizes is required"),
        (["--size", "big"], 2, "is not a budget"),
        (["--size", "1.5"], 2, "size ratio is 1.5"),
        (["--fit", "0.6"], 2, "A ratio goes with --size"),
        (["--size", "0.5", "--context", "64"], 2, "--context needs --fit"),
        (["--fit", "1GB", "--batch", "2"], 2, "--batch needs --context"),
        (["--fit", "1GB", "--context", "0"], 2, "whole number of at least 1"),
        (["--size", "0.5", "--quantize", "int3"], 2, "invalid choice"),
        (["--size", "0.5", "--push", "nobody"], 2, "must be OWNER/NAME"),
        (["--size", "0.5", "--max-shard-size", "5"], 2, "must be like"),
        (["--size", "0.5", "--format", "gguf", "--quantize", "nf4"], 2, "Leave --all-sizes, --quantize and --context out"),
        (["--size", "0.5", "--text", "package:austen"], 2, "--text is for --format gguf"),
        (["--size", "800K params", "--format", "gguf"], 2, "needs a size in bytes, not params"),
        (["--fit", "1KB"], 2, "can't be reached: the smallest is"),
        (["--size", "ppl<=20"], 2, "no curve was measured"),
    ],
)
def test_invalid_arguments_are_refused(
    command: Command, small_artifact: Artifact, tmp_path: Path, args: list[str], code: int, message: str
) -> None:
    actual_code, output = command(small_artifact.folder, *args, "--out", tmp_path / "out")
    assert (actual_code, message in output) == (code, True), output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_gguf_file_of_a_number_of_bytes(command: Command, small_artifact: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install llama-cpp-python compiles it)")
    out = tmp_path / "out"
    for size, most in (("--fit", "450KB"), 450_000), (("--size", "0.25"), small_artifact.table().base_bytes // 4):
        code, output = command(small_artifact.folder, *size, "--format", "gguf", "--out", out)
        assert code == 0, output
        written = (out / "model.gguf").stat().st_size
        assert 0.95 * most < written <= most
        assert f"asked      {most:,} bytes" in output and f"got        {written:,} bytes" in output
    code, output = command(small_artifact.folder, "--fit", "1KB", "--format", "gguf", "--out", out)
    assert code == 2 and "1,000 bytes are too few: the smallest GGUF file" in output


def test_folders_without_an_export_are_not_overwritten(command: Command, small_artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, output = command(small_artifact.folder, "--size", "0.5", "--out", tmp_path / "mine")
    assert code == 2 and "not an earlier export" in output
    code, output = command(tmp_path / "mine", "--size", "0.5", "--out", tmp_path / "out")
    assert code == 2 and "holds no manifest.json" in output
    code, output = command(str(tmp_path / "nowhere"), "--size", "0.5", "--out", tmp_path / "out")
    assert code == 2 and "is not a folder" in output


def test_push_to_the_hub(command: Command, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job calls the hub client with the right arguments and refuses a repository with foreign files. The hub is patched."""
    calls: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, name, **kwargs: calls.append((name, kwargs)))
    hub_files = [".gitattributes"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda _, name: hub_files)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **kwargs: calls.append(kwargs["repo_id"]))
    code, output = command(small_artifact.folder, "--size", "0.5", "--out", tmp_path / "out", "--push", "me/small")
    assert code == 0 and calls == [("me/small", {"exist_ok": True}), "me/small"] and "https://huggingface.co/me/small" in output
    downloaded = tmp_path / "downloaded"  # the files that the hub client downloaded
    downloaded.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(downloaded))
    shutil.copyfile(tmp_path / "out" / PROVENANCE, downloaded / PROVENANCE)
    exported = [path.name for path in (tmp_path / "out").iterdir()]
    (downloaded / "manifest.json").write_text('{"name": "an app", "version": "1.0"}')
    for files, message in (
        ([".gitattributes", *exported], None),
        (["thesis.tex"], "thesis.tex"),
        ([*exported, "thesis.tex"], "thesis.tex"),
        (["manifest.json", "app.js"], "app.js"),
    ):
        hub_files[:] = files
        code, output = command(small_artifact.folder, "--size", "0.5", "--out", tmp_path / "out", "--push", "me/small")
        assert (code, calls.count("me/small")) == ((0, 2) if message is None else (2, 2)), output
        assert message is None or f"holds files that acip did not write ({message})" in output
    monkeypatch.undo()


def test_all_sizes_copies_and_pushes_the_artifact(
    command: Command, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: dict[str, set[str]] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, name, **kwargs: None)
    hub_files = [".gitattributes", "manifest.json", *small_artifact.manifest["files"]]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda _, name: hub_files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(small_artifact.folder))

    def upload(_: Any, *, repo_id: str, folder_path: Path, **kwargs: Any) -> None:
        pushed[repo_id] = {path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()}

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    code, output = command(small_artifact.folder, "--all-sizes", "--out", tmp_path / "all", "--push", "me/any")
    assert code == 0 and "https://huggingface.co/me/any" in output
    assert pushed == {"me/any": {"manifest.json", "README.md", *small_artifact.manifest["files"]}}
    copied = Artifact.open(tmp_path / "all", verify=True)
    base = small_artifact.manifest["base"]
    assert copied.manifest == {**small_artifact.manifest, "base": {**base, "source": Path(base["source"]).name}}
    assert copied.load(size=0.5).cut is not None
    card = (tmp_path / "all" / "README.md").read_text()
    assert "library_name: transformers" in card and "prune_model_by_score" in card and str(tmp_path) not in card
    code, output = command(small_artifact.folder, "--all-sizes", "--out", tmp_path / "all")
    assert code == 2 and "is not an empty folder" in output
    code, output = command(small_artifact.folder, "--all-sizes", "--quantize", "nf4", "--out", tmp_path / "q")
    assert code == 2 and "Leave --quantize out" in output
    code, output = command(small_artifact.folder, "--all-sizes", "--convention", "bytes", "--out", tmp_path / "q")
    assert code == 2 and "--convention bytes counts one. Leave it out." in output
    assert {path.name for path in tmp_path.iterdir()} <= {"all", "home"}, "a refused command leaves no files"
