"""Checkpoints used to resume one attempt. Writes are atomic, and the newest intact checkpoint is used.

    state -> a temporary folder -> RUNS/ATTEMPT/step_000123-4f2a; the last two are kept

Ray Train's own checkpoints are not used, for three reasons. Its controller lists a checkpoint seconds after it was written. The list
is one file that can't be read when it is incomplete or was written by another version of Ray. A failed upload ends the run.
Here, a checkpoint is valid as soon as its last file exists, a damaged checkpoint is skipped, and a failed write is repeated at the
next interval.
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
    """The checkpoints of one attempt. Problems are reported with `emit`."""

    def __init__(self, settings: Settings, attempt: str, emit: Emit = lambda kind, **facts: None) -> None:
        self.store, self.attempt, self.emit = Store(settings.runs, settings.home / "cache"), attempt, emit
        self.every_s = settings.checkpoint_s
        self.damaged: set[str] = set()

    def write(self, state: CalibrationState) -> bool:
        """Write a checkpoint; return False if that fails. The error is reported but not raised, so that the calibration continues."""
        name = f"step_{state.step:06d}-{secrets.token_hex(2)}"  # random, so that it differs from a damaged one of the same step
        try:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / name
                folder.mkdir()
                state.save(folder)
                self.store.add(folder, f"{self.attempt}/{name}", SUMS)
            intact = [name for name in self.names() if name not in self.damaged]
            self.store.keep_only(self.attempt, intact[:KEPT], "step_")
        except (StoreError, SafetensorError, OSError) as error:
            cause = reason(error) if isinstance(error, OSError) else error
            self.emit("stage", text=f"could not write the checkpoint of step {state.step}: {cause}")
            return False
        return True

    def names(self) -> list[str]:
        """Return the names of the complete checkpoints, newest first."""
        names = (uri.rpartition("/")[2] for uri in self.store.complete(self.attempt, SUMS))
        return sorted((name for name in names if re.match(r"step_\d", name)), reverse=True)

    @contextmanager
    def newest(self) -> Iterator[Path | None]:
        """Yield the folder of the newest intact checkpoint, or None. It is readable inside the block, and the same on every worker."""
        for name in sharding.from_first(self.names()):
            with self.store.folder(self.store.uri(f"{self.attempt}/{name}")) as folder:
                faults = [fault for fault in sharding.from_all(damage(folder)) if fault]
                if not faults:
                    yield folder
                    return
                self.damaged.add(name)
                self.emit("stage", text=f"checkpoint {name} is damaged ({faults[0]}): using the previous one")
        yield None
