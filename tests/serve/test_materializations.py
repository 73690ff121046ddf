"""Materializations on a real Ray cluster: a size is exported once in the background and found again; a failure is reported."""

import asyncio
import contextlib
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from shutil import copytree, move, rmtree
from typing import Any

import boto3
import psutil
import pytest
import ray
import torch
from acip_platform.serve.coordinator import Coordinator
from acip_platform.serve.export_task import lock, workplace
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.materializations import Materializations
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import ModelVersion

from acip.artifact.artifact import Artifact
from acip.errors import BudgetError
from acip.export.folder import PROVENANCE, tensor_bytes
from acip.sizing.budget import Budget
from acip.sizing.elastic_model import ElasticModel
from tests.conftest import logits, read
from tests.support.application import LocalHandle
from tests.support.waiting import PATIENCE_S, until


@pytest.fixture(scope="module", autouse=True)
def cluster(s3_server: dict[str, str]) -> Iterator[None]:
    """Start a local Ray cluster whose workers reach the S3 server. It must leave no process behind."""
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_server.items():
            environment.setenv(name, value)
        ray.init(address="local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=PATIENCE_S)
    assert not alive, "Ray left processes behind"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})


@pytest.fixture
def version(small_artifact: Artifact, tmp_path: Path) -> ModelVersion:
    """Return a version with a copy of the small artifact, which a test may damage."""
    folder = copytree(small_artifact.folder, tmp_path / "artifact")
    return ModelVersion("small", "1", str(folder), ("champion",), {})


def materializations(settings: Settings, coordinator: Coordinator | None = None, keep: int = 1000) -> Materializations:
    """Return the materializations of an HTTP replica with its own coordinator, or with a shared one."""
    return Materializations(settings, LocalHandle(coordinator or Coordinator(keep=keep)), keep)  # type: ignore[arg-type]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine with a time limit."""

    async def limited() -> Any:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await work
        except TimeoutError as error:
            raise AssertionError(f"waited for {PATIENCE_S:g} s: a materialization has neither succeeded nor failed") from error

    return asyncio.run(limited())


async def finished_record(sizes: Materializations, id: str) -> dict[str, Any]:
    """Wait until a materialization is finished and return its record."""
    while (record := await sizes.get(id))["status"] in ("queued", "running"):
        assert record["uri"] is record["sha256"] is record["bytes"] is record["finished"] is record["error"] is None
        await asyncio.sleep(0.02)
    assert record["finished"] >= record["created"]
    return record


def check(folder: Path, record: dict[str, Any]) -> None:
    """Verify the files of a folder from the record alone, as a client would."""
    raw = (folder / PROVENANCE).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == record["sha256"]
    files = json.loads(raw)["files"]
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert paths.keys() == {*files, PROVENANCE}
    assert all(hashlib.sha256(paths[name].read_bytes()).hexdigest() == facts["sha256"] for name, facts in files.items())
    assert sum(path.stat().st_size for path in paths.values()) == record["bytes"]


def test_size_is_materialized_once(settings: Settings, version: ModelVersion, any_size: ElasticModel, heldout_tokens: torch.Tensor) -> None:
    async def scenario() -> dict[str, Any]:
        sizes, workplaces = materializations(settings), settings.home / "exporting"
        workplaces.mkdir(parents=True)
        with lock(workplaces):  # the task waits for this lock, so that the test observes it running
            record = await sizes.start(version, Budget(ratio=0.6))
            assert record["status"] == "queued" and record["object"] == "materialization"
            while (now := await sizes.get(record["id"]))["status"] == "queued":
                await asyncio.sleep(0.01)
            assert now["status"] == "running", now
        now = await finished_record(sizes, record["id"])
        assert now["status"] == "succeeded", now

        written = (Path(now["uri"]) / PROVENANCE).stat()
        again = await sizes.start(version, Budget(ratio=0.6))
        percent = await sizes.start(version, Budget.parse("60%"))
        same_cut = await sizes.start(version, Budget(params=now["size"]["params"]))
        assert again == percent == same_cut == now
        restarted = materializations(settings)
        found = await restarted.get(now["id"])
        assert found == await restarted.start(version, Budget(ratio=0.6)) == now | {key: found[key] for key in ("created", "finished")}
        assert found["created"] == found["finished"] <= now["finished"], "the time of the file"
        assert [record["id"] for record in await restarted.list()] == [now["id"]]
        assert (Path(now["uri"]) / PROVENANCE).stat() == written, "the files must not be written again"
        return now

    record = run(scenario())
    folder = Path(record["uri"])
    assert folder.parent == Path(settings.store) / "exports" / "small" / "1"
    assert folder.name.startswith("size-") and record["id"].removeprefix("mat-") in folder.name
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not list((settings.home / "exporting").glob("*/"))
    check(folder, record)
    cut = any_size.resize(0.6)
    assert torch.equal(logits(read(folder), heldout_tokens[:4]), logits(any_size.materialize(), heldout_tokens[:4]))
    assert record["size"] == {
        "unit": "ratio", "ratio": record["size"]["got"],
        "asked": 0.6, "got": cut.got, "convention": "linear", "params": cut.params, "bytes": tensor_bytes(folder),
        "bits_per_weight": None, "extrapolated": False,
    }  # fmt: skip
    assert (record["model"], record["version"], record["quantize"]) == ("small", "1", None)


