"""acip: calibrate a language model once, then use it at any size (ACIP, TMLR 2025, with our improvements).

`import acip` is cheap. It registers the exported models with transformers' Auto classes, which then load them without running code
from their folders.
"""

from typing import Any

from acip import renamed
from acip.auto import register_with_transformers

__version__ = "0.1.0"
__all__ = ["from_pretrained", "pack"]

register_with_transformers()
renamed.install("acip")


def __getattr__(name: str) -> Any:
    if name == "from_pretrained":  # imported here, so that `import acip` stays cheap
        from acip.modeling import from_pretrained

        return from_pretrained
    if name == "pack":
        from acip.layers.packing import pack

        return pack
    raise AttributeError(f"module 'acip' has no attribute {name!r}")
