"""Leases in the store: at most one process works on an attempt, even if a fleet is submitted twice.

    STORE/.leases/ATTEMPT/1     {"owner": "ann on box-7, process 4711", "mark": "9f...", "beat": 17}

The creator of the highest-numbered file holds the lease. Creating a file is a conditional write (O_EXCL, or If-None-Match on S3), so
exactly one process succeeds. The owner updates the heartbeat `beat` every `beat_s` seconds. A heartbeat that is unchanged over
`POLLS` polls, `beat_s` seconds apart, means that the owner died; another process then creates the next number. No clocks are compared:
each process counts its own polls, and only those that S3 answered. An owner that was only suspended finds the higher number at its
next heartbeat, and stops.
"""

import getpass
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

from acip_platform.storage.store import Store, StoreError

POLLS = 6  # polls with an unchanged heartbeat until a lease expires
FOLDER = ".leases"  # names of models do not begin with a dot


class Leases:
    """The leases of this process. A context manager: it sends heartbeats inside the block and releases all leases at the end.

    When a lease is lost, `lost` is called with the attempt and its new owner, from another thread.
    """

    def __init__(self, store: Store, lease_s: float, lost: Callable[[str, str], Any]) -> None:
        self.store, self.lease_s, self.beat_s, self.lost = store, lease_s, lease_s / POLLS, lost
        self.owner = f"{_user()} on {socket.gethostname()}, process {os.getpid()}"
        self.mark = secrets.token_hex(8)
        self.held: dict[str, int] = {}  # attempt -> number of the lease
        self.lock = threading.Lock()  # otherwise a heartbeat could recreate a lease while it is released
        self.beats = 0
        self.ends = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True, name="leases")

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.set()
        self.thread.join()
        for attempt in list(self.held):
            self.release(attempt)

    def release(self, attempt: str) -> None:
        """Release the lease of `attempt` if this process holds it."""
        with self.lock, suppress(StoreError):  # a lease that can't be removed expires
            number = self.held.pop(attempt, 0)
            for each in sorted(n for n in map(int, self.store.small(f"{FOLDER}/{attempt}")) if n <= number):
                self.store.remove(f"{FOLDER}/{attempt}/{each}")  # this process' own file last

    def claim(self, attempts: Sequence[str], waiting: Callable[[str, str], Any] = lambda attempt, owner: None) -> dict[str, str]:
        """Take the leases of `attempts`. Return attempt -> owner for those that another live process holds.

        This takes up to `lease_s` seconds if a lease has an owner that may have died; `waiting` is called with each of them before.
        """
        others = {attempt: lease for attempt in attempts if (lease := self._take(attempt)) is not None}
        for attempt, lease in others.items():
            waiting(attempt, lease["owner"])
        alive: dict[str, str] = {}
        for poll in range(POLLS):
            if not others:
                break
            time.sleep(self.beat_s)
            for attempt, lease in list(others.items()):
                current = self._take(attempt, lease if poll == POLLS - 1 else None)
                if current is None:
                    del others[attempt]
                elif current != lease:
                    alive[attempt] = current["owner"]
                    del others[attempt]
        return alive

    def _take(self, attempt: str, dead: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Take the lease if it is free or still equal to `dead`, and return None; else return the present lease."""
        lease = self._read(attempt)
        if lease is None or lease == dead:
            number = 1 if lease is None else lease["number"] + 1
            self.store.create(f"{FOLDER}/{attempt}/{number}", self._content())
            lease = self._read(attempt)  # the result of `create` is wrong if S3's response was lost
            assert lease is not None
        if lease["mark"] != self.mark:
            return lease
        self.held[attempt] = lease["number"]
        return None

    def _read(self, attempt: str) -> dict[str, Any] | None:
        """Return the present lease of `attempt`, with its number; None if there is none."""
        files = self.store.small(f"{FOLDER}/{attempt}")
        if not files:
            return None
        number = max(map(int, files))
        try:
            return {**json.loads(files[str(number)]), "number": number}
        except ValueError:  # the file is being written, on a file system where files do not appear whole
            return {"owner": "another process", "mark": "", "beat": 0, "number": number}

    def _content(self) -> bytes:
        return json.dumps({"owner": self.owner, "mark": self.mark, "beat": self.beats}).encode()

    def _beat(self) -> None:
        """Send heartbeats until the end of the block, and notice leases that another process has taken."""
        while not self.ends.wait(self.beat_s):
            self.beats += 1
            for attempt in list(self.held):
                with self.lock, suppress(StoreError):  # while S3 does not answer, no other process can take the lease either
                    if (number := self.held.get(attempt)) is None:
                        continue  # released meanwhile
                    lease = self._read(attempt)
                    if lease is None or lease["mark"] != self.mark:
                        del self.held[attempt]
                        self.lost(attempt, "nobody" if lease is None else lease["owner"])
                    else:
                        self.store.write(f"{FOLDER}/{attempt}/{number}", self._content())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user ID has no name, as in some containers
        return f"user {os.getuid()}"
