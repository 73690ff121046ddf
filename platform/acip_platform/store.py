"""Folders by URI: a local path, file://, or s3://bucket/prefix. The only place that uses boto3.

An artifact is complete when its manifest is there, so the manifest is moved last, in both directions. Other folders have
another last file (an export: its provenance).
"""

import functools
import hashlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlparse
from urllib.request import url2pathname

from urllib3.exceptions import HTTPError

from acip.artifact import MANIFEST, Artifact
from acip.errors import AcipError, ArtifactError, cited
from acip.source import Range
from acip_platform.settings import masked

PART = 8 << 20  # bytes of one request at most
AT_ONCE = 16  # requests
JOINED = 64 << 20  # bytes
ATTEMPTS = 4  # at a body that is cut off
SUMMED = {"ChecksumAlgorithm": "SHA256"}  # of each part, compared by the server
WRITER = "acip-writer"  # metadata of an artifact's objects


class StoreError(AcipError):
    """A URI that can't be read or written. Says which, and what to check."""


P = ParamSpec("P")
T = TypeVar("T")


def _told(method: Callable[P, T]) -> Callable[P, T]:
    """S3's errors as ours, with the URI and what to check."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return method(*args, **kwargs)
        except (BotoCoreError, ClientError, Boto3Error) as error:
            if "PreconditionFailed" in str(error):
                raise StoreError(f"an object was replaced while it was being read ({error}). Open the artifact again.") from error
            check = "Check the bucket's name, AWS_ENDPOINT_URL and the credentials (AWS_ACCESS_KEY_ID or a role)."
            raise StoreError(f"S3 refused {method.__name__} of {args[1] if len(args) > 1 else ''}: {masked(str(error))} {check}") from error

    return call


class Store:
    """`root` is a folder or s3://bucket/prefix; `cache` is a local folder for what is fetched from S3."""

    def __init__(self, root: str, cache: Path) -> None:
        self.root = root.rstrip("/")
        self.cache = cache

    def uri(self, key: str) -> str:
        return f"{self.root}/{key}"

    @_told
    def exists(self, uri: str, last: str = MANIFEST) -> bool:
        """Is there a complete artifact at `uri`, or a complete folder of another kind, whose last file is `last`?"""
        if not _is_s3(uri):
            return (_path(uri) / last).is_file()
        bucket, prefix = _split(uri)
        found = _s3().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/{last}", MaxKeys=1)
        return found.get("KeyCount", 0) > 0

    @_told
    def complete(self, under: str, last: str) -> dict[str, float]:
        """Folders anywhere under the key `under` that have their file `last`: by URI, when it came (seconds since 1970)."""
        root = self.uri(under)
        if _is_s3(root):
            came = {name: item["LastModified"].timestamp() for name, item in self._listed(root).items()}
        else:
            files = [(path, path.relative_to(_path(root)).as_posix()) for path in _path(root).rglob(last)]
            came = {name: path.stat().st_mtime for path, name in files if not name.startswith(".") and "/." not in name}  # on their way
        return {f"{root}/{name.removesuffix(f'/{last}')}": when for name, when in came.items() if name.endswith(f"/{last}")}

    @_told
    def read(self, uris: Sequence[str]) -> list[bytes]:
        """The content of small files."""
        if not all(map(_is_s3, uris)):
            try:
                return [_path(uri).read_bytes() for uri in uris]
            except OSError as error:
                raise StoreError(f"can't read {error.filename}: {error.strerror}. Was it moved or deleted?") from error
        client = _s3()

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda uri: _content(client, *_split(uri)), uris))

    @_told
    def put(self, folder: Path, key: str) -> str:
        """Move an artifact into the store under `key`, at once or not at all; returns its URI. Remains of a broken attempt go.

        Of writers at the same time one publishes its manifest, and only if every object beside it is its own. What is complete stays.
        """
        uri = self.uri(key)
        if self.exists(uri):
            shutil.rmtree(folder)
        elif _is_s3(uri):
            self._publish(folder, uri)
            shutil.rmtree(folder)
        else:
            target = _path(uri)
            shutil.rmtree(target, ignore_errors=True)
            _rename(folder, target, MANIFEST)
        return uri

    def _publish(self, folder: Path, uri: str) -> None:
        client, (bucket, prefix), writer = _s3(), _split(uri), secrets.token_hex(8)
        there = _upload(client, folder, uri, MANIFEST, {WRITER: writer})
        for stale in self._listed(uri).keys() - there:
            client.delete_object(Bucket=bucket, Key=f"{prefix}/{stale}")
        for name in there:
            if client.head_object(Bucket=bucket, Key=f"{prefix}/{name}")["Metadata"].get(WRITER) != writer:
                raise StoreError(f"another process is writing to {uri}: {name} is not ours any more. Run this again when that one ended.")
        manifest = (folder / MANIFEST).read_bytes()
        if not _created(client, bucket, f"{prefix}/{MANIFEST}", manifest) and self.read([f"{uri}/{MANIFEST}"]) != [manifest]:
            raise StoreError(f"another process was faster to write to {uri}. Run this again to go on with what is there.")

    @_told
    def add(self, folder: Path, key: str, last: str) -> str:
        """Move a local folder, complete with its file `last`, to where only the same is ever written; returns its URI.

        The key holds a checksum of the content. So nothing is replaced, and writers of the same at once do no harm.
        """
        uri = self.uri(key)
        if self.exists(uri, last):
            shutil.rmtree(folder)
        elif _is_s3(uri):
            client, (bucket, prefix) = _s3(), _split(uri)
            _upload(client, folder, uri, last)
            client.upload_file(str(folder / last), bucket, f"{prefix}/{last}", SUMMED)
            shutil.rmtree(folder)
        else:
            _rename(folder, _path(uri), last)
        return uri

    @_told
    def keep_only(self, under: str, names: Collection[str], prefix: str) -> None:
        """Delete the folders in the key `under` whose names begin with `prefix` and aren't in `names`; remains of broken ones, too."""
        root = self.uri(under)
        if not _is_s3(root):
            for path in _path(root).glob("*"):
                if path.name.lstrip(".").startswith(prefix) and path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)
            return
        bucket, at = _split(root)
        going = [name for name in self._listed(root) if name.startswith(prefix) and name.partition("/")[0] not in names]
        for name in going:
            _s3().delete_object(Bucket=bucket, Key=f"{at}/{name}")

    @_told
    def create(self, key: str, content: bytes) -> bool:
        """Write a small file where nothing is; of several writers at once, one is told True."""
        uri = self.uri(key)
        if _is_s3(uri):
            bucket, at = _split(uri)
            return _created(_s3(), bucket, at, content)
        _path(uri).parent.mkdir(parents=True, exist_ok=True)
        try:
            with _path(uri).open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    @_told
    def write(self, key: str, content: bytes) -> None:
        """Write or replace a small file, at once or not at all."""
        uri = self.uri(key)
        if _is_s3(uri):
            bucket, at = _split(uri)
            _s3().put_object(Bucket=bucket, Key=at, Body=content)
            return
        partial = _path(uri).with_name(f".{_path(uri).name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(_path(uri))

    @_told
    def remove(self, key: str) -> None:
        """Delete a small file."""
        uri = self.uri(key)
        if _is_s3(uri):
            bucket, at = _split(uri)
            _s3().delete_object(Bucket=bucket, Key=at)
        else:
            _path(uri).unlink(missing_ok=True)

    @_told
    def small(self, under: str) -> dict[str, bytes]:
        """The small files in the key `under`, by name. What goes meanwhile isn't there."""
        root = self.uri(under)
        if not _is_s3(root):
            there: dict[str, bytes] = {}
            for path in _path(root).glob("[!.]*"):
                with suppress(FileNotFoundError):
                    there[path.name] = path.read_bytes()
            return there
        client, (bucket, prefix) = _s3(), _split(root)
        there = {}
        for name in self._listed(root):
            with suppress(client.exceptions.NoSuchKey):
                there[name] = _content(client, bucket, f"{prefix}/{name}")
        return there

    @_told
    def replace_manifest(self, uri: str, folder: Path) -> None:
        """Publish the manifest of `folder`, a local copy of `uri`, after it was changed there."""
        if _is_s3(uri):
            bucket, prefix = _split(uri)
            _s3().upload_file(str(folder / MANIFEST), bucket, f"{prefix}/{MANIFEST}")

    @_told
    def open(self, uri: str) -> Artifact:
        """The artifact at `uri`, of which only what is used is read: mapped into memory, or by ranged requests."""
        if not _is_s3(uri):
            return Artifact.open(self.fetch(uri))
        objects = self._objects(uri)
        return Artifact.open(self.cache / f"{_version(uri, objects)}-parts", S3Source(uri, objects))

    @_told
    def fetch(self, uri: str) -> Path:
        """A local folder with the content of `uri`: itself if it is local, else a cached download."""
        if not _is_s3(uri):
            path = _path(uri)
            if not path.is_dir():
                raise StoreError(f"there is no folder {path}. Was the artifact moved or deleted? Calibrate again, or check ACIP_STORE.")
            return path
        bucket, prefix = _split(uri)
        client, objects = _s3(), self._objects(uri)
        folder = self.cache / _version(uri, objects)
        if (folder / MANIFEST).is_file():
            return folder

        files = [MANIFEST, *Artifact.open(folder, S3Source(uri, objects)).manifest["files"]]
        self.cache.mkdir(parents=True, exist_ok=True)
        coming = Path(tempfile.mkdtemp(prefix="coming-", dir=self.cache))

        def download(name: str) -> None:
            (coming / name).parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, f"{prefix}/{name}", str(coming / name))

        try:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(download, files))
            Artifact.open(coming, verify=True)
            if not (folder / MANIFEST).is_file():  # else another process was faster
                shutil.rmtree(folder, ignore_errors=True)
                coming.rename(folder)
        finally:
            shutil.rmtree(coming, ignore_errors=True)
        return folder

    @contextmanager
    def folder(self, uri: str) -> Iterator[Path]:
        """The files of any folder, while inside: the folder itself if it is local, else copies. They aren't checked."""
        if not _is_s3(uri):
            yield _path(uri)
            return
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / uri.rpartition("/")[2]
            self._download(uri, copy)
            yield copy

    @_told
    def _download(self, uri: str, into: Path) -> None:
        client, (bucket, prefix) = _s3(), _split(uri)
        for name in self._listed(uri):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, f"{prefix}/{name}", str(into / name))

    def _objects(self, uri: str) -> dict[str, Any]:
        """What S3 lists under an artifact's URI, by file."""
        objects = self._listed(uri)
        if MANIFEST not in objects:
            raise StoreError(f"there is no complete artifact at {uri}: no {MANIFEST}. Check the URI and the credentials.")
        return objects

    def _listed(self, uri: str) -> dict[str, Any]:
        bucket, prefix = _split(uri)
        pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/")
        listed = {item["Key"].removeprefix(prefix + "/"): item for page in pages for item in page.get("Contents", [])}
        return {name: item for name, item in listed.items() if name and not name.endswith("/")}  # not folders' own markers


