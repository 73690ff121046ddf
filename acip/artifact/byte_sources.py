"""Where an artifact's bytes come from: files by name, of which pieces are read.

A folder maps its files into memory, so that nothing is read before it is used. Other places (S3) are the
platform's: they bring a `Source` of their own, whose bytes are compared with their checksums.
"""

import errno
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from acip.errors import ArtifactError

NORESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which the module doesn't name
Range = tuple[int, int]  # the first byte, and the one after the last


class Source(Protocol):
    where: str  # for messages
    checked: bool  # whether what is read is compared with its checksum

    def size(self, file: str) -> int:
        """Bytes of a file; ArtifactError where there is none."""
        ...

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        """The bytes of each range, in their order."""
        ...


class Folder:
    """A local folder. Its bytes are the page cache's, shared by all who read them."""

    def __init__(self, folder: Path, checked: bool = False) -> None:
        self.folder, self.where, self.checked = folder, str(folder), checked

    def size(self, file: str) -> int:
        try:
            return (self.folder / file).stat().st_size
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{self.folder / file} is missing: {error}. Fetch the artifact again.") from error

    def read(self, file: str, ranges: Sequence[Range]) -> list[memoryview]:
        try:
            with (self.folder / file).open("rb") as opened:
                # writable, because torch knows no other tensors, and private: one mapping for each read, so that who trains what
                # came of one changes nobody else's. Nothing is reserved for it: files may be larger than memory
                kind = {"flags": mmap.MAP_PRIVATE | NORESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
                mapped = memoryview(mmap.mmap(opened.fileno(), 0, **kind))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # nothing is wrong with the file: another process may have room
                raise MemoryError(f"{self.folder / file} can't be mapped: this process may not have more memory.") from error
            raise ArtifactError(f"{self.folder / file} can't be read: {error}. Fetch the artifact again.") from error
        return [mapped[start:stop] for start, stop in ranges]
