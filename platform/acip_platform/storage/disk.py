"""Files and folders on a disk, by path or file:// URI: the same verbs as on S3 (s3.py)."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

from acip.errors import AcipError, cited


class StoreError(AcipError):
    """A URI that can't be read or written. Says which, and what to check."""


class MissingError(StoreError):
    """There is no such file."""


class Item(NamedTuple):
    """What is known of a file without reading it."""

    bytes: int
    came: float  # seconds since 1970
    tag: str  # changes with its content, on S3


class Disk:
    def has(self, uri: str) -> bool:
        return path_of(uri).is_file()

    def listed(self, uri: str) -> dict[str, Item]:
        """The files under a folder, by name; not those on their way, which are in hidden folders."""
        found, folder = {}, path_of(uri)
        with told("list", folder):
            for path in folder.rglob("*"):
                name = path.relative_to(folder).as_posix()
                if not name.startswith(".") and "/." not in name:
                    with suppress(FileNotFoundError):  # it went meanwhile
                        if path.is_file():
                            found[name] = Item(path.stat().st_size, path.stat().st_mtime, "")
        return found

    def folders(self, uri: str) -> Iterable[str]:
        """Names in a folder, hidden ones too."""
        return [path.name for path in path_of(uri).glob("*")]

    def read(self, uri: str) -> bytes:
        try:
            return path_of(uri).read_bytes()
        except OSError as error:
            kind = MissingError if isinstance(error, FileNotFoundError) else StoreError
            raise kind(f"can't read {error.filename}: {error.strerror}. Was it moved or deleted?") from error

    def create(self, uri: str, content: bytes) -> bool:
        path = path_of(uri)
        with told("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = path.open("xb")
            except FileExistsError:
                return False
            try:
                with file:
                    file.write(content)
            except OSError:
                path.unlink(missing_ok=True)  # nobody else could make it any more
                raise
        return True

    def write(self, uri: str, content: bytes) -> None:
        path = path_of(uri)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with told("write", path):
            try:
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def remove(self, uri: str) -> None:
        with told("remove", path_of(uri)):
            path_of(uri).unlink(missing_ok=True)

    def remove_folder(self, uri: str) -> None:
        shutil.rmtree(path_of(uri), ignore_errors=True)

    def put(self, uri: str, folder: Path, last: str) -> None:
        self.remove_folder(uri)  # remains of a broken attempt
        self.add(uri, folder, last)

    def add(self, uri: str, folder: Path, last: str) -> None:
        """From another file system perhaps; it is there at once or not at all."""
        target = path_of(uri)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as aside:
                shutil.move(folder, Path(aside) / "new")
                (Path(aside) / "new").rename(target)
        except OSError as error:
            if not (target / last).is_file():  # else another writer was faster
                remedy = f"It is there without {last}: remove it." if target.exists() else "Check the folder and the space on its disk."
                raise StoreError(f"can't write {target}: {reason(error)}. {remedy}") from error


@contextmanager
def told(what: str, path: Path) -> Iterator[None]:
    """The system's errors as ours."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"can't {what} {path}: {reason(error)}. Check the folder and the space on its disk.") from error


def reason(error: OSError) -> str:
    """What the system said, of a copied tree the first."""
    if isinstance(error, shutil.Error) and error.args and error.args[0]:
        return str(error.args[0][0][2])
    return error.strerror or type(error).__name__


def path_of(uri: str) -> Path:
    try:
        path = Path(url2pathname(urlparse(uri).path) if uri.startswith("file://") else uri)
        path.exists()
    except (OSError, ValueError) as error:  # too long, not to be looked into, not UTF-8, a host that is none
        raise StoreError(f"{cited(uri)} can't be a folder: {error}. Check the URI.") from error
    return path
