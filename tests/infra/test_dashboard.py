"""The Grafana dashboard queries only metrics and labels that the endpoint or Ray exports."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from acip_platform.serve.http.metrics import Metrics
from prometheus_client import CollectorRegistry
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
SCRAPE_LABELS = {"instance", "job"}  # Prometheus adds them
RAY_CORE = {"ray_resources": {"Name", "State"}}  # exported by C++ code; tests/platform/scheduling/test_on_nodes.py checks a running Ray

VLLM = {  # exported by vLLM through Ray; tests/vllm/test_metrics.py checks them
    name: {"model_name", "engine", "ReplicaId"}
    for name in ("ray_vllm_num_requests_running", "ray_vllm_num_requests_waiting", "ray_vllm_kv_cache_usage_perc")
}


def registered(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Return the labels of each exported metric by its name."""
    labels: dict[str, set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    metrics = Metrics()
    request = metrics.begin("m")
    request.on_event("head", {"size": {"ratio": 0.6}})
    request.on_event("start", {})
    timings = {"generate_s": 2.0, "first_token_s": 1.0}
    usage, speculation = {"prompt_tokens": 3, "completion_tokens": 4}, {"drafted_tokens": 3, "accepted_tokens": 2}
    request.on_event("done", {"usage": usage, "timings": timings, "speculation": speculation})
    request.end()
    ray_metrics = {f"ray_{name}": {str(column) for column in gauge.view.columns} for name, gauge in METRICS_GAUGES.items()}
    return registered(metrics.registry) | ray_metrics | RAY_CORE | VLLM


@pytest.fixture
def dashboard() -> dict[str, Any]:
    return copy.deepcopy(json.loads((MONITORING / "dashboard.json").read_text()))


def labels_of(query: Any, exported: dict[str, set[str]]) -> Iterator[tuple[str, set[str]]]:
    """Yield (complaint, labels of the result) for every part of a query. A complaint names a missing metric or label, or is ''."""
    if isinstance(query, promql.VectorSelector):
        available = exported.get(str(query.name))
        yield ("" if available is not None else f"no metric {query.name}"), (available or set()) | SCRAPE_LABELS
        for matcher in query.matchers.matchers:
            if available is not None and matcher.name not in available | SCRAPE_LABELS:
                yield f"{query.name} has no label {matcher.name}", available | SCRAPE_LABELS
        return
    parts = [getattr(query, name) for name in ("vector_selector", "expr", "lhs", "rhs") if getattr(query, name, None) is not None]
    inner = [result for part in [*parts, *getattr(query, "args", [])] for result in labels_of(part, exported)]
    available = set.intersection(*(labels for _, labels in inner)) if inner else set()
    yield from ((complaint, available) for complaint, _ in inner if complaint)
    if isinstance(query, promql.AggregateExpr):
        kept = set(query.modifier.labels) if query.modifier else set()
        yield (f"no label {', '.join(kept - available)} to sum by" if kept - available else ""), kept
    elif inner:
        yield "", available - ({"le"} if isinstance(query, promql.Call) and query.func.name == "histogram_quantile" else set())


def complaints(dashboard: dict[str, Any], exported: dict[str, set[str]]) -> list[str]:
    problems = []
    (uid,) = [source["uid"] for source in yaml.safe_load((MONITORING / "grafana.yaml").read_text())["datasources"]]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    for name, variable in variables.items():
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
        problems += [] if label in exported.get(metric, ()) else [f"${name}: {metric} has no {label}"]
    for panel in dashboard["panels"]:
        problems += [] if panel["datasource"]["uid"] == uid else [f"{panel['title']}: another data source"]
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            problems += [f"{panel['title']}: no variable ${name}" for name in used - variables.keys()]
            text = re.sub(r"\$(\w+)", "x", target["expr"].replace("$__rate_interval", "1m"))
            try:
                results = list(labels_of(promql.parse(text), exported))
            except ValueError as error:
                problems.append(f"{panel['title']}: {error}")
                continue
            problems += [f"{panel['title']}: {complaint}" for complaint, _ in results if complaint]
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            problems += [f"{panel['title']}: the legend's {name} is not in the result" for name in shown - results[-1][1]]
    cells = [(panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y) for panel in dashboard["panels"]
              for x in range(panel["gridPos"]["w"]) for y in range(panel["gridPos"]["h"])]  # fmt: skip
    if len(set(cells)) < len(cells) or max(x for x, _ in cells) >= 24:
        problems.append("panels overlap, or leave the grid")
    return problems


def test_dashboard_queries_only_exported_metrics(dashboard: dict[str, Any], exported: dict[str, set[str]]) -> None:
    assert complaints(dashboard, exported) == []


def test_dashboard_shows_every_metric_of_the_endpoint(dashboard: dict[str, Any], exported: dict[str, set[str]]) -> None:
    text = json.dumps(dashboard)
    counted = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported if name.startswith("acip_")}
    assert [name for name in counted if name not in text and f"{name}_total" not in exported] == []


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("acip_requests_running", "acip_request_running", "no metric acip_request_running"),
        ("acip_generated_tokens_total", "acip_generated_tokens", "no metric acip_generated_tokens"),
        ("ray_node_gram_used", "ray_node_vram_used", "no metric ray_node_vram_used"),
        ("sum by (status)", "sum by (code)", "no label code to sum by"),
        ('{model=~\\"$model\\"}', '{modell=~\\"$model\\"}', "has no label modell"),
        ('=~\\"$model\\"', '=~\\"$modell\\"', "no variable $modell"),
        ("{{size}}", "{{status}}", "the legend's status is not in the result"),
        ('State=\\"USED\\"', 'Stage=\\"USED\\"', "ray_resources has no label Stage"),
        ("rate(acip", "rat(acip", "unknown function"),
        ("acip_requests_running", "acip_requests_running)", "unexpected"),
        ("acip-prometheus", "prometheus", "another data source"),
    ],
)
def test_a_planted_error_is_found(dashboard: dict[str, Any], exported: dict[str, set[str]], right: str, wrong: str, complaint: str) -> None:
    text = json.dumps(dashboard)
    assert right in text
    assert complaint in "; ".join(complaints(json.loads(text.replace(right, wrong)), exported))