class S3Source:
    """An artifact's bytes on S3, by ranged requests side by side; neighbours are asked for together. Everything is checked.

    An object that is replaced while it is being read is an error, not a mixture.
    """

    checked = True

    def __init__(self, uri: str, objects: Mapping[str, Any]) -> None:
        self.where, self.objects = uri, objects
        self.bucket, self.prefix = _split(uri)
        self.fetched = 0  # bytes
        self.requests = 0
        self._client = _s3()

    def size(self, file: str) -> int:
        if file not in self.objects:
            raise ArtifactError(f"{self.where}/{file} is missing. Store the artifact again.")
        return int(self.objects[file]["Size"])

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        self.size(file)
        runs = {start: memoryview(bytearray(stop - start)) for start, stop in _joined(ranges)}
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

    @_told
    def _get(self, file: str, part: Range, into: memoryview) -> tuple[int, int]:
        """(bytes fetched, requests made) until the part was there."""
        from botocore.exceptions import BotoCoreError

        start, stop = part
        tag, fetched = self.objects[file]["ETag"], 0
        for attempt in range(ATTEMPTS):
            answer = self._client.get_object(
                Bucket=self.bucket, Key=f"{self.prefix}/{file}", Range=f"bytes={start}-{stop - 1}", IfMatch=tag
            )
            if answer["ContentLength"] != stop - start:
                raise StoreError(f"{self.where}: the server sent {answer['ContentLength']:,} bytes for {stop - start:,}; it has no ranges.")
            try:
                content = answer["Body"].read()
            except (BotoCoreError, HTTPError, OSError):  # cut off on the way; asking again is botocore's only before the body
                content = b""
            fetched += len(content)
            if len(content) == stop - start:
                into[:] = content
                return fetched, attempt + 1
            time.sleep(0.1 * 2**attempt)
        raise StoreError(f"{self.where}/{file}: bytes {start:,} to {stop:,} came cut off {ATTEMPTS} times. Check the network.")


