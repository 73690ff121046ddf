"""The checkpoints of one attempt: written whole or not at all, and the newest sound one is gone on from.

    state -> a temporary folder -> RUNS/ATTEMPT/step_000123-4f2a, of which the last two are kept

They are ours and not Ray Train's, whose list is written by its controller, seconds later, in a file that can't be read half written or
by another version of Ray, and whose failing upload ends the run. Here a checkpoint counts as soon as it is there, a damaged one is
passed over, and one that can't be written is tried again at the next turn.
"""

import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from acip.calibration.state import SUMS, CalibrationState, damage
from acip.layers import sharding
from acip_platform.settings import Settings
from acip_platform.storage.disk import StoreError, reason
from acip_platform.storage.store import Store

KEPT = 2
Emit = Callable[..., None]


class Checkpoints:
    def __init__(self, settings: Settings, attempt: str, say: Emit = lambda kind, **facts: None) -> None:
        self.store, self.attempt, self.say = Store(settings.runs, settings.home / "cache"), attempt, say
        self.every_s = settings.checkpoint_s
        self.damaged: set[str] = set()

    def write(self, state: CalibrationState) -> bool:
        """Whether it could be. What is in the way is said; a calibration is worth more than one checkpoint of it."""
        name = f"step_{state.step:06d}-{secrets.token_hex(2)}"  # a damaged one of the same step stays apart
        try:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / name
                folder.mkdir()
                state.save(folder)
                self.store.add(folder, f"{self.attempt}/{name}", SUMS)
            sound = [name for name in self.names() if name not in self.damaged]
            self.store.keep_only(self.attempt, sound[:KEPT], "step_")
        except (StoreError, SafetensorError, OSError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            self.say("stage", text=f"no checkpoint of step {state.step}: {why}")
            return False
        return True

    def names(self) -> list[str]:
        """Complete ones, the newest first."""
        there = (uri.rpartition("/")[2] for uri in self.store.complete(self.attempt, SUMS))
        return sorted((name for name in there if re.match(r"step_\d", name)), reverse=True)

    @contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The files of the newest that is as it was written, while inside; None if there is none. The same on every worker."""
        for name in sharding.from_first(self.names()):
            with self.store.folder(self.store.uri(f"{self.attempt}/{name}")) as folder:
                faults = [fault for fault in sharding.from_all(damage(folder)) if fault]
                if not faults:
                    yield folder
                    return
                self.damaged.add(name)
                self.say("stage", text=f"checkpoint {name} is damaged ({faults[0]}): going back to the one before")
        yield None
