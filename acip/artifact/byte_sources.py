"""Sources of an artifact's bytes: files by name, read by byte ranges.

`Folder` maps local files into memory, so nothing is read from disk before it is used. The platform adds sources of its own, for
example for S3; the bytes of those are compared with their checksums.
"""

import errno
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from acip.errors import ArtifactError

NORESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which the module mmap does not define
Range = tuple[int, int]  # the first byte, and the byte after the last


class Source(Protocol):
    """A place that an artifact is read from."""

    where: str  # names the place in messages
    checked: bool  # whether bytes are compared with their checksums when they are read

    def size(self, file: str) -> int:
        """Return the size of a file in bytes. Raise ArtifactError if there is no such file."""
        ...

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        """Return the bytes of each range, in the order of `ranges`."""
        ...


class Folder:
    """A local folder. Its bytes are in the page cache, shared by all processes that read them."""

    def __init__(self, folder: Path, checked: bool = False) -> None:
        self.folder, self.where, self.checked = folder, str(folder), checked

    def size(self, file: str) -> int:
        """Return the size of a file in bytes. Raise ArtifactError if there is no such file."""
        try:
            return (self.folder / file).stat().st_size
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{self.folder / file} is missing: {error}. Fetch the artifact again.") from error

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        """Return the bytes of each range, in the order of `ranges`, as views of one new mapping of the file."""
        try:
            with (self.folder / file).open("rb") as opened:
                # Writable, because torch supports no read-only tensors. Private, one mapping per read, so that training tensors of
                # one read changes no others. No memory is reserved, because files may be larger than memory.
                kind = {"flags": mmap.MAP_PRIVATE | NORESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
                mapped = memoryview(mmap.mmap(opened.fileno(), 0, **kind))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # the file is intact; another process may have memory
                raise MemoryError(f"{self.folder / file} can't be mapped: the memory limit of this process is reached.") from error
            raise ArtifactError(f"{self.folder / file} can't be read: {error}. Fetch the artifact again.") from error
        return [mapped[start:stop] for start, stop in ranges]
