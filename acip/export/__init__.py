"""One size as a folder that transformers loads: export, quantization, model card, hub."""

from acip.export.folder import export

__all__ = ["export"]
