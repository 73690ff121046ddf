"""`python jobs/evaluate.py` measures sizes as Ray tasks. After a crash, a second run measures only the missing parts."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from acip_platform.evaluation.measure import SIZE_FACTS, Model, Parts, _measure, measure_sizes, measure_tasks, record
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Run, Tracking

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST
from acip.data import documents, token_windows
from acip.errors import ArtifactError, BudgetError, EvaluationError
from acip.evaluate import CurveSetup, DivergenceOn, PerplexityOn, QuantizedOn, Samples, Text, evaluate, trade_off
from acip.sizing.budget import Budget, is_coded
from jobs import evaluate as evaluate_job
from tests.acip.artifact.test_codes_file import calibrated_with_codes, llama
from tests.conftest import byte_tokenizer
from tests.support.near_ties import assert_close_divergence

TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {validation: items.jsonl}}
output_type: multiple_choice
validation_split: validation
process_docs: !function utils.kill_once
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: "{{[' yes', ' no']}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
KILL_ONCE = """\
import os, pathlib, signal

def kill_once(docs):
    try:
        pathlib.Path(os.environ["ACIP_HOME"], "died").mkdir()
    except FileExistsError:
        return docs
    os.kill(os.getpid(), signal.SIGKILL)
"""


def with_curve(artifact: Artifact, folder: Path) -> Artifact:
    """Return a copy of the artifact with a measured curve in `folder`."""
    folder.mkdir(parents=True)
    for file in (*artifact.manifest["files"], MANIFEST):
        (folder / file).hardlink_to(artifact.folder / file)
    copy = Artifact.open(folder)
    windows = token_windows(documents("package:wikipedia", "heldout"), byte_tokenizer(), 64, 4)
    return copy.record_curve(list(trade_off(copy.load(), (1.0, 0.5), CurveSetup(windows, "package:wikipedia", copy.recipe.stop_ratio))))


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Return a function that runs the job in this process with its own home. Its Ray keeps running for the next call."""
    from jobs import evaluate

    for name in ("ACIP_ARTIFACT_URI", "ACIP_CHECKPOINT_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACIP_HOME", str(tmp_path / "home"))
    stop = ray.shutdown
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def start(settings: Settings) -> None:
        if not ray.is_initialized():
            variables = settings.worker_env()
            ray.init(
                address="local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False,
                runtime_env={"env_vars": variables},
            )  # fmt: skip

    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(evaluate, "connect", start)
        try:
            code = evaluate.main(args)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    yield run
    stop()


