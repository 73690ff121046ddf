"""Artifacts: folders from which a model of any size is read."""

from acip.artifact.artifact import Artifact

__all__ = ["Artifact"]