def test_a_coded_size_is_materialized_once(settings: Settings, coded_artifact: Artifact, heldout_tokens: torch.Tensor) -> None:
    version = ModelVersion("coded", "1", str(coded_artifact.folder), ("champion",), {})
    table, budget = coded_artifact.table(), Budget(ratio=0.4, convention="bytes")
    cut = table.cut(budget)

    async def scenario() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        sizes = materializations(settings)
        assert await sizes.convention(version) == "bytes"
        record = await finished_record(sizes, (await sizes.start(version, budget))["id"])
        same = await sizes.start(version, Budget(stored_bytes=cut.bytes))
        base = await finished_record(sizes, (await sizes.start(version, Budget(ratio=1.0)))["id"])
        return record, same, base

    record, same, base = run(scenario())
    assert record["status"] == base["status"] == "succeeded", (record, base)
    assert same == record
    assert base["id"] != record["id"]
    folder = Path(record["uri"])
    assert re.match(r"size-0\.\d{4}-bytes-", folder.name)
    check(folder, record)
    assert (record["size"]["convention"], record["size"]["got"], record["size"]["bytes"]) == ("bytes", cut.got, cut.bytes)
    assert record["size"]["bits_per_weight"] == cut.bits_per_weight
    tokens = heldout_tokens[:2, :32]
    assert torch.equal(logits(read(folder), tokens), logits(coded_artifact.load(size=budget).materialize(), tokens))