def test_a_second_run_measures_only_what_a_crash_lost(
    small_artifact: Artifact, tmp_path: Path, command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, tasks = tmp_path / "home", tmp_path / "tasks"
    settings = Settings.from_env()
    artifact = with_curve(small_artifact, home / "artifacts" / "small")
    registry = Registry(settings)
    registry.set_alias(registry.register("small", str(artifact.folder), "", {}))
    tasks.mkdir()
    (tasks / "mine.yaml").write_text(TASK)
    (tasks / "utils.py").write_text(KILL_ONCE)
    (tasks / "items.jsonl").write_text("".join(json.dumps({"question": f"Is {i} odd?", "gold": 1 - i % 2}) + "\n" for i in range(6)))
    arguments = ["--model", "small", "--sizes", "1.0", "0.7", "--tasks", "mine", "--task-folder", str(tasks), "--new-tokens", "3",
             "--prompt-tokens", "8", "--skip", "samples", "--cpus", "2"]  # fmt: skip

    code, output = command(*arguments)
    assert code == 1, output
    assert "1 of 2 sizes measured" in output and "FAILED" in output and "Run the same command again" in output
    (file,) = (home / "evaluations").glob("small-*.json")
    (finished_row,) = json.loads(file.read_text())
    assert [part["kind"] for part in finished_row["evaluation"]] == ["perplexity", "divergence", "task", "efficiency"]
    parts = {path: path.stat().st_mtime_ns for path in (home / "artifacts" / "evaluations").rglob("part.json")}
    assert len(parts) == 4 + 2, "parts measured before the crash are kept, and the curve has the perplexity at 1.0"

    code, output = command(*arguments)
    assert code == 0, output
    assert "2 of 2 sizes measured" in output
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    rows = json.loads(file.read_text())
    assert [row["asked"] for row in rows] == [1.0, 0.7]
    assert finished_row in rows
    assert f"[size {finished_row['asked']:g}]" not in output, "this size was not measured again"

    tracking = Tracking(settings, "acip/evaluation")
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    assert run.info.status == "FINISHED"
    for name in ("task/mine/acc", "efficiency/prompt8_new_tokens3/stored_bytes", "divergence/wikipedia_packed_64/kl_nats", "size/params"):
        history = tracking.client.get_metric_history(run.info.run_id, name)
        assert sorted(metric.step for metric in history) == [70, 100], "each size is logged once"
    monkeypatch.setattr(Store, "record_curve", lambda *_: (_ for _ in ()).throw(StoreError("read only")))
    code, output = command(*arguments[:2], "--sizes", "0.5", *arguments[5:])
    assert code == 0 and "the curve of the artifact was not changed: read only" in output and "1 of 1 sizes measured" in output
    assert [row["asked"] for row in json.loads(file.read_text())] == [1.0, 0.7, 0.5], "rows of earlier runs stay"
    assert [row["asked"] for row in Run(tracking.client, run.info.run_id).read_json("evaluation.json")] == [1.0, 0.7, 0.5]

    curve = Artifact.open(artifact.folder).curve
    assert [row["asked"] for row in curve] == [1.0, 0.7, 0.5], "a new size measured on the text of the curve is added to it"
    assert [len(row.get("evaluation", [])) for row in curve] == [4, 4, 0]
    assert next(part for part in curve[0]["evaluation"] if part["kind"] == "divergence")["values"]["kl_nats"] == 0.0


def test_known_measurements_load_no_model(small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    task: Any = _measure
    events = SimpleNamespace(put=SimpleNamespace(remote=lambda event: None))

    def measure(model: Model, size: float) -> Any:
        return task._function(model, Budget(size), [Samples(("It was",))], settings, 1, events)

    artifact, base = Model(str(small_artifact.folder)), Model(base=small_artifact.manifest["base"]["source"])
    first = [measure(artifact, 0.6), measure(base, 1.0)]
    calibrated = Model(str(with_curve(small_artifact, tmp_path / "with-curve").folder))
    assert [row["asked"] for row in first] == [0.6, 1.0] and all("bytes" in row for row in first)
    for name in ("acip.artifact.artifact.Artifact.load", "acip_platform.evaluation.measure.load_base"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("the model was loaded"))
    assert [measure(artifact, 0.6), measure(base, 1.0)] == first

    row = task._function(calibrated, Budget(0.5), [PerplexityOn(Text(context=64, windows=4))], settings, 1, events)
    curve_row = Artifact.open(calibrated.uri).curve[-1]
    perplexity = row["evaluation"][0]["values"]["perplexity"]
    assert (row["asked"], perplexity) == (0.5, curve_row["perplexity"]), "the perplexity comes from the curve"
    assert {key: row[key] for key in ("got", "params", "bytes")} == {key: curve_row[key] for key in ("got", "params", "bytes")}


def test_another_model_is_compared_with_a_reference(small_artifact: Artifact, exported: Path, small_base: str, tmp_path: Path) -> None:
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    task: Any = _measure
    events = SimpleNamespace(put=SimpleNamespace(remote=lambda event: None))
    divergence = DivergenceOn(Text("package:austen", context=64, windows=4))

    def measure(reference: str) -> Any:
        metrics = [replace(divergence, reference=reference), PerplexityOn(divergence.text)]
        return task._function(Model(base=str(exported), dtype="float32"), Budget(1.0), metrics, settings, 1, events)

    part, alone = measure(small_base)["evaluation"]
    any_size = small_artifact.load(size=0.6)
    (expected,) = evaluate(any_size, small_artifact.tokenizer(), [divergence])["evaluation"]
    assert part["key"] != expected["key"] and part["values"]["kl_nats"] > 1e-3
    assert_close_divergence(part["values"], expected["values"], 1e-3, 4 * 64)
    again = measure(str(exported))["evaluation"]
    assert again[0]["values"]["kl_nats"] == 0.0, "another reference gives a new measurement"
    assert again[1] == alone, "other measurements do not depend on the reference"
    other = tmp_path / "other"
    shutil.copytree(small_base, other)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    assert "has another vocabulary than" in measure(str(other))["error"]


@pytest.mark.parametrize(("node", "cpus"), [({"CPU": 2.0}, 3.0), ({"CPU": 2.0, "GPU": 1.0}, 3.0)])
def test_resources_that_no_node_has_are_refused(node: dict[str, float], cpus: float, tmp_path: Path) -> None:
    """A request must fit on one node. Two smaller nodes do not help: Ray would wait forever."""
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path)})
    with pytest.raises(EvaluationError, match=r"needs [01] GPUs and 3 CPUs; no node has them"):
        next(measure_sizes(Model("x"), (Budget(1.0), Budget(0.5)), [], settings, None, [node, node], cpus))


