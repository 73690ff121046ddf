"""The method comparison (arena): methods run side by side on Ray, rows are kept, failures are reported, tables follow the paper."""

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
  asvd: {{search_windows: 1, ratios: [0.9]}}   # it can't reach size 0.5
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
    """Return a function that runs `python jobs/arena.py` in this process with its own home."""
    from jobs import arena as job

    for name in ("ACIP_ARTIFACT_URI", "ACIP_CHECKPOINT_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACIP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(job, "connect", lambda _: ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False))

    def run(*args: str) -> tuple[int, str]:
        code = job.main(["--arena", str(arena_file), *args])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_an_arena_resumes_and_repeats_no_work(arena: Arena, tmp_path: Path, command: Command) -> None:
    results = Results(tmp_path / "home" / "arenas" / "small.json")
    pending = entries(arena, results)
    assert pending == [
        Entry(DENSE, (1.0,)),
        Entry("covariance", (0.7, 0.5)),
        Entry("svd-llm", (0.7,)),
        Entry("svd-llm", (0.5,)),
        Entry("asvd", (0.7, 0.5)),
    ]
    for entry in (pending[0], *pending[2:4]):
        for row in rows(arena, entry, lambda *_: None):
            results.add(arena, row)
    code, output = command("--dry-run")
    assert code == 0 and "3 methods, 3 rows done, 2 tasks to do" in output
    code, output = command()
    assert code == 1
    assert "Covariance cut at 0.7: perplexity" in output and "Covariance cut at 0.5: perplexity" in output and "SVD-LLM at" not in output
    assert "[asvd 0.7, 0.5] FAILED: size 0.5 cannot be reached with these ratios" in output
    assert "Original" in output and "one for all sizes (2)" in output  # the tables
    again = Results(results.path)  # from the file
    assert entries(arena, again) == [pending[-1]]
    written = results.path.with_suffix(".md").read_text()
    code, output = command("--only", "covariance")
    assert code == 0 and "0 tasks to do" in output and "FAILED" not in output
    assert results.path.with_suffix(".png").stat().st_size > 10_000
    assert results.path.with_suffix(".md").read_text() == written, "the table keeps the methods that did not run"
    assert "| Covariance cut |" in written and "| SVD-LLM |" in written and "ASVD" not in written
    code, output = command("--only", "covarianc")
    assert code == 2 and "did you mean 'covariance'" in output

    kept_rows = again.of(arena)
    assert [(row["method"], row["asked"]) for row in kept_rows] == [
        (DENSE, 1.0), ("covariance", 0.7), ("svd-llm", 0.7), ("covariance", 0.5), ("svd-llm", 0.5),
    ]  # fmt: skip
    dense = kept_rows[0]["metrics"]["perplexity austen"]
    for row in kept_rows[1:]:
        assert row["stored_params"] <= row["asked"] * row["dense_params"]
        assert (row["seconds"] > 0, row["cpu_seconds"] > 0, row["peak_bytes"] > 1e8, row["counted"]) == (True, True, True, "factors")
        assert dense < row["metrics"]["perplexity austen"] < 2 * dense

    table = method_comparison_report.markdown(kept_rows, arena)
    assert table.splitlines()[:2] == ["| method | runs | 0.7: austen | 0.5: austen |", "| --- | --- | --- | --- |"]
    assert f"| the base model, 1.0 |  | {dense:.1f} |  |" in table
    best = min(kept_rows[3:], key=lambda row: row["metrics"]["perplexity austen"])
    assert f"**{best['metrics']['perplexity austen']:.1f}** |\n" in table and table.count("**") == 4
    assert "| Size | Method | perplexity austen ↓ | stored |" in table.splitlines()
    error, megabytes = kept_rows[0]["stderr"]["perplexity austen"], 4 * kept_rows[0]["dense_params"] / 1e6
    assert f"| 100% | Original | {dense:.2f} ± {error:.2f} | 1.0000, {megabytes:.1f} MB: dense |" in table
    assert "| one per size (2) |" in table
    assert len(method_comparison_report.figure(kept_rows, arena).axes[0].lines) == 3
    assert total_cost(kept_rows)[2] == max(row["peak_bytes"] for row in kept_rows)
    assert [row.get("leads") for row in kept_rows] == [None, True, None, False, None]


def test_concurrent_arenas_keep_each_others_rows(arena: Arena, tmp_path: Path) -> None:
    first, second = (Results(tmp_path / "small.json") for _ in range(2))
    new_rows: list[dict[str, Any]] = [{"method": method, "asked": 0.7, "seconds": 1.0} for method in ("covariance", "svd-llm")]
    for results, row in zip((first, second), new_rows, strict=True):
        results.add(arena, row)
    kept = Results(first.path).of(arena)
    assert [row["method"] for row in kept] == ["covariance", "svd-llm"]
    first.add(arena, {**new_rows[0], "seconds": 2.0})  # it replaces the older row
    again = Results(first.path)
    assert [row["seconds"] for row in again.of(arena)] == [2.0, 1.0]
    again.forget(arena)
    assert again.of(arena) == []
    assert len(Results(first.path).of(arena)) == 2  # the file keeps the rows until new ones exist
    again.add(arena, new_rows[1])
    assert [row["method"] for row in again.of(arena)] == ["svd-llm"]


def test_shared_work_counts_once() -> None:
    """Shared work counts once, even if a run repeated it after an interruption."""
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


def test_an_entry_that_fits_no_node_is_refused(arena: Arena, tmp_path: Path) -> None:
    """A request for three CPUs does not fit on nodes of two CPUs: Ray would wait forever."""
    with pytest.raises(ArenaError, match="needs 0 GPUs and 3 CPUs; no node has them"):
        hold(Arena(**{**vars(arena), "cpus": 3.0}), Results(tmp_path / "x.json"), None, [{"CPU": 2.0}, {"CPU": 2.0}], print)


def test_fingerprints_cover_the_options_of_a_method(arena: Arena, tmp_path: Path) -> None:
    other = Arena(**{**vars(arena), "methods": {**arena.methods, "covariance": {"sample_windows": 8}}})
    assert other.fingerprint("covariance") != arena.fingerprint("covariance")
    assert other.fingerprint("svd-llm") == arena.fingerprint("svd-llm")
    assert Arena(**{**vars(arena), "sizes": (0.3,), "cpus": 2.0}).fingerprint("svd-llm") == arena.fingerprint("svd-llm")
    for bad in ("[]", '{"rows": [{}]}', '{"rows": 3}', '{"rows": [3]}', ""):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ArenaError, match="does not hold results"):
            Results(tmp_path / "bad.json")


