"""Tensors of an artifact as a server computes with them: decoded and packed once, in files that all replicas of a node map.

    ROOT/KEY/model.layers.0.mlp.up_proj.weight.safetensors     the tensors of one name
    ROOT/KEY/4f2a91c0d5e7b386.passed                           a check of the model that has passed

The pages of a mapped file are in memory once, however many processes map it, and the system may drop and read them again. KEY is a
checksum of the artifact's own checksums and of everything that decides the tensors and the check: the code, torch, transformers, and the
CPU. A file holds the checksum of its tensors, which is compared each time the file is mapped; a damaged file is written again.

Several processes may write at the same time: a file appears whole, under its name, or not at all, and the first one stays. Folders that no
server has opened for `UNUSED_S` are removed. If the disk would have less than `FREE_SHARE` of its space left, folders are removed earlier,
the least recently used first. If that is not enough, or the folder can't be written, a server keeps its tensors in its own memory.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import acip
import acip_platform
from acip.artifact.reader import ArtifactReader
from acip.artifact.tensor_writer import save_tensors
from acip.utils.atomic import SUFFIX, partial_file
from acip_platform.storage.disk import NO_HARD_LINKS, reason

CHECKSUM = "crc32"  # in the metadata of a file
ALIGNMENT = 64  # bytes, of the first tensor: a cache line, which kernels load at once
FREE_SHARE = 0.05  # of the disk
UNUSED_S = 7 * 24 * 3600.0
ABANDONED_S = 3600.0  # age of an incomplete file whose writer must have died

log = logging.getLogger("ray.serve")


class ResidentFiles:
    """The files of one artifact below `root`. Its methods may be called from several threads."""

    def __init__(self, root: Path, artifact: ArtifactReader) -> None:
        checksums = {file: facts["sha256"] for file, facts in sorted(artifact.manifest["files"].items())}
        self.root, self.folder = root, root / _digest([checksums, _environment()])
        self._writable = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)  # it was used now
        except OSError as error:
            self._stop_writing(reason(error))
        for partial in self.folder.glob(f".*{SUFFIX}"):
            if _age_s(partial) > ABANDONED_S:
                partial.unlink(missing_ok=True)
        for other in self._others():
            if _age_s(other) > UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)

    def get(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the tensors of `name` from its file. If there is none, they are computed and written first.

        The tensors must not be changed. If they can't be written, they are returned as they were computed.
        """
        path = self.folder / f"{name}.safetensors"
        mapped = self._mapped(path)
        if mapped is None:
            computed = compute()
            self._write(path, computed)
            mapped = self._mapped(path) if self._writable else None
            return computed if mapped is None else mapped
        return mapped

    @property
    def written(self) -> bool:
        """Whether there are files from an earlier start."""
        return any(self.folder.glob("*.passed"))

    def passed(self, check: str) -> bool:
        """Return whether `record_passed` was called for a check, on tensors of the same files."""
        return self._record(check).exists()

    def record_passed(self, check: str) -> None:
        """Record that a check has passed."""
        if self._writable:
            with suppress(OSError):
                self._record(check).touch()

    def _record(self, check: str) -> Path:
        return self.folder / f"{_digest(check)}.passed"

    def _mapped(self, path: Path) -> dict[str, Tensor] | None:
        """Return the tensors of a file; None if there is none. A damaged file is removed."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
                stored = (file.metadata() or {}).get(CHECKSUM)
            if stored != checksum(tensors):
                raise ValueError("its checksum is not that of its content")
            return tensors
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("%s is damaged, and will be written again: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return None

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if not self._writable:
            return
        try:
            if not self._make_room(sum(tensor.nbytes for tensor in tensors.values())):
                self._stop_writing(f"its disk would have less than {FREE_SHARE:.0%} of its space left")
                return
            with partial_file(path) as partial:  # it is not synchronized with the disk: a crash of the system leaves a wrong checksum
                save_tensors(tensors, partial, compress=False, metadata={CHECKSUM: checksum(tensors)}, alignment=ALIGNMENT)
                _publish(partial, path)
        except OSError as error:
            self._stop_writing(reason(error))

    def _make_room(self, new: int) -> bool:
        """Remove folders of others until the disk has room for `new` bytes. Return whether it has."""

        def has_room() -> bool:
            usage = shutil.disk_usage(self.folder)
            return usage.free - new >= FREE_SHARE * usage.total

        if has_room():
            return True
        for other in self._others():
            shutil.rmtree(other, ignore_errors=True)
            if has_room():
                return True
        return False

    def _others(self) -> list[Path]:
        """Return the folders of other artifacts, or of other code or CPUs, the least recently used first."""
        return sorted((path for path in self.root.glob("*") if path.is_dir() and path != self.folder), key=_age_s, reverse=True)

    def _stop_writing(self, why: str) -> None:
        self._writable = False
        log.warning(
            "%s can't be written (%s). The server works without it, but replicas share no memory, and the next start is slow.",
            self.folder, why,
        )  # fmt: skip


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the names, shapes and contents of tensors, which detects every accidental damage in practice."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _publish(partial: Path, path: Path) -> None:
    """Give a complete file its name, unless another process was faster: then all processes map the same one."""
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        partial.replace(path)


def _age_s(path: Path) -> float:
    """Return the seconds since a file or folder was changed; 0 if it was removed meanwhile."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


@functools.cache
def _environment() -> list[str]:
    """Return what decides the tensors of an artifact on this machine, and the result of a check: code, libraries, and CPU."""
    code = hashlib.sha256()
    for package in (acip, acip_platform):
        for path in sorted(_folder(package.__file__).rglob("*.py")):
            code.update(path.read_bytes())
    return [code.hexdigest(), torch.__version__, version("transformers"), *sorted(set(_cpu()))]


def _folder(file: str | None) -> Path:
    assert file is not None
    return Path(file).parent


def _cpu() -> Iterator[str]:
    """Yield the lines that describe the kind of CPU, on Linux."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "flags", "Features")):
                yield line


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
