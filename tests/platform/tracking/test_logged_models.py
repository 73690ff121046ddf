"""MLflow's LoggedModels: each size is one, nothing is logged twice, and versions, fine-tunings and exports lead to each other."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from acip_platform.settings import Settings
from acip_platform.tracking import logged_models
from acip_platform.tracking.datasets import dataset_of, digest
from acip_platform.tracking.logged_models import Description, log_artifact, log_models
from acip_platform.tracking.registry import Registry, RegistryError
from acip_platform.tracking.runs import Run, Tracking
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException

from acip.artifact.artifact import Artifact
from acip.evaluate import DivergenceOn, Text
from acip.evaluate.measurement import part_of
from acip.export.folder import export
from acip.sizing.budget import Budget
from jobs import migrate
from tests.conftest import byte_tokenizer

TEXT = Text("package:wikipedia", context=64, windows=2)
KL = {1.0: 0.0, 0.8: 0.02, 0.6: 0.04, 0.4: 0.4}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("ACIP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Settings.from_env()


@pytest.fixture
def run(settings: Settings) -> Run:
    return Tracking(settings, "acip/test").start("small", "fingerprint", {"model": "small"})


@pytest.fixture
def artifact(small_artifact: Artifact, tmp_path: Path) -> Artifact:
    """Copy the small artifact, with a curve of four sizes."""
    copy = Artifact.open(shutil.copytree(small_artifact.folder, tmp_path / "artifact"))
    rows = []
    for size, kl in KL.items():
        cut = copy.table().cut(Budget(ratio=size))
        outcome = DivergenceOn(TEXT).outcome([(kl, 0.9)] * 2)
        about = {"corpus": TEXT.source, "protocol": TEXT.protocol, "context": TEXT.context, "windows": 2}
        row = {"asked": size, "got": cut.got, "convention": "linear", "params": cut.params, "bytes": cut.bytes, "flops": 1000}
        quality = {"loss": 2.0 + kl, "stderr": 0.1, "perplexity": 8.0 + kl, "extrapolated": False}
        rows.append({**row, **quality, **about, "evaluation": [part_of(DivergenceOn(TEXT), outcome)]})
    return copy.record_curve(rows)


def models_of(run: Run, query: str = "", **options: Any) -> list[LoggedModel]:
    return list(run.client.search_logged_models([run.experiment_id], query, **options))


def state(run: Run) -> Any:
    """Return everything that is logged, without times and ids."""
    info: Any = run.client.get_run(run.run_id)
    models = [
        (model.name, model.tags, model.params, sorted((metric.key, metric.value, metric.dataset_digest) for metric in model.metrics or ()))
        for model in models_of(run)
    ]
    return models, len(info.outputs.model_outputs), [each.dataset.digest for each in info.inputs.dataset_inputs]


def test_smallest_size_that_is_good_enough(run: Run, artifact: Artifact) -> None:
    log_artifact(run, "small", artifact, str(artifact.folder))
    found = models_of(run, "metrics.kl < 0.05", order_by=[{"field_name": "metrics.bytes"}])
    assert [model.name for model in found] == [
        "small, 60 percent of numbers", "small, 80 percent of numbers", "small, the base model",
    ]  # fmt: skip
    smallest = found[0]
    assert smallest.status == LoggedModelStatus.READY
    row = next(row for row in artifact.curve if row["asked"] == 0.6)
    assert smallest.params["bytes"] == str(row["bytes"]) and smallest.params["method"] == "acip"
    metrics = {metric.key: metric for metric in smallest.metrics or ()}
    assert (metrics["kl"].value, metrics["perplexity"].value, metrics["bytes"].value) == (0.04, 8.04, row["bytes"])
    tokens = digest(TEXT.tokens(artifact.tokenizer()))
    assert {metrics["kl"].dataset_digest, metrics["perplexity"].dataset_digest} == {tokens}
    assert metrics["bytes"].dataset_digest is None and metrics["kl"].run_id == run.run_id
    logged: Any = run.client.get_run(run.run_id)
    (used,) = logged.inputs.dataset_inputs
    assert used.dataset.digest == tokens and json.loads(used.dataset.source) == {"text": "package:wikipedia", "split": "heldout"}
    (whole,) = models_of(run, "model_type = 'any-size'")
    assert whole.name == "small" and whole.tags["artifact_uri"] == str(artifact.folder)


def test_nothing_is_logged_twice(run: Run, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is killed at any request and repeated leaves the same as one that is not."""
    calls = ["create_logged_model", "log_inputs", "log_outputs", "log_batch", "finalize_logged_model"]
    for call in calls:
        with monkeypatch.context() as patch:
            patch.setattr(run.client, call, lambda *_, **__: (_ for _ in ()).throw(MlflowException("killed")))
            with pytest.raises(MlflowException, match="killed"):
                log_artifact(run, "small", artifact, str(artifact.folder))
    ids = log_artifact(run, "small", artifact, str(artifact.folder))
    before = state(run)
    assert len(before[0]) == before[1] == 5 and len(before[2]) == 1
    assert log_artifact(run, "small", artifact, str(artifact.folder)) == ids
    assert state(run) == before


