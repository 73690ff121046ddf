"""The arena: methods side by side on Ray, rows kept, failures told, the table in the format of the paper's."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from acip_platform.evaluation import method_comparison_report
from acip_platform.evaluation.method_comparison import DENSE, Arena, ArenaError, Entry, Results, entries, hold, rows, total_cost

from acip.baselines import METHODS
from acip.errors import AcipError

ARENAS = Path(__file__).parents[3] / "jobs" / "arenas"

FILE = """\
base: {base}
dtype: float32
data: package:austen
windows: 16
context: 64
eval_data: [package:austen]
eval_context: 64
eval_windows: 4
sizes: [0.7, 0.5]
methods:
  covariance:
  svd-llm: {{update_windows: 8}}
  asvd: {{search_windows: 1, ratios: [0.9]}}   # it can't be so small
"""


@pytest.fixture(scope="module")
def arena_file(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arena") / "small.yaml"
    path.write_text(FILE.format(base=small_base))
    return path


@pytest.fixture(scope="module")
def arena(arena_file: Path) -> Arena:
    return Arena.load(arena_file)


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path, arena_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`python jobs/arena.py` in this process, in a home of its own."""
    from jobs import arena as job

    for name in ("ACIP_ARTIFACT_URI", "ACIP_CHECKPOINT_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACIP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(job, "connect", lambda _: ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False))

    def run(*args: str) -> tuple[int, str]:
        code = job.main(["--arena", str(arena_file), *args])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_the_arena_is_held_side_by_side_and_nothing_is_done_twice(arena: Arena, tmp_path: Path, command: Command) -> None:
    results = Results(tmp_path / "home" / "arenas" / "small.json")
    todo = entries(arena, results)
    assert todo == [
        Entry(DENSE, (1.0,)),
        Entry("covariance", (0.7, 0.5)),
        Entry("svd-llm", (0.7,)),
        Entry("svd-llm", (0.5,)),
        Entry("asvd", (0.7, 0.5)),
    ]
    for entry in (todo[0], *todo[2:4]):
        for row in rows(arena, entry, lambda *_: None):
            results.add(arena, row)
    code, said = command("--dry-run")
    assert code == 0 and "3 methods, 3 rows done, 2 tasks to do" in said
    code, said = command()
    assert code == 1
    assert "Covariance cut at 0.7: perplexity" in said and "Covariance cut at 0.5: perplexity" in said and "SVD-LLM at" not in said
    assert "[asvd 0.7, 0.5] FAILED: size 0.5 cannot be reached with these ratios" in said
    assert "Original" in said and "one for all sizes (2)" in said  # the tables
    again = Results(results.path)  # from the file
    assert entries(arena, again) == [todo[-1]]
    written = results.path.with_suffix(".md").read_text()
    code, said = command("--only", "covariance")
    assert code == 0 and "0 tasks to do" in said and "FAILED" not in said
    assert results.path.with_suffix(".png").stat().st_size > 10_000
    assert results.path.with_suffix(".md").read_text() == written, "what it didn't run, too"
    assert "| Covariance cut |" in written and "| SVD-LLM |" in written and "ASVD" not in written
    code, said = command("--only", "covarianc")
    assert code == 2 and "did you mean 'covariance'" in said

    found = again.of(arena)
    assert [(row["method"], row["asked"]) for row in found] == [
        (DENSE, 1.0), ("covariance", 0.7), ("svd-llm", 0.7), ("covariance", 0.5), ("svd-llm", 0.5),
    ]  # fmt: skip
    dense = found[0]["metrics"]["perplexity austen"]
    for row in found[1:]:
        assert row["stored_params"] <= row["asked"] * row["dense_params"]
        assert (row["seconds"] > 0, row["cpu_seconds"] > 0, row["peak_bytes"] > 1e8, row["counted"]) == (True, True, True, "factors")
        assert dense < row["metrics"]["perplexity austen"] < 2 * dense

    table = method_comparison_report.markdown(found, arena)
    assert table.splitlines()[:2] == ["| method | runs | 0.7: austen | 0.5: austen |", "| --- | --- | --- | --- |"]
    assert f"| the base model, 1.0 |  | {dense:.1f} |  |" in table
    best = min(found[3:], key=lambda row: row["metrics"]["perplexity austen"])
    assert f"**{best['metrics']['perplexity austen']:.1f}** |\n" in table and table.count("**") == 4
    assert "| Size | Method | perplexity austen ↓ | stored |" in table.splitlines()
    error, megabytes = found[0]["stderr"]["perplexity austen"], 4 * found[0]["dense_params"] / 1e6
    assert f"| 100% | Original | {dense:.2f} ± {error:.2f} | 1.0000, {megabytes:.1f} MB: dense |" in table
    assert "| one per size (2) |" in table
    assert len(method_comparison_report.figure(found, arena).axes[0].lines) == 3
    assert total_cost(found)[2] == max(row["peak_bytes"] for row in found)
    assert [row.get("leads") for row in found] == [None, True, None, False, None]


def test_two_arenas_keep_each_others_rows(arena: Arena, tmp_path: Path) -> None:
    first, second = (Results(tmp_path / "small.json") for _ in range(2))
    made: list[dict[str, Any]] = [{"method": method, "asked": 0.7, "seconds": 1.0} for method in ("covariance", "svd-llm")]
    for results, row in zip((first, second), made, strict=True):
        results.add(arena, row)
    kept = Results(first.path).of(arena)
    assert [row["method"] for row in kept] == ["covariance", "svd-llm"]
    first.add(arena, {**made[0], "seconds": 2.0})  # in the place of the older one
    again = Results(first.path)
    assert [row["seconds"] for row in again.of(arena)] == [2.0, 1.0]
    again.forget(arena)
    assert again.of(arena) == []
    assert len(Results(first.path).of(arena)) == 2  # until there are new ones
    again.add(arena, made[1])
    assert [row["method"] for row in again.of(arena)] == ["svd-llm"]


def test_shared_work_counts_once() -> None:
    """Also where it was done again, by a run that went on after an interruption."""
    leads, follows = (
        {"seconds": 9.0, "cpu_seconds": 8.0, "peak_bytes": 7, "leads": True},
        {"seconds": 2.0, "cpu_seconds": 1.0, "peak_bytes": 8},
    )
    assert total_cost([leads, follows]) == (11.0, 9.0, 8)
    assert total_cost([leads, {**leads, "seconds": 10.0}, follows]) == (12.0, 9.0, 8)
    assert total_cost([follows, follows]) == (4.0, 2.0, 8)
    assert total_cost([{**follows, "leads": False}]) == (2.0, 1.0, 8)
    row = {**follows, "leads": False, "method": "acip", "title": "ACIP", "one_run_per_size": False, "device": "1 CPU threads"}
    assert method_comparison_report.cost_cells([row])[0][2:4] == ["> 0m02s", "> 0m01s"]


def test_an_entry_that_no_node_has_room_for_is_refused(arena: Arena, tmp_path: Path) -> None:
    """Two nodes of two CPUs are not one of three: Ray would wait for ever."""
    with pytest.raises(ArenaError, match="asks for 0 GPUs and 3 CPUs; no node has them"):
        hold(Arena(**{**vars(arena), "cpus": 3.0}), Results(tmp_path / "x.json"), None, [{"CPU": 2.0}, {"CPU": 2.0}], print)


def test_rows_belong_to_what_decides_them(arena: Arena, tmp_path: Path) -> None:
    other = Arena(**{**vars(arena), "methods": {**arena.methods, "covariance": {"sample_windows": 8}}})
    assert other.fingerprint("covariance") != arena.fingerprint("covariance")
    assert other.fingerprint("svd-llm") == arena.fingerprint("svd-llm")
    assert Arena(**{**vars(arena), "sizes": (0.3,), "cpus": 2.0}).fingerprint("svd-llm") == arena.fingerprint("svd-llm")
    for bad in ("[]", '{"rows": [{}]}', '{"rows": 3}', '{"rows": [3]}', ""):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ArenaError, match="does not hold results"):
            Results(tmp_path / "bad.json")