def test_materialization_from_s3_to_s3(
    s3_server: dict[str, str], tmp_path: Path, small_artifact: Artifact, any_size: ElasticModel, heldout_tokens: torch.Tensor
) -> None:
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home"), "ACIP_ARTIFACT_URI": f"s3://models/{tmp_path.name}"})
    store, s3 = Store(settings.store, tmp_path / "cache"), boto3.client("s3")
    uri = store.put(copytree(small_artifact.folder, tmp_path / "copy"), "small/1")
    version = ModelVersion("small", "1", uri, (), {})

    async def scenario() -> tuple[dict[str, Any], dict[str, Any]]:
        first, second = materializations(settings), materializations(settings)  # as on two servers
        ids = [(await sizes.start(version, Budget(ratio=0.5), "nf4"))["id"] for sizes in (first, second)]
        return await finished_record(first, ids[0]), await finished_record(second, ids[1])

    record, other = run(scenario())
    assert record["status"] == "succeeded", record
    assert {key: record[key] for key in ("id", "uri", "sha256")} == {key: other[key] for key in ("id", "uri", "sha256")}
    prefix = record["uri"].removeprefix("s3://models/")
    assert prefix.startswith(f"{tmp_path.name}/exports/small/1/size-0.") and "-nf4-" in prefix
    listed = s3.list_objects_v2(Bucket="models", Prefix=f"{tmp_path.name}/exports/")["Contents"]
    assert {item["Key"].rpartition("/")[0] for item in listed} == {prefix}, "two exports must give one folder"
    for item in listed:
        target = tmp_path / "down" / item["Key"].removeprefix(prefix + "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file("models", item["Key"], str(target))
    check(tmp_path / "down", record)
    assert tensor_bytes(tmp_path / "down") == record["size"]["bytes"]
    any_size.resize(0.5)
    assert logits(read(tmp_path / "down"), heldout_tokens[:2]).shape == logits(any_size.materialize(), heldout_tokens[:2]).shape

    s3.delete_object(Bucket="models", Key=f"{prefix}/{PROVENANCE}")
    with pytest.raises(RequestError, match="no materialization 'mat-"):
        run(materializations(settings).get(record["id"]))
    s3.put_object(Bucket="models", Key=f"{tmp_path.name}/small/1/factors.safetensors", Body=_corrupted(small_artifact.folder))

    async def broken() -> dict[str, Any]:
        sizes = materializations(settings)
        return await finished_record(sizes, (await sizes.start(version, Budget(ratio=0.7)))["id"])

    failed = run(broken())
    assert failed["status"] == "failed" and "corrupted" in failed["error"], failed
    assert str(settings.home) not in failed["error"]


def _corrupted(artifact: Path) -> bytes:
    """Return the factors with one wrong byte in every sixteen."""
    content = bytearray((artifact / "factors.safetensors").read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start::16] = bytes(byte ^ 1 for byte in content[start::16])
    return bytes(content)


def test_failed_materialization_reports_why_and_can_be_retried(settings: Settings, version: ModelVersion) -> None:
    factors = Path(version.uri) / "factors.safetensors"

    async def scenario() -> None:
        sizes = materializations(settings)
        await sizes.start(version, Budget(ratio=1.0))
        factors.rename(factors.with_suffix(".away"))
        failed = await finished_record(sizes, (await sizes.start(version, Budget(ratio=0.6)))["id"])
        assert failed["status"] == "failed" and failed["uri"] is None
        assert f"{factors} is missing" in failed["error"]
        with pytest.raises(RequestError, match="is missing") as unavailable:
            await sizes.start(version, Budget(ratio=0.6))
        assert unavailable.value.status == 503
        factors.with_suffix(".away").rename(factors)
        again = await sizes.start(version, Budget(ratio=0.6))
        assert again["id"] == failed["id"] and again["error"] is None
        assert (await finished_record(sizes, again["id"]))["status"] == "succeeded"

    run(scenario())


def test_an_export_that_was_deleted_from_the_store_is_gone(
    settings: Settings, version: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acip_platform.serve.materializations.REFRESH_INTERVAL_S", -1.0)  # the store is listed at once

    async def scenario() -> None:
        sizes = materializations(settings)
        kept, gone = [await finished_record(sizes, (await sizes.start(version, Budget(ratio=ratio)))["id"]) for ratio in (0.7, 0.6)]
        assert [record["id"] for record in await sizes.list()] == [gone["id"], kept["id"]]
        rmtree(gone["uri"])
        with pytest.raises(RequestError, match=f"'{gone['id']}' was deleted from the store") as missing:
            await sizes.get(gone["id"])
        assert (missing.value.status, missing.value.code) == (404, "materialization_not_found")
        assert [record["id"] for record in await sizes.list()] == [kept["id"]]
        again = await finished_record(sizes, (await sizes.start(version, Budget(ratio=0.6)))["id"])
        assert (again["id"], again["status"]) == (gone["id"], "succeeded")
        await sizes.get(gone["id"])
        assert await sizes.get(kept["id"]) == kept
        remade = f"{again['uri'][:-8]}{0:08}"
        move(again["uri"], remade)  # as if another server made it again, with another checksum
        found = await sizes.get(gone["id"])
        assert (found["uri"], found["sha256"]) == (remade, again["sha256"])
        assert {record["uri"] for record in await sizes.list()} == {kept["uri"], remade}

    run(scenario())


def test_killed_worker_fails_the_materialization(settings: Settings, version: ModelVersion) -> None:
    workplaces = settings.home / "exporting"
    workplaces.mkdir(parents=True)

    async def scenario() -> None:
        sizes = materializations(settings)
        with lock(workplaces):  # the task runs and waits for this lock
            record = await sizes.start(version, Budget(ratio=0.6))
            while (await sizes.get(record["id"]))["status"] == "queued":
                await asyncio.sleep(0.01)
            while len(tasks := _tasks()) > 1:  # that of an earlier test may still write to MLflow
                await asyncio.sleep(0.1)
            tasks[0].kill()
            failed = await finished_record(sizes, record["id"])
        assert failed["status"] == "failed" and "died" in failed["error"]
        again = await sizes.start(version, Budget(ratio=0.6))
        assert (await finished_record(sizes, again["id"]))["status"] == "succeeded"

    run(scenario())


def _tasks() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if "export_task" in _title(process)]


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def test_queue_is_bounded(settings: Settings, version: ModelVersion) -> None:
    async def scenario() -> None:
        sizes = materializations(
            settings, Coordinator(num_cpus=1000, max_queued=1)
        )  # more CPUs than the cluster has, so that no task starts
        first = await sizes.start(version, Budget(ratio=0.6))
        await sizes.start(version, Budget(ratio=0.5))
        with pytest.raises(RequestError, match="too many materializations are queued or running") as full:
            await sizes.start(version, Budget(ratio=0.4))
        assert full.value.status == 429
        assert await sizes.start(version, Budget(ratio=0.6)) == first, "a full queue must accept a request for a queued size"
        assert {record["status"] for record in await sizes.list()} == {"queued"}

    run(scenario())


def test_finished_records_are_bounded(settings: Settings, version: ModelVersion) -> None:
    async def scenario() -> None:
        sizes = materializations(settings, keep=1)
        ids = [(await finished_record(sizes, (await sizes.start(version, Budget(ratio=ratio)))["id"]))["id"] for ratio in (0.4, 0.5, 0.6)]
        assert len(await sizes.list()) == 1 and len(set(ids)) == 3
        for ratio in (0.4, 0.5, 0.6):
            assert (await sizes.start(version, Budget(ratio=ratio)))["status"] == "succeeded", "the store must find all of them"

    run(scenario())


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda sizes, version: sizes.start(version, Budget(ratio=0.01)), BudgetError, "the smallest is"),
        (lambda sizes, version: sizes.start(version, Budget(ratio=0.6), "int3"), RequestError, "quantize is 'int3'"),
        (lambda sizes, version: sizes.start(version, Budget(ratio=0.6, bits=4), "int8"), RequestError, "int8 needs 8"),
        (lambda sizes, version: sizes.get("mat-0123456789abcdef"), RequestError, "no materialization 'mat-0123456789abcdef'"),
        (lambda sizes, version: sizes.get("../etc"), RequestError, "no materialization"),
    ],
)
def test_invalid_requests_are_refused(
    ask: Callable[[Materializations, ModelVersion], Awaitable[Any]], error: type[Exception], message: str, settings: Settings,
    version: ModelVersion,
) -> None:  # fmt: skip
    async def scenario() -> None:
        with pytest.raises(error, match=message):
            await ask(materializations(settings), version)

    run(scenario())


