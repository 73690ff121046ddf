"""What workers say, on its way to the driver. Imports nothing else: this process is there for every job, and should be small."""

from typing import Any

import ray


@ray.remote(num_cpus=0)
class Inbox:
    """What the workers say, in order; the driver empties it."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events
