"""The tables of BYTES.md, and the results that the comparison at equal bytes keeps."""

import json
import math
from pathlib import Path
from types import ModuleType

import pytest

from acip.baselines.quantized import gptq, hqq
from tests.benchmarks import bytes as benchmark
from tests.benchmarks.bytes import BEGIN, END, FACTS, PAGE, WITH_TASKS, Results, goals, result


@pytest.fixture(scope="module")
def facts() -> benchmark.Facts:
    return dict(json.loads(FACTS.read_text(encoding="utf-8")))


def test_page_holds_the_tables_of_the_recorded_facts(facts: benchmark.Facts) -> None:
    assert PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip() == result(facts)


def test_recorded_rows_are_complete(facts: benchmark.Facts) -> None:
    """Each other method that takes at least the bytes of our coarsest codes has a row of ours beside it, with at most as many bytes."""
    rows = {row["title"]: row for row in facts["rows"]}
    least = min(row["bytes"] for title, row in rows.items() if title.startswith("ours"))
    for title, row in rows.items():
        if title != "base" and not title.startswith("ours") and row["bytes"] >= least:
            assert rows[f"ours beside {title}"]["bytes"] <= row["bytes"]
    assert {title for title, row in rows.items() if "tasks" in row} == set(WITH_TASKS)
    assert rows["base"]["bytes"] == facts["base_bytes"]


def test_goals_compare_with_the_recorded_rows() -> None:
    """A goal bounds our KL, or KL and excess loss as multiples of those of another row. The last sentence compares KL in all rows."""

    def reached(kl: float, loss: float, beside: float, bounds: dict[float, tuple[str, float]]) -> list[bool]:
        rows = {"base": (0.0, 3.0), "ours at 0.5": (kl, loss), "GPTQ": (0.3, 3.2), "ours beside GPTQ": (beside, 3.1)}
        facts = {"domains": ["text"], "rows": [{"title": title, "kl": kl, "text": math.exp(loss)} for title, (kl, loss) in rows.items()]}
        return list(goals(facts, bounds).values())

    assert reached(0.1, 3.05, 0.2, {0.5: ("", 0.2)}) == [True, True]
    assert reached(0.1, 3.05, 0.2, {0.5: ("", 0.05)}) == [False, True]
    assert reached(0.1, 3.05, 0.2, {0.5: ("GPTQ", 0.4)}) == [True, True]
    assert reached(0.15, 3.05, 0.2, {0.5: ("GPTQ", 0.4)}) == [False, True]
    assert reached(0.1, 3.15, 0.2, {0.5: ("GPTQ", 0.4)}) == [False, True]
    assert reached(0.1, 3.05, 0.4, {}) == [False]


def test_finished_results_are_not_computed_again(tmp_path: Path) -> None:
    """A result is computed once for each title, model, setting and source code."""
    calls: list[None] = []

    def compute() -> benchmark.Facts:
        calls.append(None)
        return {"kl": float(len(calls))}

    def value(subject: str, title: str, code: ModuleType, bits: int) -> float:
        return float(Results(tmp_path, {"subject": subject}).values(title, (code,), compute, bits=bits)["kl"])

    different = [("a", "GPTQ", gptq, 2), ("b", "GPTQ", gptq, 2), ("a", "HQQ", gptq, 2), ("a", "GPTQ", hqq, 2), ("a", "GPTQ", gptq, 3)]
    assert [value(*each) for each in different] == [1, 2, 3, 4, 5]
    assert [value(*each) for each in different] == [1, 2, 3, 4, 5]


def test_interrupted_results_are_computed_again(tmp_path: Path) -> None:
    def interrupted() -> benchmark.Facts:
        raise KeyboardInterrupt

    results = Results(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        results.values("GPTQ", (gptq,), interrupted)
    assert results.values("GPTQ", (gptq,), lambda: {"kl": 1.0}) == {"kl": 1.0}