def _upload(client: Any, folder: Path, uri: str, last: str, metadata: Mapping[str, str] | None = None) -> set[str]:
    """Every file of `folder` but `last`; returns their names."""
    bucket, prefix = _split(uri)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {last}
    extra = {**SUMMED, "Metadata": dict(metadata or {})}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: client.upload_file(str(folder / name), bucket, f"{prefix}/{name}", extra), sorted(names)))
    return names


def _created(client: Any, bucket: str, key: str, content: bytes) -> bool:
    """Whether this small object was written where nothing was. A request that is repeated because its answer was lost finds itself."""
    from botocore.exceptions import ClientError

    try:
        client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*", **SUMMED)
    except ClientError as error:
        if error.response["Error"]["Code"] not in {"PreconditionFailed", "ConditionalRequestConflict"}:
            raise
        return False
    return True


def _content(client: Any, bucket: str, key: str) -> bytes:
    """All of an object, asked for again where it comes cut off: botocore does that only before the body."""
    from botocore.exceptions import BotoCoreError

    for attempt in range(ATTEMPTS):
        answer = client.get_object(Bucket=bucket, Key=key)
        with suppress(BotoCoreError, HTTPError, OSError):
            content: bytes = answer["Body"].read()
            return content
        time.sleep(0.1 * 2**attempt)
    raise StoreError(f"s3://{bucket}/{key} came cut off {ATTEMPTS} times. Check the network.")