def test_the_papers_table_is_quoted_and_labeled() -> None:
    arena = Arena.load(ARENAS / "paper.yaml")
    assert arena.quoted
    quoted = {(row["method"], row["asked"]): row["metrics"] for row in method_comparison_report.quoted()["rows"]}
    assert {method for method, _ in quoted} <= {DENSE, *METHODS}
    assert set(arena.sizes) == {size for method, size in quoted if method == "acip-paper"}
    # Table 1 of the paper
    assert (quoted[DENSE, 1.0]["perplexity c4"], quoted["acip-paper", 0.4]["perplexity wikitext2"]) == (7.34, 23.99)
    assert (quoted["asvd", 0.8]["piqa"], quoted["svd-llm", 0.6]["perplexity c4"], quoted["dobi-svd", 0.8]["hellaswag"]) == (
        0.68,
        49.83,
        0.44,
    )
    ours: dict[str, Any] = {
        "method": "asvd",
        "asked": 0.8,
        "got": 0.8,
        "stored_bytes": 1,
        "title": "ASVD",
        "metrics": {"perplexity c4": 15.0},
        "counted": "factors",
    }
    lines = method_comparison_report.cells(method_comparison_report.with_quoted([ours], arena))
    assert lines[0][:3] == ["80%", "ASVD", "15.00"]
    assert lines[1][:4] == ["", "ASVD (quoted)", "15.93", "11.14"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: x/y\nsize: [0.5]", "line 2: unknown field 'size'.*did you mean 'sizes'"),
        ("base: x/y\nmethods: {asdv: }", "line 2: unknown field 'asdv' of methods.*did you mean 'asvd'"),
        ("base: x/y\nmethods: {asvd: {alpa: 1}}", "asvd has no option 'alpa'.*did you mean 'alpha'"),
        ("base: x/y\nmethods: {asvd: {scale_windows: x}}", "asvd's scale_windows is 'x'; it must be a whole number"),
        ("base: x/y\nmethods: {asvd: {ratios: 0.5}}", "asvd's ratios is 0.5; it must be a list"),
        ("base: x/y\nmethods: {acip: {set: {lrr: 1}}}", "unknown recipe field 'lrr'"),
        ("base: x/y\nmethods: {acip: {set: {lr: 1e-4}}}", "lr is '1e-4'.*write 1.0e-4"),
        ("base: x/y\nmethods: {acip: {set: 3}}", "set is 3; it must be a mapping"),
        ("base: x/y\nmethods: [asvd]", "line 2: methods must be a mapping"),
        ("base: x/y\nmethods: {asvd: 1}", "line 2: the options of asvd are 1"),
        ("base: x/y\nmethods: {asvd: , asvd: {alpha: 1}}", "line 2: field 'asvd' is given twice"),
        ("base: x/y\nwindows: 8\nwindows: 9", "line 3: field 'windows' is given twice"),
        ("base: x/y\nwindows: many", "yaml, line 2: windows is 'many'"),
        ("base: x/y\nsizes: [1.5]", "size ratio is 1.5"),
        ("base: x/y\nwindows: 0", "windows is 0"),
        ("sizes: [0.5]", "line 1: 'base' is missing"),
        ("base: [", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "arena.yaml"
    path.write_text(text)
    with pytest.raises(AcipError, match=says):
        Arena.load(path)


def test_the_tables_that_are_told_are_those_of_the_rows() -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    kept = json.loads((benchmarks / "arena.json").read_text())["rows"]
    arena = Arena.load(ARENAS / "demo.yaml")
    assert {(row["method"], row["asked"]) for row in kept} == {(DENSE, 1.0), *itertools.product(arena.methods, arena.sizes)}
    assert (benchmarks / "ARENA.md").read_text().endswith(method_comparison_report.markdown(kept, arena))
    assert "\n".join(method_comparison_report.summary(kept)) in (benchmarks / "README.md").read_text()


def test_the_arena_files_name_every_method() -> None:
    for path in ARENAS.glob("*.yaml"):
        assert set(Arena.load(path).methods) == set(METHODS)
    assert json.dumps(Arena.load(ARENAS / "demo.yaml").fingerprint("asvd"))
