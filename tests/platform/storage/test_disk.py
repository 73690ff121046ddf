"""Local files appear whole: concurrent readers never see a part of them."""

import errno
import os
import threading
from pathlib import Path

import pytest
from acip_platform.storage.disk import Disk

CONTENT = b"x" * 100_000


@pytest.mark.parametrize("hard_links", [True, False])
def test_create_returns_true_to_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", _without_hard_links)
    created: list[bool] = []
    threads = [threading.Thread(target=lambda: created.append(Disk().create(str(tmp_path / "a" / "b"), CONTENT))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 7 + [True]
    assert (tmp_path / "a" / "b").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"], "a partial file is left"


def test_readers_of_created_files_see_whole_files(tmp_path: Path) -> None:
    lengths: set[int] = set()
    ends = threading.Event()

    def read() -> None:
        while not ends.is_set():
            for path in tmp_path.glob("[0-9]*"):
                lengths.add(len(path.read_bytes()))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        assert Disk().create(str(tmp_path / str(number)), CONTENT)
    ends.set()
    reader.join()
    assert lengths <= {len(CONTENT)}


def _without_hard_links(source: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")