def test_two_processes_create_one_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Description("key", "small", "size", {"size": 1}, {}, [({"kl": 0.5}, None)])
    create = run.client.create_logged_model

    def with_a_rival(*args: Any) -> Any:
        create(*args)
        return create(*args)

    monkeypatch.setattr(run.client, "create_logged_model", with_a_rival)
    (id,) = log_models(run, [model])
    assert [each.model_id for each in models_of(run)] == [id]
    assert log_models(run, [model]) == [id]


def test_deleted_experiment_is_named_and_receives_no_models(settings: Settings, run: Run, artifact: Artifact) -> None:
    """A person has deleted the experiment of a calibration in MLflow's UI, and evaluates or fine-tunes its artifact."""
    made = dataclasses.replace(artifact, manifest=artifact.manifest | {"provenance": {"mlflow_run": run.run_id}})
    evaluation = Tracking(settings, "acip/evaluation").start("small", "evaluation", {})
    assert logged_models.experiment_of(evaluation, made) == run.experiment_id
    assert logged_models.experiment_name(settings, made, "acip/finetune") == "acip/test"
    run.client.delete_experiment(run.experiment_id)
    assert logged_models.experiment_of(evaluation, made) == evaluation.experiment_id
    assert logged_models.experiment_name(settings, made, "acip/finetune") == "acip/finetune"
    with pytest.raises(RegistryError, match=r"experiment 'acip/test' was deleted in MLflow. Restore it \(mlflow experiments restore"):
        Tracking(settings, "acip/test")


def test_metrics_on_several_texts_do_not_replace_each_other(run: Run) -> None:
    tokenizer = byte_tokenizer()
    first, second = dataset_of(TEXT, tokenizer), dataset_of(Text("package:austen", context=64, windows=2), tokenizer)
    values = [({"perplexity": 9.0}, first), ({"perplexity": 10.0}, second), ({"perplexity": float("inf"), "kl": 0.1}, None)]
    log_models(run, [Description("key", "qwen2.5/3b: 50 %", "size", {}, {}, values)])
    (model,) = models_of(run)
    assert model.name == "qwen2_5_3b_ 50 _", "MLflow does not allow these characters"
    assert {(metric.key, metric.value, metric.dataset_name) for metric in model.metrics or ()} == {
        ("perplexity", 9.0, "wikipedia packed 64"), ("perplexity", 10.0, "austen packed 64"), ("kl", 0.1, None),
    }  # fmt: skip


def test_digest_depends_on_the_tokens_only() -> None:
    tokenizer = byte_tokenizer()
    limited = dataset_of(Text("package:wikipedia", context=64), tokenizer)
    count = json.loads(limited.profile or "")["windows"]
    assert dataset_of(Text("package:wikipedia", context=64, windows=count), tokenizer).digest == limited.digest
    assert dataset_of(Text("package:wikipedia", context=64, windows=count - 1), tokenizer).digest != limited.digest


