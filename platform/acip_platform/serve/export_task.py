"""The Ray task behind a materialization: one size of one artifact becomes a folder in the store.

It says that it runs, and then what came of it, as plain values: an exception would reach the server as a Ray traceback.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acip.errors import AcipError, ArtifactError
from acip.sizing.budget import Budget
from acip_platform.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What is to be exported, and where to."""

    artifact: str  # URI
    budget: Budget
    removed: int  # directions that the budget's cut removes
    quantize: Any  # a Kind or None
    title: str
    key: str  # of the folder in the store; a checksum of the content is added to it
    facts: dict[str, Any]  # for the provenance, under "materialization"


def export_task(settings: Settings, work: Work) -> Iterator[dict[str, Any]]:
    """{"status": "running"}; then "succeeded" with uri, sha256 and bytes, or "failed" with the error."""
    yield {"status": "running"}
    place = settings.home / "exporting"
    try:
        with workplace(place) as folder:
            done = _export(settings, work, folder)
        yield {"status": "succeeded", **done}
    except Exception as error:
        log.exception("the export of %s failed", work.artifact)
        yield {"status": "failed", "error": _told(error).replace(str(place), "the folder of exports under way")}


def _export(settings: Settings, work: Work, folder: Path) -> dict[str, Any]:
    from acip.export.folder import PROVENANCE, export
    from acip_platform.storage.store import Store

    store = Store.of(settings)
    artifact = store.open(work.artifact)
    any_size = artifact.load(size=work.budget)
    if any_size.cut is None or any_size.cut.removed != work.removed:
        raise ArtifactError(f"{work.artifact} was replaced by another artifact. Ask again.")
    export(any_size, artifact, folder / work.title, work.quantize, facts={"materialization": work.facts})
    raw = (folder / work.title / PROVENANCE).read_bytes()
    uri = store.add(folder / work.title, f"{work.key}-{hashlib.sha256(raw).hexdigest()[:8]}", PROVENANCE)
    return {"uri": uri, **sums(raw)}


def sums(raw: bytes) -> dict[str, Any]:
    """The checksum of an export and the bytes of all its files, from its provenance.json as it is stored."""
    files = json.loads(raw)["files"].values()
    return {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw) + sum(facts["bytes"] for facts in files)}


def _told(error: Exception) -> str:
    """What the client may know: our own messages; of others neither paths nor code."""
    if isinstance(error, AcipError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return f"the export failed ({type(error).__name__}); the log of its worker says why."


@contextlib.contextmanager
def workplace(parent: Path) -> Iterator[Path]:
    """A folder of one task's own. It is locked while the task lives, so that what dead ones left is known, and removed."""
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with lock(parent):  # nobody looks between the making of a folder and its lock
            for left in parent.iterdir():
                with contextlib.suppress(BlockingIOError), lock(left, fcntl.LOCK_NB):
                    shutil.rmtree(left)
            folder = Path(tempfile.mkdtemp(dir=parent))
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            held.enter_context(lock(folder))
        yield folder


@contextlib.contextmanager
def lock(folder: Path, more: int = 0) -> Iterator[None]:
    """Hold a folder; the kernel lets go of it when the process dies."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | more)
        yield
    finally:
        os.close(opened)
