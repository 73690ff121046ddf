"""The number of engines follows the number of sequences that they compute, or that wait in their queues.

Ray Serve's own policy counts requests. But a request may have many sequences (`n`, several prompts), and sequences wait inside of an
engine: for a slot of the embedded engine, or in vLLM's queue for pages of its cache.
"""

from typing import Any

from ray.serve.config import AutoscalingContext


class SequencesPolicy:
    """A policy of Ray Serve that wants an engine for each `per_engine` sequences, within the bounds and delays of its configuration.

    Requests that no engine has accepted yet count as one sequence each. Ray's controller calls the policy, so this package must be
    installed where the controller runs.
    """

    def __init__(self, per_engine: float) -> None:
        self.per_engine = per_engine

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the number of engines that are wanted, and no state."""
        sequences = (context.aggregated_metrics or {}).get("sequences", {})  # by engine, from EngineReplica.record_autoscaling_stats
        return (sum(sequences.values()) + (context.total_queued_requests or 0)) / self.per_engine, {}
