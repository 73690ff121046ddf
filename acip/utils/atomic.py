"""Files that appear whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".partial"  # of files that are being written, or that a killed process left behind


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Yield a hidden, unused path beside `path` for new content, and remove the file there at the end of the block.

    The caller writes the file and gives it its name, for example with `Path.replace`. The folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{SUFFIX}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; if the block succeeds, the file there atomically replaces `path`, durable on the disk."""
    with partial_file(path) as partial:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
