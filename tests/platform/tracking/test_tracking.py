"""What a run holds: no step twice, nothing lost while MLflow is down, figures of the right data, words for a person."""

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


def observer(run: Run, recipe: Recipe | None = None, heard: list[str] | None = None) -> Observer:
    def say(kind: str, **facts: Any) -> None:
        if heard is not None and kind == "stage":
            heard.append(facts["text"])

    return Observer(Job("small", "base", recipe or Recipe()), run, say, torch.device("cpu"))


def state(values: list[float], pruning: bool = False) -> CalibrationState:
    """Return a state with the scores of two layers. During `pruning`, the layers have masks with the same values."""
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
    """A worker that goes on from a checkpoint repeats steps that MLflow has."""
    run = tracking.start("small", "resumed", {})
    first = observer(run)
    first([report(step) for step in range(1, 6)], state([0.1]))
    first.flush()
    again = observer(tracking.start("small", "resumed", {}))
    again([report(step) for step in range(4, 9)], state([0.1]))
    again.flush()
    again.flush()
    assert history(run, "loss_nats") == list(range(1, 9))
    assert history(run, "tokens_per_s") == list(range(1, 9))


def test_steps_that_died_with_their_worker_come_from_the_checkpoint(tracking: Tracking) -> None:
    run = tracking.start("small", "died", {})
    first = observer(run)
    first([report(1), report(2)], state([0.1]))
    first.flush()
    first([report(3), report(4)], state([0.1]))  # and then it was killed
    loaded = state([0.1])
    loaded.history = [report(step) for step in range(1, 6)]
    again = observer(run)
    again([report(5)], loaded)
    again.flush()
    assert history(run, "loss_nats") == [1, 2, 3, 4, 5]