@pytest.fixture
def registered(settings: Settings, run: Run, artifact: Artifact) -> tuple[Registry, str]:
    """Register the artifact with its LoggedModel."""
    registry, uri = Registry(settings), str(artifact.folder)
    model_id = log_artifact(run, "small", artifact, uri)
    registry.link(registry.register("small", uri, run.run_id, {}, model_id=model_id), model_id)
    return registry, model_id


def test_version_points_at_its_model(registered: tuple[Registry, str], run: Run, artifact: Artifact) -> None:
    registry, model_id = registered
    version = registry.resolve("small", "1")
    assert (version.uri, version.model_id) == (str(artifact.folder), model_id)
    assert registry.client.get_model_version("small", "1").source == f"models:/{model_id}"
    again = registry.register("small", version.uri, run.run_id, {}, model_id=model_id)
    registry.link(again, model_id)
    assert again.version == "1"
    assert json.loads(run.client.get_logged_model(model_id).tags["mlflow.modelVersions"]) == [{"name": "small", "version": "1"}]


def test_export_leads_to_the_version_that_it_was_made_from(
    registered: tuple[Registry, str], settings: Settings, run: Run, artifact: Artifact, tmp_path: Path
) -> None:
    provenance = export(artifact.load(size=0.6), artifact, tmp_path / "export")
    percent = f"{100 * artifact.table().cut(Budget(ratio=0.6)).got:.3g}".replace(".", "_")  # 59_9, if no cut is nearer to 60
    for _ in range(2):
        logged_models.log_export(settings, registered[0].resolve("small", "1"), provenance, str(tmp_path / "export"))
    (found,) = models_of(run, "model_type = 'export'")
    assert found.name == f"small, {percent} percent of numbers, exported"
    assert found.params["exported_from"] == "small 1" and found.params["folder"] == str(tmp_path / "export")
    assert found.params["bytes"] == str(provenance["weight_bytes"]) and found.source_run_id == run.run_id


def test_migration_adds_what_is_missing(
    settings: Settings, run: Run, artifact: Artifact, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Runs and versions of releases without LoggedModels get them. A missing artifact is reported, and changes nothing else."""
    registry, uri = Registry(settings), str(artifact.folder)
    run.tags({"artifact_uri": uri})
    registry.set_champion(registry.register("small", uri, run.run_id, {"area": "1"}))
    gone = Tracking(settings, "acip/test").start("gone", "other", {"model": "gone", "artifact_uri": str(tmp_path / "gone")})
    tuned = Tracking(settings, "acip/finetune").start("tuned", "tuned", {"model": "small", "artifact_uri": uri, "finetuned_from": "1"})
    evaluation = Tracking(settings, "acip/evaluation").start("small", "evaluation-1", {"model": "small", "artifact_uri": uri})
    evaluation.json([{**artifact.curve[2], "evaluation": []}], "evaluation.json")
    old = registry.resolve("small")
    assert old.uri == uri and not old.model_id

    assert migrate.main([]) == 1
    assert f"[gone] {tmp_path / 'gone'} is left out: there is no folder" in " ".join(capsys.readouterr().out.split())
    version = registry.resolve("small")
    assert (version.version, version.uri, version.tags["area"]) == ("1", uri, "1"), "the version and its alias stay"
    assert run.client.get_logged_model(version.model_id).name == "small"
    assert len(models_of(run)) + len(models_of(tuned)) == 5
    measured, trained = (cast(Any, each.client.get_run(each.run_id)) for each in (evaluation, tuned))
    used = measured.inputs.model_inputs
    assert len(used) == 1, "the evaluation is linked with the size that it measured"
    assert [each.model_id for each in trained.inputs.model_inputs] == [version.model_id]
    before = state(run), state(tuned), state(evaluation)
    assert migrate.main([]) == 1
    assert (state(run), state(tuned), state(evaluation)) == before
    gone.tags({"artifact_uri": uri})
    assert migrate.main([]) == 0
