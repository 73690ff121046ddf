"""Make transformers' Auto classes load exports and artifacts.

Registering the classes at once would make `import acip` import torch and transformers, which takes seconds, even for `--help`.
Therefore an import hook waits until transformers imports the module with the mapping from model_type to config class, registers the
classes then, and removes itself.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Register model_type "acip" in transformers: now if its Auto classes are imported, else when they are."""
    if AUTO in sys.modules:
        _register(sys.modules[AUTO])
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


def _register(auto: ModuleType) -> None:
    from acip import modeling_acip

    modeling_acip.load_artifact = _load_artifact
    auto.CONFIG_MAPPING.register(modeling_acip.MODEL_TYPE, modeling_acip.AcipConfig, exist_ok=True)


def _load_artifact(*args: Any, **kwargs: Any) -> Any:
    """Call `acip.modeling.load_artifact`, which is imported only when an artifact is loaded."""
    from acip.modeling import load_artifact

    return load_artifact(*args, **kwargs)


class _RegisterOnImport(MetaPathFinder):
    """An import hook for the module `AUTO`."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the module `AUTO`, whose loader also registers the classes; None for all other modules."""
        if fullname != AUTO or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
