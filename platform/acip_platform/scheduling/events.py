"""Progress events on their way from the workers to the driver, and the driver's request for checkpoints before it stops.

This module imports only Ray, so that the process of the queue stays small.
"""

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

STOP_S = 30.0  # time for workers to write a checkpoint when the job stops
SILENT_S = 60.0  # a worker that has not asked for so long has no checkpoint to write


@ray.remote(num_cpus=0)
class EventQueue:
    """An actor that collects the events of all workers in order. The driver takes them out."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.asked: dict[str, float] = {}  # model -> the time when its worker last asked, if it has a checkpoint to write
        self.stops = False

    def put(self, event: dict[str, Any]) -> None:
        """Append an event."""
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Remove and return all events."""
        events, self.events = self.events, []
        return events

    def is_stopping(self, model: str, saved: bool) -> bool:
        """Return whether the job is about to stop. Workers ask regularly, and say whether everything so far is saved."""
        if saved:
            self.asked.pop(model, None)
        else:
            self.asked[model] = time.monotonic()
        return self.stops

    def stop(self) -> list[str]:
        """Ask the workers for a checkpoint. Return the models that have not written theirs yet."""
        self.stops = True
        return [model for model, at in self.asked.items() if time.monotonic() - at < SILENT_S]


def wait_for_checkpoints(events: Any) -> None:
    """Ask the workers of an EventQueue for a checkpoint, and wait until all have written theirs, at most STOP_S seconds."""
    ends = time.monotonic() + STOP_S
    while ray.get(events.stop.remote(), timeout=STOP_S) and time.monotonic() < ends:
        time.sleep(0.1)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return a scheduling strategy for the node of this process, so that the loss of another node does not end the actor."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def open_event_queue() -> Any:
    """Start an EventQueue on the node of this process."""
    return EventQueue.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
