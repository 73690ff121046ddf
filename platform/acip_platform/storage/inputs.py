"""What users name: paths as the submitter means them, and the content behind them.

resolved("base")          /home/me/work/base        relative paths and ~ are the submitter's; tasks have folders of their own
resolved("file:///a%20b") /a b
resolved("org/name")      org/name                  not here: a name on the hub, or of a text that ships with acip
identity("/home/me/base") sha256:...                equal content is equal, wherever it lies
"""

import functools
import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from acip.base import is_there, local_path
from acip.data import HUB
from acip.errors import AcipError
from acip_platform.settings import Settings
from acip_platform.storage.disk import path_of

WORTH_KEEPING = 64 << 20  # bytes of a file whose digest is remembered on disk


def resolved(source: str) -> str:
    """Return the absolute path of a file or folder that `source` names for the submitter; other names as they are.

    Call it where a job is submitted, on every path that a user wrote. What is written as a path (~, ./, ../) is one also where
    nothing is there, so that an error shows the whole path. AcipError for a file: URI that names none.
    """
    if source in HUB or source.startswith("package:"):
        return source
    if source.startswith("file:"):
        if not source.startswith("file:///"):
            raise AcipError(f"{source!r} is not a URI of a local file; it must be file:///folder, or a path.")
        return str(path_of(source))
    path = Path(source)
    if source.startswith("~"):
        with suppress(RuntimeError):  # there is no such user
            path = path.expanduser()
    if source.startswith(("~", "./", "../", "/")) or (source and is_there(path)):
        return str(path.resolve())
    return source


def placed(uri: str) -> str:
    """Return the URI of an artifact that a user wrote, a path as the submitter means it."""
    return uri if "://" in uri else str(Path(resolved(uri)).resolve())


def identity(source: str) -> str:
    """Return what tells the content of `source` from any other: a digest where it is here, else its name."""
    path = local_path(source)
    return source if path is None else f"sha256:{content(path)}"


def content(path: Path) -> str:
    """sha256 of a file, or of all files in a folder with their names; hidden ones and compiled Python aside.

    A file's digest is kept as long as its size and times stay the same.
    """
    if path.is_file():
        return _file_digest(path)
    sha = hashlib.sha256()
    for file in _files(path):
        sha.update(f"{file.relative_to(path).as_posix()}\n{_file_digest(file)}\n".encode("utf-8", "surrogateescape"))
    return sha.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
            yield path


def _file_digest(path: Path) -> str:
    try:
        facts = path.stat()
        return _digest(str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)
    except OSError as error:
        raise AcipError(f"{path} can't be read: {error.strerror}. Check the file and who may read it.") from error


@functools.lru_cache(maxsize=4096)
def _digest(path: str, size: int, *times: int) -> str:
    """The digest of a file of this size and these times; that of a large one is remembered in ACIP_HOME."""
    key = hashlib.sha256(json.dumps([path, size, *times]).encode()).hexdigest()
    kept = Settings.from_env().home / "cache" / "digests" / key
    if size >= WORTH_KEEPING:
        with suppress(OSError):
            if len(found := kept.read_text(encoding="ascii")) == 64:
                return found
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if size >= WORTH_KEEPING:
        partial = kept.with_name(f"{key}.{secrets.token_hex(4)}")
        with suppress(OSError):  # then it is computed again
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(digest, encoding="ascii")
            partial.replace(kept)
    return digest
