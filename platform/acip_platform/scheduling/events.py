"""Progress events on their way from the workers to the driver.

This module imports only Ray, so that the process of the queue stays small.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
class EventQueue:
    """An actor that collects the events of all workers in order. The driver takes them out."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        """Append an event."""
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Remove and return all events."""
        events, self.events = self.events, []
        return events


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return a scheduling strategy for the node of this process, so that the loss of another node does not end the actor."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def open_event_queue() -> Any:
    """Start an EventQueue on the node of this process."""
    return EventQueue.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
