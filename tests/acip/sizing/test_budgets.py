"""Budgets in bytes, memory and quality are kept exactly, count the bytes that are stored, and are refused with a reason."""

import math
import random
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, T5Config

from acip.artifact.artifact import Artifact
from acip.errors import BudgetError
from acip.export.quantization import spread
from acip.layers.directions import FourBitDirectionMatrix
from acip.layers.elastic_linear import ElasticLinear
from acip.modeling_acip import PivotLinear, plain_linear
from acip.recipe import Storage
from acip.sizing.budget import OVERHEAD, Bits, Budget, Curve, Decoder, as_perplexity
from acip.sizing.cut_table import Cut, CutTable, LayerShape, Weights
from acip.sizing.model_sizes import set_size

TABLES = [
    (storage, rows, dense_if_no_saving) for storage in ("pivot", "factors") for rows in (0, 8) for dense_if_no_saving in (True, False)
]
BUDGETS = 150  # random budgets per kind and table: 1200 of each kind
DECODER = Decoder(layers=3, kv_heads=2, head_dim=16, vocabulary=100, hidden=64, itemsize=2)
ALL_BITS: tuple[Bits | None, ...] = (None, 8, 4)


def shapes(seed: int) -> tuple[LayerShape, ...]:
    rng = random.Random(seed)
    return tuple(LayerShape(f"layer{i}", rng.randint(6, 90), rng.randint(6, 90), rng.random() < 0.5) for i in range(rng.randint(2, 5)))


@cache
def table(index: int) -> CutTable:
    storage, adapter_rows, dense_if_no_saving = TABLES[index]
    rng, layers = random.Random(index), shapes(index)
    order = [i for i, shape in enumerate(layers) for _ in range(shape.K)]
    rng.shuffle(order)
    weights = Weights(tuple(rng.choice([2, 4]) for _ in layers), rng.randint(0, 10_000))
    curve = Curve((1.0, 0.9, 0.71, 0.5), (2.0, 2.01, 2.01, 2.4))
    return CutTable(
        layers, torch.tensor(order, dtype=torch.int32), adapter_rows, rng.randint(0, 5000), storage,  # type: ignore[arg-type]
        dense_if_no_saving, weights, DECODER, curve,
    )  # fmt: skip


def matrices(layer: LayerShape, rank: int, adapter_rows: int, storage: Storage) -> tuple[list[tuple[int, int]], int]:
    """Return the shapes [rows, columns] that a layer stores, and the bytes of its row indices."""
    q = rank + adapter_rows
    if storage == "pivot" and q < layer.K:
        return [(q, layer.N), (layer.M - q, q)], 8 * layer.M
    if storage == "factors" and q * (layer.M + layer.N) < layer.M * layer.N:
        return [(layer.M, q), (q, layer.N)], 0
    return [(layer.M, layer.N)], 0


def matrix_bytes(shape: tuple[int, int], itemsize: int, bits: Bits | None) -> int:
    rows, columns = shape
    if bits == 8:
        return rows * columns + 4 * rows
    if bits == 4:
        return rows * math.ceil(columns / 64) * (32 + 4)
    return rows * columns * itemsize


@cache
def counts(index: int) -> dict[str, list[int]]:
    """Count, layer by layer, the numbers and the bytes that every size stores in each number of bits."""
    t = table(index)
    assert t.weights
    ranks = [layer.K for layer in t.layers]
    totals: dict[str, list[int]] = {key: [] for key in ("params", *map(str, ALL_BITS))}
    for removed in [None, *t.order.tolist()]:
        if removed is not None:
            ranks[removed] = max(1, ranks[removed] - 1)
        forms, quantized = (
            [matrices(layer, rank, t.adapter_rows, storage) for layer, rank in zip(t.layers, ranks, strict=True)]
            for storage in (t.storage, "factors")
        )
        biases = sum(layer.M for layer in t.layers if layer.bias)
        totals["params"].append(sum(m * n for form, _ in forms for m, n in form) + biases + t.rest_params)
        for bits in ALL_BITS:
            total = sum(
                index_bytes + sum(matrix_bytes(shape, itemsize, bits) for shape in form)
                for (form, index_bytes), itemsize in zip(quantized if bits else forms, t.weights.itemsizes, strict=True)
            )
            totals[f"{bits}"].append(total + t.weights.rest)
    return totals


