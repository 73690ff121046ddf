"""Fingerprints depend on the content of files, not on their paths. Relative paths refer to the folder of the submitter."""

import shutil
import sys
from pathlib import Path

import pytest
from acip_platform.evaluation.method_comparison import Arena
from acip_platform.scheduling.fleet import Fleet, FleetError, Job
from acip_platform.settings import Settings, keep_loopback_direct, sqlite_path, sqlite_uri, this_program
from acip_platform.storage.inputs import content, identity, resolved
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Tracking

from acip.errors import AcipError


def test_fingerprint_depends_on_content_not_location(small_base: str, tmp_path: Path) -> None:
    text, moved = tmp_path / "text.txt", tmp_path / "moved.txt"
    text.write_text("one\n\n\ntwo")
    base = Path(shutil.copytree(small_base, tmp_path / "base"))
    first = Job("small", str(base), data=str(text)).fingerprint

    text.rename(moved)
    assert Job("small", small_base, data=str(moved)).fingerprint == first

    moved.write_text("one\n\n\nTWO")  # same length as before
    assert Job("small", small_base, data=str(moved)).fingerprint != first

    moved.write_text("one\n\n\ntwo")
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    assert Job("small", str(base), data=str(moved)).fingerprint != first


def test_identity_keeps_hub_names_and_ignores_hidden_files(tmp_path: Path) -> None:
    assert identity("org/name@main") == "org/name@main"
    (tmp_path / "a.txt").write_text("a")
    before = content(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").write_text("x")
    assert content(tmp_path) == before
    (tmp_path / "b.txt").write_text("")
    assert content(tmp_path) != before


def test_fingerprint_is_fixed_at_submission(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    job = Job("small", "org/name", data=str(text))
    first = job.fingerprint
    text.write_text("two")
    assert job.fingerprint == first
    assert Job.from_dict(job.to_dict()).fingerprint != first


def test_arena_fingerprint_depends_on_file_content(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same")
    one, other = (Arena("x", "org/name", data=str(tmp_path / name)) for name in ("a.txt", "b.txt"))
    assert one.fingerprint("asvd") == other.fingerprint("asvd")


def test_paths_resolve_in_the_folder_of_the_submitter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "base").mkdir()
    (tmp_path / "a b%20c").mkdir()
    for path, expected in (
        ("base", tmp_path / "base"),
        ("./base", tmp_path / "base"),
        ("base/../base", tmp_path / "base"),
        ("~/base", tmp_path / "home" / "base"),
        ("./nowhere", tmp_path / "nowhere"),
        ((tmp_path / "a b%20c").as_uri(), tmp_path / "a b%20c"),
    ):
        assert resolved(path) == str(expected), path
    for name in ("org/name", "c4", "package:austen", ""):
        assert resolved(name) == name
    (tmp_path / "c4").mkdir()
    assert resolved("c4") == "c4", "names of known texts take precedence over folders"
    with pytest.raises(AcipError, match="file:///"):
        resolved("file:base")


def test_fleets_and_arenas_hold_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "text"):
        (tmp_path / name).mkdir()
    (tmp_path / "fleet.yaml").write_text("defaults: {data: text, eval_data: ~/held}\nmodels:\n  - {name: small, base: ./base}\n")
    (job,) = Fleet.load("fleet.yaml").jobs
    assert (job.base, job.data, job.eval_data) == (str(tmp_path / "base"), str(tmp_path / "text"), str(Path("~/held").expanduser()))
    (tmp_path / "arena.yaml").write_text("{base: base, data: text, eval_data: [text, c4]}\n")
    arena = Arena.load("arena.yaml")
    assert (arena.base, arena.data, arena.eval_data) == (str(tmp_path / "base"), str(tmp_path / "text"), (str(tmp_path / "text"), "c4"))
    (tmp_path / "fleet.yaml").write_text("models:\n  - {name: small, base: 'file:base'}\n")
    with pytest.raises(FleetError, match="line 2"):
        Fleet.load("fleet.yaml")


def test_settings_are_absolute_and_equal_on_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_env({"ACIP_HOME": "home", "ACIP_ARTIFACT_URI": "store", "MLFLOW_TRACKING_URI": "sqlite:///my#runs.db"})
    assert settings.store == str(tmp_path / "store")
    assert sqlite_path(settings.tracking_uri) == tmp_path / "my#runs.db"
    monkeypatch.chdir("/")
    assert Settings.from_env(settings.worker_env()) == settings
    monkeypatch.chdir(tmp_path)
    for path in ("runs", "file:runs", "./runs"):
        assert Settings.from_env({"MLFLOW_TRACKING_URI": path}).tracking_uri == (tmp_path / "runs").as_uri()
    assert Settings.from_env({"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}).tracking_uri == "http://127.0.0.1:5000"


def test_any_folder_can_be_the_home(tmp_path: Path) -> None:
    home = tmp_path / "a b#c%20d?e'\"ü&;"
    settings = Settings.from_env({"ACIP_HOME": str(home)})
    assert sqlite_path(sqlite_uri(home / "x")) == home / "x"
    run = Tracking(settings, "experiment").start("name", "fingerprint", {})
    run.json({"a": 1}, "a.json")
    assert run.read_json("a.json") == {"a": 1}
    uri = str(home / "artifacts" / "small")
    version = Registry(settings).register("small", uri, run.run_id, {})
    assert Registry(settings).resolve("small", version.version).uri == uri
    assert (home / "mlflow.db").is_file()


def test_a_program_is_quoted_for_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    assert this_program("mlflow") == f"'{tmp_path}/my env/mlflow'"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({"http_proxy": "http://proxy:1"}, {"no_proxy": "127.0.0.1,localhost,::1", "NO_PROXY": "127.0.0.1,localhost,::1"}),
        (
            {"HTTPS_PROXY": "x", "no_proxy": "corp"},
            {"no_proxy": "corp,127.0.0.1,localhost,::1", "NO_PROXY": "corp,127.0.0.1,localhost,::1"},
        ),
        ({"http_proxy": "x", "no_proxy": "*", "NO_PROXY": "*"}, {"no_proxy": "*", "NO_PROXY": "*"}),
    ],
)
def test_loopback_addresses_bypass_the_proxy(before: dict[str, str], after: dict[str, str]) -> None:
    env = dict(before)
    keep_loopback_direct(env)
    keep_loopback_direct(env)  # the second call is that of a worker
    assert env == before | after
