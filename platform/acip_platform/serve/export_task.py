"""The Ray task of a materialization: it exports one size of an artifact to a folder in the store.

The task yields its progress and its result as plain values, because an exception would reach the server as a Ray traceback.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from acip.errors import AcipError, ArtifactError
from acip.sizing.budget import Budget
from acip_platform.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """One export: the artifact, the size and the destination."""

    artifact: str  # URI
    budget: Budget
    cut: tuple[int, int]  # `Cut.key` of the size
    quantize: Any  # a Kind or None
    title: str
    key: str  # key of the folder in the store; a checksum of the content is appended
    facts: dict[str, Any]  # stored in the provenance under "materialization"


def export_task(settings: Settings, work: Work) -> Iterator[dict[str, Any]]:
    """Yield {"status": "running"}; then status "succeeded" with uri, sha256 and bytes, or "failed" with the error."""
    yield {"status": "running"}
    parent = settings.home / "exporting"
    try:
        with workplace(parent) as folder:
            uri, raw = _export(settings, work, folder)
    except Exception as error:
        log.exception("the export of %s failed", work.artifact)
        yield {"status": "failed", "error": _message(error).replace(str(parent), "the folder of running exports")}
    else:
        yield {"status": "succeeded", "uri": uri, **sums(raw)}
        _log(settings, work, json.loads(raw), uri)


def _export(settings: Settings, work: Work, folder: Path) -> tuple[str, bytes]:
    """Export to a new folder of the store. Return its URI and its provenance.json."""
    from acip.export.folder import PROVENANCE
    from acip.export.stored import export_size
    from acip_platform.storage.store import Store

    store = Store.of(settings)
    artifact = store.open(work.artifact)
    if artifact.table().cut(work.budget).key != work.cut:
        raise ArtifactError(f"{work.artifact} was replaced by another artifact. Try again.")
    export_size(artifact, work.budget, folder / work.title, work.quantize, facts={"materialization": work.facts})
    raw = (folder / work.title / PROVENANCE).read_bytes()
    uri = store.add(folder / work.title, f"{work.key}-{hashlib.sha256(raw).hexdigest()[:8]}", PROVENANCE)
    return uri, raw


def _log(settings: Settings, work: Work, provenance: dict[str, Any], uri: str) -> None:
    """Record the export in MLflow. If that fails, the export is complete all the same."""
    from acip_platform.tracking.logged_models import log_export
    from acip_platform.tracking.registry import Registry, few_retries, reached

    try:
        with reached(settings), few_retries():
            version = Registry(settings).resolve(work.facts["model"], work.facts["version"])
        log_export(settings, version, provenance, uri)
    except AcipError as error:
        log.warning("the export at %s is not recorded in MLflow: %s", uri, error)


def sums(raw: bytes) -> dict[str, Any]:
    """Return the checksum of an export and the bytes of all its files, from the content of its provenance.json."""
    files = json.loads(raw)["files"].values()
    return {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw) + sum(facts["bytes"] for facts in files)}


def _message(error: Exception) -> str:
    """Return the error message that clients receive. Errors of libraries are shortened, so that no paths or code are shown."""
    if isinstance(error, AcipError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return f"the export failed ({type(error).__name__}); the reason is in the log of its worker."


@contextlib.contextmanager
def workplace(parent: Path) -> Iterator[Path]:
    """Yield a temporary folder for one task, and remove the folders of dead tasks.

    The folder is locked while its task runs, so an unlocked folder belongs to a dead one.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with lock(parent):  # no other task removes the new folder before it is locked
            for left in parent.glob("*/"):
                with contextlib.suppress(Timeout, FileNotFoundError), lock(left).acquire(blocking=False):  # locked, or removed by its task
                    shutil.rmtree(left)
            folder = Path(tempfile.mkdtemp(dir=parent))
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            held.enter_context(lock(folder))
        yield folder


def lock(folder: Path) -> FileLock:
    """Return the lock of a folder. The kernel releases it when the process dies."""
    return FileLock(folder / ".lock", thread_local=False)
