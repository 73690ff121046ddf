"""Folders of installed Python packages, found without importing the packages."""

import importlib.util
from pathlib import Path


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed top-level package, or None."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None  # find_spec would import the parent of a dotted name
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