def assert_exact(index: int, amounts: list[int], allowed: int, scale: int, budget: Budget) -> None:
    """Assert that the cut is the largest size whose amount is at most `allowed`. `scale` is the unit of the budget in amounts."""
    fits = [n for n, amount in enumerate(amounts) if amount <= allowed]
    if not fits:
        with pytest.raises(BudgetError, match="can't be reached: the smallest is"):
            table(index).cut(budget)
    else:
        cut = table(index).cut(budget)
        assert cut.removed == fits[0]
        assert cut.got == (amounts[fits[0]] if scale == 1 else amounts[fits[0]] / scale)
        assert cut.got <= cut.asked == budget.asked
        assert cut.params == counts(index)["params"][fits[0]]
        assert cut.bytes == counts(index)[f"{budget.bits}"][fits[0]]


@pytest.mark.parametrize("index", range(len(TABLES)))
def test_params_and_bytes_are_kept_exactly(index: int) -> None:
    rng = random.Random(index)
    for bits in ALL_BITS:
        amounts = counts(index)[f"{bits}"]
        for _ in range(BUDGETS):
            asked = rng.randint(int(0.9 * min(amounts)), int(1.05 * max(amounts)))
            assert_exact(index, amounts, asked, 1, Budget(stored_bytes=asked, bits=bits))
        for asked in rng.sample(amounts, 5):
            assert_exact(index, amounts, asked, 1, Budget(stored_bytes=asked, bits=bits))
    amounts = counts(index)["params"]
    for _ in range(BUDGETS):
        asked = rng.randint(int(0.9 * min(amounts)), int(1.05 * max(amounts)))
        assert_exact(index, amounts, asked, 1, Budget(params=asked))


@pytest.mark.parametrize("index", range(len(TABLES)))
def test_ratios_are_kept_exactly(index: int) -> None:
    """Ratios are decimals: 0.7 of 10 is 7."""
    t, rng = table(index), random.Random(index)
    for convention, amounts, of in (
        ("model", counts(index)["params"], t.dense_params + t.rest_params),
        ("linear", [amount - t.rest_params for amount in counts(index)["params"]], t.dense_params),
    ):
        for _ in range(BUDGETS):
            written = f"{rng.uniform(0.01, 1.0):.{rng.randint(2, 17)}f}"
            budget = Budget(ratio=float(written), convention=convention)  # type: ignore[arg-type]
            assert_exact(index, amounts, int(Fraction(repr(float(written))) * of), of, budget)


@pytest.mark.parametrize("index", range(len(TABLES)))
def test_memory_is_kept_exactly(index: int) -> None:
    rng = random.Random(index)
    for bits in ALL_BITS:
        for _ in range(BUDGETS):
            context, batch = rng.randint(1, 4096), rng.randint(1, 16)
            beside = 2 * 3 * 2 * 16 * context * batch * 2 + OVERHEAD + 4 * batch * 100
            amounts = [amount + beside for amount in counts(index)[f"{bits}"]]
            allowed = rng.randint(min(amounts) - 1000, max(amounts) + 1000)
            assert_exact(index, amounts, allowed, 10**6, Budget(memory_mb=allowed / 1e6, context=context, batch=batch, bits=bits))


@pytest.mark.parametrize("index", range(len(TABLES)))
@pytest.mark.parametrize("kind", ["max_perplexity", "max_loss_increase"])
def test_quality_is_kept_exactly(index: int, kind: str) -> None:
    """The cut is the smallest measured size whose predicted loss is within the bound."""
    t = table(index)
    assert t.curve
    rng = random.Random(index)
    linear = t.stored().tolist()
    ratios = [amount / t.dense_params for amount in linear]
    losses = [loss for loss in map(t.curve.loss, ratios) if loss is not None]
    values = [as_perplexity(loss) if kind == "max_perplexity" else loss - 2.0 for loss in losses]
    assert values == sorted(values)
    for _ in range(BUDGETS):
        asked = rng.uniform(values[0], 1.05 * values[-1])
        cut = t.cut(Budget(**{kind: asked}))  # type: ignore[arg-type]
        best = max(n for n, value in enumerate(values) if value <= asked)
        assert linear[cut.removed] == linear[best]
        assert cut.removed == linear.index(linear[best])
        assert cut.got == values[best] <= asked
        assert cut.predicted == {"loss": losses[best], "perplexity": as_perplexity(losses[best])}
        assert cut.sizes["linear"] >= 0.5


def test_the_smallest_size_of_a_plateau_is_chosen() -> None:
    """Among sizes with equal loss the smallest is chosen, but never one below the smallest measured size."""
    t = table(0)
    assert t.cut(Budget(max_loss_increase=0.01)).sizes["linear"] == pytest.approx(0.71, abs=0.02)
    assert 0.5 <= t.cut(Budget(max_perplexity=1e6)).sizes["linear"] < 0.52


