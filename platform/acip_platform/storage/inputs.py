"""The inputs of a job: paths made absolute where the job is submitted, and digests of their content.

resolved("base")          /home/me/base             relative paths and ~ belong to the submitter; tasks run in other folders
resolved("file:///a%20b") /a b
resolved("org/name")      org/name                  if there is no such file: a name on the hub, or of a text that ships with acip
identity("/home/me/base") sha256:...                equal content has the same identity at every path
identity("s3://b/base")   s3:...                    from the names, sizes and tags of its files
"""

import functools
import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from acip.base import is_there, local_path
from acip.data import HUB, SELF
from acip.errors import AcipError
from acip_platform.settings import Settings
from acip_platform.storage.base_models import is_on_s3, version
from acip_platform.storage.disk import path_of

CACHED_FROM_BYTES = 64 << 20  # digests of files of at least this size are cached on disk


def resolved(source: str) -> str:
    """Return the absolute path if `source` is a file or folder, else `source` unchanged.

    Call it where a job is submitted, for every path that a user wrote. A source that begins with ~, ./, ../ or / is a path even if
    nothing exists there, so that errors show the whole path. AcipError for a file: URI that is not of the form file:///path.
    """
    if source in HUB or source == SELF or source.startswith("package:"):
        return source
    if source.startswith("file:"):
        if not source.startswith("file:///"):
            raise AcipError(f"{source!r} is not a URI of a local file; use file:///path, or a path.")
        return str(path_of(source))
    path = Path(source)
    if source.startswith("~"):
        with suppress(RuntimeError):  # the user in ~user does not exist
            path = path.expanduser()
    if source.startswith(("~", "./", "../", "/")) or (source and is_there(path)):
        return str(path.resolve())
    return source


def placed(uri: str) -> str:
    """Return the URI of an artifact that a user wrote. A path becomes absolute."""
    return uri if "://" in uri else str(Path(resolved(uri)).resolve())


def identity(source: str) -> str:
    """Return an identifier of the content of `source`: a digest if it is a local file or folder or a base model on S3, else its name."""
    if is_on_s3(source):
        return f"s3:{version(source)}"
    path = local_path(source)
    return source if path is None else f"sha256:{content(path)}"


def content(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files in a folder and their names, without hidden files and __pycache__.

    The digest of a file is cached until its size, times or inode change.
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
        raise AcipError(f"{path} can't be read: {error.strerror}. Check the file and its permissions.") from error


@functools.lru_cache(maxsize=4096)
def _digest(path: str, size: int, *times: int) -> str:
    """Return the digest of a file with this size and these times. The digests of large files are cached in ACIP_HOME."""
    key = hashlib.sha256(json.dumps([path, size, *times]).encode()).hexdigest()
    cached = Settings.from_env().home / "cache" / "digests" / key
    if size >= CACHED_FROM_BYTES:
        with suppress(OSError):
            if len(digest := cached.read_text(encoding="ascii")) == 64:
                return digest
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if size >= CACHED_FROM_BYTES:
        partial = cached.with_name(f"{key}.{secrets.token_hex(4)}")
        with suppress(OSError):  # without the cache it is computed again
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(digest, encoding="ascii")
            partial.replace(cached)
    return digest
