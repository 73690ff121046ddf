"""`python jobs/finetune.py` registers a child version that is better at one size and records its parent."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import ModelVersion, Registry, RegistryError
from acip_platform.tracking.runs import Tracking
from acip_platform.training.calibration_text import CalibrationText
from acip_platform.training.fine_tuning import _text, _windows, tuning_job
from safetensors.torch import load_file

from acip.artifact.artifact import Artifact
from acip.data import documents, token_windows
from acip.errors import DataError
from acip.finetune import tuning
from acip.mixture import Mixture, interleaved
from acip.sizing.cut_table import Budget
from tests.acip.calibration.test_resume import ROOT, interruptible, worker_of
from tests.conftest import byte_tokenizer
from tests.support.texts import text_reader
from tests.support.waiting import PATIENCE_S, exit_code, stop


class Command:
    def __init__(self, home: Path, artifact: Artifact) -> None:
        self.env = {"ACIP_HOME": str(home), "RAY_ADDRESS": "local"}
        self.settings = Settings.from_env(self.env)
        self.registry = Registry(self.settings)
        self.registry.set_alias(self.registry.register("small", str(artifact.folder), "", {}))

    def __call__(self, *args: str) -> tuple[int, str]:
        from jobs import finetune

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
            for name in ("ACIP_ARTIFACT_URI", "ACIP_CHECKPOINT_URI", "MLFLOW_TRACKING_URI"):
                patch.delenv(name, raising=False)
            for name, value in self.env.items():
                patch.setenv(name, value)
            try:
                code = finetune.main(args)
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        return code, output.getvalue()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, small_artifact: Artifact) -> Command:
    return Command(tmp_path_factory.mktemp("tuning") / "home", small_artifact)


EVALUATION = ("--data", "package:austen", "--eval-context", "64", "--eval-windows", "64", "--cpus", "1")


@pytest.mark.slow
def test_finetune_registers_a_better_child(command: Command, small_artifact: Artifact) -> None:
    arguments = ("small", "--size", "50%", "--steps", "40", "--lr", "2e-3", "--quantize", "nf4", *EVALUATION)
    code, output = command(*arguments)
    assert code == 0, output
    child, parent = command.registry.resolve("small", "candidate"), command.registry.resolve("small")
    assert (child.version, parent.version) == ("2", "1")
    lineage = {"from": "1", "at": "0.5", "data": "package:austen", "steps": "40", "quantize": "nf4"}
    lineage = {f"finetuned_{key}": value for key, value in lineage.items()}
    assert child.tags.items() >= lineage.items()
    tracking = Tracking(command.settings, "acip/finetune")
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags.items() >= {"model": "small", **lineage}.items()
    assert [metric.step for metric in tracking.client.get_metric_history(run.info.run_id, "loss_nats")] == list(range(1, 41))

    artifact = Store(command.settings.store, Path()).open(child.uri)
    assert artifact.table().cut(Budget(0.4)).ranks == small_artifact.table().cut(Budget(0.4)).ranks
    provenance = artifact.manifest["provenance"]
    assert provenance["parent"] == small_artifact.manifest["provenance"] and provenance["finetuned"]["version"] == "1"
    assert provenance["job"]["recipe"]["seed"] != small_artifact.recipe.seed
    measured = {metric: run.data.metrics[f"perplexity_{metric}"] for metric in ("before", "after", "before_nf4", "after_nf4")}
    assert measured["after_nf4"] < measured["before"] < measured["before_nf4"] and measured["after"] < measured["before"]
    assert next(row["perplexity"] for row in artifact.curve if row["asked"] == 0.5) == measured["after"]
    text = " ".join(output.split())
    assert f"perplexity at 0.5 {measured['before']:.2f} before, {measured['after']:.2f} after" in text
    assert "[small] trial step at full shape: loss " in text
    assert f"perplexity in nf4 {measured['before_nf4']:.2f} before, {measured['after_nf4']:.2f} after" in text
    commands = (
        "jobs/materialize.py small --alias 2 --size 0.5",
        "jobs/serve.py --model small --alias candidate",
    )
    assert all(each in text for each in commands)

    manifest = json.dumps(artifact.manifest)
    code, output = command(*arguments)
    assert code == 0 and "already done: version 2" in output and all(each in " ".join(output.split()) for each in commands)
    assert json.dumps(Artifact.open(child.uri).manifest) == manifest
    command.registry.client.delete_model_version_tag("small", "2", "verdict")  # as after a kill before promotion
    code, output = command(*arguments)
    assert code == 0 and "already done" not in output and "verdict" in command.registry.resolve("small", "2").tags
    with pytest.raises(RegistryError):
        command.registry.resolve("small", "3")


@pytest.mark.slow
def test_interrupted_jobs_give_the_same_child(small_artifact: Artifact, tmp_path: Path) -> None:
    """After a killed worker or Ctrl-C, the job resumes from its checkpoint and gives the same child, bit for bit."""
    children = []
    for name in ("undisturbed", "killed", "interrupted"):
        command = Command(tmp_path / name, small_artifact)
        log = tmp_path / f"{name}.log"
        with log.open("a") as out, interruptible():
            arguments = ["small", "--size", "0.5", "--steps", "150", "--lr", "2e-3", *EVALUATION]
            env = {**os.environ, **command.env, "ACIP_CHECKPOINT_S": "0.3"}
            command_line = [sys.executable, str(ROOT / "jobs" / "finetune.py"), *arguments]
            job = subprocess.Popen(command_line, env=env, stdout=out, stderr=out)
            try:
                if name == "interrupted":
                    worker = worker_of("small", job, Path(command.settings.runs), log)
                    job.send_signal(signal.SIGINT)
                    assert exit_code(job, log) == 130, log.read_text()
                    assert "interrupted. Finished work is kept" in log.read_text()
                    assert psutil.wait_procs([worker], timeout=PATIENCE_S)[1] == [], "the worker still runs"
                    job = subprocess.Popen(command_line, env=env, stdout=out, stderr=out)
                if name == "killed":
                    worker_of("small", job, Path(command.settings.runs), log).send_signal(signal.SIGKILL)
                assert exit_code(job, log) == 0, log.read_text()
            finally:
                stop(job)
        assert ("resuming from checkpoint" in log.read_text()) == (name != "undisturbed")
        tracking = Tracking(command.settings, "acip/finetune")
        (run,) = tracking.client.search_runs([tracking.experiment_id])
        assert [metric.step for metric in tracking.client.get_metric_history(run.info.run_id, "loss_nats")] == list(range(1, 151))
        children.append(load_file(Path(command.registry.resolve("small", "candidate").uri) / "factors.safetensors"))
    undisturbed, *others = children
    for child in others:
        assert undisturbed.keys() == child.keys() and all(torch.equal(undisturbed[key], child[key]) for key in undisturbed)


def test_fine_tuning_measures_the_sizes_of_the_calibration(small_artifact: Artifact) -> None:
    provenance = {"job": {"sizes": [1.0, 0.7], "byte_sizes": [0.5, 0.4]}}
    artifact = Artifact(small_artifact.folder, {**small_artifact.manifest, "provenance": provenance}, small_artifact.source)
    job = tuning_job(ModelVersion("small", "1", "", (), {}), artifact, tuning(artifact, 0.5), {})
    assert (job.sizes, job.byte_sizes) == ((1.0, 0.7, 0.5), (0.5, 0.4))


def test_fine_tuning_uses_text_after_the_calibration_windows(small_artifact: Artifact) -> None:
    """The text starts after all windows of the calibration, even if it stopped early, and also if the parent was fine-tuned."""
    recipe = replace(small_artifact.recipe, post_tune_steps=3, batch_size=2, seq_len=48)
    job, calibration = Job("small", "base", recipe, "package:austen"), Job("small", "base", small_artifact.recipe, "package:austen")
    text = token_windows(documents("package:austen", "train"), byte_tokenizer(), 1).flatten()
    first = -(-calibration.windows * small_artifact.recipe.seq_len // 48) * 48
    for provenance in ({"job": calibration.to_dict()}, {"job": job.to_dict(), "parent": {"job": calibration.to_dict()}}):
        parent = replace(small_artifact, manifest={**small_artifact.manifest, "provenance": provenance, "steps": 1})
        assert torch.equal(_windows(job, parent, text_reader(byte_tokenizer(), 48)).flatten(), text[first : first + 6 * 48])
    windows = _windows(job, small_artifact, text_reader(byte_tokenizer(), 48))
    assert torch.equal(windows.flatten(), text[: 6 * 48]), "without provenance the text starts at the beginning"


def test_fine_tuning_on_a_mixture_skips_the_windows_of_each_source(small_artifact: Artifact) -> None:
    """A source that the calibration did not use is read from its beginning."""
    recipe = replace(small_artifact.recipe, post_tune_steps=3, batch_size=2)
    calibration = Job("small", "base", small_artifact.recipe, Mixture((("package:austen", 1.0), ("self", 1.0))))
    parent = replace(small_artifact, manifest={**small_artifact.manifest, "provenance": {"job": calibration.to_dict()}})
    mixture = Mixture((("package:austen", 2.0), ("package:wikipedia", 1.0)))
    windows = _windows(Job("small", "base", recipe, mixture), parent, text_reader(byte_tokenizer(), recipe.seq_len))
    drawn = Mixture.of(calibration.data).counts(calibration.windows)["package:austen"]
    austen = token_windows(documents("package:austen", "train"), byte_tokenizer(), recipe.seq_len, drawn + 4)[drawn:]
    wikipedia = token_windows(documents("package:wikipedia", "train"), byte_tokenizer(), recipe.seq_len, 2)
    assert torch.equal(windows, interleaved([austen, wikipedia]))
    job = tuning_job(ModelVersion("small", "1", "", (), {}), parent, tuning(parent, 0.5), {})
    assert (job.data, job.eval_data) == (calibration.data, "package:austen")


def test_fine_tuning_on_text_of_the_base_model_loads_it_once(small_artifact: Artifact, tmp_path: Path) -> None:
    """It is not loaded if the text is there, and refused if it is not the base model of the artifact."""
    stages: list[str] = []
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path)})
    recipe = replace(small_artifact.recipe, post_tune_steps=2, batch_size=2, seq_len=32)
    job = Job("small", small_artifact.manifest["base"]["source"], recipe, "self")

    def read(parent: Artifact) -> CalibrationText:
        return _text(job, parent, settings, lambda kind, **facts: stages.append(facts.get("text", "")), torch.device("cpu"))

    first = read(small_artifact)
    assert first.windows.shape == (4, 32) and first.provenance["sampled_text"]["tokens"] >= 4 * 31
    assert torch.equal(read(small_artifact).windows, first.windows)
    assert sum("loading" in stage for stage in stages) == 1
    other = {**small_artifact.manifest, "base": {**small_artifact.manifest["base"], "digest": "0"}}
    with pytest.raises(DataError, match="is not the base model of small"):
        read(replace(small_artifact, manifest=other))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["smal", "--size", "0.5"], "did you mean 'small'?"),
        (["small@7", "--size", "0.5"], "no version or alias '7'"),
        (["small", "--size", "1.0"], "there is nothing to tune"),
        (["small", "--size", "0.01"], "can't be reached: the smallest is"),
        (["small", "--size", "8GB"], "is not a size ratio"),
        (["small", "--size", "half"], "is not a budget"),
        (["small", "--size", "0.5", "--steps", "0"], "whole number of at least 1"),
        (["small", "--size", "0.5", "--lr=-1"], "a number above 0"),
    ],
)
def test_invalid_arguments_are_refused_before_work_starts(
    command: Command, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.setattr("jobs.finetune.connect", lambda _: pytest.fail("Ray was started"))
    code, output = command(*args)
    assert code == 2 and message in output
