"""Files of resident tensors: whatever happens to them, a server gets the tensors that were computed."""

import errno
import multiprocessing
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from acip_platform.storage import resident_files
from acip_platform.storage.resident_files import ABANDONED_S, UNUSED_S, ResidentFiles
from torch import Tensor

from tests.support.waiting import PATIENCE_S

MIB = 1 << 20
NAMES = [f"layers.{i}.weight" for i in range(20)]


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk have room, also if that of this machine is almost full."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(900 * MIB))


def opened(root: Path, checksum: str = "a") -> ResidentFiles:
    artifact: Any = SimpleNamespace(manifest={"files": {"dense.safetensors": {"sha256": checksum}}})
    return ResidentFiles(root, artifact)


def compute(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (33, 65), dtype=torch.int8, generator=generator)
    return {"weight": torch.randn(100, 70, generator=generator).bfloat16(), "steps": torch.rand(33, generator=generator), "codes": codes}


def never() -> dict[str, Tensor]:
    raise AssertionError("the tensors must not be computed again")


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def mappings(path: Path) -> list[str]:
    """Return the lines of this process's memory map that name a file."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]


def test_tensors_are_computed_once_and_mapped_afterwards(tmp_path: Path) -> None:
    first = opened(tmp_path).get("w", compute)
    again = opened(tmp_path).get("w", never)
    assert same(first, compute())
    assert same(again, compute())
    assert mappings(opened(tmp_path).folder / "w.safetensors")
    assert again["steps"].data_ptr() % resident_files.ALIGNMENT == 0  # the first tensor of the file


@pytest.mark.parametrize("damage", ["one bit", "truncated", "empty", "other file"])
def test_a_damaged_file_is_written_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    files = opened(tmp_path)
    files.get("w", compute)
    path = files.folder / "w.safetensors"
    content = bytearray(path.read_bytes())
    path.unlink()  # so that nothing that maps the file changes
    if damage == "one bit":
        content[-10] ^= 4
    damaged: dict[str, bytes] = {"truncated": bytes(content[:-1]), "empty": b"", "other file": b"hello, world" * 9}
    path.write_bytes(damaged.get(damage, bytes(content)))
    assert same(opened(tmp_path).get("w", compute), compute())
    assert "is damaged" in caplog.text
    assert same(opened(tmp_path).get("w", never), compute())


def test_a_folder_belongs_to_one_artifact_and_one_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path).get("w", compute)
    assert same(opened(tmp_path, "b").get("w", lambda: compute(1)), compute(1))
    monkeypatch.setattr(resident_files, "_environment", lambda: ["another version of the code"])
    assert same(opened(tmp_path).get("w", lambda: compute(2)), compute(2))


def test_a_check_is_remembered_for_its_conditions(tmp_path: Path) -> None:
    opened(tmp_path).record_passed("cpu")
    assert opened(tmp_path).passed("cpu")
    assert not opened(tmp_path).passed("cuda")
    assert not opened(tmp_path, "b").passed("cpu")


def usage(free: int) -> Any:
    return SimpleNamespace(total=1000 * MIB, used=0, free=free)


def test_a_server_works_without_files_if_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(50 * MIB))
    files = opened(tmp_path)
    assert same(files.get("w", compute), compute())
    assert same(files.get("w", compute), compute())
    files.record_passed("cpu")
    assert caplog.text.count("less than 5% of its space left") == 1
    assert not list(files.folder.iterdir())


def test_a_server_works_without_files_if_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"the beginning")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(resident_files, "save_tensors", fail)
    files = opened(tmp_path)
    assert same(files.get("w", compute), compute())
    assert "No space left on device" in caplog.text
    assert not list(files.folder.iterdir())


def test_a_server_works_without_files_if_the_folder_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    files = opened(tmp_path / "file")
    assert same(files.get("w", compute), compute())
    assert not files.passed("cpu")
    assert "can't be written" in caplog.text


def test_unused_folders_are_removed(tmp_path: Path) -> None:
    old, recent = opened(tmp_path, "old"), opened(tmp_path, "recent")
    old.get("w", compute)
    recent.get("w", compute)
    age(old.folder, UNUSED_S + 60)
    age(recent.folder, UNUSED_S - 3600)
    opened(tmp_path)
    assert not old.folder.exists()
    assert recent.folder.exists()


def test_the_least_recently_used_folder_leaves_if_the_disk_is_almost_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, recent, files = opened(tmp_path, "old"), opened(tmp_path, "recent"), opened(tmp_path)
    mapped = old.get("w", compute)
    recent.get("w", compute)
    age(old.folder, 7200)
    age(recent.folder, 3600)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage((0 if old.folder.exists() else 100) * MIB))
    files.get("w", compute)
    assert not old.folder.exists()
    assert recent.folder.exists()
    assert same(opened(tmp_path).get("w", never), compute())
    assert same(mapped, compute())  # a server that has mapped a removed file goes on


def test_incomplete_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    folder = opened(tmp_path).folder
    killed, writing = folder / ".v.safetensors.0123.partial", folder / ".w.safetensors.4567.partial"
    for path in (killed, writing):
        path.write_bytes(b"half")
    age(killed, ABANDONED_S + 60)
    opened(tmp_path)
    assert not killed.exists()
    assert writing.exists()


def age(path: Path, seconds: float) -> None:
    """Let a file or folder look as if it was last changed `seconds` ago."""
    changed = path.stat().st_mtime - seconds
    os.utime(path, (changed, changed))


def start(root: Path, barrier: Any, results: Any) -> None:
    """Get all tensors at the same time as another process, and report whether they are right, and what is mapped."""

    def together() -> dict[str, Tensor]:
        barrier.wait(PATIENCE_S)  # both processes compute, and both write
        return compute()

    resident_files.FREE_SHARE = 0.0  # the disk of this machine may be almost full
    files = opened(root)
    found = [files.get(name, together) for name in NAMES]
    lines = mappings(root)
    results.put((all(same(each, compute()) for each in found), len(lines), sum("deleted" in line for line in lines)))


def test_processes_that_start_at_the_same_time_map_the_same_files(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=start, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=PATIENCE_S) for _ in processes]
    for process in processes:
        process.join(PATIENCE_S)
    assert all(right and mapped >= len(NAMES) and not deleted for right, mapped, deleted in found)
    assert sorted(path.name for path in opened(tmp_path).folder.iterdir()) == sorted(f"{name}.safetensors" for name in NAMES)
