"""The metrics of the endpoint. Every HTTP replica counts its requests with `ray.serve.metrics`, and Ray's nodes export the counts.

Prometheus reads them from the nodes, one series per replica: `sum by (status) (rate(ray_acip_requests_total[1m]))`. The route /metrics
returns the sums over all replicas and nodes, without the prefix `ray_`. Ray keeps the counts of a replica that has died, and drops its
gauges. Counts arrive with a delay of up to RAY_metrics_report_interval_ms (10 seconds). Ray computes the sum of a histogram from the
middles of its buckets. Size labels are rounded to 0.05 to limit their number.
"""

import asyncio
import logging
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]
PER_TOKEN = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2]
PREFIX = "ray_"  # Ray adds it to every name
LABELS = ("model", "size", "status", "le")  # labels of the sums
NODE_TIMEOUT_S = 5.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

log = logging.getLogger("ray.serve")


class Metrics:
    """The metrics of one HTTP replica."""

    def __init__(self) -> None:
        by_size: Any = ("model", "size")  # Ray's annotation allows one label only
        by_status: Any = ("model", "status")
        self.waiting = OpenRequests("acip_requests_waiting", "Requests without a first token")
        self.running = OpenRequests("acip_requests_running", "Requests that are generating tokens")
        self.requests = Counter("acip_requests", "Finished requests by status", by_status)
        self.prompt_tokens = Counter("acip_prompt_tokens", "Prompt tokens", by_size)
        self.generated_tokens = Counter("acip_generated_tokens", "Generated tokens", by_size)
        self.drafted_tokens = Counter("acip_drafted_tokens", "Tokens that a small size has drafted", by_size)
        self.accepted_tokens = Counter("acip_accepted_tokens", "Drafted tokens that the requested size has accepted", by_size)
        self.first_token = Histogram(
            "acip_time_to_first_token_seconds", "Time from the arrival of a request to its first token, including waiting", SECONDS, by_size
        )
        self.per_token = Histogram("acip_time_per_output_token_seconds", "Mean time between the tokens of a response", PER_TOKEN, by_size)

        self.update_failed = Gauge("acip_update_failed", "HTTP replicas whose selected version cannot be loaded", ("model",))

    @property
    def all(self) -> list[Counter | Gauge | Histogram]:
        """All metrics of the replica."""
        counters = [self.requests, self.prompt_tokens, self.generated_tokens, self.drafted_tokens, self.accepted_tokens]
        return [self.waiting.gauge, self.running.gauge, *counters, self.first_token, self.per_token, self.update_failed]

    def show_failed(self, models: Mapping[str, bool]) -> None:
        """Show for each model whether the selected version could not be loaded."""
        for model, failed in models.items():
            self.update_failed.set(int(failed), {"model": model})

    async def text(self) -> bytes:
        """Return the sums over all replicas of this application in the text format of Prometheus."""
        texts = await asyncio.gather(*(asyncio.to_thread(_exported, node) for node in ray.nodes() if node["Alive"]))
        names = [f"{PREFIX}{metric.info['name']}" for metric in self.all]
        return sums(texts, names, serve.get_replica_context().app_name)

    def begin(self, model: str) -> "RequestMetrics":
        """Begin the measurements of a request."""
        return RequestMetrics(self, model)


class OpenRequests:
    """A gauge of open requests, because Ray's gauges can only be set."""

    def __init__(self, name: str, description: str) -> None:
        self.gauge, self.count = Gauge(name, description), 0
        self.add(0)

    def add(self, more: int) -> None:
        self.count += more
        self.gauge.set(self.count)


class RequestMetrics:
    """The measurements of one request, from its arrival to its end."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.metrics, self.model, self.arrived = metrics, model, time.monotonic()
        self.size, self.first, self.status = "", 0.0, "canceled"
        self._state = metrics.waiting
        self._state.add(1)

    def on_event(self, kind: str, data: dict[str, Any]) -> None:
        """Update the measurements by a text event of the request."""
        labels = {"model": self.model, "size": self.size}
        if kind == "head":
            self.size = f"{round(data['size']['ratio'] * 20) / 20:.2f}"
        elif kind == "start":
            if self.first:  # the request was restarted after an engine was lost
                return
            self.first = time.monotonic()
            self.metrics.first_token.observe(self.first - self.arrived, labels)
            self._state.add(-1)
            self._state = self.metrics.running
            self._state.add(1)
        elif kind == "done":
            self.status = "200"
            usage, timings, speculation = data["usage"], data["timings"], data["speculation"]
            tokens = usage["completion_tokens"]
            for counter, count in (
                (self.metrics.prompt_tokens, usage["prompt_tokens"]),
                (self.metrics.generated_tokens, tokens),
                (self.metrics.drafted_tokens, speculation["drafted_tokens"]),
                (self.metrics.accepted_tokens, speculation["accepted_tokens"]),
            ):
                if count:  # Ray refuses 0
                    counter.inc(count, labels)
            if tokens > 1:
                spent = timings["generate_s"] - timings["first_token_s"]
                self.metrics.per_token.observe(spent / (tokens - 1), labels)
        elif kind == "error":
            self.status = str(data["status"])

    def end(self) -> None:
        """Count the request as finished."""
        self._state.add(-1)
        self.metrics.requests.inc(tags={"model": self.model, "status": self.status})


def sums(texts: Iterable[str], names: Iterable[str], application: str) -> bytes:
    """Return the sums of the named metrics of an application over the exports of several nodes. Other metrics are dropped."""
    wanted = tuple(names)
    comments = tuple(f"# {comment} {name}" for comment in ("HELP", "TYPE") for name in wanted)
    lines = [line for text in texts for line in text.splitlines() if line.startswith(wanted + comments)]
    found: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in text_string_to_metric_families("\n".join(lines)):
        name = family.name.removeprefix(PREFIX)
        found.setdefault(name, Metric(name, family.documentation, family.type))
        for sample in family.samples:
            if sample.labels.get("application") == application:
                labels = tuple((label, sample.labels[label]) for label in LABELS if label in sample.labels)
                added = values.setdefault(name, {})
                key = sample.name.removeprefix(PREFIX), labels
                added[key] = added.get(key, 0.0) + sample.value
    for name, metric in found.items():
        for (sample_name, sample_labels), value in values.get(name, {}).items():
            metric.add_sample(sample_name, dict(sample_labels), value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(list(found.values())))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self.metrics


def _exported(node: dict[str, Any]) -> str:
    """Return the metrics that a node exports, or nothing if it does not answer."""
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=NODE_TIMEOUT_S) as response:
            text: str = response.read().decode()
            return text
    except OSError as error:
        log.warning("the node at %s exports no metrics: %s", url, error)
        return ""
