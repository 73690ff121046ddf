"""Exports: one size of an artifact as a folder for transformers; its quantization, model card, and upload to the hub."""

from acip.export.folder import export

__all__ = ["export"]
