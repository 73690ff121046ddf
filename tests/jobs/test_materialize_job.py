"""`python jobs/materialize.py`: an artifact by name, path or URI becomes a folder of one size, or an error that helps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry

from acip.artifact.artifact import Artifact
from acip.export.folder import PROVENANCE, tensor_bytes

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
        except SystemExit as end:
            code = int(end.code or 0)
        said = self.capsys.readouterr()
        return code, said.out + said.err


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    (tmp_path / "home").mkdir()
    return Command(tmp_path / "home", monkeypatch, capsys)


def test_the_command_takes_names_paths_and_uris(
    command: Command, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()  # no artifact, so the name is the registry's
    settings = Settings.from_env()
    version = Registry(settings).register("small", str(small_artifact.folder), "", {})
    Registry(settings).set_alias(version)
    outputs = []
    for model in ("small", small_artifact.folder, small_artifact.folder.as_uri()):
        code, said = command(model, "--size", "60%", "--out", tmp_path / "out")
        assert code == 0, said
        assert "asked      0.6 (linear)" in said and "got        0.59" in said and "try it\n  " in said and "python -c " in said
        outputs.append(json.loads((tmp_path / "out" / PROVENANCE).read_text())["weight_bytes"])
        assert f"weights    {outputs[-1]:,} bytes" in said
    assert len(set(outputs)) == 1
    code, said = command("small@1", "--size", f"{small_artifact.recipe.stop_ratio}", "--out", tmp_path / "out")
    assert code == 0 and "where calibration stopped" not in said
    code, said = command("small", "--alias", "1", "--size", "0.2", "--out", tmp_path / "out")
    assert code == 0 and f"below {small_artifact.recipe.stop_ratio:g}, where calibration stopped" in said and "shards" not in said
    assert "--fit is '8'; it must be bytes" in command("small", "--fit", "8", "--out", tmp_path / "out")[1]
    code, said = command("smal", "--size", "0.5", "--out", tmp_path / "out")
    assert code == 2 and "no model 'smal' in the registry (did you mean 'small'?)" in said


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
        (["--fit", "1KB"], 2, "can't be reached: the smallest is"),
        (["--size", "ppl<=20"], 2, "no curve was measured"),
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
    assert code == 2 and "not an earlier export" in said
    code, said = command(tmp_path / "mine", "--size", "0.5", "--out", tmp_path / "out")
    assert code == 2 and "holds no manifest.json" in said
    code, said = command(str(tmp_path / "nowhere"), "--size", "0.5", "--out", tmp_path / "out")
    assert code == 2 and "is not a folder" in said


def test_the_command_pushes(command: Command, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without the hub can tell: what is called, and what is said where it fails."""
    calls: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, name, **kwargs: calls.append((name, kwargs)))
    held = [".gitattributes"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda _, name: held)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **kwargs: calls.append(kwargs["repo_id"]))
    code, said = command(small_artifact.folder, "--size", "0.5", "--out", tmp_path / "out", "--push", "me/small")
    assert code == 0 and calls == [("me/small", {"exist_ok": True}), "me/small"] and "https://huggingface.co/me/small" in said
    there = tmp_path / "there"  # what the hub's client has downloaded of it
    there.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(there))
    shutil.copyfile(tmp_path / "out" / PROVENANCE, there / PROVENANCE)
    ours = [path.name for path in (tmp_path / "out").iterdir()]
    (there / "manifest.json").write_text('{"name": "an app", "version": "1.0"}')
    for files, says in (
        ([".gitattributes", *ours], None),
        (["thesis.tex"], "thesis.tex"),
        ([*ours, "thesis.tex"], "thesis.tex"),
        (["manifest.json", "app.js"], "app.js"),
    ):
        held[:] = files
        code, said = command(small_artifact.folder, "--size", "0.5", "--out", tmp_path / "out", "--push", "me/small")
        assert (code, calls.count("me/small")) == ((0, 2) if says is None else (2, 2)), said
        assert says is None or f"holds files that acip did not write ({says})" in said
    monkeypatch.undo()


def test_the_command_copies_and_pushes_the_artifact_itself(
    command: Command, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: dict[str, set[str]] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, name, **kwargs: None)
    held = [".gitattributes", "manifest.json", *small_artifact.manifest["files"]]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda _, name: held)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(small_artifact.folder))

    def upload(_: Any, *, repo_id: str, folder_path: Path, **kwargs: Any) -> None:
        pushed[repo_id] = {path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()}

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    code, said = command(small_artifact.folder, "--all-sizes", "--out", tmp_path / "all", "--push", "me/any")
    assert code == 0 and "https://huggingface.co/me/any" in said
    assert pushed == {"me/any": {"manifest.json", "README.md", *small_artifact.manifest["files"]}}
    copied = Artifact.open(tmp_path / "all", verify=True)
    base = small_artifact.manifest["base"]
    assert copied.manifest == {**small_artifact.manifest, "base": {**base, "source": Path(base["source"]).name}}
    assert copied.load(size=0.5).cut is not None
    card = (tmp_path / "all" / "README.md").read_text()
    assert "library_name: transformers" in card and "prune_model_by_score" in card and str(tmp_path) not in card
    code, said = command(small_artifact.folder, "--all-sizes", "--out", tmp_path / "all")
    assert code == 2 and "is not an empty folder" in said
    code, said = command(small_artifact.folder, "--all-sizes", "--quantize", "nf4", "--out", tmp_path / "q")
    assert code == 2 and "Leave --quantize out" in said
    assert {path.name for path in tmp_path.iterdir()} <= {"all", "home"}, "nothing is left of what was refused"