def test_parts_and_curves_are_kept_on_s3(
    small_artifact: Artifact, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key, value in s3_server.items():
        monkeypatch.setenv(key, value)
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home"), "ACIP_ARTIFACT_URI": "s3://models/evaluated"})
    artifact = with_curve(small_artifact, tmp_path / "small")
    store = Store(settings.store, settings.home / "cache")
    uri = store.put(artifact.folder, "small")
    parts = Parts.of(settings, Model(uri), (opened := store.open(uri)), opened.table().cut(Budget(ratio=0.7)))
    assert "abc" not in parts
    part = {"kind": "task", "key": "abc", "label": "task/x", "values": {"acc": 0.5}}
    parts["abc"] = part
    assert "abc" in parts and parts["abc"] == part
    row: dict[str, Any] = {**artifact.curve[1], "evaluation": [part]}
    assert record(store, uri, [row, {**row, "asked": 0.9, "got": 0.9}])[1] == [0.9]
    read = store.open(uri)
    assert [row.get("evaluation") for row in read.curve] == [None, [part]]
    assert Model(uri).identity(read) == Model(uri).identity(artifact), "a longer curve does not change the identity"


def test_a_fleet_measures_its_tasks(small_artifact: Artifact, tmp_path: Path) -> None:
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    artifact = with_curve(small_artifact, tmp_path / "small")
    run = Tracking(settings, "acip/small").start("small", "small", {})
    job = Job("small", "b/c", sizes=(1.0, 0.5, 0.001), tasks=("package:piqa", "package:piqa"), task_limit=3)
    messages: list[str] = []
    for _ in range(2):  # the second pass is a worker that restarts after all measurements
        measured = measure_tasks(job, artifact, artifact.load(), str(artifact.folder), run, settings, lambda _, text: messages.append(text))
        assert measured.curve == Artifact.open(artifact.folder).curve
        assert [[part["label"] for part in row["evaluation"]] for row in measured.curve] == [["task/package_piqa_first3"]] * 2
        assert [row["evaluation"][0]["items"] for row in measured.curve] == [3, 3]
    assert len([text for text in messages if text.startswith("task/package_piqa_first3: acc ")]) == 2
    assert sorted(run.steps("task/package_piqa_first3/acc")) == [50, 100]
    assert measure_tasks(replace(job, tasks=()), artifact, artifact.load(), "", run, settings, lambda _, text: None) is artifact


@pytest.fixture(scope="module")
def coded_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Return an artifact whose layers are also coded, with a curve over ranks and over bytes."""
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(llama())
    artifact = Artifact.save(tmp_path_factory.mktemp("coded") / "coded", base, calibration, {}, codes)
    windows = token_windows(documents("package:wikipedia", "heldout"), byte_tokenizer(), 32, 4)
    sizes: list[Budget | float] = [1.0, 0.5, *(Budget(size, "bytes") for size in (0.56, 0.52))]
    return artifact.record_curve(trade_off(artifact.load(), sizes, CurveSetup(windows, "package:wikipedia", artifact.recipe.stop_ratio)))


def test_a_number_is_a_share_of_the_bytes_of_an_artifact_with_codes(
    coded_artifact: Artifact, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    folder = shutil.copytree(coded_artifact.folder, tmp_path / "coded")
    arguments = ["--artifact", str(folder), "--new-tokens", "3", "--prompt-tokens", "8", "--skip", "samples"]
    code, output = command(*arguments, "--sizes", "1.0", "0.54")
    assert code == 0, output
    assert "sizes 1 (bytes), 0.54 (bytes)" in " ".join(output.split())
    code, output = command(*arguments, "--sizes", "0.54", "--convention", "linear")
    assert code == 0, output
    assert "sizes 0.54 measured" in " ".join(output.split())
    (file,) = (tmp_path / "home" / "evaluations").glob("coded-*.json")
    base, ranks, coded = json.loads(file.read_text())
    table = coded_artifact.table()
    assert coded["got"] == table.cut(Budget(0.54, "bytes")).sizes["bytes"]
    assert ranks["got"] == table.cut(Budget(0.54)).sizes["linear"]
    assert base["got"] == 1.0
    values = {row["got"]: {part["kind"]: part["values"] for part in row["evaluation"]} for row in (ranks, coded)}
    assert values[coded["got"]]["efficiency"]["stored_bytes"] == coded["bytes"]
    assert values[coded["got"]]["divergence"] != values[ranks["got"]]["divergence"], "parts of different models have different places"

    curve = Artifact.open(folder).curve
    assert [(row["asked"], is_coded(row)) for row in curve] == [
        (1.0, False),
        (0.54, False),
        (0.5, False),
        (0.56, True),
        (0.54, True),
        (0.52, True),
    ]
    tracking = Tracking(Settings.from_env(), "acip/evaluation")
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    for name, step in (("size/got", {100, 54}), ("bytes/size/got", {540})):
        assert {metric.step for metric in tracking.client.get_metric_history(run.info.run_id, name)} == step


def test_the_sizes_of_a_curve_are_measured_in_their_conventions(coded_artifact: Artifact) -> None:
    args = evaluate_job.arguments(["--artifact", str(coded_artifact.folder)])
    expected = [Budget(1.0), Budget(0.5), Budget(0.56, "bytes"), Budget(0.52, "bytes")]
    assert evaluate_job.sizes_of(args, coded_artifact) == expected
    args = evaluate_job.arguments(["--artifact", str(coded_artifact.folder), "--sizes", "0.6", "--convention", "paper"])
    assert evaluate_job.sizes_of(args, coded_artifact) == [Budget(0.6, "paper")]


def test_only_sizes_of_ranks_are_quantized(coded_artifact: Artifact) -> None:
    def sizes(*options: str) -> list[Budget]:
        arguments = evaluate_job.arguments(["--artifact", str(coded_artifact.folder), "--quantize", "nf4", *options])
        return evaluate_job.sizes_of(arguments, coded_artifact)

    assert sizes() == [Budget(1.0), Budget(0.5)], "the coded sizes of the curve are left out"
    assert sizes("--sizes", "0.6") == [Budget(0.6)]
    with pytest.raises(BudgetError, match=r"size 0\.56 \(bytes\) is stored in codes"):
        sizes("--sizes", "0.56", "--convention", "bytes")
    windows = Text("package:wikipedia", context=32, windows=1)
    any_size = coded_artifact.load(size=Budget(0.56, "bytes"))
    with pytest.raises(ArtifactError, match="can't be quantized to nf4"):
        evaluate(any_size, byte_tokenizer(), [QuantizedOn(windows)])


def test_a_coded_size_is_known_from_the_curve(coded_artifact: Artifact, tmp_path: Path) -> None:
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home")})
    model, table = Model(str(coded_artifact.folder)), coded_artifact.table()
    for row in coded_artifact.curve:
        parts = Parts.of(settings, model, coded_artifact, table.cut(Budget(row["asked"], row["convention"])))
        assert parts["size"] == {key: row[key] for key in SIZE_FACTS if key in row}
    places = {Parts.of(settings, model, coded_artifact, table.cut(Budget(size, "bytes"))).place for size in (0.52, 0.56)}
    assert len(places | {Parts.of(settings, model, coded_artifact, table.cut(Budget(1.0))).place}) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "package:piqua"], "did you mean 'package:piqa'"),
        (["--sizes", "0.5", "0.0001"], "size 0.0001 (linear) can't be reached: the smallest is"),
        (["--sizes", "1.5"], "size ratio is 1.5"),
        (["--data", "package:wiki"], "acip includes no text 'wiki' (did you mean"),
        (["--data", "c4"], "c4 can't be fetched from the hub"),
        (["--protocol", "feild"], "did you mean 'field'"),
        (["--sizes", "8GB"], "'8GB' is not a size ratio"),
        (["--convention", "bytes"], "--convention needs --sizes"),
        (["--all-documents"], "--all-documents needs --data"),
        (["--out", "."], "Is a directory"),
        (["--pool", "many"], "the pool is 'many'; it must be like 8xGPU:1,CPU:14"),
    ],
)
def test_invalid_arguments_are_refused_before_work_starts(
    args: list[str], message: str, small_artifact: Artifact, command: Callable[..., tuple[int, str]]
) -> None:
    code, output = command("--artifact", str(small_artifact.folder), *args)
    assert code == 2 and message in " ".join(output.split())
    assert not ray.is_initialized()
