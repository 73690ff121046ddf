"""The curve of an artifact with coded layers: sizes of ranks and sizes in bytes are measured alike, and never mixed up."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from acip.artifact.artifact import Artifact
from acip.errors import EvaluationError
from acip.evaluate import (
    CurveSetup,
    DivergenceOn,
    Efficiency,
    Perplexity,
    PerplexityOn,
    Text,
    curve,
    divergence_of,
    evaluate,
    extended,
    place_of,
    streamed_trade_off,
    trade_off,
)
from acip.export.folder import export
from acip.modeling import from_pretrained
from acip.sizing.budget import Budget, Curve, is_coded
from tests.acip.artifact.test_codes_file import calibrated_with_codes, llama
from tests.support.near_ties import assert_close_divergence

TEXT = Text("package:austen", context=32, windows=3)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(llama())
    return Artifact.save(tmp_path_factory.mktemp("coded") / "artifact", base, calibration, {}, codes)


def byte_budgets(artifact: Artifact) -> list[Budget]:
    """Return the smallest and a middle size, and the largest below the base model."""
    sizes = artifact.table().byte_sizes
    assert sizes is not None
    last = len(sizes.order.steps) - 1
    return [Budget(sizes.share(steps), "bytes") for steps in (0, last // 2, last)]


def measured(artifact: Artifact, *more: Budget | float) -> list[Row]:
    sizes = [0.5, *byte_budgets(artifact), 1.0, *more]
    return trade_off(artifact.load(), sizes, CurveSetup(TEXT.tokens(artifact.tokenizer()), TEXT.source, 0.9, divergence=DivergenceOn(TEXT)))


@pytest.mark.parametrize("keep_bytes", [0, 32 * 256 * 4, 2**30])
def test_coded_sizes_are_measured_like_each_size_alone(artifact: Artifact, keep_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the base model are the same whether none, those of one window, or all are kept."""
    monkeypatch.setattr(curve, "KEPT_LOGITS_BYTES", keep_bytes)
    any_size, rows = artifact.load(), measured(artifact)
    assert [is_coded(row) for row in rows] == [False, False, True, True, True], "ranks come first"
    assert rows == sorted(rows, key=place_of), "the largest come first"
    for row in rows:
        any_size.resize(Budget(row["asked"], row["convention"]))
        perplexity, divergence = evaluate(any_size, artifact.tokenizer(), [PerplexityOn(TEXT), DivergenceOn(TEXT)])["evaluation"]
        assert row["loss"] == pytest.approx(perplexity["values"]["loss_nats"], rel=1e-6)
        assert_close_divergence(dict(divergence_of(row)), divergence["values"], 1e-5, TEXT.windows * TEXT.context)


@pytest.mark.parametrize("hidden_bytes", [0, 2**30], ids=["a window at a time", "all windows at once"])
def test_a_curve_with_one_block_in_memory_equals_that_of_the_whole_model(artifact: Artifact, hidden_bytes: float) -> None:
    """The numbers of both are the same; the sizes of ranks among them, and the base model."""
    expected = measured(artifact)
    windows = TEXT.tokens(artifact.tokenizer())
    sizes: list[Budget | float] = [0.5, *byte_budgets(artifact), 1.0]
    any_size, done = artifact.unloaded(), list[tuple[int, int]]()
    setup = CurveSetup(windows, TEXT.source, 0.9, divergence=DivergenceOn(TEXT))
    rows = streamed_trade_off(any_size, sizes, setup, hidden_bytes, lambda *each: done.append(each))
    assert [{**row, "evaluation": None} for row in rows] == [
        {**row, "evaluation": None, "loss": pytest.approx(row["loss"]), "stderr": pytest.approx(row["stderr"], abs=1e-5),
         "perplexity": pytest.approx(row["perplexity"])} for row in expected
    ]  # fmt: skip
    for row, other in zip(rows, expected, strict=True):
        assert_close_divergence(dict(divergence_of(row)), dict(divergence_of(other)), 1e-5, TEXT.windows * TEXT.context)
    parts = 1 if hidden_bytes else TEXT.windows
    blocks = any_size.model.config.num_hidden_layers
    assert done == [(i + 1, parts * blocks) for i in range(parts * blocks)]
    assert all(layer.original.weight.is_meta and not layer.coded and not len(layer.left) for layer in any_size.layers.values())


def test_the_divergence_is_from_the_base_model_where_size_one_is_not(tmp_path: Path) -> None:
    """Without dense_if_no_saving, size 1.0 is the product of all directions, which is rounded."""
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(llama(dtype=torch.bfloat16))
    everywhere = replace(calibration, recipe=replace(calibration.recipe, dense_if_no_saving=False))
    artifact = Artifact.save(tmp_path / "artifact", base, everywhere, {}, codes)
    setup = CurveSetup(TEXT.tokens(artifact.tokenizer()), TEXT.source, 0.9, divergence=DivergenceOn(TEXT))
    whole, partial, streamed = (
        [divergence_of(row)["kl_nats"] for row in rows]
        for rows in (
            trade_off(artifact.load(), [1.0, 0.5], setup),
            trade_off(artifact.load(size=Budget(0.5)), [1.0, 0.5], setup),
            streamed_trade_off(artifact.unloaded(), [1.0, 0.5], setup),
        )
    )
    assert [partial[1], streamed[1]] == pytest.approx([whole[1]] * 2, rel=0.5)
    assert streamed[0] != 0
    any_size = artifact.load(size=Budget(1.0))
    assert None not in {layer.rank for layer in any_size.layers.values()}
    any_size.resize(Budget(1.0, "bytes"))
    assert {layer.rank for layer in any_size.layers.values()} == {None}


