"""The environment of a replica, which a benchmark of the engine enters before it imports torch."""

import os
import sys

from acip.utils.malloc import HUGE_PAGES


def enter() -> None:
    """Start this program again with huge pages, unless it has them: the C library reads the environment when a process starts."""
    if not HUGE_PAGES.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | HUGE_PAGES)
