"""Folders by URI: a local path, file://, or s3://bucket/prefix (disk.py, s3.py).

An artifact is complete when its manifest is there, so the manifest is moved last, in both directions. Other folders have
another last file (an export: its provenance).
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
from acip_platform.storage.s3 import FILES_AT_ONCE, S3, S3Source, split

__all__ = ["Store", "StoreError"]


class Store:
    """`root` is a folder or s3://bucket/prefix; `cache` is a local folder for what is fetched from S3. StoreError for what fails."""

    def __init__(self, root: str, cache: Path) -> None:
        self.root = root.rstrip("/")
        self.cache = cache

    @classmethod
    def of(cls, settings: Settings) -> "Store":
        """Where the artifacts are."""
        return cls(settings.store, settings.home / "cache")

    def uri(self, key: str) -> str:
        return f"{self.root}/{key}"

    # ---- folders

    def exists(self, uri: str, last: str = MANIFEST) -> bool:
        """Is there a complete artifact at `uri`, or a complete folder of another kind, whose last file is `last`?"""
        return _place(uri).has(f"{uri}/{last}")

    def complete(self, under: str, last: str) -> dict[str, float]:
        """Folders anywhere under the key `under` that have their file `last`: by URI, when it came (seconds since 1970)."""
        root = self.uri(under)
        files = _place(root).listed(root).items()
        return {f"{root}/{name.removesuffix(f'/{last}')}": item.came for name, item in files if name.endswith(f"/{last}")}

    def put(self, folder: Path, key: str) -> str:
        """Move an artifact into the store under `key`, at once or not at all; returns its URI. Remains of a broken attempt go.

        What is complete stays. Of writers at once on S3 one wins, the others are told.
        """
        return self._moved(folder, key, MANIFEST, unique=False)

    def add(self, folder: Path, key: str, last: str) -> str:
        """Move a local folder, complete with its file `last`, to where only the same is ever written; returns its URI.

        The key holds a checksum of the content. So nothing is replaced, and writers of the same at once do no harm.
        """
        return self._moved(folder, key, last, unique=True)

    def _moved(self, folder: Path, key: str, last: str, unique: bool) -> str:
        uri = self.uri(key)
        if self.exists(uri, last):
            shutil.rmtree(folder)
        else:
            (_place(uri).add if unique else _place(uri).put)(uri, folder, last)
        return uri

    def keep_only(self, under: str, names: Collection[str], prefix: str) -> None:
        """Delete the folders in the key `under` whose names begin with `prefix` and aren't in `names`; remains of broken ones, too."""
        root = self.uri(under)
        for name in _place(root).folders(root):
            if name.lstrip(".").startswith(prefix) and name not in names:
                _place(root).remove_folder(f"{root}/{name}")

    @contextmanager
    def folder(self, uri: str) -> Iterator[Path]:
        """The files of any folder, while inside: the folder itself if it is local, else copies. They aren't checked."""
        place = _place(uri)
        if isinstance(place, Disk):
            yield path_of(uri)
            return
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / uri.rpartition("/")[2]
            place.download(uri, place.listed(uri), copy)
            yield copy

    def source(self, uri: str) -> tuple[Source, dict[str, int]]:
        """The files of any folder, to be read in pieces, and the bytes of each. What is read isn't checked."""
        place = _place(uri)
        listed = place.listed(uri)
        sizes = {name: item.bytes for name, item in listed.items()}
        return Folder(path_of(uri)) if isinstance(place, Disk) else S3Source(uri, listed), sizes

    # ---- artifacts

    def open(self, uri: str) -> Artifact:
        """The artifact at `uri`, of which only what is used is read: mapped into memory, or by ranged requests."""
        if isinstance(_place(uri), Disk):
            return Artifact.open(self.fetch(uri))
        objects = _objects(uri)
        return Artifact.open(self.cache / f"{_version(uri, objects)}-parts", S3Source(uri, objects))

    def fetch(self, uri: str) -> Path:
        """A local folder with the artifact at `uri`: itself if it is local, else a cached and verified download."""
        place = _place(uri)
        if isinstance(place, Disk):
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
        with FileLock(f"{folder}.lock"):  # of those on this node, one fetches it
            if (folder / MANIFEST).is_file():  # only its curve may be another by now
                Disk().write(f"{folder}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
            else:
                with tempfile.TemporaryDirectory(prefix="coming-", dir=self.cache, ignore_cleanup_errors=True) as scratch:
                    coming = Path(scratch) / "artifact"
                    place.download(uri, files, coming)
                    Artifact.open(coming, verify=True)
                    shutil.rmtree(folder, ignore_errors=True)
                    coming.rename(folder)
        return folder

    def record_curve(self, uri: str, artifact: Artifact, rows: list[dict[str, Any]]) -> Artifact:
        """Put a measured curve into the manifest of the artifact at `uri`; nothing but the manifest has to travel."""
        manifest = {**artifact.manifest, "curve": rows}
        _place(uri).write(f"{uri}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        return dataclasses.replace(artifact, manifest=manifest)

    # ---- small files

    def read(self, uris: Sequence[str]) -> list[bytes]:
        """Their content, whole."""
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            return list(pool.map(lambda uri: _place(uri).read(uri), uris))

    def small(self, under: str) -> dict[str, bytes]:
        """The small files in the key `under`, by name. What goes meanwhile isn't there."""
        there, root = {}, self.uri(under)
        for name in _place(root).listed(root):
            with suppress(MissingError):
                there[name] = _place(root).read(f"{root}/{name}")
        return there

    def create(self, key: str, content: bytes) -> bool:
        """Write one where nothing is; of several writers at once, one is told True."""
        return _place(self.uri(key)).create(self.uri(key), content)

    def write(self, key: str, content: bytes) -> None:
        """Write or replace one, at once or not at all."""
        _place(self.uri(key)).write(self.uri(key), content)

    def remove(self, key: str) -> None:
        _place(self.uri(key)).remove(self.uri(key))


def _place(uri: str) -> Disk | S3:
    if not uri.startswith("s3://"):
        if "://" in uri and not uri.startswith("file://"):
            raise StoreError(f"{uri} is at a place that is not known here; allowed: a folder, file:///folder, or s3://bucket/prefix.")
        return Disk()
    split(uri)  # an artifact has a prefix of its own: a bucket alone is refused
    return S3()


def _objects(uri: str) -> dict[str, Item]:
    """What S3 lists under an artifact's URI, by file."""
    objects = S3().listed(uri)
    if MANIFEST not in objects:
        raise StoreError(f"there is no complete artifact at {uri}: no {MANIFEST}. Check the URI and the credentials.")
    return objects


def _version(uri: str, objects: Mapping[str, Item]) -> str:
    """A manifest's tag changes with its content, so a replaced artifact gets a folder of its own."""
    return hashlib.sha256(f"{uri}{objects[MANIFEST].tag}".encode()).hexdigest()[:16]
