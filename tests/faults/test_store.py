"""Faults of storage: S3 failing, slow, cut off, asked by two at once; a disk that is full. Nothing half counts, nothing is lost."""

import errno
import os
import random
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from acip_platform.settings import Settings
from acip_platform.storage.s3 import PART, S3Source
from acip_platform.storage.store import Store, StoreError
from acip_platform.training.completion import stored
from safetensors.torch import save_file

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST
from acip.artifact.writer import seal
from tests.support.faulty import Proxy, proxy


@pytest.fixture
def s3(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to S3 leads through a proxy."""
    with proxy(s3_server["AWS_ENDPOINT_URL"]) as server:
        for name, value in {**s3_server, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def store(s3: Proxy, tmp_path: Path) -> Store:
    return Store(f"s3://models/{tmp_path.name}", tmp_path / "cache")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with a file of several parts."""
    (tmp_path / "large").mkdir()
    generator = torch.Generator().manual_seed(0)
    save_file({"w": torch.randint(0, 255, (2 * PART + 12345,), dtype=torch.uint8, generator=generator)}, tmp_path / "large" / "weights")
    (tmp_path / "large" / "last").write_text("complete")
    return tmp_path / "large"


def often(share: float, *faults: str) -> Callable[[str, str, int], str]:
    """Every request may fail, with this probability, but not more than three times in a row."""
    rng = random.Random(0)
    return lambda method, path, before: rng.choice(faults) if before < 3 and rng.random() < share else ""


@pytest.mark.parametrize("fault", ["500", "503", "reset", "lost", "cut", "slow"])
def test_an_artifact_goes_there_and_back_all_the_same(
    s3: Proxy, store: Store, small_artifact: Artifact, tmp_path: Path, fault: str
) -> None:
    """Each request fails once: those of put, of fetch, and the ranged reads."""
    s3.choose = lambda method, path, before: fault if before == 0 else ""
    uri = store.put(copytree(small_artifact.folder, tmp_path / "copy"), "tiny/1")
    assert store.exists(uri)
    fetched = Artifact.open(store.fetch(uri), verify=True)
    assert fetched.manifest == small_artifact.manifest
    source = store.open(uri).source
    assert isinstance(source, S3Source)
    whole = (small_artifact.folder / "factors.safetensors").read_bytes()
    ranges = [(0, 8), (100, 5000), (len(whole) - 9, len(whole))]
    assert [bytes(view) for view in source.read("factors.safetensors", ranges)] == [whole[start:stop] for start, stop in ranges]
    assert s3.injected[fault] > 20, "of every request's kind"


def test_many_parts_through_a_bad_network(s3: Proxy, store: Store, large: Path, tmp_path: Path) -> None:
    s3.choose = often(0.5, "500", "503", "reset", "lost", "cut")
    expected = {path.name: path.read_bytes() for path in large.iterdir()}
    uri = store.add(large, "some/one", "last")
    with store.folder(uri) as copy:
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == expected
    assert any("partNumber=3" in path for _, path in s3.requests), "in parts"
    assert sum(s3.injected.values()) >= 5


def test_what_is_changed_on_the_way_is_refused(s3: Proxy, store: Store, large: Path) -> None:
    """Every part has a checksum, which the server compares."""
    s3.choose = lambda method, path, before: "flip" if "partNumber=2" in path else ""
    with pytest.raises(StoreError, match="S3 refused add"):
        store.add(large, "some/one", "last")
    assert not store.exists(store.uri("some/one"), "last") and (large / "last").exists(), "nothing counts, and ours is still there"
    s3.choose = lambda method, path, before: ""
    assert store.exists(store.add(large, "some/one", "last"), "last")


def test_an_s3_that_is_away_is_an_error_and_nothing_counts(
    s3: Proxy, store: Store, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    s3.choose = lambda method, path, before: "503" if method == "PUT" and MANIFEST in path else ""
    copy = copytree(small_artifact.folder, tmp_path / "copy")
    with pytest.raises(StoreError, match=r"SlowDown.*reached max retries"):
        store.put(copy, "tiny/1")
    assert not store.exists(store.uri("tiny/1"))
    assert max(s3.requests.values()) >= 8, "it was asked again"
    s3.choose = lambda method, path, before: ""
    assert Artifact.open(store.fetch(store.put(copy, "tiny/1")), verify=True).manifest == small_artifact.manifest


def test_of_two_writers_one_wins(s3: Proxy, store: Store, small_artifact: Artifact, tmp_path: Path) -> None:
    """Their contents differ. What is there at the end is one of them, in every file; who did not win knows."""
    for go in range(4):
        folders = [another(small_artifact, tmp_path / f"{go}-{i}", i) for i in range(2)]
        wanted = [Artifact.open(folder).manifest for folder in folders]
        key, told = f"tiny/{go}", dict[int, str]()

        def write(i: int, folders: list[Path] = folders, key: str = key, told: dict[int, str] = told) -> None:
            try:
                told[i] = store.put(folders[i], key)
            except StoreError as error:
                told[i] = str(error)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if store.exists(store.uri(key)):
            assert Artifact.open(store.fetch(store.uri(key)), verify=True).manifest in wanted
            assert any(text == store.uri(key) for text in told.values())
        else:
            assert all("another process" in text for text in told.values()), told
            store.put(another(small_artifact, tmp_path / f"{go}-again", 0), key)
        third = another(small_artifact, tmp_path / f"{go}-late", 3)
        before = store.read([f"{store.uri(key)}/{MANIFEST}"])
        assert store.put(third, key) == store.uri(key) and store.read([f"{store.uri(key)}/{MANIFEST}"]) == before, "it stays"


def another(artifact: Artifact, folder: Path, i: int) -> Path:
    """A copy with another `order`."""
    copytree(artifact.folder, folder)
    (folder / MANIFEST).unlink()
    order = artifact.tensors("order")
    tensors = order.read(list(order.entries))
    save_file({**tensors, "score": tensors["score"] + i}, folder / "order.safetensors")
    seal(folder, artifact.manifest)
    return folder


def test_only_one_creates(s3: Proxy, store: Store, tmp_path: Path) -> None:
    """On S3 and on disk. An answer that was lost makes nobody else of the writer: it finds its own content."""
    for place in (store, Store(str(tmp_path / "disk"), tmp_path / "cache")):
        with ThreadPoolExecutor(12) as pool:
            won = list(pool.map(lambda i, place=place: place.create("some/file", b"%d" % i), range(12)))
        assert sum(won) == 1 and place.small("some") == {"file": b"%d" % won.index(True)}
    s3.choose = lambda method, path, before: "lost" if method == "PUT" and before == 0 else ""
    store.create("some/other", b"mine")
    assert store.small("some")["other"] == b"mine"


def test_credentials_are_in_no_message(
    s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "acip_platform")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    store = Store("s3://models/x", tmp_path / "cache")
    with pytest.raises(StoreError) as refused:
        store.fetch(store.uri("tiny/1"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url.replace("//", "//ann:hunter2@").replace(str(s3.server_port), "9"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError) as unreachable:
        store.exists(store.uri("tiny/1"))
    shown = f"{refused.value}{unreachable.value}{store!r}{vars(store)}{caplog.text}"
    assert "credentials" in str(refused.value) and "hunter2" not in shown


def test_an_artifact_that_could_not_be_saved_leaves_nothing(calibrated: Any, tmp_path: Path) -> None:
    """The system refuses to write more than 100 kB into a file; a second attempt without that limit works."""
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    base, calibration = calibrated
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="can't write the artifact to .*" + os.strerror(errno.EFBIG)):
            stored(settings, "small/1", lambda folder: Artifact.save(folder, base, calibration, {"seed": 0}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(settings.home.iterdir())
    uri = stored(settings, "small/1", lambda folder: Artifact.save(folder, base, calibration, {"seed": 0}))
    assert Artifact.open(Path(uri), verify=True).manifest["provenance"] == {"seed": 0}
    assert [path.name for path in settings.home.iterdir()] == ["artifacts"]


def test_a_small_file_that_could_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    """As above, the limit is 100 kB; what was there stays, and the name is free for who comes next."""
    store = Store(str(tmp_path / "store"), tmp_path / "cache")
    store.create("some/old", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for call, name in ((store.write, "old"), (store.create, "new")):
            with pytest.raises(StoreError, match=f"can't write .*{name}: {os.strerror(errno.EFBIG)}"):
                call(f"some/{name}", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "store" / "some").iterdir()] == ["old"] and store.small("some") == {"old": b"old"}
    with pytest.raises(StoreError, match=r"can't remove .*some"):
        store.remove("some")


def test_writers_of_one_file_at_once_do_each_other_no_harm(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), tmp_path / "cache")
    store.create("some/file", b"")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.write("some/file", b"%d" % i * 1000), range(64)))
    assert len(store.small("some")["file"]) in (1000, 2000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB. Only its owner may mount one; without that the test above tells what remains of this one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_no_half_artifact(small_disk: Path, small_artifact: Artifact, tmp_path: Path) -> None:
    """Clear error, what was there before is whole, and when there is space again it works."""
    store = Store(str(small_disk / "store"), tmp_path / "cache")
    size = sum(path.stat().st_size for path in small_artifact.folder.rglob("*") if path.is_file())
    assert 2_000_000 < size < 5_000_000
    kept = store.put(copytree(small_artifact.folder, tmp_path / "first"), "tiny/1")
    (small_disk / "ballast").write_bytes(bytes(12_000_000 - size - size // 2))
    with pytest.raises(StoreError, match=r"can't write .*tiny/2: .*No space left on device"):
        store.put(copytree(small_artifact.folder, tmp_path / "second"), "tiny/2")
    assert sorted(path.name for path in (small_disk / "store" / "tiny").iterdir()) == ["1"]
    assert not store.exists(store.uri("tiny/2"))
    assert Artifact.open(store.fetch(kept), verify=True).manifest == small_artifact.manifest
    (small_disk / "ballast").unlink()
    assert Artifact.open(store.fetch(store.put(copytree(small_artifact.folder, tmp_path / "third"), "tiny/2")), verify=True)
