"""Who works on an attempt: leases in the store, so that two submissions of one fleet don't do the same work.

    STORE/.leases/ATTEMPT/1     {"owner": "ann on box-7, process 4711", "mark": "9f...", "beat": 17}

Who made the file with the highest number holds the lease, and only one can make it: the write is conditional (O_EXCL, or If-None-Match
on S3). The owner writes a new beat again and again. Who finds the same beat at `LOOKS` looks, each `beat_s` after the other, takes
the owner for dead and makes the next number. So nobody compares clocks: it counts its own looks, and only those that S3 answered.
An owner that was only stopped finds the higher number at its next beat, and ends.
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

LOOKS = 6
FOLDER = ".leases"  # no model's name begins so


class Leases:
    """Those of this process. Use as a context: inside the beats go on; at its end they are given back.

    `lost` is called, from another thread, with an attempt and who has taken it.
    """

    def __init__(self, store: Store, lease_s: float, lost: Callable[[str, str], Any]) -> None:
        self.store, self.lease_s, self.beat_s, self.lost = store, lease_s, lease_s / LOOKS, lost
        self.owner = f"{_user()} on {socket.gethostname()}, process {os.getpid()}"
        self.mark = secrets.token_hex(8)
        self.held: dict[str, int] = {}  # the number, by attempt
        self.lock = threading.Lock()  # a beat would bring back what is being given back
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
        """Give one back, if we still have it."""
        with self.lock, suppress(StoreError):  # else we will be taken for dead
            number = self.held.pop(attempt, 0)
            for each in sorted(n for n in map(int, self.store.small(f"{FOLDER}/{attempt}")) if n <= number):
                self.store.remove(f"{FOLDER}/{attempt}/{each}")  # ours last

    def claim(self, attempts: Sequence[str], waiting: Callable[[str, str], Any] = lambda attempt, owner: None) -> dict[str, str]:
        """Take the leases of `attempts`; returns who has those that another process holds, by attempt.

        Takes `lease_s` where an owner may be dead; `waiting` is told of each.
        """
        others = {attempt: found for attempt in attempts if (found := self._try(attempt)) is not None}
        for attempt, found in others.items():
            waiting(attempt, found["owner"])
        alive: dict[str, str] = {}
        for look in range(LOOKS):
            if not others:
                break
            time.sleep(self.beat_s)
            for attempt, found in list(others.items()):
                now = self._try(attempt, found if look == LOOKS - 1 else None)
                if now is None:
                    del others[attempt]
                elif now != found:
                    alive[attempt] = now["owner"]
                    del others[attempt]
        return alive

    def _try(self, attempt: str, dead: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Take the lease if it is free, or if what is there is still `dead`; else what is there."""
        found = self._look(attempt)
        if found is None or found == dead:
            number = 1 if found is None else found["number"] + 1
            self.store.create(f"{FOLDER}/{attempt}/{number}", self._content())
            found = self._look(attempt)  # also where the answer was lost on its way
            assert found is not None
        if found["mark"] != self.mark:
            return found
        self.held[attempt] = found["number"]
        return None

    def _look(self, attempt: str) -> dict[str, Any] | None:
        there = self.store.small(f"{FOLDER}/{attempt}")
        if not there:
            return None
        number = max(map(int, there))
        try:
            return {**json.loads(there[str(number)]), "number": number}
        except ValueError:  # it is just being written
            return {"owner": "another process", "mark": "", "beat": 0, "number": number}

    def _content(self) -> bytes:
        return json.dumps({"owner": self.owner, "mark": self.mark, "beat": self.beats}).encode()

    def _beat(self) -> None:
        while not self.ends.wait(self.beat_s):
            self.beats += 1
            for attempt in list(self.held):
                with self.lock, suppress(StoreError):  # while S3 is away nobody can take it, either
                    if (number := self.held.get(attempt)) is None:
                        continue  # given back meanwhile
                    now = self._look(attempt)
                    if now is None or now["mark"] != self.mark:
                        del self.held[attempt]
                        self.lost(attempt, "nobody" if now is None else now["owner"])
                    else:
                        self.store.write(f"{FOLDER}/{attempt}/{number}", self._content())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"
