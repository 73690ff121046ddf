"""transformers' Auto classes learn to know exported models, at the moment they are imported themselves.

Doing it at once would make `import acip` import torch and transformers: seconds, for a `--help` too. So a finder waits for
the one module of transformers that holds the mapping from model_type to config class, and steps aside after it.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def introduce() -> None:
    """Register model_type "acip", now or when transformers is ready for it."""
    if AUTO in sys.modules:
        _register(sys.modules[AUTO])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register(auto: ModuleType) -> None:
    from acip.modeling_acip import MODEL_TYPE, AcipConfig

    auto.CONFIG_MAPPING.register(MODEL_TYPE, AcipConfig, exist_ok=True)


class _Waiting(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
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
