"""MLflow runs: every step is logged once, outages lose nothing, and figures and descriptions show the right data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from acip_platform.reporting import figures
from acip_platform.reporting.mask_samples import MaskSamples
from acip_platform.reporting.text_samples import side_by_side
from acip_platform.scheduling.fleet import Job
from acip_platform.scheduling.job_queue import Outcome
from acip_platform.settings import Settings
from acip_platform.tracking import run_descriptions
from acip_platform.tracking.registry import RegistryError
from acip_platform.tracking.runs import BATCH, Run, Tracking, artifacts_inside
from acip_platform.training.worker import Observer
from mlflow.tracking import MlflowClient

from acip.artifact.artifact import Artifact
from acip.base import load_base
from acip.calibration.loop import calibrate
from acip.calibration.parametrize import parametrize
from acip.calibration.state import CalibrationState, StepReport
from acip.data import TokenBatches
from acip.evaluate import Samples, evaluate
from acip.evaluate.samples import PROMPTS
from acip.layers.svd_linear import SVDLinear
from acip.recipe import Recipe
from acip.sizing.elastic_model import ElasticModel
from acip.sizing.score_map import ScoreMap
from tests.support.waiting import until


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    return Tracking(Settings.from_env({"ACIP_HOME": str(tmp_path_factory.mktemp("home"))}), "fleet")


def observer(run: Run, recipe: Recipe | None = None, messages: list[str] | None = None) -> Observer:
    def emit(kind: str, **facts: Any) -> None:
        if messages is not None and kind == "stage":
            messages.append(facts["text"])

    return Observer(Job("small", "base", recipe or Recipe()), run, emit, torch.device("cpu"))


def state(values: list[float], pruning: bool = False) -> CalibrationState:
    """Return a state with the scores of two layers. With `pruning`, the layers have masks with the same values."""
    masks = {"blocks.0.q_proj": torch.tensor(values), "blocks.1.down_proj": torch.tensor([*values, 0.5])}
    layers = {name: masked_layer(mask) for name, mask in masks.items()} if pruning else {}
    return CalibrationState(layers, ScoreMap.start(masks), {}, None, 0.0, torch.zeros(1))  # type: ignore[arg-type]


def masked_layer(mask: torch.Tensor) -> SVDLinear:
    size = len(mask)
    layer = SVDLinear(torch.nn.Linear(size, size), torch.eye(size), torch.eye(size), mask_scale=0.02)
    layer.p.data = mask.clone()
    return layer


def report(step: int, phase: str = "post_tune", size: float = 0.7) -> StepReport:
    return StepReport(step, phase, 3.0 - step / 100, size, 0.1, 5, 0.5)  # type: ignore[arg-type]


def history(run: Run, key: str) -> list[int]:
    return [metric.step for metric in run.client.get_metric_history(run.run_id, key)]


def test_no_step_is_logged_twice(tracking: Tracking) -> None:
    """A worker that resumes from a checkpoint does not log steps that MLflow already has."""
    run = tracking.start("small", "resumed", {})
    first = observer(run)
    first([report(step) for step in range(1, 6)], state([0.1]))
    first.flush()
    second = observer(tracking.start("small", "resumed", {}))
    second([report(step) for step in range(4, 9)], state([0.1]))
    second.flush()
    second.flush()
    assert history(run, "loss_nats") == list(range(1, 9))
    assert history(run, "tokens_per_s") == list(range(1, 9))


def test_steps_lost_with_a_worker_come_from_the_checkpoint(tracking: Tracking) -> None:
    run = tracking.start("small", "died", {})
    first = observer(run)
    first([report(1), report(2)], state([0.1]))
    first.flush()
    first([report(3), report(4)], state([0.1]))  # the worker is killed before the next flush
    loaded = state([0.1])
    loaded.history = [report(step) for step in range(1, 6)]
    second = observer(run)
    second([report(5)], loaded)
    second.flush()
    assert history(run, "loss_nats") == [1, 2, 3, 4, 5]


def test_steps_wait_while_mlflow_is_down(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("acip_platform.training.worker.MLFLOW_REST_S", 1e6)
    run = tracking.start("small", "down", {})
    messages: list[str] = []
    live_observer = observer(run, messages=messages)
    live_observer([report(1), report(2)], state([0.1]))
    live_observer.flush()
    live_observer.run = Run(MlflowClient(tracking_uri="http://127.0.0.1:9"), run.run_id)  # no server listens on this port
    live_observer([report(3)], state([0.1]))
    live_observer.flush()
    live_observer([report(4)], state([0.1]))
    live_observer.flush()
    assert len(messages) == 1 and "1 steps are queued" in messages[0], "there is no immediate retry"
    live_observer.run, live_observer.rests_until = run, 0.0
    live_observer.flush()
    assert history(run, "loss_nats") == [1, 2, 3, 4]


def test_each_phase_logs_its_metrics(tracking: Tracking) -> None:
    run = tracking.start("small", "phases", {})
    live_observer = observer(run, Recipe(scores="order", stop_ratio=0.4))
    live_observer([report(1, "prune")], state([0.1]))
    live_observer([report(2, size=0.4), report(3)], state([0.1]))
    live_observer.flush()
    steps = {key: history(run, key) for key in ("loss_nats", "size_ratio", "lambda", "trained_size_ratio", "loss_at_stop_ratio_nats")}
    assert steps == {
        "loss_nats": [1, 2, 3], "size_ratio": [1], "lambda": [1], "trained_size_ratio": [2, 3], "loss_at_stop_ratio_nats": [2],
    }  # fmt: skip


def test_batches_do_not_split_steps(tracking: Tracking) -> None:
    run = tracking.start("small", "many", {})
    run.metrics([(step, {"a": 1.0, "b": 2.0, "c": 3.0}) for step in range(1, BATCH // 2)])
    assert history(run, "a") == history(run, "c") == list(range(1, BATCH // 2))


def test_a_changed_parameter_is_not_an_error(tracking: Tracking) -> None:
    """A resumed run may change gradient_checkpointing, because it is not part of the identity of a run."""
    job = Job("small", "base")
    run = tracking.start("small", "changed", {})
    run.params(run_descriptions.settings(job))
    second = tracking.start("small", "changed", {})
    second.params({**run_descriptions.settings(job), "gradient_checkpointing": True, "new": 1})
    params = run.client.get_run(run.run_id).data.params
    assert (params["gradient_checkpointing"], params["new"], params["eval_data"], params["recipe"]) == ("False", "1", "c4", "acip")


def test_child_runs_of_a_run(tracking: Tracking) -> None:
    parent = tracking.start("fleet", "parent", {})
    settings = Settings(Path(), "", "", tracking.client.tracking_uri)
    with pytest.raises(RegistryError, match="none has finished yet"):
        artifacts_inside(settings, parent.run_id)
    for name in ("a", "b"):
        tracking.start(name, f"child {name}", {"artifact_uri": f"/{name}"}, parent)
    tracking.start("c", "child c", {}, parent)
    assert artifacts_inside(settings, parent.run_id) == {"a": "/a", "b": "/b"}
    with pytest.raises(RegistryError, match="there is no run 'nonsense'"):
        artifacts_inside(settings, "nonsense")


@pytest.fixture(scope="module")
def observed_run(tracking: Tracking, small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor) -> tuple[Run, list[list[float]]]:
    """Return a run with an observed pruning, and the masks of its first layer after each step."""
    base = load_base(small_base, quick_recipe.dtype)
    parametrize(base.model, quick_recipe, golden_tokens)
    run = tracking.start("small", "watched", {})
    live_observer, masks_by_step = observer(run, quick_recipe), []

    def observe(reports: list[StepReport], state: CalibrationState) -> None:
        live_observer(reports, state)
        if state.masks:
            masks_by_step.append(state.masks[0].tolist())

    recipe = Recipe.from_dict({"post_tune_steps": 2, "stop_ratio": 0.7}, quick_recipe)
    calibrate(base.model, TokenBatches(golden_tokens, recipe.batch_size), recipe, observe=observe)
    live_observer.flush()
    return run, masks_by_step


def test_mask_samples_equal_the_masks(observed_run: tuple[Run, list[list[float]]]) -> None:
    run, masks_by_step = observed_run
    samples = MaskSamples(**run.read_json("masks.json"))
    assert samples.steps == list(range(1, len(masks_by_step) + 1)), "every pruning step has a sample"
    assert np.array(samples.values).shape == (len(masks_by_step), len(samples.layers), 8)
    expected_masks = [[round(masks[i], 7) for i in samples.directions[0]] for masks in masks_by_step]
    assert [step[0] for step in samples.values] == expected_masks
    figure = figures.mask_shrinkage(samples)
    assert [len(panel.lines) for panel in figure.axes[: len(samples.layers)]] == [8] * len(samples.layers)
    points: Any = figure.axes[0].lines[0].get_data()
    assert list(points[0]) == samples.steps and min(points[1]) >= 0


def test_only_new_mask_samples_are_sent(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    run, sent_steps = tracking.start("small", "sent", {}), list[int]()
    monkeypatch.setattr(Run, "json", lambda run, content, name: sent_steps.append(content["steps"][-1]))
    live_observer = observer(run)
    for step, phase in ((1, "prune"), (2, "prune"), (3, "post_tune"), (4, "post_tune")):
        live_observer([report(step, phase)], state([0.3, 0.2], pruning=phase == "prune"))
        live_observer.flush()
    assert sent_steps == [1, 2] and history(run, "loss_nats") == [1, 2, 3, 4]


def test_long_prunings_keep_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acip_platform.reporting.mask_samples.ROWS", 10)
    last_state = state([0.3, 0.2], pruning=True)
    samples = MaskSamples.of(last_state.scores)
    for step in range(1, 101):
        samples.take(last_state, step)
    assert len(samples.steps) <= 10
    assert samples.steps[0] == 1 and set(np.diff(samples.steps)) == {samples.every}
    assert samples.steps[-1] > 100 - samples.every
    kept = MaskSamples(**json.loads(json.dumps(samples.to_dict())))
    kept.take(last_state, samples.steps[-1])
    assert kept.steps == samples.steps, "a repeated step adds no sample"


def test_figures_show_the_numbers_of_the_artifact(small_artifact: Artifact) -> None:
    table = small_artifact.table()
    score_map: Any = figures.score_map(table)
    image: Any = score_map.axes[0].images[0].get_array()
    assert image.shape == (len(table.layers), max(layer.K for layer in table.layers))
    assert sorted(image.compressed() * len(table.order)) == pytest.approx(range(len(table.order))), "every direction appears once"
    assert all(np.all(np.diff(line.compressed()) < 0) for line in image), "in each layer, the most important direction is removed last"
    kept: Any = figures.kept_ranks(table, 0.6)
    ranks = table.cut(figures.Budget(ratio=0.6)).ranks
    shares = [1.0 if ranks[layer.name] is None else ranks[layer.name] / layer.K for layer in table.layers]  # type: ignore[operator]
    shown: Any = kept.axes[0].images[0].get_array()
    assert sorted(shown.ravel()) == pytest.approx(sorted(shares))
    assert figures.kept_ranks(table, 1e-6) is None


def curve(*losses: float) -> list[dict[str, Any]]:
    fields = {"corpus": "text", "context": 64, "stderr": 0.1, "extrapolated": False}
    return [{"got": 1 - 0.2 * i, "loss": loss, **fields} for i, loss in enumerate(losses)]


def plotted_values(figure: Any) -> list[float]:
    """Return the y values of the plotted points."""
    return [float(container.lines[0].get_ydata()[0]) for container in figure.axes[0].containers]


def test_curve_figures() -> None:
    assert plotted_values(figures.curves({"a": curve(1.0, 1.5)})) == pytest.approx([np.exp(1.5), np.exp(1.0)])
    assert plotted_values(figures.curves({"a": curve(1.0, 1.5), "b": curve(2.0, 2.1)}, quantity="excess")) == pytest.approx(
        [0.5, 0.0, 0.1, 0.0]
    )
    assert len(plotted_values(figures.curves({"a": curve(1.0, np.nan, 1.5)}))) == 2
    figure: Any = figures.curves({"a": curve(1.0, 1.5)}, {"svd": curve(1.0, 9.0)})
    wide = figure.axes[0]
    assert wide.get_yscale() == "log" and "log scale" in wide.get_ylabel()
    assert "text, 64 tokens" in wide.get_ylabel()
    same_name = figures.curves({"acip": curve(1.0, 1.5)}, {"acip": curve(1.0, 2.0)})
    assert len(plotted_values(same_name)) == 4, "a baseline may have the same name as a model"
    assert figures.curves({}) is None


def test_curves_are_drawn_over_bytes_and_flops() -> None:
    ranks = [{**row, "bytes": 1000 - 100 * i, "flops": 50 - 10 * i} for i, row in enumerate(curve(1.0, 1.5))]
    kl = {"kind": "divergence", "corpus": "text", "context": 64, "values": {"kl_nats": 0.25}}
    coded = {**ranks[0], "got": 0.4, "bytes": 400, "loss": 1.1, "bits_per_weight": 3.0, "evaluation": [kl]}
    rows, rival = [*ranks, coded], {"got": 0.3, "loss": 2.0, "convention": "bytes"}

    def points(figure: Any) -> list[tuple[float, float]]:
        lines = [container.lines[0] for container in figure.axes[0].containers]
        return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]

    over_bytes: Any = figures.curves({"a": rows}, {"rival": [rival, {"got": 0.9, "loss": 2.0}]}, "bytes", "excess")
    expected = [(0.4, 0.1), (1.0, 0.0), (0.9, 0.5), (1.0, 0.0), (0.3, 0.0)]
    assert points(over_bytes) == [pytest.approx(point) for point in expected], "codes, ranks, and the baseline in bytes"
    assert [text.get_text() for text in over_bytes.axes[0].get_legend().get_texts()] == ["a, codes", "a, ranks", "rival"]
    assert points(figures.curves({"a": rows}, over="bytes", quantity="kl")) == [pytest.approx((0.4, 0.25))]
    assert points(figures.curves({"a": rows}, over="flops", quantity="excess")) == [pytest.approx((0.8, 0.5)), pytest.approx((1.0, 0.0))]
    assert points(figures.curves({"a": rows}, {"rival": [rival]}, quantity="excess")) == points(
        figures.curves({"a": ranks}, quantity="excess")
    )
    assert figures.curves({"a": ranks}, over="bytes") is None, "there are no coded sizes"
    assert figures.curves({"a": curve(1.0, 1.5)}, over="flops") is None, "FLOPs of older curves are unknown"


def test_svg_uses_page_colors_and_escapes_text() -> None:
    def draw() -> Any:
        return figures.curves({"</svg><script>alert(1)</script> $x$": curve(1.0, 1.5)})

    text = figures.svg(draw)
    assert text.startswith("<svg viewBox=") and text == figures.svg(draw)
    assert "<script" not in text and "&lt;script&gt;" in text and "$x$" in text
    assert "var(--accent)" in text and "var(--soft)" in text and not any(stand_in in text for stand_in in figures.THEME)


def test_samples_are_greedy_continuations(any_size: ElasticModel, small_artifact: Artifact) -> None:
    tokenizer = small_artifact.tokenizer()
    rows = []
    for size in (1.0, 0.5):
        any_size.resize(size)
        rows.append({"asked": size, "evaluation": evaluate(any_size, tokenizer, [Samples()])["evaluation"]})
    table = side_by_side(rows)
    assert list(table) == ["size", *PROMPTS] and table["size"] == ["1.00", "0.50"]
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    any_size.resize(1.0)
    expected: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            logits = any_size.model(input_ids=torch.cat([ids, torch.tensor([expected], dtype=torch.long)], 1)).logits
        expected.append(int(logits[0, -1].argmax()))
    assert table[PROMPTS[0]][0].startswith(tokenizer.decode(expected[:4]))
    assert side_by_side([{"asked": 1.0}]) == {}


def test_row_metrics_have_units() -> None:
    row = {"asked": 0.6, "got": 0.59, "params": 7, "bytes": 14, "loss": 2.0, "stderr": 0.1, "perplexity": 7.4, "corpus": "x", "context": 64}
    row |= {"windows": 8, "extrapolated": True, "evaluation": []}
    assert run_descriptions.measured(row) == {"tradeoff/stored_bytes": 14.0, "tradeoff/loss_nats": 2.0, "tradeoff/perplexity": 7.4}
    assert run_descriptions.excess("a", [{**row, "asked": 1.0, "got": 1.0, "loss": 1.5}, row])[1] == (60, {"excess_loss_nats/a": 0.5})
    assert run_descriptions.excess("a", [row]) == []
    coded = {**row, "asked": 0.425, "bits_per_weight": 3.0, "flops": 9}
    assert run_descriptions.curve([coded]) == [
        (425, {"bytes/tradeoff/stored_bytes": 14.0, "bytes/tradeoff/loss_nats": 2.0, "bytes/tradeoff/perplexity": 7.4,
               "bytes/tradeoff/bits_per_weight": 3.0, "bytes/tradeoff/flops_per_token": 9.0})
    ]  # fmt: skip
    numbers = {"same_top_share": 0.9, "ppl": 9.0, "base_ppl": 8.0, "windows": 1, "tokens": 9}
    domains = {"code": {"kl_nats": 0.3, **numbers}, "x": {"kl_nats": 0.1, **numbers, "ppl": None}}
    assert run_descriptions.on_domains({**row, "domains": domains}) == {
        "kl_nats/code": 0.3, "kl_nats/x": 0.1, "kl_nats/worst_domain": 0.3, "kl_nats/mean_of_domains": pytest.approx(0.2),
        "same_top_share/code": 0.9, "same_top_share/x": 0.9, "perplexity/code": 9.0,
    }  # fmt: skip
    assert run_descriptions.curve([{**row, "domains": domains}])[0][1]["kl_nats/code"] == 0.3
    base = {**row, "asked": 1.0, "got": 1.0, "loss": 1.5}
    assert run_descriptions.excess("a", [base, coded])[1] == (425, {"bytes/excess_loss_nats/a": 0.5})


def test_fleet_description_names_failed_models() -> None:
    text = run_descriptions.of_fleet([Outcome(Job("a", "base"), None, "no | such\nbase")])
    assert "FAILED: no / such base" in text


def test_system_metrics_are_logged(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = tracking.start("small", "system", {})

    def logged() -> bool:
        return "system/cpu_utilization_percentage" in run.client.get_run(run.run_id).data.metrics

    with run.system_metrics():
        until(logged, "the run has no system metrics")
