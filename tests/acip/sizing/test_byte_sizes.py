"""Sizes in bytes: a budget becomes the best versions of codes within it, and a model of that size is loaded, resized and mixed."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acip.artifact.artifact import Artifact
from acip.errors import BudgetError
from acip.layers.mixed_sizes import Mixer, Size
from acip.modeling_acip import CodedLinear
from acip.sizing.budget import OVERHEAD, Budget, Curve
from acip.sizing.byte_order import Version
from acip.sizing.byte_sizes import ByteSizes, LayerBytes, with_exact
from acip.sizing.elastic_model import ElasticModel
from tests.acip.artifact.test_codes_file import calibrated_with_codes, llama
from tests.conftest import logits


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(llama())
    return Artifact.save(tmp_path_factory.mktemp("coded") / "artifact", base, calibration, {}, codes)


@pytest.fixture
def any_size(artifact: Artifact) -> ElasticModel:
    return artifact.load()


def random_sizes(seed: int) -> ByteSizes:
    rng = random.Random(seed)
    versions = {}
    for i in range(rng.randint(1, 6)):
        facts = [(0, 100.0)]
        for _ in range(rng.randint(1, 5)):
            facts.append((facts[-1][0] + rng.randint(1, 500), facts[-1][1] * rng.uniform(0.1, 0.9)))
        versions[f"layer{i}"] = [Version(*each) for each in facts[1:]]
    order = with_exact(versions, {name: each[-1].bytes + rng.randint(1, 500) for name, each in versions.items()})
    layers = {name: LayerBytes(1000, 1000, 2000) for name in versions}
    return ByteSizes(order, layers, rest=rng.randint(0, 500), rest_memory=500, base=20_000)


@given(st.integers(0, 10_000), st.floats(0.001, 1.0))
@settings(max_examples=200, deadline=None)
def test_a_size_is_the_largest_within_its_budget(seed: int, ratio: float) -> None:
    sizes = random_sizes(seed)
    budget = Budget(ratio=ratio, convention="bytes")
    if ratio < sizes.share(0):
        with pytest.raises(BudgetError, match=r"\(bytes\) can't be reached: the smallest is 0\.\d+"):
            sizes.choose(budget)
        return
    steps, got = sizes.choose(budget)
    assert got == sizes.share(steps) <= ratio
    if steps is None:
        assert ratio >= sizes.exact / sizes.base
    else:
        assert sizes.share(steps + 1) > ratio
    assert sizes.choose(Budget(stored_bytes=sizes.bytes(steps))) == (steps, sizes.bytes(steps))


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_sizes_end_at_the_base_model(seed: int) -> None:
    """After all steps every layer is exact. Memory never falls with the size."""
    sizes = random_sizes(seed)
    last = len(sizes.order.steps)
    assert sizes.bytes(last) == sizes.bytes(None) == sizes.exact
    assert sizes.versions(last) == sizes.versions(None) == {}
    complete = [steps for steps in range(last + 1) if len(sizes.versions(steps)) == len(sizes.layers)]
    assert complete == list(range(sizes.all_coded + 1))
    held = [sizes.memory(sizes.versions(steps)) for steps in range(last + 1)]
    assert held == sorted(held)
    assert held[-1] == 500 + 2000 * len(sizes.layers)


def test_a_loss_is_met_by_the_fewest_bytes_on_the_curve() -> None:
    order = with_exact(
        {"layer": [Version(size, loss) for size, loss in ((100, 1.0), (200, 0.5), (300, 0.25), (400, 0.125))]}, {"layer": 700}
    )
    curve = Curve((1.0, 0.4, 0.3, 0.2, 0.1), (2.0, 2.1, 2.2, 2.4, 3.0))
    kl = Curve((1.0, 0.4, 0.1), (0.0, 0.06, 0.6))
    sizes = ByteSizes(order, {"layer": LayerBytes(400, 400, 800)}, rest=0, rest_memory=0, base=1000, loss=curve, kl=kl)
    assert sizes.choose(Budget(max_loss_increase=0.21)) == pytest.approx((2, 0.2))
    assert sizes.choose(Budget(max_loss_increase=0.11)) == pytest.approx((3, 0.1))
    assert sizes.choose(Budget(max_loss_increase=0.06))[0] is None
    assert sizes.choose(Budget(max_kl=0.061)) == pytest.approx((3, 0.06))
    assert sizes.predicted(3) == {"loss": 2.1, "perplexity": pytest.approx(8.166, abs=1e-3), "kl": pytest.approx(0.06)}
    with pytest.raises(BudgetError, match=r"max_perplexity 1.0 can't be reached: the base model has 7\.7\d+"):
        sizes.choose(Budget(max_perplexity=1.0))


def test_memory_chooses_the_largest_size_that_fits(artifact: Artifact) -> None:
    table = artifact.table()
    sizes, decoder = table.byte_sizes, table.decoder
    assert sizes is not None
    assert decoder is not None
    beside = decoder.cache(16, 1) + decoder.overhead(1)
    whole = table.cut(Budget(memory_mb=(table.base_bytes + beside) / 1e6, context=16, batch=1))
    assert (whole.versions, whole.ranks) == (None, dict.fromkeys(whole.ranks))
    least = sizes.memory(sizes.versions(0))
    coded = table.cut(Budget(memory_mb=(least + beside) / 1e6, context=16, batch=1))
    assert coded.versions is not None and coded.versions.keys() == sizes.layers.keys()
    half = table.cut(Budget(memory_mb=((table.base_bytes + least) / 2 + beside) / 1e6, context=16, batch=1))
    assert half.versions is not None and 0 < len(half.versions) < len(sizes.layers), "a part of the layers is exact"
    with pytest.raises(BudgetError, match=r"can't be reached: the smallest is .* MB, of which the weights take"):
        table.cut(Budget(memory_mb=OVERHEAD / 1e6, context=16, batch=1))


def test_bytes_choose_codes_and_numbers_choose_ranks(artifact: Artifact) -> None:
    table = artifact.table()
    assert table.convention == "bytes"
    by_bytes = table.cut(Budget(ratio=0.55, convention="bytes"))
    assert by_bytes.versions is not None
    assert by_bytes.got == by_bytes.sizes["bytes"] == (by_bytes.bytes or 0) / table.base_bytes <= 0.55
    assert (by_bytes.sizes["linear"], by_bytes.params, by_bytes.removed) == (1.0, table.cut(Budget(ratio=1.0)).params, 0)
    assert by_bytes.bits_per_weight is not None and 0 < by_bytes.bits_per_weight <= 9
    for budget in (Budget(ratio=0.8), Budget(ratio=0.8, convention="model"), Budget(params=by_bytes.params - 1), Budget(ratio=0.8, bits=8)):
        cut = table.cut(budget)
        assert cut.versions is None
        assert any(rank is not None for rank in cut.ranks.values())
    flops = table.flops(0)
    cut = table.cut(Budget(max_flops=flops - 1))
    assert cut.got == table.flops(cut.removed) < flops
    assert table.cut(Budget(max_flops=flops)).removed == 0
    with pytest.raises(BudgetError, match="FLOPs per token"):
        table.cut(Budget(max_flops=1))


def test_a_loss_is_a_budget_of_ranks_without_a_curve_over_bytes(artifact: Artifact, tmp_path: Path) -> None:
    size = {"asked": 0.8, "got": 0.8, "loss": 2.5}
    rows = [{"asked": 1.0, "got": 1.0, "loss": 2.0}, size]
    measured = Artifact(artifact.folder, {**artifact.manifest, "curve": rows}, artifact.source).table()
    assert measured.cut(Budget(max_loss_increase=0.5)).versions is None
    coded = {"asked": 0.5, "got": 0.5, "loss": 2.25, "bits_per_weight": 4.0}
    with_bytes = Artifact(artifact.folder, {**artifact.manifest, "curve": [*rows, coded]}, artifact.source).table()
    cut = with_bytes.cut(Budget(max_loss_increase=0.26))
    assert cut.versions is not None
    assert cut.predicted is not None and cut.predicted["loss"] <= 2.25
    assert with_bytes.curve == measured.curve, "rows of codes are not on the curve of ranks"


def test_the_size_changes_in_place_between_ranks_and_codes(
    artifact: Artifact, any_size: ElasticModel, heldout_tokens: torch.Tensor
) -> None:
    tokens = heldout_tokens[:1, :32]
    base = logits(any_size.model, tokens)
    by_size = {}
    for budget in (Budget(ratio=0.5, convention="bytes"), Budget(ratio=0.6), Budget(ratio=0.58, convention="bytes"), Budget(ratio=1.0)):
        cut = any_size.resize(budget)
        by_size[budget] = logits(any_size.model, tokens)
        assert torch.equal(by_size[budget], logits(artifact.load(size=budget).model, tokens))
        held = [len(layer.coded) for layer in any_size.layers.values()]
        assert held == [int(cut.versions is not None)] * len(held), "only the codes of the present size are in memory"
    assert torch.equal(by_size[Budget(ratio=1.0)], base)
    assert len({float(each.sum()) for each in by_size.values()}) == 4


def test_a_coded_size_materializes_as_coded_layers(any_size: ElasticModel, heldout_tokens: torch.Tensor) -> None:
    any_size.resize(Budget(ratio=0.5, convention="bytes"))
    plain = any_size.materialize()
    assert all(isinstance(plain.get_submodule(name), CodedLinear) for name in any_size.layers)
    assert torch.equal(logits(plain, heldout_tokens[:1, :32]), logits(any_size.model, heldout_tokens[:1, :32]))


@pytest.mark.parametrize("counts", [(1, 1, 1, 1, 1), (20, 1, 3, 40, 2), (2, 64, 64, 1, 17)])
def test_rows_of_ranks_and_codes_share_a_batch(any_size: ElasticModel, counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    budgets = [Budget(ratio=1.0), Budget(ratio=0.6), *(Budget(ratio=share, convention="bytes") for share in (0.58, 0.55, 0.5))]
    cuts = [any_size.table.cut(budget) for budget in budgets]
    assert sorted(cut.key for cut in cuts) == [cut.key for cut in cuts], "keys rise with falling size"
    assert any_size.load_missing is not None
    for cut in cuts:
        any_size.load_missing(any_size.layers, cut)
    runs = [(Size(cut.key, cut.ranks, cut.versions), count) for cut, count in zip(cuts, counts, strict=True)]
    mixer = Mixer(any_size.layers)
    for name, layer in any_size.layers.items():
        x = torch.randn(1, sum(counts), layer.right.values.shape[1])
        alone, start = [], 0
        layer.groups = None
        for cut, count in zip(cuts, counts, strict=True):
            layer.set_rank(cut.ranks[name])
            if cut.versions is not None:
                layer.set_version(cut.versions[name])
            alone.append(layer(x[:, start : start + count]))
            start += count
        mixer.set(runs)
        assert torch.allclose(layer(x), torch.cat(alone, 1), atol=1e-5)
        mixer.clear()


def test_casting_keeps_step_sizes_in_float32(any_size: ElasticModel) -> None:
    any_size.resize(Budget(ratio=0.5, convention="bytes"))
    before = {name: layer.coded[str(layer.version)].steps.clone() for name, layer in any_size.layers.items()}
    torch.nn.Module.to(any_size.model, torch.bfloat16)
    for name, layer in any_size.layers.items():
        assert torch.equal(layer.coded[str(layer.version)].steps, before[name])


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("40%", Budget(ratio=0.4, convention="bytes")),
        ("kl<=0.05", Budget(max_kl=0.05)),
        ("200M flops", Budget(max_flops=200_000_000)),
        ("180MB", Budget(stored_bytes=180_000_000)),
    ],
)
def test_budgets_are_parsed(text: str, budget: Budget) -> None:
    assert Budget.parse(text, "bytes") == budget


@pytest.mark.parametrize("fields", [{"max_kl": -0.1}, {"max_kl": "0.1"}, {"max_flops": 0}, {"max_flops": 1.5}])
def test_malformed_budgets_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(BudgetError, match=f"{next(iter(fields))} is .*; it must be"):
        Budget(**fields)  # type: ignore[arg-type]