def _rename(folder: Path, target: Path, last: str) -> None:
    """Move a folder, from another file system perhaps, so that it is there at once or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as aside:
            shutil.move(folder, Path(aside) / "new")
            (Path(aside) / "new").rename(target)
    except OSError as error:
        if not (target / last).is_file():  # else another writer was faster
            remedy = f"It is there without {last}: remove it." if target.exists() else "Check the folder and the space on its disk."
            raise StoreError(f"can't write {target}: {reason(error)}. {remedy}") from error


def reason(error: OSError) -> str:
    """What the system said, of a copied tree the first."""
    if isinstance(error, shutil.Error) and error.args and error.args[0]:
        return str(error.args[0][0][2])
    return error.strerror or type(error).__name__


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """The same bytes in as few ranges as possible; neighbours up to JOINED bytes, because they are held together, too."""
    runs: list[Range] = []
    for start, stop in sorted(span for span in ranges if span[1] > span[0]):
        if runs and start <= runs[-1][1] and (stop - runs[-1][0] <= JOINED or start < runs[-1][1]):
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    return runs


def _version(uri: str, objects: Mapping[str, Any]) -> str:
    """A manifest's ETag changes with its content, so a replaced artifact gets a folder of its own."""
    return hashlib.sha256(f"{uri}{objects[MANIFEST]['ETag']}".encode()).hexdigest()[:16]


def _is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def _path(uri: str) -> Path:
    try:
        path = Path(url2pathname(urlparse(uri).path) if uri.startswith("file://") else uri)
        path.exists()
    except (OSError, ValueError) as error:  # too long, not to be looked into, not UTF-8, a host that is none
        raise StoreError(f"{cited(uri)} can't be a folder: {error}. Check the URI.") from error
    return path


def _split(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket or not prefix.strip("/"):
        raise StoreError(f"{cited(uri)} must be s3://bucket/prefix.")
    return bucket, prefix.strip("/")


_making = threading.Lock()  # clients may be used by several threads, but not made by them at once


def _s3() -> Any:
    import boto3
    from botocore.config import Config

    retries = {"max_attempts": 8, "mode": "standard"}  # adaptive: after one 503, 200 requests take 7 s instead of 1
    config = Config(retries=retries, max_pool_connections=8 * AT_ONCE, connect_timeout=10, read_timeout=30)  # seconds of silence
    with _making:
        return boto3.client("s3", config=config)
