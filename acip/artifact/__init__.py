"""Artifacts: folders from which a model of any size is loaded. ARTIFACT.md specifies the format."""

from acip.artifact.artifact import Artifact

__all__ = ["Artifact"]