def test_a_curve_never_rises_with_size_and_ends_before_a_loss_that_is_not_finite() -> None:
    rows: list[dict[str, Any]] = [
        {"asked": 0.5, "got": 0.5, "loss": 3.0},
        {"asked": 1.0, "got": 1.0, "loss": 2.0},
        {"asked": 0.8, "got": 0.75, "loss": 1.5},
        {"asked": 0.4, "got": 0.4, "loss": float("nan")},
        {"asked": 0.3, "got": 0.3, "loss": 9.0},
    ]
    curve = Curve.of(rows)
    assert curve == Curve((1.0, 0.75, 0.5), (2.0, 2.0, 3.0))
    assert [curve.loss(size) for size in (1.0, 0.8, 0.75, 0.625, 0.5, 0.499, 1.01)] == [2.0, 2.0, 2.0, 2.5, 3.0, None, None]
    assert Curve.of([]) is Curve.of([{"got": 1.0, "loss": None}]) is None


def test_bytes_are_those_of_a_materialized_model(small_artifact: Artifact) -> None:
    """The bytes are those of all saved tensors, with tied ones counted once. In 4 bit they are those of `FourBitDirectionMatrix`."""
    any_size = small_artifact.load()
    for size in (1.0, 0.8, 0.5, 0.4):
        cut = any_size.resize(size)
        plain = any_size.materialize()
        tensors = {tensor.data_ptr(): tensor for tensor in plain.state_dict().values()}
        assert cut.bytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        assert any_size.resize(Budget(stored_bytes=cut.bytes)).bytes == cut.bytes
    beside = OVERHEAD + 4 * 256 + 2 * 4 * 2 * 24 * 100 * 4
    cut = any_size.resize(Budget(memory_mb=beside / 1e6 + 1, context=100, batch=1))
    assert cut.unit == "MB" and cut.bytes and cut.got == (cut.bytes + beside) / 1e6 <= beside / 1e6 + 1
    assert cut.got > beside / 1e6 + 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["pivot", "factors"])
@pytest.mark.parametrize("bias", [True, False])
def test_bytes_are_those_of_materialized_layers(dtype: torch.dtype, storage: Storage, bias: bool) -> None:
    for M, N in ((20, 33), (70, 24)):
        original = plain_linear(torch.randn(M, N).to(dtype), torch.randn(M).to(dtype) if bias else None)
        U, S, V = torch.linalg.svd(original.weight.float(), full_matrices=False)
        layer = ElasticLinear(original, (U * S).T.to(dtype).contiguous(), V.to(dtype).contiguous())
        shape = LayerShape("layer", M, N, bias)
        order = torch.zeros(shape.K, dtype=torch.int32)
        t = CutTable((shape,), order, 0, 0, storage, False, Weights((dtype.itemsize,), M * dtype.itemsize if bias else 0))
        for rank in (1, 7, shape.K - 1, shape.K):
            layer.set_rank(rank)
            stored = layer.materialize(storage)
            total = sum(tensor.numel() * tensor.itemsize for tensor in (*stored.parameters(), *stored.buffers()))
            assert t.cut(Budget(params=sum(p.numel() for p in stored.parameters()))).bytes == total
            factors = spread(stored) if isinstance(stored, PivotLinear) else stored
            weights = [module.weight for module in factors.modules() if isinstance(module, nn.Linear)]
            rest = sum(p.numel() * p.itemsize for p in factors.parameters()) - sum(weight.numel() * weight.itemsize for weight in weights)
            four = [p for weight in weights for p in FourBitDirectionMatrix(weight, "nf4").parameters()]
            cut = t.cut(Budget(params=sum(p.numel() for p in stored.parameters()), bits=4))
            assert cut.bytes == rest + sum(p.numel() * p.itemsize for p in four)


def test_a_size_of_an_artifact_has_the_prediction_of_its_curve(small_artifact: Artifact) -> None:
    rows = [{"asked": size, "got": size, "loss": loss} for size, loss in ((1.0, 1.5), (0.8, 1.6), (0.6, 1.9))]
    any_size = Artifact(small_artifact.folder, {**small_artifact.manifest, "curve": rows}, small_artifact.source).load()
    assert any_size.cut and any_size.cut.predicted == {"loss": 1.5, "perplexity": math.exp(1.5)}
    cut = any_size.resize(Budget(max_loss_increase=0.1))
    assert (cut.asked, cut.convention, cut.unit) == (0.1, "max_loss_increase", "nats per token")
    assert 0 <= cut.sizes["linear"] - 0.8 < 0.01
    with pytest.raises(BudgetError, match=r"max_perplexity 4 can't be reached: the base model has perplexity 4\.48"):
        any_size.resize(Budget(max_perplexity=4))


