"""The tables on the screen show bytes first, and next commands name a size that is close to the base model."""

import io
from typing import Any

import pytest
from acip_platform.reporting.console import console, curve_tables, evaluation_table, example_size, lines
from rich.console import Console

from acip.evaluate.generated_tasks import shares

TEXT = {"corpus": "package:wikipedia", "protocol": "packed", "context": 64, "windows": 8}


def row(asked: float, loss: float, kl: float, **more: Any) -> dict[str, Any]:
    divergence = {"kind": "divergence", "label": "divergence", **TEXT, "values": {"kl_nats": kl, "same_top_share": 0.9}}
    facts = {"asked": asked, "got": asked, "params": 10, "bytes": round(2e8 * asked), "flops": 1000 * asked, "extrapolated": False}
    return {**facts, "loss": loss, "stderr": 0.1, "perplexity": 10 * loss, **TEXT, "evaluation": [divergence], **more}


RANKS = [row(1.0, 2.0, 0.0), row(0.6, 3.0, 1.0)]
CODED = [row(size, loss, kl, bits_per_weight=10 * size) for size, loss, kl in ((0.5, 2.01, 0.01), (0.42, 2.02, 0.04), (0.37, 2.2, 0.2))]


def printed(*tables: Any) -> list[list[str]]:
    """Return the cells of each line."""
    out = Console(file=io.StringIO(), width=200)
    out.print(*tables)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return [[cell.strip() for cell in line.strip(" │┃|").replace("┃", "│").split("│")] for line in text.splitlines()]


def test_brackets_and_colons_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a[v2] b[/v3] :100:"
    console().print(name, curve_tables(name, RANKS, 0.4))
    lines(console(), {name: name})
    assert capsys.readouterr().out.count(name) == 4


def test_bytes_come_before_ranks() -> None:
    lines = printed(curve_tables("small, version 1", [*RANKS, *CODED], 0.4))
    headings = [i for i, cells in enumerate(lines) if "KL to base" in cells]
    assert lines[headings[0]][:4] == ["of the bytes", "got", "MB stored", "bits/weight"]
    assert lines[headings[1]][:5] == ["asked", "got", "FLOPs", "parameters", "MB stored"]
    rows = [[cells for cells in part if len(cells) >= 8] for part in (lines[headings[0] + 1 : headings[1]], lines[headings[1] + 1 :])]
    assert rows[0][0] == ["base", "1.0000", "200.0", "", "20.00 ± 2.00", "1.00", "0.0000", "90.0%"]
    assert rows[0][2] == ["0.42", "0.4200", "84.0", "4.20", "20.20 ± 2.02", "1.01", "0.0400", "90.0%"]
    assert [cells[0] for cells in rows[0]] == ["base", "0.5", "0.42", "0.37"]
    assert rows[1][1][:8] == ["0.60", "0.6000", "0.6000", "10", "120.0", "30.00 ± 3.00", "1.50", "1.0000"]


def test_a_curve_without_the_base_model_has_no_ratios_to_it() -> None:
    assert not {"nan", "1.00"} & {cell for cells in printed(curve_tables("small", RANKS[1:], 0.4)) for cell in cells}


def test_a_curve_of_one_kind_is_one_table() -> None:
    for rows in (RANKS, [RANKS[0], *CODED]):
        lines = printed(curve_tables("small, version 1", rows, 0.4))
        assert len([cells for cells in lines if "KL to base" in cells]) == 1
        assert any("8 x 64 tokens" in cells[0] for cells in lines), "the text is named"


def test_the_worst_domain_has_a_column_if_domains_were_measured() -> None:
    domains = {"wikipedia": {"kl_nats": 0.04}, "code": {"kl_nats": 0.12}}
    lines = printed(curve_tables("small, version 1", [*RANKS, {**CODED[0], "domains": domains}, CODED[1]], 0.4))
    headings = [cells for cells in lines if "KL to base" in cells]
    assert ["worst domain" in cells for cells in headings] == [True, False]
    assert [cells[8:] for cells in lines if cells[0] in ("base", "0.5", "0.42")] == [[], ["code 0.1200"], []]


def test_older_curves_have_no_flops() -> None:
    older = [{key: value for key, value in each.items() if key != "flops"} for each in RANKS]
    assert any(cells[:4] == ["0.60", "0.6000", "", "10"] for cells in printed(curve_tables("small", older, 0.4)))


def test_the_example_is_the_smallest_size_that_is_close_to_the_base_model() -> None:
    assert example_size([*RANKS, *CODED]) == 0.42
    assert example_size([*RANKS, CODED[-1]]) == 0.37
    assert example_size(RANKS) == example_size([]) == 0.6


def test_an_evaluation_states_the_unit_of_each_size() -> None:
    part = {"kind": "domains", "label": "domains", "values": {"kl_nats/code": 0.25}}
    lines = printed(evaluation_table("small", [RANKS[1], {**CODED[1], "evaluation": [*CODED[1]["evaluation"], part]}]))
    assert ["code KL", "", "0.2500"] in lines
    assert ["measured", "0.6", "0.42 of the bytes"] in lines
    assert ["MB stored", "120.0", "84.0"] in lines
    assert ["bits per weight", "", "4.20"] in lines


def test_an_evaluation_compares_generated_answers_with_those_of_the_base_model() -> None:
    values = shares(acc=[True, False], base_acc=[True, True], kept=[True, False], flipped=[False, True], same_answer=[True, True])
    part = {"kind": "task", "label": "task/generated_arithmetic", "values": values}
    lines = printed(evaluation_table("small", [{**RANKS[1], "evaluation": [part]}]))
    assert ["generated_arithmetic acc", "0.500 ± 0.354"] in lines
    assert ["generated_arithmetic acc of the base", "1.000 ± 0.000"] in lines
    assert ["generated_arithmetic kept", "50.0% ± 35.4%"] in lines
    assert ["generated_arithmetic flipped", "50.0% ± 35.4%"] in lines
    assert ["generated_arithmetic same answer", "100.0% ± 0.0%"] in lines
