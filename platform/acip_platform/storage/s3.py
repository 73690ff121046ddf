"""Objects and folders on S3, by s3://bucket/key, with the same methods as on a disk (disk.py). The only user of boto3.

botocore retries failed requests; this module retries truncated bodies. Uploads carry a SHA-256, which the server verifies.
Small objects and the last file of a folder are written conditionally, so exactly one of several writers succeeds.
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

PART = 8 << 20  # most bytes in one ranged request
PARALLEL_REQUESTS = 16
PARALLEL_FILES = 8  # each is transferred in several parts
MAX_JOINED_BYTES = 64 << 20
ATTEMPTS = 4  # requests for a body that arrives truncated
WITH_CHECKSUM = {"ChecksumAlgorithm": "SHA256"}  # of each part, verified by the server
WRITER = "acip-writer"  # metadata key of an artifact's objects

P = ParamSpec("P")
T = TypeVar("T")


def _store_errors(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate a method so that S3's errors become StoreError, with the URI and what to check."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return method(*args, **kwargs)
        except (BotoCoreError, ClientError, Boto3Error, ValueError) as error:  # ValueError: the endpoint is not a URL
            if isinstance(error, AcipError):
                raise
            message = masked(str(error))
            if "PreconditionFailed" in message:
                raise StoreError(f"an object was replaced while it was being read ({message}). Open the artifact again.") from error
            check = "Check the bucket's name, AWS_ENDPOINT_URL and the credentials (AWS_ACCESS_KEY_ID or a role)."
            kind = MissingError if "NoSuchKey" in message else StoreError
            raise kind(f"S3 refused {method.__name__} of {args[1] if len(args) > 1 else ''}: {message} {check}") from error

    return call


class S3:
    """Operations on S3. They raise StoreError."""

    @_store_errors
    def has(self, uri: str) -> bool:
        """Return whether there is an object at `uri`."""
        bucket, key = split(uri)
        page = client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)  # the object itself is the first with this prefix
        return any(item["Key"] == key for item in page.get("Contents", []))

    @_store_errors
    def listed(self, uri: str) -> dict[str, Item]:
        """Return all objects under a folder, by relative name, without the markers of folders."""
        bucket, prefix = split(uri)
        items = {}
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/"):
            for item in page.get("Contents", []):
                name = item["Key"].removeprefix(prefix + "/")
                if name and not name.endswith("/"):
                    items[name] = Item(int(item["Size"]), item["LastModified"].timestamp(), item["ETag"])
        return items

    def folders(self, uri: str) -> Iterable[str]:
        """Return the names of everything in a folder."""
        return {name.partition("/")[0] for name in self.listed(uri)}

    @_store_errors
    def read(self, uri: str) -> bytes:
        """Return the content of an object; MissingError if it does not exist."""
        from botocore.exceptions import BotoCoreError

        bucket, key = split(uri)
        for attempt in range(ATTEMPTS):
            response = client().get_object(Bucket=bucket, Key=key)
            with suppress(BotoCoreError, HTTPError, OSError):  # truncated; botocore retries only until the body begins
                content: bytes = response["Body"].read()
                return content
            time.sleep(0.1 * 2**attempt)
        raise StoreError(f"{uri} arrived truncated {ATTEMPTS} times. Check the network.")

    @_store_errors
    def create(self, uri: str, content: bytes) -> bool:
        """Write a new object; return False if it exists already.

        If the response was lost, botocore repeats the request, and the result is False although this call wrote the content.
        """
        from botocore.exceptions import ClientError

        bucket, key = split(uri)
        try:
            client().put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*", **WITH_CHECKSUM)
        except ClientError as error:
            if error.response["Error"]["Code"] not in {"PreconditionFailed", "ConditionalRequestConflict"}:
                raise
            return False
        return True

    @_store_errors
    def write(self, uri: str, content: bytes) -> None:
        """Write or replace an object."""
        bucket, key = split(uri)
        client().put_object(Bucket=bucket, Key=key, Body=content, **WITH_CHECKSUM)

    @_store_errors
    def remove(self, uri: str) -> None:
        """Remove an object. It does not have to exist."""
        bucket, key = split(uri)
        client().delete_object(Bucket=bucket, Key=key)

    def remove_folder(self, uri: str) -> None:
        """Remove all objects under a folder."""
        for name in self.listed(uri):
            self.remove(f"{uri}/{name}")

    @_store_errors
    def put(self, uri: str, folder: Path, last: str) -> None:
        """Move a local folder to `uri` and replace the incomplete folder that may be there.

        The file `last` is written at the end, only if all other objects are this writer's. One of several writers succeeds at most.
        """
        (bucket, prefix), writer = split(uri), secrets.token_hex(8)
        names = _upload(folder, uri, last, {WRITER: writer})
        for stale in self.listed(uri).keys() - names:
            self.remove(f"{uri}/{stale}")
        for name in names:
            if client().head_object(Bucket=bucket, Key=f"{prefix}/{name}")["Metadata"].get(WRITER) != writer:
                raise StoreError(f"another process is writing to {uri}: it replaced {name}. Run this again when that process has ended.")
        content = (folder / last).read_bytes()
        if not self.create(f"{uri}/{last}", content) and self.read(f"{uri}/{last}") != content:
            raise StoreError(f"another process has written to {uri} first. Run this again to continue with the existing content.")
        shutil.rmtree(folder)

    @_store_errors
    def add(self, uri: str, folder: Path, last: str) -> None:
        """Move a local folder to `uri`, its file `last` at the end."""
        bucket, prefix = split(uri)
        _upload(folder, uri, last)
        client().upload_file(str(folder / last), bucket, f"{prefix}/{last}", WITH_CHECKSUM)
        shutil.rmtree(folder)

    @_store_errors
    def download(self, uri: str, names: Iterable[str], into: Path) -> None:
        """Download the files `names` of a folder into the local folder `into`."""
        s3, (bucket, prefix) = client(), split(uri)

        def download_file(name: str) -> None:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, f"{prefix}/{name}", str(into / name))

        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(download_file, names))


class S3Source:
    """The bytes of an artifact on S3, read by parallel ranged requests. Adjacent ranges are read by one request.

    If an object is replaced while it is being read, `read` raises StoreError instead of returning a mixture.
    """

    checked = True

    def __init__(self, uri: str, objects: Mapping[str, Item]) -> None:
        self.where, self.objects = uri, objects
        self.bucket, self.prefix = split(uri)
        self.fetched = 0  # bytes
        self.requests = 0

    def size(self, file: str) -> int:
        """Return the size of a file in bytes; ArtifactError if it does not exist."""
        if file not in self.objects:
            raise ArtifactError(f"{self.where}/{file} is missing. Store the artifact again.")
        return self.objects[file].bytes

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        """Return the bytes of each of `ranges` of a file."""
        self.size(file)
        runs = {start: memoryview(bytearray(stop - start)) for start, stop in joined(ranges)}
        parts = [
            ((start + at, start + at + len(view)), view)
            for start, run in runs.items()
            for at in range(0, len(run), PART)
            for view in (run[at : at + PART],)
        ]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            for fetched, requests in pool.map(lambda part: self._get(file, *part), parts):
                self.fetched += fetched
                self.requests += requests
        starts = sorted(runs)
        views = []
        for start, stop in ranges:
            run = starts[bisect_right(starts, start) - 1] if stop > start else 0
            views.append(runs[run][start - run : stop - run] if stop > start else memoryview(bytearray()))
        return views

    @_store_errors
    def _get(self, file: str, part: Range, into: memoryview) -> tuple[int, int]:
        """Fetch one part into `into`; return (bytes fetched, requests made)."""
        from botocore.exceptions import BotoCoreError

        start, stop = part
        tag, fetched = self.objects[file].tag, 0
        for attempt in range(ATTEMPTS):
            response = client().get_object(Bucket=self.bucket, Key=f"{self.prefix}/{file}", Range=f"bytes={start}-{stop - 1}", IfMatch=tag)
            if response["ContentLength"] != stop - start:
                raise StoreError(
                    f"{self.where}: the server sent {response['ContentLength']:,} bytes instead of {stop - start:,}. "
                    "Use a server that supports range requests."
                )
            try:
                content = response["Body"].read()
            except (BotoCoreError, HTTPError, OSError):  # truncated, as in S3.read
                content = b""
            fetched += len(content)
            if len(content) == stop - start:
                into[:] = content
                return fetched, attempt + 1
            time.sleep(0.1 * 2**attempt)
        raise StoreError(f"{self.where}/{file}: bytes {start:,} to {stop:,} arrived truncated {ATTEMPTS} times. Check the network.")


def _upload(folder: Path, uri: str, last: str, metadata: Mapping[str, str] | None = None) -> set[str]:
    """Upload every file of `folder` except `last`; return their names."""
    s3, (bucket, prefix) = client(), split(uri)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {last}
    extra = {**WITH_CHECKSUM, "Metadata": dict(metadata or {})}
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        list(pool.map(lambda name: s3.upload_file(str(folder / name), bucket, f"{prefix}/{name}", extra), sorted(names)))
    return names


def joined(ranges: Sequence[Range]) -> list[Range]:
    """Merge overlapping and adjacent ranges. Adjacent ones are merged up to MAX_JOINED_BYTES, because one buffer holds a merged range."""
    runs: list[Range] = []
    for start, stop in sorted(span for span in ranges if span[1] > span[0]):
        if runs and start <= runs[-1][1] and (stop - runs[-1][0] <= MAX_JOINED_BYTES or start < runs[-1][1]):
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    return runs


def split(uri: str) -> tuple[str, str]:
    """Return the bucket and the key of an S3 URI; StoreError if one is missing."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket or not prefix.strip("/"):
        raise StoreError(f"{cited(uri)} must be s3://bucket/prefix.")
    return bucket, prefix.strip("/")


_client_lock = threading.Lock()  # boto3 clients are thread-safe, but creating them is not


def client() -> Any:
    """Return the client of this process for the present AWS_* variables. It reuses its connections."""
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _client_lock:
        return _client_for(os.getpid(), settings)


@functools.lru_cache(maxsize=4)
def _client_for(_process: int, _settings: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore.config import Config

    retries = {"max_attempts": 8, "mode": "standard"}  # with "adaptive", 200 requests take 7 s instead of 1 s after one 503
    config = Config(retries=retries, max_pool_connections=8 * PARALLEL_REQUESTS, connect_timeout=10, read_timeout=30)  # seconds of silence
    return boto3.session.Session().client("s3", config=config)  # boto3.client would keep the credentials of the first settings
