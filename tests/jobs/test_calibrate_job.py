"""`python jobs/calibrate_all.py --dry-run` prints the whole plan on any machine, and what each model lacks there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from acip_platform.cluster import Cluster
from acip_platform.reporting.console import console
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from ray.exceptions import RayTaskError

from acip.mixture import Mixture
from acip.recipe import Recipe
from jobs import calibrate_all

FLEETS = Path(__file__).parents[2] / "jobs" / "fleets"
LAPTOP = [{"CPU": 4.0}]


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without a GPU, the hub, and Ray."""
    for name in ("ACIP_ARTIFACT_URI", "ACIP_CHECKPOINT_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACIP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(calibrate_all, "connect", lambda _: Cluster(True, ""))
    monkeypatch.setattr(calibrate_all, "nodes", lambda: LAPTOP)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "01"))
    monkeypatch.setattr(calibrate_all, "run_job", lambda *_: pytest.fail("a dry run started work"))


def test_a_plan_is_complete_and_names_missing_inputs(small_base: str, tmp_path: Path, laptop: None) -> None:
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path)})

    def facts(**fields: object) -> dict[str, str]:
        job = Job(**{"name": "some", "base": small_base, "data": "package:austen", "sizes": (1.0, 0.5), "eval_context": 64, **fields})  # type: ignore[arg-type]
        return calibrate_all.plan(job, LAPTOP, settings)

    complete_plan = facts()
    assert complete_plan["resources"] == "0 GPU, 4 CPU"
    assert (complete_plan["text"], complete_plan["held-out text"]) == ("package:austen", "package:austen")
    assert complete_plan["curve"] == "sizes 1, 0.5, packed"
    coded = facts(recipe=Recipe(code="bits"), byte_sizes=(0.5,))
    assert coded["curve"] == "sizes 1, packed; of the bytes 0.5", "without directions, the base model is the only size of ranks"
    assert "GB per worker, peak in " in complete_plan["memory"]
    streamed = facts(recipe=Recipe(code="bits", code_tune_steps=0, sample_windows=1))
    assert "GB where less is free, a block at a time: code, measure" in streamed["memory"]
    untrained = facts(recipe=Recipe(post_tune_steps=0, sample_windows=1, batch_size=64))
    assert "GB where less is free, a block at a time: parametrize, scores, measure" in untrained["memory"]
    sampled = facts(data=Mixture((("self", 1.0), ("package:austen", 3.0))), recipe=Recipe(sample_windows=40, post_tune_steps=0))
    assert sampled["text"] == (
        "10 windows of self, about 10,240 tokens that will be sampled from the base model; 30 windows of package:austen"
    )
    assert sampled["held-out text"] == "package:austen"
    assert complete_plan["artifact"].startswith(f"{tmp_path}/artifacts/some/some-")
    for expected, fields in (
        ({"memory": "nobody/has-this"}, {"base": "nobody/has-this"}),
        ({"text": "did you mean 'austen'", "held-out text": "did you mean 'austen'"}, {"data": "package:austin"}),
        ({"resources": "1 GPUs"}, {"gpus": 1.0}),
        ({"resources": "1 GPUs", "memory": "nobody/has-this"}, {"gpus": 1.0, "base": "nobody/has-this", "data": "c4"}),
    ):
        missing = {name: fact for name, fact in facts(**fields).items() if fact.startswith(calibrate_all.MISSING)}
        assert missing.keys() == expected.keys()
        assert all(part in missing[name] for name, part in expected.items()), missing


def test_the_paper_fleet_is_planned_without_a_gpu(laptop: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate_all.main(["--fleet", str(FLEETS / "paper.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n[") == 2 * 9, "each model is listed and has a plan"
    assert out.count("resources      MISSING: ") == 9
    assert "9 of 9 models lack something here" in out
    assert calibrate_all.main(["--fleet", str(FLEETS / "paper.yaml"), "--dry-run", "--pool", "8xGPU:1,CPU:14"]) == 0
    assert capsys.readouterr().out.count("resources      1 GPU, 4 CPU") == 9
    assert not list(tmp_path.rglob("factors*"))


def test_a_bad_file_is_refused(laptop: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("models: []")
    for args in (["--fleet", str(tmp_path / "bad.yaml")], ["--fleet", str(tmp_path / "none.yaml")], ["--only", "smollm"]):
        assert calibrate_all.main([*args, "--dry-run"]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_failed_rehearsal_is_reported_in_one_line(
    laptop: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(_: object) -> None:
        raise RayTaskError("rehearsed", "Traceback of the task", ZeroDivisionError("division by zero")).as_instanceof_cause()

    monkeypatch.setattr("ray.get", failed)
    monkeypatch.setattr(calibrate_all, "rehearsed", SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: None)))
    calibrate_all.print_forecasts([Job("some", "some-base")], console())
    out = capsys.readouterr().out
    assert "[some] can't be rehearsed: ZeroDivisionError: division by zero" in out and "Traceback" not in out
