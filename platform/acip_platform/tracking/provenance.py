"""Where a result comes from: the code's commit, the packages, the job. It goes into the artifact and into MLflow."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from acip_platform.scheduling.fleet import Job

PACKAGES = ("acip", "torch", "transformers", "peft", "ray")


def provenance(job: Job) -> dict[str, Any]:
    """Of a result made here and now."""
    return {
        "job": job.to_dict(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


@functools.cache
def commit() -> str:
    """The commit of this checkout, "+" where files differ from it; ACIP_COMMIT where it is installed otherwise, else "unknown"."""
    checkout = Path(__file__).resolve().parents[3]
    if given := os.environ.get("ACIP_COMMIT"):
        return given
    if not (checkout / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(checkout), "-c", f"safe.directory={checkout}"]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if changed else "")