def test_the_dimensions_of_a_decoder_are_read_from_its_config() -> None:
    small = LlamaConfig(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, vocab_size=50, head_dim=32)
    assert Decoder.of(small, 2) == Decoder(3, 2, 32, 50, 96, 2)
    assert Decoder.of(AutoConfig.for_model("gpt2"), 4) == Decoder(12, 12, 64, 50257, 768, 4)
    assert Decoder.of(AutoConfig.for_model("deepseek_v3"), 2).head_dim == 192  # type: ignore[union-attr]
    assert Decoder.of(AutoConfig.for_model("gemma3"), 2) is not None
    assert Decoder.of(T5Config(), 2) is None


BARE = CutTable(shapes(0), table(0).order, 0, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one"),
        ({"ratio": 0.5, "stored_bytes": 5}, r"exactly one of .* \(got ratio and stored_bytes\)"),
        ({"stored_bytes": 0}, "whole number of bytes, at least 1"),
        ({"stored_bytes": 1.5}, "whole number of bytes"),
        ({"stored_bytes": True}, "whole number of bytes"),
        ({"memory_mb": 100}, "or none of them"),
        ({"memory_mb": 100, "context": 100}, "or none of them"),
        ({"ratio": 0.5, "batch": 1}, "or none of them"),
        ({"memory_mb": float("nan"), "context": 1, "batch": 1}, "above 0"),
        ({"memory_mb": 100, "context": 0, "batch": 1}, "whole number of tokens"),
        ({"max_perplexity": 0.9}, "at least 1"),
        ({"max_loss_increase": -0.1}, "at least 0"),
        ({"max_loss_increase": float("inf")}, "at least 0"),
        ({"stored_bytes": 5, "bits": 16}, "8, 4, 'best' or None"),
        ({"ratio": 0.5, "bits": "best"}, "use .best. with stored_bytes"),
    ],
)
def test_malformed_budgets_are_refused_with_advice(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**fields)


@pytest.mark.parametrize(
    ("cut_table", "budget", "message"),
    [
        (BARE, Budget(stored_bytes=10**9), "load the saved artifact"),
        (BARE, Budget(memory_mb=1000, context=1, batch=1), "load the saved artifact"),
        (BARE, Budget(max_perplexity=20), "no curve"),
        (table(0), Budget(stored_bytes=10, bits=8), r"the smallest is [\d,]+ bytes in 8 bit"),
        (table(0), Budget(memory_mb=1, context=10, batch=1), r"the smallest is 257 MB \(weights .*, KV cache .*, overhead 256\.0\)"),
        (table(0), Budget(max_perplexity=7), r"the base model has perplexity 7\.38"),
        (table(0), Budget(max_perplexity=20, bits=4), "no curve was measured in 4 bit"),
        (BARE, Budget(max_perplexity=20, bits="best"), "no curve"),
        (table(0), Budget(stored_bytes=10, bits="best"), r"the smallest is [\d,]+ bytes"),
    ],
)
def test_unreachable_budgets_are_refused_with_a_reason(cut_table: CutTable, budget: Budget, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        cut_table.cut(budget)


def test_a_loss_increase_needs_the_loss_of_the_base_model() -> None:
    t = CutTable(shapes(0), table(0).order, 0, 0, curve=Curve((0.9, 0.5), (2.0, 3.0)))
    assert t.cut(Budget(max_perplexity=8)).sizes["linear"] < 0.9
    with pytest.raises(BudgetError, match=r"starts at size 0\.9000"):
        t.cut(Budget(max_loss_increase=0.1))
    with pytest.raises(BudgetError, match=r"largest measured size, 0\.9000, has perplexity 7\.38"):
        t.cut(Budget(max_perplexity=5))


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.6", Budget(0.6)),
        ("60%", Budget(0.6)),
        ("62.5 %", Budget(0.625)),
        ("800M params", Budget(params=800_000_000)),
        ("1.1B parameters", Budget(params=1_100_000_000)),
        ("123 params", Budget(params=123)),
        ("8GB", Budget(stored_bytes=8_000_000_000)),
        ("fit:8GB", Budget(stored_bytes=8_000_000_000)),
        (" fit: 1.5 gib ", Budget(stored_bytes=3 << 29)),
        ("1000 bytes", Budget(stored_bytes=1000)),
        ("ppl<=20", Budget(max_perplexity=20.0)),
        ("ppl <= 20.5", Budget(max_perplexity=20.5)),
    ],
)
def test_written_budgets_are_parsed(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    "text",
    ["", "large", "8", "8B", "8M", "-1", "0%", "120%", "8GBit", "ppl<20", "ppl<=0.5", "0GB", "nan", "1e3", "GB", ".", "9" * 100_000],
)
def test_text_that_is_not_a_budget_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"must be|is not a budget"):
        Budget.parse(text)


