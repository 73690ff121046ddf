"""A version in the model registry, as a value. This module does not import MLflow, which takes seconds, so that a replica starts sooner."""

from collections.abc import Mapping
from dataclasses import dataclass

MODEL_ID = "model_id"  # tag of a version: its LoggedModel
MLFLOW_SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")  # of models that other programs log to MLflow


@dataclass(frozen=True)
class ModelVersion:
    """One registered version of a calibrated model, with the URI of its artifact."""

    name: str
    version: str
    uri: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    alias: str = ""  # by which the version was selected; "" = by its number

    @property
    def is_foreign(self) -> bool:
        """Whether this is a model of another program in a shared registry: it is in MLflow, where our artifacts never are."""
        return self.uri.startswith(MLFLOW_SCHEMES)

    @property
    def model_id(self) -> str:
        """The id of its LoggedModel; "" if it has none."""
        return self.tags.get(MODEL_ID, "")