def test_steps_wait_while_mlflow_is_down(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("acip_platform.training.worker.MLFLOW_REST_S", 1e6)
    run = tracking.start("small", "down", {})
    heard: list[str] = []
    watching = observer(run, heard=heard)
    watching([report(1), report(2)], state([0.1]))
    watching.flush()
    watching.run = Run(MlflowClient(tracking_uri="http://127.0.0.1:9"), run.run_id)  # nothing listens there
    watching([report(3)], state([0.1]))
    watching.flush()
    watching([report(4)], state([0.1]))
    watching.flush()
    assert len(heard) == 1 and "1 steps are queued" in heard[0], "it is not asked again at once"
    watching.run, watching.rests_until = run, 0.0
    watching.flush()
    assert history(run, "loss_nats") == [1, 2, 3, 4]


def test_metrics_fit_their_phase(tracking: Tracking) -> None:
    run = tracking.start("small", "phases", {})
    watching = observer(run, Recipe(scores="order", stop_ratio=0.4))
    watching([report(1, "prune")], state([0.1]))
    watching([report(2, size=0.4), report(3)], state([0.1]))
    watching.flush()
    steps = {key: history(run, key) for key in ("loss_nats", "size_ratio", "lambda", "trained_size_ratio", "loss_at_stop_ratio_nats")}
    assert steps == {
        "loss_nats": [1, 2, 3], "size_ratio": [1], "lambda": [1], "trained_size_ratio": [2, 3], "loss_at_stop_ratio_nats": [2],
    }  # fmt: skip


def test_a_batch_holds_whole_steps(tracking: Tracking) -> None:
    run = tracking.start("small", "many", {})
    run.metrics([(step, {"a": 1.0, "b": 2.0, "c": 3.0}) for step in range(1, BATCH // 2)])
    assert history(run, "a") == history(run, "c") == list(range(1, BATCH // 2))


def test_a_parameter_that_changed_is_no_error(tracking: Tracking) -> None:
    """Recomputing is not part of what a run is, so a resumed run may have changed it."""
    job = Job("small", "base")
    run = tracking.start("small", "changed", {})
    run.params(run_descriptions.settings(job))
    again = tracking.start("small", "changed", {})
    again.params({**run_descriptions.settings(job), "gradient_checkpointing": True, "new": 1})
    params = run.client.get_run(run.run_id).data.params
    assert (params["gradient_checkpointing"], params["new"], params["eval_data"], params["recipe"]) == ("False", "1", "c4", "acip")


def test_runs_inside_a_run(tracking: Tracking) -> None:
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
def watched(tracking: Tracking, small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor) -> tuple[Run, list[list[float]]]:
    """A run whose pruning was watched, and the masks of its first layer after each step."""
    base = load_base(small_base, quick_recipe.dtype)
    parametrize(base.model, quick_recipe, golden_tokens)
    run = tracking.start("small", "watched", {})
    watching, seen = observer(run, quick_recipe), []

    def observe(reports: list[StepReport], state: CalibrationState) -> None:
        watching(reports, state)
        if state.masks:
            seen.append(state.masks[0].tolist())

    recipe = Recipe.from_dict({"post_tune_steps": 2, "stop_ratio": 0.7}, quick_recipe)
    calibrate(base.model, TokenBatches(golden_tokens, recipe.batch_size), recipe, observe=observe)
    watching.flush()
    return run, seen


def test_example_masks_are_the_masks(watched: tuple[Run, list[list[float]]]) -> None:
    run, seen = watched
    samples = MaskSamples(**run.read_json("masks.json"))
    assert samples.steps == list(range(1, len(seen) + 1)), "while there are masks, every step"
    assert np.array(samples.values).shape == (len(seen), len(samples.layers), 8)
    picked = [[round(masks[i], 7) for i in samples.directions[0]] for masks in seen]
    assert [step[0] for step in samples.values] == picked
    figure = figures.mask_shrinkage(samples)
    assert [len(panel.lines) for panel in figure.axes[: len(samples.layers)]] == [8] * len(samples.layers)
    points: Any = figure.axes[0].lines[0].get_data()
    assert list(points[0]) == samples.steps and min(points[1]) >= 0


def test_example_masks_are_sent_when_there_are_new_ones(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    run, sent = tracking.start("small", "sent", {}), list[int]()
    monkeypatch.setattr(Run, "json", lambda run, content, name: sent.append(content["steps"][-1]))
    watching = observer(run)
    for step, phase in ((1, "prune"), (2, "prune"), (3, "post_tune"), (4, "post_tune")):
        watching([report(step, phase)], state([0.3, 0.2], pruning=phase == "prune"))
        watching.flush()
    assert sent == [1, 2] and history(run, "loss_nats") == [1, 2, 3, 4]


def test_long_prunings_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acip_platform.reporting.mask_samples.ROWS", 10)
    looked = state([0.3, 0.2], pruning=True)
    samples = MaskSamples.of(looked.scores)
    for step in range(1, 101):
        samples.take(looked, step)
    assert len(samples.steps) <= 10
    assert samples.steps[0] == 1 and set(np.diff(samples.steps)) == {samples.every}
    assert samples.steps[-1] > 100 - samples.every
    kept = MaskSamples(**json.loads(json.dumps(samples.to_dict())))
    kept.take(looked, samples.steps[-1])
    assert kept.steps == samples.steps, "an attempt that repeats a step adds nothing"


def test_figures_show_the_artifacts_numbers(small_artifact: Artifact) -> None:
    table = small_artifact.table()
    picture: Any = figures.score_map(table).axes[0].images[0].get_array()
    assert picture.shape == (len(table.layers), max(layer.K for layer in table.layers))
    assert sorted(picture.compressed() * len(table.order)) == pytest.approx(range(len(table.order))), "every direction once"
    assert all(np.all(np.diff(line.compressed()) < 0) for line in picture), "in each layer, the most important stays longest"
    kept: Any = figures.kept_ranks(table, 0.6)
    ranks = table.cut(figures.Budget(ratio=0.6)).ranks
    shares = [1.0 if ranks[layer.name] is None else ranks[layer.name] / layer.K for layer in table.layers]  # type: ignore[operator]
    shown: Any = kept.axes[0].images[0].get_array()
    assert sorted(shown.ravel()) == pytest.approx(sorted(shares))
    assert figures.kept_ranks(table, 1e-6) is None


def curve(*losses: float) -> list[dict[str, Any]]:
    known = {"corpus": "text", "context": 64, "stderr": 0.1, "extrapolated": False}
    return [{"got": 1 - 0.2 * i, "loss": loss, **known} for i, loss in enumerate(losses)]


def drawn(figure: Any) -> list[float]:
    """The heights of the points of the first curve."""
    return [float(container.lines[0].get_ydata()[0]) for container in figure.axes[0].containers]


def test_curves_over_each_other() -> None:
    assert drawn(figures.curves({"a": curve(1.0, 1.5)})) == pytest.approx([np.exp(1.5), np.exp(1.0)])
    assert drawn(figures.curves({"a": curve(1.0, 1.5), "b": curve(2.0, 2.1)}, excess=True)) == pytest.approx([0.5, 0.0, 0.1, 0.0])
    assert len(drawn(figures.curves({"a": curve(1.0, np.nan, 1.5)}))) == 2
    wide = figures.curves({"a": curve(1.0, 1.5)}, {"svd": curve(1.0, 9.0)}).axes[0]
    assert wide.get_yscale() == "log" and "log scale" in wide.get_ylabel()
    assert "text, 64 tokens" in wide.get_ylabel()
    assert len(drawn(figures.curves({"acip": curve(1.0, 1.5)}, {"acip": curve(1.0, 2.0)}))) == 4, "a baseline of the same name"


def test_an_svg_takes_its_colors_from_the_page_and_escapes_its_text() -> None:
    def draw() -> Any:
        return figures.curves({"</svg><script>alert(1)</script> $x$": curve(1.0, 1.5)})

    text = figures.svg(draw)
    assert text.startswith("<svg viewBox=") and text == figures.svg(draw)
    assert "<script" not in text and "&lt;script&gt;" in text and "$x$" in text
    assert "var(--accent)" in text and "var(--soft)" in text and not any(stand_in in text for stand_in in figures.THEME)


def test_samples_are_what_the_model_says(any_size: ElasticModel, small_artifact: Artifact) -> None:
    tokenizer = small_artifact.tokenizer()
    rows = []
    for size in (1.0, 0.5):
        any_size.resize(size)
        rows.append({"asked": size, "evaluation": evaluate(any_size, tokenizer, [Samples()])["evaluation"]})
    table = side_by_side(rows)
    assert list(table) == ["size", *PROMPTS] and table["size"] == [1.0, 0.5]
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    any_size.resize(1.0)
    expected: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            logits = any_size.model(input_ids=torch.cat([ids, torch.tensor([expected], dtype=torch.long)], 1)).logits
        expected.append(int(logits[0, -1].argmax()))
    assert table[PROMPTS[0]][0].startswith(tokenizer.decode(expected[:4]))
    assert side_by_side([{"asked": 1.0}]) == {}


def test_a_row_becomes_metrics_with_units() -> None:
    row = {"asked": 0.6, "got": 0.59, "params": 7, "bytes": 14, "loss": 2.0, "stderr": 0.1, "perplexity": 7.4, "corpus": "x", "context": 64}
    row |= {"windows": 8, "extrapolated": True, "evaluation": []}
    assert run_descriptions.measured(row) == {"tradeoff/stored_bytes": 14.0, "tradeoff/loss_nats": 2.0, "tradeoff/perplexity": 7.4}
    assert run_descriptions.excess("a", [{**row, "asked": 1.0, "got": 1.0, "loss": 1.5}, row])[1] == (60, {"excess_loss_nats/a": 0.5})
    assert run_descriptions.excess("a", [row]) == []


def test_a_fleets_story_tells_who_failed() -> None:
    told = run_descriptions.of_fleet([Outcome(Job("a", "base"), None, "no | such\nbase")])
    assert "FAILED: no / such base" in told


def test_system_metrics_are_in_the_run(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = tracking.start("small", "system", {})

    def logged() -> bool:
        return "system/cpu_utilization_percentage" in run.client.get_run(run.run_id).data.metrics

    with run.system_metrics():
        until(logged, "the run has no metrics of the machine")
