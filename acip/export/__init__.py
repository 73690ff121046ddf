"""Exports: one size of an artifact as a folder for transformers; its quantization, model card, and upload to the hub."""

from acip.export.folder import export
from acip.export.stored import export_size

__all__ = ["export", "export_size"]
