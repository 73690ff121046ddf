"""Ray Serve starts engines for the sequences in them."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from acip_platform.serve.autoscaling import SequencesPolicy
from ray import serve

from tests.support.waiting import until


@pytest.mark.parametrize(
    ("sequences", "queued", "engines"), [({}, 0, 0), ({"a": 5, "b": 3}, 0, 2), ({"a": 5}, 3, 2), ({"a": 2}, 0, 0.5), (None, 8, 2)]
)
def test_an_engine_for_each_four_sequences(sequences: dict[str, float] | None, queued: float, engines: float) -> None:
    metrics = None if sequences is None else {"sequences": sequences}
    context: Any = SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=queued)
    assert SequencesPolicy(4)(context) == (engines, {})


def test_ray_serve_scales_by_what_the_replicas_report() -> None:
    """Without any request, eight sequences in one replica start a second one."""

    class Replica:
        def record_autoscaling_stats(self) -> dict[str, float]:
            return {"sequences": 8}

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        policy = {"policy_function": SequencesPolicy, "policy_kwargs": {"per_engine": 4}}
        scaling: Any = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 0, "policy": policy}
        deployment: Any = serve.deployment(autoscaling_config=scaling, ray_actor_options={"num_cpus": 0.1})(Replica)
        serve.start(proxy_location="Disabled")
        serve.run(deployment.bind(), route_prefix=None)

        def running() -> int:
            states: Any = serve.status().applications["default"].deployments["Replica"].replica_states
            return int(states.get("RUNNING", 0))

        until(lambda: running() == 2, lambda: f"{running()} replicas are running", every_s=1)
    finally:
        serve.shutdown()
        ray.shutdown()
