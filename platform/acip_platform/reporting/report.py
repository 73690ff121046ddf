"""The report of one or several calibrations, as a self-contained HTML file and as JSON.

    artifacts (+ rows of baselines) -> facts, the content of the JSON file -> page: a template, with figures as inline SVG

The page has no script and loads nothing. All its numbers come from the artifacts. For values that were not measured, it shows the
command that measures them.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from acip.artifact.artifact import Artifact
from acip.errors import AcipError
from acip.evaluate import Samples, divergence_of
from acip.export.card import license_of, shown
from acip.recipe import nearest
from acip.sizing.budget import Budget, as_perplexity, is_coded
from acip.sizing.cut_table import CutTable
from acip.sizing.domains import DOMAINS, worst_domain
from acip.sizing.excess_loss_area import excess_loss_area
from acip_platform.reporting import figures
from acip_platform.reporting.console import example_size
from acip_platform.reporting.text_samples import side_by_side, size_label
from acip_platform.tracking.provenance import commit
from acip_platform.tracking.registry import ModelVersion
from acip_platform.tracking.run_descriptions import CLOSE_KL, close_to_base

TEMPLATE = Path(__file__).with_name("report.html")
CONTEXT = 4096  # tokens of the KV cache in the memory estimate, at batch size 1
SPEED, MEMORY = "tokens_per_s", "peak_memory_bytes"  # ends of the names of measured values (acip.evaluate)


@dataclass(frozen=True)
class Subject:
    """One artifact of the report. `version` is None if it is not from the registry."""

    label: str
    uri: str
    artifact: Artifact
    version: ModelVersion | None = None


def facts(subjects: Sequence[Subject], baselines: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> dict[str, Any]:
    """Return the content of the report as JSON values. The first model is shown in detail; it is the one with the least area."""
    models = [_model(subject) for subject in subjects]
    if len(models) > 1:
        models.sort(key=lambda model: math.inf if model["area"] is None or math.isnan(model["area"]) else model["area"])
    return _plain({"title": title, "made_by": commit(), "models": models, "baselines": dict(baselines)})


def page(content: Mapping[str, Any], subjects: Sequence[Subject]) -> str:
    """Return the result of `facts` as HTML."""
    first = content["models"][0]
    table = next(subject for subject in subjects if subject.uri == first["uri"]).artifact.table()
    curves = {model["label"]: model["curve"] for model in content["models"] if model["curve"]}
    charts = [figures.svg(partial(figures.curves, curves, content["baselines"], over)) for over in ("bytes", "flops", "ranks")]
    kept = [figures.svg(partial(figures.kept_ranks, table, size)) for size in figures.KEPT_AT]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["ending"] = str.endswith
    environment.filters |= {"mb": lambda n: f"{n / 1e6:,.1f}", "number": _number}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        content=content, first=first, speed=SPEED, memory=MEMORY,
        # matplotlib escapes the text in the figures
        charts=[Markup(chart) for chart in charts if chart],  # noqa: S704
        coded=[row for row in first["curve"] if is_coded(row)],
        over_ranks=[row for row in first["curve"] if not is_coded(row)],
        kept=[Markup(figure) for figure in kept if figure],  # noqa: S704
        score_map=Markup(figures.svg(lambda: figures.score_map(table))),  # noqa: S704
    )  # fmt: skip


def baseline_rows(path: Path, corpus: str = "") -> dict[str, list[dict[str, Any]]]:
    """Read the rows of other methods, by method, from a JSON file: [{method, got (or asked), loss (or perplexity), ...}, ...].

    The list may also be at the key "rows". Rows of an arena have perplexities on several texts; the one on `corpus` is used.
    """
    metric = f"perplexity {corpus.removeprefix('package:')}"  # an arena's file may hold rows of other texts, and older rows
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["rows"] if isinstance(content, dict) else content
        if any("metrics" in row for row in rows):
            rows = list({(row["method"], row["asked"]): row for row in rows if metric in row["metrics"]}.values())
            if not rows:
                raise KeyError(metric)
        by_method: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            loss = float(row["loss"]) if "loss" in row else math.log(row["perplexity"] if "perplexity" in row else row["metrics"][metric])
            got, error = float(row["got"] if "got" in row else row["asked"]), row.get("stderr")
            if isinstance(error, dict):  # an arena's errors are those of the perplexities
                error = error[metric] / row["metrics"][metric] if metric in error else None
            numbers = {"got": got, "loss": loss, "perplexity": as_perplexity(loss), "stderr": error}
            by_method.setdefault(str(row["method"]), []).append({**row, **numbers})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AcipError(
            f"{path} can't be read as rows of baselines ({type(error).__name__}: {error}). It must be a JSON list of rows with method, "
            f"got (or asked), and loss (or perplexity), or an arena's rows with {metric!r}."
        ) from error
    return by_method


def _model(subject: Subject) -> dict[str, Any]:
    artifact, version = subject.artifact, subject.version
    manifest, table, curve = artifact.manifest, artifact.table(), artifact.curve
    recipe, changes = nearest(artifact.recipe)
    base = manifest["base"]
    return {
        "label": subject.label,
        "name": version.name if version else None,
        "version": version.version if version else None,
        "aliases": list(version.aliases) if version else [],
        "verdict": version.tags.get("verdict") if version else None,
        "uri": subject.uri,
        "base": {"shown": shown(base["source"]), **base, "license": license_of(base["source"])},
        "recipe": {"name": recipe, "changes": changes, "fields": manifest["recipe"]},
        "stop_ratio": artifact.recipe.stop_ratio,
        "steps": manifest.get("steps"),
        "area": excess_loss_area(curve) if len(curve) > 1 and any(row["got"] == 1.0 for row in curve) else None,
        "context": CONTEXT,
        "close_to_base": {"kl": CLOSE_KL, "size": close_to_base(artifact)},
        "curve": [_row(row, table) for row in artifact.curve],
        "measured": _measured(artifact.curve),
        "domains": list(dict.fromkeys(name for row in artifact.curve for name in row.get(DOMAINS, {}))),
        "samples": side_by_side(artifact.curve),
        "provenance": manifest.get("provenance", {}),
        "commands": _commands(subject),
    }


def _row(row: Mapping[str, Any], table: CutTable) -> dict[str, Any]:
    """Return a row of the curve with the memory that serving it needs, which is computed."""
    decoder = table.decoder
    weights = row["bytes"]
    if is_coded(row) and table.byte_sizes is not None:
        weights = table.byte_sizes.memory(table.cut(Budget(stored_bytes=row["bytes"])).versions or {})
    memory = None if weights is None or decoder is None else weights + decoder.cache(CONTEXT, 1) + decoder.overhead(1)
    kl, worst = divergence_of(row).get("kl_nats"), worst_domain(row)
    more = {"memory_bytes": memory, "kl": kl, "label": size_label(row), "worst_domain": worst._asdict() if worst else None}
    return {key: value for key, value in row.items() if key != "evaluation"} | more


def _measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the measurements besides the curve: name -> requested size -> value."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        for part in row.get("evaluation", ()):
            for name, value in part["values"].items() if part["kind"] != Samples.kind else ():
                values.setdefault(f"{part['label']}/{name}", {})[size_label(row)] = value
    return values


def _commands(subject: Subject) -> dict[str, str]:
    """Return the shell commands to use the model: description -> command."""
    version, size = subject.version, example_size(subject.artifact.curve)
    uri = shlex.quote(subject.uri)
    if version is None:
        return {
            "measure speed and memory": f"python jobs/evaluate.py --artifact {uri} --skip perplexity divergence samples",
            "keep one size": f"python jobs/materialize.py {uri} --size {size:g} --out small",
            "fit a budget": f"python jobs/materialize.py {uri} --fit 8GB --context {CONTEXT} --batch 1 --out small",
        }
    name = shlex.quote(version.name)
    body = json.dumps({"model": f"{version.name}@{size:g}", "prompt": "The capital of France is", "max_tokens": 24, "temperature": 0})
    request = f"curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    return {
        "serve": f"python jobs/serve.py --model {name} --alias {version.version}",
        f"ask at {size:g}": request,
        "measure speed and memory": f"python jobs/evaluate.py --model {name}@{version.version} --skip perplexity divergence samples",
        "keep one size": f"python jobs/materialize.py {name} --alias {version.version} --size {size:g} --out small",
        "make it the champion": f"python jobs/promote.py {name} {version.version}",
    }


def _plain(content: Any) -> dict[str, Any]:
    """Return `content` as JSON values, with NaN and infinity as null."""
    plain: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return plain


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
