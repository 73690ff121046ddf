"""Tables of curves warn about a size that is better than a larger one, and experiments describe their metrics."""

import io
from pathlib import Path
from typing import Any

import pytest
from acip_platform.reporting.console import evaluation_table, trade_off_table
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Outcome
from acip_platform.settings import Settings
from acip_platform.tracking.runs import EXPERIMENT_NOTE, Tracking, runs_page
from rich.console import Console

from acip.evaluate import improbable
from acip.evaluate.perplexity import PerplexityOn

TEXT = {"corpus": "package:wikipedia", "protocol": "packed", "context": 64, "windows": 8}


def row(size: float, loss: float, stderr: float = 0.1, **more: Any) -> dict[str, Any]:
    facts = {"asked": size, "got": size, "params": 10, "bytes": 20, "extrapolated": False, "perplexity": 2.0}
    return {**facts, "loss": loss, "stderr": stderr, **TEXT, **more}


def measured(size: float, loss: float) -> dict[str, Any]:
    values = {"perplexity": 2.0, "loss_nats": loss, "loss_stderr_nats": 0.1}
    part = {"kind": PerplexityOn.kind, "label": "perplexity/wikipedia", "key": "0", **TEXT, "values": values}
    return {"asked": size, "got": size, "params": 10, "bytes": 20, "evaluation": [part]}


def rendered(table: Any) -> str:
    out = Console(file=io.StringIO(), width=200)
    out.print(table)
    return str(out.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("losses", "sizes"),
    [
        ({1.0: 3.0, 0.8: 3.1, 0.6: 3.4}, None),
        ({1.0: 3.0, 0.8: 2.95, 0.6: 3.4}, None),  # within the standard error
        ({1.0: 3.0, 0.8: 2.7, 0.6: 3.4}, ("0.80", "1.00")),
        ({0.6: 3.4, 0.8: 2.7, 1.0: 3.0}, ("0.80", "1.00")),
        ({1.0: 3.0, 0.8: 3.8, 0.6: 3.4}, ("0.60", "0.80")),
        ({1.0: 3.0, 0.8: 3.8, 0.6: 2.0}, ("0.60", "0.80")),
    ],
)
def test_a_size_that_beats_a_larger_one_is_named(losses: dict[float, float], sizes: tuple[str, str] | None) -> None:
    rows = [row(size, loss) for size, loss in losses.items()]
    warnings = improbable(rows)
    assert improbable([measured(size, loss) for size, loss in losses.items()]) == warnings
    assert len(warnings) == (sizes is not None)
    if sizes:
        assert f"size {sizes[0]} has perplexity" in warnings[0] and f"larger size {sizes[1]}" in warnings[0]
    screen = rendered(trade_off_table(Outcome(Job("small", "base"), {"curve": rows, "version": "1", "stop_ratio": 0.4}, None)))
    assert ("Warning: size" in screen) == (sizes is not None)
    parts = rendered(evaluation_table("small", [measured(size, loss) for size, loss in losses.items()]))
    assert ("Warning: size" in parts) == (sizes is not None)


def test_sizes_in_bytes_are_compared_with_each_other_only() -> None:
    coded = {"bits_per_weight": 3.0}
    assert improbable([row(1.0, 3.0), row(0.8, 3.5), row(0.4, 3.1, **coded), row(0.3, 3.2, **coded)]) == []
    (warning,) = improbable([row(1.0, 3.0), row(0.4, 3.5, **coded), row(0.3, 3.1, **coded)])
    assert "size 0.30 of the bytes has perplexity" in warning and "larger size 0.40 of the bytes" in warning


def test_only_equal_measurements_are_compared() -> None:
    assert improbable([row(1.0, 3.0), row(0.8, 2.0, start="2")]) == []
    assert improbable([row(1.0, 3.0), row(0.8, 2.0, corpus="c4")]) == []
    assert improbable([row(1.0, 3.0), row(0.8, 2.0, float("inf"))]) == []  # one window has no standard error
    assert len(improbable([row(1.0, 3.0), row(0.8, 2.0), {**measured(1.0, 3.0)}])) == 1


def test_an_experiment_describes_the_axis_of_its_metrics(tmp_path: Path) -> None:
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path)})
    tracking = Tracking(settings, "acip/small")
    client, id = tracking.client, tracking.experiment_id
    note = client.get_experiment(id).tags[EXPERIMENT_NOTE]
    assert all(f"`{name}/*`" in note for name in ("tradeoff", "divergence")) and "percent" in note
    client.set_experiment_tag(id, EXPERIMENT_NOTE, "mine")
    Tracking(settings, "acip/small")
    assert client.get_experiment(id).tags[EXPERIMENT_NOTE] == "mine"  # a note of the user is kept
    client.create_experiment("acip/older")
    assert client.get_experiment(Tracking(settings, "acip/older").experiment_id).tags[EXPERIMENT_NOTE] == note

    table = f"/#/experiments/{id}/runs?workflowType=machine_learning"
    assert runs_page(settings, id) == "http://127.0.0.1:5000" + table
    served = Settings.from_env({"ACIP_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": "http://me:secret@mlflow:5000/"})
    assert runs_page(served, id).endswith("mlflow:5000" + table) and "secret" not in runs_page(served, id)
