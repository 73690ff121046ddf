"""The Prometheus metrics of /metrics, measured at the endpoint. Size labels are rounded to 0.05 to limit their number."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PER_TOKEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The Prometheus metrics of one server process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry}
        self.waiting = Gauge("acip_requests_waiting", "Requests without a first token", **common)
        self.running = Gauge("acip_requests_running", "Requests that are generating tokens", **common)
        self.requests = Counter("acip_requests", "Finished requests by status", ["model", "status"], **common)
        by_size = ["model", "size"]
        self.prompt_tokens = Counter("acip_prompt_tokens", "Prompt tokens", by_size, **common)
        self.generated_tokens = Counter("acip_generated_tokens", "Generated tokens", by_size, **common)
        self.drafted_tokens = Counter("acip_drafted_tokens", "Tokens that a small size has drafted", by_size, **common)
        self.accepted_tokens = Counter("acip_accepted_tokens", "Drafted tokens that the requested size has accepted", by_size, **common)
        self.first_token = Histogram(
            "acip_time_to_first_token_seconds",
            "Time from the arrival of a request to its first token, including waiting",
            by_size,
            buckets=SECONDS,
            **common,
        )
        self.per_token = Histogram(
            "acip_time_per_output_token_seconds", "Mean time between the tokens of a response", by_size, buckets=PER_TOKEN, **common
        )

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def begin(self, model: str) -> "RequestMetrics":
        """Begin the measurements of a request."""
        return RequestMetrics(self, model)


class RequestMetrics:
    """The measurements of one request, from its arrival to its end."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.metrics, self.model, self.arrived = metrics, model, time.monotonic()
        self.size, self.first, self.status = "", 0.0, "canceled"
        self._gauge = metrics.waiting
        self._gauge.inc()

    def on_event(self, kind: str, data: dict[str, Any]) -> None:
        """Update the measurements by a text event of the request."""
        if kind == "head":
            self.size = f"{round(data['size']['ratio'] * 20) / 20:.2f}"
        elif kind == "start":
            if self.first:  # the request was restarted after an engine was lost
                return
            self.first = time.monotonic()
            self.metrics.first_token.labels(self.model, self.size).observe(self.first - self.arrived)
            self._gauge.dec()
            self._gauge = self.metrics.running
            self._gauge.inc()
        elif kind == "done":
            self.status = "200"
            usage, tokens = data["usage"], data["usage"]["completion_tokens"]
            self.metrics.prompt_tokens.labels(self.model, self.size).inc(usage["prompt_tokens"])
            self.metrics.generated_tokens.labels(self.model, self.size).inc(tokens)
            self.metrics.drafted_tokens.labels(self.model, self.size).inc(data["speculation"]["drafted_tokens"])
            self.metrics.accepted_tokens.labels(self.model, self.size).inc(data["speculation"]["accepted_tokens"])
            timings = data["timings"]
            if tokens > 1:
                spent = timings["generate_s"] - timings["first_token_s"]
                self.metrics.per_token.labels(self.model, self.size).observe(spent / (tokens - 1))
        elif kind == "error":
            self.status = str(data["status"])

    def end(self) -> None:
        """Count the request as finished."""
        self._gauge.dec()
        self.metrics.requests.labels(self.model, self.status).inc()
