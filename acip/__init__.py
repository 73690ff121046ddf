"""acip: calibrate a language model once, have it at any size (ACIP, TMLR 2025, and our improvements on it).

Importing this is cheap, and makes transformers' Auto classes load exported models without code from their folders.
"""

from typing import Any

from acip import renamed
from acip.auto import register_with_transformers

__version__ = "0.1.0"
__all__ = ["from_pretrained", "pack"]

register_with_transformers()
renamed.install("acip")


def __getattr__(name: str) -> Any:
    if name == "from_pretrained":  # torch and transformers only where a model is wanted
        from acip.modeling import from_pretrained

        return from_pretrained
    if name == "pack":
        from acip.layers.packing import pack

        return pack
    raise AttributeError(f"module 'acip' has no attribute {name!r}")