def test_quoted_results_match_the_paper_and_are_labeled() -> None:
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
    measured: dict[str, Any] = {
        "method": "asvd",
        "asked": 0.8,
        "got": 0.8,
        "stored_bytes": 1,
        "title": "ASVD",
        "metrics": {"perplexity c4": 15.0},
        "counted": "factors",
    }
    lines = method_comparison_report.cells(method_comparison_report.with_quoted([measured], arena))
    assert lines[0][:3] == ["80%", "ASVD", "15.00"]
    assert lines[1][:4] == ["", "ASVD (quoted)", "15.93", "11.14"]


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_errors_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "arena.yaml"
    path.write_text(text)
    with pytest.raises(AcipError, match=message):
        Arena.load(path)


def test_published_tables_match_the_recorded_rows() -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    kept = json.loads((benchmarks / "arena.json").read_text())["rows"]
    arena = Arena.load(ARENAS / "demo.yaml")
    assert {(row["method"], row["asked"]) for row in kept} == {(DENSE, 1.0), *itertools.product(arena.methods, arena.sizes)}
    assert (benchmarks / "ARENA.md").read_text().endswith(method_comparison_report.markdown(kept, arena))
    assert "\n".join(method_comparison_report.summary(kept)) in (benchmarks / "README.md").read_text()


def test_arena_files_contain_every_method() -> None:
    for path in ARENAS.glob("*.yaml"):
        assert set(Arena.load(path).methods) == set(METHODS)
    assert json.dumps(Arena.load(ARENAS / "demo.yaml").fingerprint("asvd"))
