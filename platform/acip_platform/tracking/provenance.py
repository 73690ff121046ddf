"""The provenance of a result: commit of the code, versions of packages, device and job. It is stored in the artifact and in MLflow."""

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
    """Return the provenance of a result that this process makes."""
    return {
        "job": job.to_dict(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


@functools.cache
def commit() -> str:
    """Return ACIP_COMMIT if it is set, else the commit of this checkout, with a "+" if files were changed, else "unknown"."""
    checkout = Path(__file__).resolve().parents[3]
    if from_env := os.environ.get("ACIP_COMMIT"):
        return from_env
    if not (checkout / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(checkout), "-c", f"safe.directory={checkout}"]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if changed else "")
