"""Objects and folders on S3, by s3://bucket/key: the same verbs as on a disk (disk.py). The only place that uses boto3.

Requests are asked again by botocore, and bodies that come cut off by us. What is sent has a SHA-256, which the server compares.
Of several writers of a small object, or of a folder's last file, one is told that it was first: the write is conditional.
"""

import functools
import os
import secrets
import shutil
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from urllib3.exceptions import HTTPError

from acip.artifact.byte_sources import Range
from acip.errors import AcipError, ArtifactError, cited
from acip_platform.settings import masked
from acip_platform.storage.disk import Item, MissingError, StoreError

PART = 8 << 20  # bytes of one request at most
AT_ONCE = 16  # requests
FILES_AT_ONCE = 8  # each in parts of its own
JOINED = 64 << 20  # bytes
ATTEMPTS = 4  # at a body that is cut off
SUMMED = {"ChecksumAlgorithm": "SHA256"}  # of each part, compared by the server
WRITER = "acip-writer"  # metadata of an artifact's objects

P = ParamSpec("P")
T = TypeVar("T")


def told(method: Callable[P, T]) -> Callable[P, T]:
    """S3's errors as ours, with the URI and what to check."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return method(*args, **kwargs)
        except (BotoCoreError, ClientError, Boto3Error, ValueError) as error:  # ValueError: an endpoint that is no URL
            if isinstance(error, AcipError):
                raise
            said = masked(str(error))
            if "PreconditionFailed" in said:
                raise StoreError(f"an object was replaced while it was being read ({said}). Open the artifact again.") from error
            check = "Check the bucket's name, AWS_ENDPOINT_URL and the credentials (AWS_ACCESS_KEY_ID or a role)."
            kind = MissingError if "NoSuchKey" in said else StoreError
            raise kind(f"S3 refused {method.__name__} of {args[1] if len(args) > 1 else ''}: {said} {check}") from error

    return call


class S3:
    @told
    def has(self, uri: str) -> bool:
        bucket, key = split(uri)
        found = client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)  # the shortest with this prefix is itself
        return any(item["Key"] == key for item in found.get("Contents", []))

    @told
    def listed(self, uri: str) -> dict[str, Item]:
        """The objects under a folder, by name; not folders' own markers."""
        bucket, prefix = split(uri)
        found = {}
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/"):
            for item in page.get("Contents", []):
                name = item["Key"].removeprefix(prefix + "/")
                if name and not name.endswith("/"):
                    found[name] = Item(int(item["Size"]), item["LastModified"].timestamp(), item["ETag"])
        return found

    def folders(self, uri: str) -> Iterable[str]:
        return {name.partition("/")[0] for name in self.listed(uri)}

    @told
    def read(self, uri: str) -> bytes:
        from botocore.exceptions import BotoCoreError

        bucket, key = split(uri)
        for attempt in range(ATTEMPTS):
            answer = client().get_object(Bucket=bucket, Key=key)
            with suppress(BotoCoreError, HTTPError, OSError):  # cut off on the way; asking again is botocore's only before the body
                content: bytes = answer["Body"].read()
                return content
            time.sleep(0.1 * 2**attempt)
        raise StoreError(f"{uri} came cut off {ATTEMPTS} times. Check the network.")

    @told
    def create(self, uri: str, content: bytes) -> bool:
        """A request that is repeated because its answer was lost is told False, and finds its own content there."""
        from botocore.exceptions import ClientError

        bucket, key = split(uri)
        try:
            client().put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*", **SUMMED)
        except ClientError as error:
            if error.response["Error"]["Code"] not in {"PreconditionFailed", "ConditionalRequestConflict"}:
                raise
            return False
        return True

    @told
    def write(self, uri: str, content: bytes) -> None:
        bucket, key = split(uri)
        client().put_object(Bucket=bucket, Key=key, Body=content, **SUMMED)

    @told
    def remove(self, uri: str) -> None:
        bucket, key = split(uri)
        client().delete_object(Bucket=bucket, Key=key)

    def remove_folder(self, uri: str) -> None:
        for name in self.listed(uri):
            self.remove(f"{uri}/{name}")

    @told
    def put(self, uri: str, folder: Path, last: str) -> None:
        """Of writers at once, one publishes its last file, and only if every object beside it is its own."""
        (bucket, prefix), writer = split(uri), secrets.token_hex(8)
        there = _upload(folder, uri, last, {WRITER: writer})
        for stale in self.listed(uri).keys() - there:
            self.remove(f"{uri}/{stale}")
        for name in there:
            if client().head_object(Bucket=bucket, Key=f"{prefix}/{name}")["Metadata"].get(WRITER) != writer:
                raise StoreError(f"another process is writing to {uri}: {name} is not ours any more. Run this again when that one ended.")
        content = (folder / last).read_bytes()
        if not self.create(f"{uri}/{last}", content) and self.read(f"{uri}/{last}") != content:
            raise StoreError(f"another process was faster to write to {uri}. Run this again to go on with what is there.")
        shutil.rmtree(folder)

    @told
    def add(self, uri: str, folder: Path, last: str) -> None:
        bucket, prefix = split(uri)
        _upload(folder, uri, last)
        client().upload_file(str(folder / last), bucket, f"{prefix}/{last}", SUMMED)
        shutil.rmtree(folder)

    @told
    def download(self, uri: str, names: Iterable[str], into: Path) -> None:
        """Files of a folder into a local one."""
        s3, (bucket, prefix) = client(), split(uri)

        def one(name: str) -> None:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, f"{prefix}/{name}", str(into / name))

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(one, names))


