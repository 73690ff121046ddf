"""The memory allocator of the C library."""

import ctypes
import sys

MMAP_THRESHOLD = -3  # the number of this parameter in glibc's malloc.h
LEAST_BYTES = 1 << 20

# Environment of a process whose allocator asks for huge pages, where the system has them on request ("madvise"). The C library reads it
# when the process starts. On a CPU, products with one to six rows then take 0.65 to 0.95 of their time, as fewer addresses are looked up.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def return_freed_memory() -> None:
    """Return every freed piece of `LEAST_BYTES` or more to the operating system at once, from now on.

    By default, glibc keeps freed pieces of up to 32 MB. After many tensors of different sizes, a process may hold a multiple of the memory
    that it uses. Returning costs time, so call this where memory is short. Other C libraries are not changed.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MMAP_THRESHOLD, LEAST_BYTES)


def trim() -> None:
    """Return the memory that has been freed so far to the operating system. glibc keeps most of it otherwise."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)
