"""The metrics of vLLM's engines are exported by Ray, where Prometheus scrapes them."""

from pathlib import Path
from typing import Any

import pytest
import ray
from acip_platform.serve.engine.engine import Engine
from acip_platform.serve.engine.request import GenerationRequest

from acip.artifact.artifact import Artifact
from tests.infra.test_dashboard import VLLM
from tests.platform.scheduling.test_on_nodes import exported_labels
from tests.support.waiting import until
from tests.vllm.test_any_size import PROMPT, SIZES, VERSION, save
from tests.vllm.test_engine import FAMILIES

pytestmark = pytest.mark.vllm


@ray.remote
class Replica:
    """A process of Ray that holds a model."""

    def __init__(self, folder: Path) -> None:
        from acip_vllm.resident_model import VllmModel

        self.engine, self.model = Engine(), VllmModel(VERSION, Artifact.open(folder), packed=False)
        self.engine.add(self.model)

    def answer(self) -> int:
        """Answer a request, and return the number of events."""
        return len(list(self.engine.events(self.model, GenerationRequest([PROMPT], SIZES[0], max_tokens=4))))


def test_ray_exports_the_metrics_of_vllm(tmp_path: Path) -> None:
    artifact = save(tmp_path, FAMILIES["llama"])
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        replica: Any = Replica.remote(Path(artifact.folder))  # type: ignore[attr-defined]
        assert ray.get(replica.answer.remote()) > 0
        until(
            lambda: all(labels <= exported_labels(name) for name, labels in VLLM.items()),
            lambda: f"Ray exports {[exported_labels(name) for name in VLLM]}", every_s=1,
        )  # fmt: skip
    finally:
        ray.shutdown()
