"""Folders and small files by URI: a local path, file:// or s3://bucket/prefix (disk.py, s3.py).

A folder is complete when its last file exists, so that file is moved last in both directions. The last file of an artifact is its
manifest; that of an export is its provenance.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from acip.artifact.artifact import Artifact
from acip.artifact.byte_sources import Folder, Source
from acip.artifact.manifest import MANIFEST
from acip_platform.settings import Settings
from acip_platform.storage.disk import Disk, Item, MissingError, StoreError, path_of
from acip_platform.storage.s3 import PARALLEL_FILES, S3, S3Source, split

__all__ = ["Store", "StoreError"]


class Store:
    """Storage below `root`, a folder or s3://bucket/prefix. Failed operations raise StoreError.

    `cache` is a local folder for files that were fetched from S3. A key is a path below `root`.
    """

    def __init__(self, root: str, cache: Path) -> None:
        self.root = root.rstrip("/")
        self.cache = cache

    @classmethod
    def of(cls, settings: Settings) -> "Store":
        """Return the store of artifacts."""
        return cls(settings.store, settings.home / "cache")

    def uri(self, key: str) -> str:
        """Return the URI of a key."""
        return f"{self.root}/{key}"

    # ---- folders

    def exists(self, uri: str, last: str = MANIFEST) -> bool:
        """Return whether there is a complete folder at `uri`: one that holds the file `last`. By default the folder is an artifact."""
        return _backend(uri).has(f"{uri}/{last}")

    def complete(self, under: str, last: str) -> dict[str, float]:
        """Return the complete folders at any depth below the key `under`: URI -> time of the file `last`, in seconds since 1970."""
        root = self.uri(under)
        files = _backend(root).listed(root).items()
        return {f"{root}/{name.removesuffix(f'/{last}')}": item.came for name, item in files if name.endswith(f"/{last}")}

    def put(self, folder: Path, key: str) -> str:
        """Move an artifact to `key` atomically and return its URI. An incomplete artifact there is replaced, a complete one is kept.

        If several processes write to the same key on S3, one succeeds and the others raise StoreError.
        """
        return self._moved(folder, key, MANIFEST, unique=False)

    def add(self, folder: Path, key: str, last: str) -> str:
        """Move a local folder, complete with its file `last`, to `key` and return its URI.

        The key must contain a checksum of the content. Concurrent writers then write the same content, and nothing is replaced.
        """
        return self._moved(folder, key, last, unique=True)

    def _moved(self, folder: Path, key: str, last: str, unique: bool) -> str:
        uri = self.uri(key)
        if self.exists(uri, last):
            shutil.rmtree(folder)
        else:
            (_backend(uri).add if unique else _backend(uri).put)(uri, folder, last)
        return uri

    def keep_only(self, under: str, names: Collection[str], prefix: str) -> None:
        """Delete the folders below the key `under` whose names begin with `prefix` and are not in `names`, including incomplete ones."""
        root = self.uri(under)
        for name in _backend(root).folders(root):
            if name.lstrip(".").startswith(prefix) and name not in names:
                _backend(root).remove_folder(f"{root}/{name}")

    @contextmanager
    def folder(self, uri: str) -> Iterator[Path]:
        """Yield a local folder with the files at `uri`: the folder itself, or a temporary copy. No checksums are verified."""
        backend = _backend(uri)
        if isinstance(backend, Disk):
            yield path_of(uri)
            return
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / uri.rpartition("/")[2]
            backend.download(uri, backend.listed(uri), copy)
            yield copy

    def source(self, uri: str) -> tuple[Source, dict[str, int]]:
        """Return a source that reads parts of the files at `uri`, and the size of each file in bytes. No checksums are verified."""
        backend = _backend(uri)
        listed = backend.listed(uri)
        sizes = {name: item.bytes for name, item in listed.items()}
        return Folder(path_of(uri)) if isinstance(backend, Disk) else S3Source(uri, listed), sizes

    # ---- artifacts

    def open(self, uri: str) -> Artifact:
        """Open the artifact at `uri`. Only the parts that are used are read, by memory mapping or ranged requests."""
        if isinstance(_backend(uri), Disk):
            return Artifact.open(self.fetch(uri))
        objects = _objects(uri)
        return Artifact.open(self.cache / f"{_version(uri, objects)}-parts", S3Source(uri, objects))

    def fetch(self, uri: str) -> Path:
        """Return a local folder with the artifact at `uri`: the folder itself, or a cached and verified download."""
        backend = _backend(uri)
        if isinstance(backend, Disk):
            path = path_of(uri)
            if not path.is_dir():
                raise StoreError(
                    f"there is no folder {path}. Was the artifact moved or deleted? Calibrate again, or check ACIP_ARTIFACT_URI."
                )
            return path
        manifest = self.open(uri).manifest
        files = [MANIFEST, *manifest["files"]]
        folder = self.cache / hashlib.sha256(f"{uri}{json.dumps(manifest['files'], sort_keys=True)}".encode()).hexdigest()[:16]
        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # one process on a node downloads it
            if (folder / MANIFEST).is_file():  # only the curve in the manifest may have changed
                Disk().write(f"{folder}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
            else:
                with tempfile.TemporaryDirectory(prefix="coming-", dir=self.cache, ignore_cleanup_errors=True) as scratch:
                    download = Path(scratch) / "artifact"
                    backend.download(uri, files, download)
                    Artifact.open(download, verify=True)
                    shutil.rmtree(folder, ignore_errors=True)
                    download.rename(folder)
        return folder

    def record_curve(self, uri: str, artifact: Artifact, rows: list[dict[str, Any]]) -> Artifact:
        """Store a measured curve in the manifest of the artifact at `uri`. Only the manifest is written."""
        manifest = {**artifact.manifest, "curve": rows}
        _backend(uri).write(f"{uri}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        return dataclasses.replace(artifact, manifest=manifest)

    # ---- small files

    def read(self, uris: Sequence[str]) -> list[bytes]:
        """Return the content of each file."""
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            return list(pool.map(lambda uri: _backend(uri).read(uri), uris))

    def small(self, under: str) -> dict[str, bytes]:
        """Return the content of all files below the key `under`, by name. Files that are removed meanwhile are left out."""
        contents, root = {}, self.uri(under)
        for name in _backend(root).listed(root):
            with suppress(MissingError):
                contents[name] = _backend(root).read(f"{root}/{name}")
        return contents

    def create(self, key: str, content: bytes) -> bool:
        """Write a new file; return False if it exists already. Of several concurrent writers, one gets True."""
        return _backend(self.uri(key)).create(self.uri(key), content)

    def write(self, key: str, content: bytes) -> None:
        """Write or replace a file atomically."""
        _backend(self.uri(key)).write(self.uri(key), content)

    def remove(self, key: str) -> None:
        """Remove a file. It does not have to exist."""
        _backend(self.uri(key)).remove(self.uri(key))


def _backend(uri: str) -> Disk | S3:
    if not uri.startswith("s3://"):
        if "://" in uri and not uri.startswith("file:///"):
            raise StoreError(f"{uri} is not supported; allowed: a folder, file:///folder, or s3://bucket/prefix.")
        return Disk()
    split(uri)  # raises for a bucket without a prefix
    return S3()


def _objects(uri: str) -> dict[str, Item]:
    """Return the listing of an artifact on S3, by file name; StoreError if it is not complete."""
    objects = S3().listed(uri)
    if MANIFEST not in objects:
        raise StoreError(f"there is no complete artifact at {uri}: no {MANIFEST}. Check the URI and the credentials.")
    return objects


def _version(uri: str, objects: Mapping[str, Item]) -> str:
    """Return an identifier of an artifact's content. The tag of its manifest changes when the artifact is replaced."""
    return hashlib.sha256(f"{uri}{objects[MANIFEST].tag}".encode()).hexdigest()[:16]
