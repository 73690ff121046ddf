"""Base models of jobs, wherever they are: those of acip.base, and folders on S3.

    s3://models/llama-3-8b     a folder as transformers saves it. Each node downloads a version once, to ACIP_HOME/cache/base_models.

The weights of a downloaded model are mapped from its files, as those of any folder.
"""

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from acip.base import Base, load_base, outline
from acip.errors import BaseModelError
from acip.recipe import Dtype
from acip_platform.storage.s3 import S3

WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|h5|msgpack|gguf|onnx)$")
OTHER_WEIGHTS = re.compile(r"\.(bin|pt|pth|h5|msgpack|gguf|onnx)$")  # not needed beside safetensors


def is_on_s3(source: str) -> bool:
    """Return whether a base model is on S3."""
    return source.startswith("s3://")


def load(source: str, dtype: Dtype, trust_remote_code: bool, cache: Path) -> Base:
    """Load a base model (see `acip.base.load_base`). `cache` is the local folder for files from S3; StoreError if they can't be read."""
    base = load_base(local(source, cache), dtype, trust_remote_code)
    base.source = source
    return base


def outlined(source: str, dtype: Dtype, trust_remote_code: bool) -> Base:
    """Return a base model without its weights (see `acip.base.outline`). Nothing stays on the disk."""
    if not is_on_s3(source):
        return outline(source, dtype, trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        names = [name for name in listed(source) if not WEIGHTS.search(name)]
        S3().download(source.rstrip("/"), names, Path(scratch))
        return outline(scratch, dtype, trust_remote_code, weights=False)


def local(source: str, cache: Path) -> str:
    """Return the local folder of a base model on S3, which is downloaded if this version is not there yet; any other source unchanged."""
    if not is_on_s3(source):
        return source
    folder = cache / "base_models" / version(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # one process on a node downloads it
        if not folder.is_dir():
            names = listed(source)
            dense = any(name.endswith(".safetensors") for name in names)
            with tempfile.TemporaryDirectory(prefix="coming-", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
                wanted = [name for name in names if not (dense and OTHER_WEIGHTS.search(name))]
                S3().download(source.rstrip("/"), wanted, Path(scratch) / "base")
                shutil.move(Path(scratch) / "base", folder)
    return str(folder)


def version(source: str) -> str:
    """Return an identifier of the content of a base model on S3, from the names, sizes and tags of its files. Nothing is downloaded."""
    return hashlib.sha256(json.dumps(sorted(listed(source).items())).encode()).hexdigest()[:16]


def listed(source: str) -> dict[str, tuple[int, str]]:
    """Return the size and the tag of each file of a base model on S3. Raises BaseModelError if it has no config.json."""
    files = {name: (item.bytes, item.tag) for name, item in S3().listed(source.rstrip("/")).items()}
    if "config.json" not in files:
        raise BaseModelError(f"there is no base model at {source}: it has {len(files)} files, but no config.json. Check the URI.")
    return files
