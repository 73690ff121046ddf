"""A temporary file for what does not have to stay in memory: finished codes."""

import mmap
import tempfile
import weakref
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from acip.errors import CalibrationError

SEGMENT = 1 << 32  # bytes of the file that are mapped at once: each mapping takes an open file of the process
ALIGNED = 64  # bytes


class Scratch:
    """A temporary file in `folder`. It has no name, so the operating system frees it when the process ends, even if it is killed.

    What is added to it is read through memory mappings: its pages are in memory only while there is room for them. Mappings stay valid
    after this object is gone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.segment, self.start, self.end = memoryview(b""), 0, 0  # the last mapping, its offset in the file, and the end of the content
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from error
        weakref.finalize(self, self.file.close)

    def add(self, parts: Sequence[bytes | memoryview]) -> list[memoryview]:
        """Append `parts` and return them as mapped parts of the file. Raises CalibrationError if the file cannot be written."""
        sizes = [len(part) for part in parts]
        total = sum(sizes)
        try:
            if self.end + total > self.start + len(self.segment):
                self._map(max(total, SEGMENT))
            self.file.seek(self.end)
            for part in parts:
                self.file.write(part)
            self.file.flush()
        except OSError as error:
            raise self._failed(error, total) from error
        mapped = self.segment[self.end - self.start :]
        self.end += -(-total // ALIGNED) * ALIGNED
        return [mapped[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]

    def _map(self, size: int) -> None:
        """Map the next `size` bytes of the file. They take no space on the disk before they are written."""
        self.start = self.end = -(-self.end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self.file.truncate(self.start + size)
        self.segment = memoryview(mmap.mmap(self.file.fileno(), size, offset=self.start))

    def _failed(self, error: OSError, more: int = 0) -> CalibrationError:
        size = f" of {(self.end + more) / 1e9:.2f} GB" if more else ""
        return CalibrationError(
            f"a temporary file{size} cannot be written in {self.folder}: {error.strerror}. "
            "Free space on its disk, or set ACIP_HOME to a folder on a larger one."
        )
