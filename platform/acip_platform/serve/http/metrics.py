"""What /metrics tells Prometheus, as the endpoint's clients saw it. Sizes are labels in steps of 0.05, so that they stay few."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PER_TOKEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry}
        self.waiting = Gauge("acip_requests_waiting", "Requests that have no token yet", **common)
        self.running = Gauge("acip_requests_running", "Requests that are being answered", **common)
        self.requests = Counter("acip_requests", "Requests by what became of them", ["model", "status"], **common)
        by_size = ["model", "size"]
        self.prompt_tokens = Counter("acip_prompt_tokens", "Tokens of prompts", by_size, **common)
        self.generated_tokens = Counter("acip_generated_tokens", "Tokens that were generated", by_size, **common)
        self.first_token = Histogram(
            "acip_time_to_first_token_seconds",
            "From a request's arrival to its first token, waiting included",
            by_size,
            buckets=SECONDS,
            **common,
        )
        self.per_token = Histogram(
            "acip_time_per_output_token_seconds", "Between tokens of an answer, after its first", by_size, buckets=PER_TOKEN, **common
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def begin(self, model: str) -> "Watched":
        return Watched(self, model)


class Watched:
    """One request, from its arrival to its end."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.metrics, self.model, self.arrived = metrics, model, time.monotonic()
        self.size, self.first, self.status = "", 0.0, "canceled"
        self._now = metrics.waiting
        self._now.inc()

    def hear(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "head":
            self.size = f"{round(data['size']['ratio'] * 20) / 20:.2f}"
        elif kind == "start":
            if self.first:  # once more: an engine was lost on the way
                return
            self.first = time.monotonic()
            self.metrics.first_token.labels(self.model, self.size).observe(self.first - self.arrived)
            self._now.dec()
            self._now = self.metrics.running
            self._now.inc()
        elif kind == "done":
            self.status = "200"
            usage, tokens = data["usage"], data["usage"]["completion_tokens"]
            self.metrics.prompt_tokens.labels(self.model, self.size).inc(usage["prompt_tokens"])
            self.metrics.generated_tokens.labels(self.model, self.size).inc(tokens)
            timings = data["timings"]
            if tokens > 1:
                spent = timings["generate_s"] - timings["first_token_s"]
                self.metrics.per_token.labels(self.model, self.size).observe(spent / (tokens - 1))
        elif kind == "error":
            self.status = str(data["status"])

    def end(self) -> None:
        self._now.dec()
        self.metrics.requests.labels(self.model, self.status).inc()