def test_foreign_folders_are_skipped(settings: Settings) -> None:
    for name, content in (("size-0.5-0123456789abcdef-01234567", "{}"), ("size-0.5-0123456789abcdee-01234567", "no JSON"), ("mine", "{}")):
        folder = Path(settings.store) / "exports" / "small" / "1" / name
        folder.mkdir(parents=True)
        (folder / PROVENANCE).write_text(content)
    assert run(materializations(settings).list()) == []


def test_canceled_request_does_not_cancel_its_export(settings: Settings, version: ModelVersion) -> None:
    """If a client disconnects, Serve cancels the Ray task of its request and the child tasks; the export must continue."""

    @ray.remote(num_cpus=0)
    class Server:
        def __init__(self) -> None:
            self.sizes = materializations(settings)
            self.id = ""

        async def ask(self) -> None:
            self.id = (await self.sizes.start(version, Budget(ratio=0.6)))["id"]
            await asyncio.sleep(PATIENCE_S)

        async def record(self) -> dict[str, Any] | None:
            return await self.sizes.get(self.id) if self.id else None

    server = Server.remote()  # type: ignore[attr-defined]
    request = server.ask.remote()
    until(lambda: ray.get(server.record.remote()), "the request starts no task")
    ray.cancel(request)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(request)

    def export_record() -> dict[str, Any] | None:
        record: dict[str, Any] = ray.get(server.record.remote())
        return None if record["status"] in ("queued", "running") else record

    record = until(export_record, "the task of the canceled request does not end")
    assert record["status"] == "succeeded", record
    ray.kill(server)


def test_workplaces_in_use_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "model").write_text("")
    with workplace(tmp_path) as first, workplace(tmp_path) as second:
        assert sorted(tmp_path.glob("*/")) == sorted([first, second])
    assert not list(tmp_path.glob("*/"))
