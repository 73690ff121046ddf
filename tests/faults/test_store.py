"""Storage faults: S3 errors, slow and truncated responses, concurrent writers, full disks. No partial artifact is used, no data is lost."""

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
    """Start a fault-injecting proxy in front of S3 and set the endpoint to it."""
    with proxy(s3_server["AWS_ENDPOINT_URL"]) as server:
        for name, value in {**s3_server, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def store(s3: Proxy, tmp_path: Path) -> Store:
    return Store(f"s3://models/{tmp_path.name}", tmp_path / "cache")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Return a folder with a file that is uploaded in several parts."""
    (tmp_path / "large").mkdir()
    generator = torch.Generator().manual_seed(0)
    save_file({"w": torch.randint(0, 255, (2 * PART + 12345,), dtype=torch.uint8, generator=generator)}, tmp_path / "large" / "weights")
    (tmp_path / "large" / "last").write_text("complete")
    return tmp_path / "large"


def random_faults(share: float, *faults: str) -> Callable[[str, str, int], str]:
    """Return a fault policy: each request fails with probability `share`, at most three times in a row."""
    rng = random.Random(0)
    return lambda method, path, before: rng.choice(faults) if before < 3 and rng.random() < share else ""


@pytest.mark.parametrize("fault", ["500", "503", "reset", "lost", "cut", "slow"])
def test_artifact_round_trip_survives_one_fault_per_request(
    s3: Proxy, store: Store, small_artifact: Artifact, tmp_path: Path, fault: str
) -> None:
    """Each request of put, fetch, and ranged reads fails once."""
    s3.choose = lambda method, path, before: fault if before == 0 else ""
    uri = store.put(copytree(small_artifact.folder, tmp_path / "copy"), "tiny/1")
    assert store.exists(uri)
    fetched = Artifact.open(store.fetch(uri), verify=True)
    assert fetched.manifest == small_artifact.manifest
    source = store.open(uri).source
    assert isinstance(source, S3Source)
    content = (small_artifact.folder / "factors.safetensors").read_bytes()
    ranges = [(0, 8), (100, 5000), (len(content) - 9, len(content))]
    assert [bytes(view) for view in source.read("factors.safetensors", ranges)] == [content[start:stop] for start, stop in ranges]
    assert s3.injected[fault] > 20, "every kind of request failed"


def test_multipart_upload_survives_random_faults(s3: Proxy, store: Store, large: Path, tmp_path: Path) -> None:
    s3.choose = random_faults(0.5, "500", "503", "reset", "lost", "cut")
    expected = {path.name: path.read_bytes() for path in large.iterdir()}
    uri = store.add(large, "some/one", "last")
    with store.folder(uri) as copy:
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == expected
    assert any("partNumber=3" in path for _, path in s3.requests), "the file was uploaded in parts"
    assert sum(s3.injected.values()) >= 5


def test_a_part_changed_in_transit_is_refused(s3: Proxy, store: Store, large: Path) -> None:
    """The server compares the checksum of every part."""
    s3.choose = lambda method, path, before: "flip" if "partNumber=2" in path else ""
    with pytest.raises(StoreError, match="S3 refused add"):
        store.add(large, "some/one", "last")
    assert not store.exists(store.uri("some/one"), "last"), "the upload is incomplete"
    assert (large / "last").exists(), "the local folder is kept"
    s3.choose = lambda method, path, before: ""
    assert store.exists(store.add(large, "some/one", "last"), "last")


def test_an_s3_outage_raises_an_error_and_leaves_no_artifact(
    s3: Proxy, store: Store, small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    s3.choose = lambda method, path, before: "503" if method == "PUT" and MANIFEST in path else ""
    copy = copytree(small_artifact.folder, tmp_path / "copy")
    with pytest.raises(StoreError, match=r"SlowDown.*reached max retries"):
        store.put(copy, "tiny/1")
    assert not store.exists(store.uri("tiny/1"))
    assert max(s3.requests.values()) >= 8, "the request was retried"
    s3.choose = lambda method, path, before: ""
    assert Artifact.open(store.fetch(store.put(copy, "tiny/1")), verify=True).manifest == small_artifact.manifest


def test_one_of_two_concurrent_writers_wins(s3: Proxy, store: Store, small_artifact: Artifact, tmp_path: Path) -> None:
    """Two writers put different contents under one key. The result holds the files of one writer, and the other writer gets an error."""
    for attempt in range(4):
        folders = [changed_copy(small_artifact, tmp_path / f"{attempt}-{i}", i) for i in range(2)]
        manifests = [Artifact.open(folder).manifest for folder in folders]
        key, results = f"tiny/{attempt}", dict[int, str]()

        def write(i: int, folders: list[Path] = folders, key: str = key, results: dict[int, str] = results) -> None:
            try:
                results[i] = store.put(folders[i], key)
            except StoreError as error:
                results[i] = str(error)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if store.exists(store.uri(key)):
            assert Artifact.open(store.fetch(store.uri(key)), verify=True).manifest in manifests
            assert any(text == store.uri(key) for text in results.values())
        else:
            assert all("another process" in text for text in results.values()), results
            store.put(changed_copy(small_artifact, tmp_path / f"{attempt}-again", 0), key)
        late_copy = changed_copy(small_artifact, tmp_path / f"{attempt}-late", 3)
        before = store.read([f"{store.uri(key)}/{MANIFEST}"])
        assert store.put(late_copy, key) == store.uri(key)
        assert store.read([f"{store.uri(key)}/{MANIFEST}"]) == before, "the first artifact stays"


def changed_copy(artifact: Artifact, folder: Path, i: int) -> Path:
    """Return a copy of the artifact with different scores."""
    copytree(artifact.folder, folder)
    (folder / MANIFEST).unlink()
    order = artifact.tensors("order")
    tensors = order.read(list(order.entries))
    save_file({**tensors, "score": tensors["score"] + i}, folder / "order.safetensors")
    seal(folder, artifact.manifest)
    return folder


def test_only_one_writer_creates_a_file(s3: Proxy, store: Store, tmp_path: Path) -> None:
    """Only one of twelve writers creates a file, on S3 and on disk. After a lost response the content is the writer's own."""
    for each_store in (store, Store(str(tmp_path / "disk"), tmp_path / "cache")):
        with ThreadPoolExecutor(12) as pool:
            created = list(pool.map(lambda i, each_store=each_store: each_store.create("some/file", b"%d" % i), range(12)))
        assert sum(created) == 1 and each_store.small("some") == {"file": b"%d" % created.index(True)}
    s3.choose = lambda method, path, before: "lost" if method == "PUT" and before == 0 else ""
    store.create("some/other", b"content")
    assert store.small("some")["other"] == b"content"


def test_credentials_never_appear_in_messages(
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


def test_a_failed_artifact_save_leaves_no_files(calibrated: Any, tmp_path: Path) -> None:
    """A file size limit of 100 kB makes the save fail. A second attempt without the limit succeeds."""
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


def test_a_failed_file_write_leaves_no_files(tmp_path: Path) -> None:
    """A write above the limit of 100 kB fails. The old file stays, and the new name remains free."""
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


def test_concurrent_writes_to_one_file_stay_atomic(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), tmp_path / "cache")
    store.create("some/file", b"")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.write("some/file", b"%d" % i * 1000), range(64)))
    assert len(store.small("some")["file"]) in (1000, 2000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 12 MB, or skip the test without that permission. The tests with a file size limit cover that case."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no permission to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_no_partial_artifact(small_disk: Path, small_artifact: Artifact, tmp_path: Path) -> None:
    """A full disk raises a clear error and leaves earlier artifacts intact. The write succeeds once there is space again."""
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
