"""A resident model and its engine."""

from collections.abc import Iterator

import pytest
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.text_engine import TextEngine
from acip_platform.tracking.registry import ModelVersion

from acip.artifact.artifact import Artifact


@pytest.fixture(scope="module")
def served(small_artifact: Artifact) -> ResidentModel:
    return ResidentModel(ModelVersion("small", "7", str(small_artifact.folder), ("champion",), {}), small_artifact)


@pytest.fixture(scope="module")
def engine(served: ResidentModel) -> Iterator[TextEngine]:
    engine = TextEngine()
    engine.add(served)
    yield engine
    engine.close()
