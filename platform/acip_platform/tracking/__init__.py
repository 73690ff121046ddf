"""MLflow: runs, the model registry, and the rule that promotes a version."""

from acip_platform.tracking.registry import ModelVersion, Registry
from acip_platform.tracking.runs import Run, Tracking

__all__ = ["ModelVersion", "Registry", "Run", "Tracking"]