def test_bits_do_not_change_the_size_of_a_ratio() -> None:
    """The number of bits changes only the bytes and the prediction."""
    cuts: list[Cut] = [table(3).cut(Budget(0.7, bits=bits)) for bits in ALL_BITS]
    assert len({cut.removed for cut in cuts}) == 1
    assert len({cut.bytes for cut in cuts}) == 3
    assert cuts[0].predicted and cuts[1].predicted is None


def table_with_quantized_curves(index: int) -> CutTable:
    """Return a table whose losses are higher by 0.02 nats in 8 bit and by 0.1 to 0.5 nats in 4 bit."""
    curves: dict[Bits, Curve] = {8: Curve((1.0, 0.5), (2.02, 2.42)), 4: Curve((1.0, 0.5), (2.1, 2.9))}
    return replace(table(index), quantized=curves)


@pytest.mark.parametrize("index", range(len(TABLES)))
def test_the_best_bits_have_the_lowest_loss_within_the_bytes(index: int) -> None:
    t, chosen = table_with_quantized_curves(index), set()
    assert t.weights is not None
    most, least = int(t.least_bytes()[0]) + t.weights.rest, int(t.least_bytes(4)[-1]) + t.weights.rest
    for asked in random.Random(index).sample(range(least, most + 2), BUDGETS):
        losses = {}
        for bits in ALL_BITS:
            with suppress(BudgetError):
                cut = t.cut(Budget(stored_bytes=asked, bits=bits))
                if cut.predicted:
                    losses[bits] = cut.predicted["loss"]
        if not losses:
            with pytest.raises(BudgetError):
                t.cut(Budget(stored_bytes=asked, bits="best"))
            continue
        best = t.cut(Budget(stored_bytes=asked, bits="best"))
        assert best.bytes is not None and best.bytes <= asked
        assert best.predicted and best.predicted["loss"] == min(losses.values()) == losses[best.bits]
        chosen.add(best.bits)
    assert len(chosen) > 1


def test_the_best_bits_for_a_perplexity_store_the_fewest_bytes() -> None:
    t = table_with_quantized_curves(2)
    for asked in (7.4, 7.6, 8.0, 9.0, 11.0):
        cuts = []
        for bits in ALL_BITS:
            with suppress(BudgetError):
                cuts.append(t.cut(Budget(max_perplexity=asked, bits=bits)))
        best = t.cut(Budget(max_perplexity=asked, bits="best"))
        assert best.predicted and best.predicted["perplexity"] <= asked
        assert best.bytes == min(cut.bytes for cut in cuts if cut.bytes is not None)


def test_a_quantized_curve_uses_only_measurements_on_the_same_text() -> None:
    text = {"corpus": "a", "protocol": "packed", "context": 64, "windows": 4}

    def part(kind: str, loss: float, **changes: Any) -> dict[str, Any]:
        return {"kind": "quantized", "quantize": kind, "values": {"loss_nats": loss}, **text, **changes}

    rows: list[dict[str, Any]] = [
        {"got": 1.0, "loss": 2.0, **text, "evaluation": [part("int8", 2.9, corpus="b"), part("nf4", 2.2), part("int8", 2.1)]},
        {"got": 0.8, "loss": 2.1, **text},
        {"got": 0.6, "loss": 2.5, **text, "evaluation": [part("int8", 2.6), "odd", {"kind": "quantized"}]},
    ]
    assert Curve.of(rows, 8) == Curve((1.0, 0.6), (2.1, 2.6))
    assert Curve.of(rows, 4) == Curve((1.0,), (2.2,))
    assert Curve.of(rows[1:2], 4) is None


def test_a_model_takes_the_size_of_a_budget_in_bytes(small_artifact: Artifact) -> None:
    """A cut by bytes sets the ranks of the layers like a cut by ratio."""
    any_size = small_artifact.load()
    by_ratio = any_size.resize(0.6)
    assert by_ratio.bytes
    by_bytes = any_size.table.cut(Budget(stored_bytes=by_ratio.bytes))
    set_size(any_size.layers, by_bytes)
    assert {name: layer.rank for name, layer in any_size.layers.items()} == by_bytes.ranks
    assert by_bytes.params >= by_ratio.params
