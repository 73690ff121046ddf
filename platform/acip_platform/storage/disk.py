"""Files and folders on a disk, by path or file:// URI, with the same methods as on S3 (s3.py)."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import url2pathname

from acip.errors import AcipError, cited
from acip.utils.atomic import atomic_file, partial_file

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # errors of file systems without hard links, such as exFAT


class StoreError(AcipError):
    """A URI can't be read or written. The message names the URI and what to check."""


class MissingError(StoreError):
    """A file does not exist."""


class Item(NamedTuple):
    """The properties of a file that a listing returns."""

    bytes: int
    came: float  # time of the last change, in seconds since 1970
    tag: str  # on S3, a tag that changes with the content; on a disk ""


class Disk:
    """Operations on local files and folders. They raise StoreError."""

    def has(self, uri: str) -> bool:
        """Return whether there is a file at `uri`."""
        return path_of(uri).is_file()

    def listed(self, uri: str) -> dict[str, Item]:
        """Return all files under a folder, by relative path. Hidden files and folders are left out: they hold incomplete writes."""
        items, folder = {}, path_of(uri)
        with _store_errors("list", folder):
            for path in folder.rglob("*"):
                name = path.relative_to(folder).as_posix()
                if not name.startswith(".") and "/." not in name:
                    with suppress(FileNotFoundError):  # removed meanwhile
                        if path.is_file():
                            items[name] = Item(path.stat().st_size, path.stat().st_mtime, "")
        return items

    def folders(self, uri: str) -> Iterable[str]:
        """Return the names of everything in a folder, including hidden names."""
        return [path.name for path in path_of(uri).glob("*")]

    def read(self, uri: str) -> bytes:
        """Return the content of a file; MissingError if it does not exist."""
        try:
            return path_of(uri).read_bytes()
        except OSError as error:
            kind = MissingError if isinstance(error, FileNotFoundError) else StoreError
            raise kind(f"can't read {error.filename}: {error.strerror}. Check whether it was moved or deleted.") from error

    def create(self, uri: str, content: bytes) -> bool:
        """Write a new file, atomically where the file system has hard links; return False if it exists already."""
        path = path_of(uri)
        with _store_errors("write", path), partial_file(path) as partial:
            partial.write_bytes(content)
            try:
                os.link(partial, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_HARD_LINKS:
                    raise
                return _create_exclusively(path, content)
        return True

    def write(self, uri: str, content: bytes) -> None:
        """Write or replace a file atomically."""
        path = path_of(uri)
        with _store_errors("write", path), atomic_file(path) as partial:
            partial.write_bytes(content)

    def remove(self, uri: str) -> None:
        """Remove a file. It does not have to exist."""
        with _store_errors("remove", path_of(uri)):
            path_of(uri).unlink(missing_ok=True)

    def remove_folder(self, uri: str) -> None:
        """Remove a folder and its content, as far as possible."""
        shutil.rmtree(path_of(uri), ignore_errors=True)

    def put(self, uri: str, folder: Path, last: str) -> None:
        """Move a local folder to `uri` and replace the incomplete folder that may be there."""
        self.remove_folder(uri)
        self.add(uri, folder, last)

    def add(self, uri: str, folder: Path, last: str) -> None:
        """Move a local folder, complete with its file `last`, to `uri` atomically, also from another file system."""
        target = path_of(uri)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as scratch:
                shutil.move(folder, Path(scratch) / "new")
                (Path(scratch) / "new").rename(target)
        except OSError as error:
            if not (target / last).is_file():  # otherwise another writer has finished first
                remedy = f"It exists without {last}: remove it." if target.exists() else "Check the folder and the space on its disk."
                raise StoreError(f"can't write {target}: {reason(error)}. {remedy}") from error


@contextmanager
def _store_errors(what: str, path: Path) -> Iterator[None]:
    """Raise StoreError for the operating system's errors inside the block."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"can't {what} {path}: {reason(error)}. Check the folder and the space on its disk.") from error


def _create_exclusively(path: Path, content: bytes) -> bool:
    """Write a new file where the file system has no hard links; return False if it exists. Readers may see a part of the content."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)  # otherwise the name could never be created again
        raise
    return True


def reason(error: OSError) -> str:
    """Return the operating system's message. The error of a copied folder holds several; the first is returned."""
    if isinstance(error, shutil.Error) and error.args and error.args[0]:
        return str(error.args[0][0][2])
    return error.strerror or type(error).__name__


def path_of(uri: str) -> Path:
    """Return the path of a path or a file:// URI; StoreError if it can't be one."""
    try:
        path = Path(url2pathname(uri.removeprefix("file://")) if uri.startswith("file:///") else uri)
        path.exists()
    except (OSError, ValueError) as error:  # for example too long, not accessible, or not UTF-8
        raise StoreError(f"{cited(uri)} can't be a folder: {error}. Check the URI.") from error
    return path