class S3Source:
    """An artifact's bytes on S3, by ranged requests side by side; neighbors are asked for together. Everything is checked.

    An object that is replaced while it is being read is an error, not a mixture.
    """

    checked = True

    def __init__(self, uri: str, objects: Mapping[str, Item]) -> None:
        self.where, self.objects = uri, objects
        self.bucket, self.prefix = split(uri)
        self.fetched = 0  # bytes
        self.requests = 0

    def size(self, file: str) -> int:
        if file not in self.objects:
            raise ArtifactError(f"{self.where}/{file} is missing. Store the artifact again.")
        return self.objects[file].bytes

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        self.size(file)
        runs = {start: memoryview(bytearray(stop - start)) for start, stop in joined(ranges)}
        parts = [
            ((start + at, start + at + len(view)), view)
            for start, run in runs.items()
            for at in range(0, len(run), PART)
            for view in (run[at : at + PART],)
        ]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for fetched, requests in pool.map(lambda part: self._get(file, *part), parts):
                self.fetched += fetched
                self.requests += requests
        starts = sorted(runs)
        found = []
        for start, stop in ranges:
            run = starts[bisect_right(starts, start) - 1] if stop > start else 0
            found.append(runs[run][start - run : stop - run] if stop > start else memoryview(bytearray()))
        return found

    @told
    def _get(self, file: str, part: Range, into: memoryview) -> tuple[int, int]:
        """(bytes fetched, requests made) until the part was there."""
        from botocore.exceptions import BotoCoreError

        start, stop = part
        tag, fetched = self.objects[file].tag, 0
        for attempt in range(ATTEMPTS):
            answer = client().get_object(Bucket=self.bucket, Key=f"{self.prefix}/{file}", Range=f"bytes={start}-{stop - 1}", IfMatch=tag)
            if answer["ContentLength"] != stop - start:
                raise StoreError(f"{self.where}: the server sent {answer['ContentLength']:,} bytes for {stop - start:,}; it has no ranges.")
            try:
                content = answer["Body"].read()
            except (BotoCoreError, HTTPError, OSError):  # cut off, as in S3.read
                content = b""
            fetched += len(content)
            if len(content) == stop - start:
                into[:] = content
                return fetched, attempt + 1
            time.sleep(0.1 * 2**attempt)
        raise StoreError(f"{self.where}/{file}: bytes {start:,} to {stop:,} came cut off {ATTEMPTS} times. Check the network.")


def _upload(folder: Path, uri: str, last: str, metadata: Mapping[str, str] | None = None) -> set[str]:
    """Every file of `folder` but `last`; returns their names."""
    s3, (bucket, prefix) = client(), split(uri)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {last}
    extra = {**SUMMED, "Metadata": dict(metadata or {})}
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(lambda name: s3.upload_file(str(folder / name), bucket, f"{prefix}/{name}", extra), sorted(names)))
    return names


def joined(ranges: Sequence[Range]) -> list[Range]:
    """The same bytes in as few ranges as possible; neighbors up to JOINED bytes, because they are held together, too."""
    runs: list[Range] = []
    for start, stop in sorted(span for span in ranges if span[1] > span[0]):
        if runs and start <= runs[-1][1] and (stop - runs[-1][0] <= JOINED or start < runs[-1][1]):
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    return runs


def split(uri: str) -> tuple[str, str]:
    """Bucket and key."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket or not prefix.strip("/"):
        raise StoreError(f"{cited(uri)} must be s3://bucket/prefix.")
    return bucket, prefix.strip("/")


_making = threading.Lock()  # clients may be used by several threads, but not made by them at once


def client() -> Any:
    """One for this process and these settings: its connections are used again."""
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _making:
        return _made(os.getpid(), settings)


@functools.lru_cache(maxsize=4)
def _made(_process: int, _settings: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore.config import Config

    retries = {"max_attempts": 8, "mode": "standard"}  # adaptive: after one 503, 200 requests take 7 s instead of 1
    config = Config(retries=retries, max_pool_connections=8 * AT_ONCE, connect_timeout=10, read_timeout=30)  # seconds of silence
    return boto3.session.Session().client("s3", config=config)  # boto3.client's own session would keep the first settings' credentials
