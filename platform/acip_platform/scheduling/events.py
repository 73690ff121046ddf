"""What workers say, on its way to the driver. Imports nothing else: this process is there for every job, and should be small."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
class EventQueue:
    """What the workers say, in order; the driver empties it."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For an actor that has to outlive the nodes that come and go: the node of this process, which it can't outlive anyhow."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def open_event_queue() -> Any:
    """Where the driver is."""
    return EventQueue.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