def test_rows_state_what_a_size_counts(artifact: Artifact) -> None:
    table, rows = artifact.table(), measured(artifact)
    for row in rows:
        cut = table.cut(Budget(row["asked"], row["convention"]))
        assert (row["bytes"], row["params"], row["flops"]) == (cut.bytes, cut.params, table.flops(cut.removed))
        if is_coded(row):
            assert (row["got"], row["bits_per_weight"]) == (cut.sizes["bytes"], cut.bits_per_weight)
            assert row["flops"] == rows[0]["flops"], "codes change no shapes"
        else:
            assert row["got"] == cut.sizes["linear"]
    assert [row["extrapolated"] for row in rows] == [False, True, False, False, False], "a calibration does not limit coded sizes"


def test_sizes_with_the_same_model_are_measured_once(artifact: Artifact) -> None:
    """A size in bytes that is the base model, or has the same codes as another, is on the curve already."""
    rows = measured(artifact, Budget(1.0, "bytes"), Budget(0.01, "bytes"))
    assert [row["asked"] for row in rows] == [row["asked"] for row in measured(artifact)]
    finest = byte_budgets(artifact)[-1].asked
    again = measured(artifact, Budget(finest + 1e-6, "bytes"))
    assert [row["asked"] for row in again] == [row["asked"] for row in rows], "the smallest ratio with the same codes stays"


def test_a_curve_with_both_kinds_predicts_each_from_its_own_rows(artifact: Artifact) -> None:
    rows = measured(artifact)
    kinds = [[row for row in rows if is_coded(row) is kind] for kind in (False, True)]
    assert Curve.of(rows) == Curve.of(kinds[0])
    over_bytes = Curve.over_bytes(rows, 1.0)
    assert over_bytes is not None and over_bytes.sizes == (1.0, *(row["got"] for row in kinds[1]))


def test_a_coded_size_is_added_beside_ranks_with_the_same_number(artifact: Artifact) -> None:
    coded, ranks = byte_budgets(artifact)[1], artifact.load()
    rows = measured(artifact)
    before = [row for row in rows if row["asked"] != coded.asked]
    ranks.resize(coded)
    row = evaluate(ranks, artifact.tokenizer(), [PerplexityOn(TEXT)])
    twin = {**before[1], "got": row["got"]}  # of ranks
    grown, left_out = extended([before[0], twin, *before[2:]], [row], 0.9)
    assert left_out == []
    assert [place_of(each) for each in grown] == [place_of(each) for each in [before[0], twin, *rows[2:]]]
    assert not grown[3]["extrapolated"] and grown[3]["bits_per_weight"] == rows[3]["bits_per_weight"]
    assert Perplexity(grown[3]["loss"], 0.0, 1, 1).perplexity == grown[3]["perplexity"]
    assert grown[1] == twin


def test_efficiency_tells_stored_bytes_from_memory(artifact: Artifact) -> None:
    any_size = artifact.load()
    cut = any_size.resize(byte_budgets(artifact)[0])
    (part,) = evaluate(any_size, artifact.tokenizer(), [Efficiency(prompt=4, new_tokens=2, flop_tokens=4, repeats=1)])["evaluation"]
    assert part["values"]["stored_bytes"] == cut.bytes
    sizes = any_size.table.byte_sizes
    assert sizes is not None and part["values"]["resident_bytes"] == sizes.memory(cut.versions or {})
    assert sizes.memory(cut.versions or {}) > (cut.bytes or 0)


def test_a_loaded_export_has_the_numbers_and_bytes_of_its_size(artifact: Artifact, tmp_path: Path) -> None:
    """So has the model that `from_pretrained` returns, before and after it is compressed."""
    for budget in (Budget(0.5), byte_budgets(artifact)[1]):
        any_size = artifact.load(size=budget)
        export(any_size, artifact, tmp_path / "export")
        elastic: Any = from_pretrained(artifact, budget)
        for model in (elastic, elastic.compress(), AutoModelForCausalLM.from_pretrained(tmp_path / "export")):
            row = evaluate(model, artifact.tokenizer(), [])
            assert any_size.cut is not None and (row["params"], row["bytes"]) == (any_size.cut.params, any_size.cut.bytes)


def test_a_measurement_that_fails_leaves_the_model_in_training_mode(artifact: Artifact) -> None:
    any_size = artifact.load()
    any_size.model.train()
    with pytest.raises(EvaluationError, match="positions"):
        evaluate(any_size, artifact.tokenizer(), [PerplexityOn(Text(context=65))])
    assert any_size.model.training
