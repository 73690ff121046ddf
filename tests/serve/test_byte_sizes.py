"""Sizes in bytes: what a request asks for is loaded, shared, mixed with other sizes, and dropped when nothing needs it."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from acip_platform.serve.engine import model_cache, resident_weights
from acip_platform.serve.engine.engine import Engine
from acip_platform.serve.engine.errors import MemoryFullError
from acip_platform.serve.engine.events import RequestDone, TokenEvent, TokenSampled
from acip_platform.serve.engine.model_cache import ModelCache
from acip_platform.serve.engine.request import GenerationRequest
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.engine.sampling import SamplingParams
from acip_platform.serve.http.requests import CompletionRequest
from acip_platform.serve.size_facts import size_range
from acip_platform.serve.text_engine import TextEngine
from acip_platform.serve.tradeoff import trade_off

from acip.artifact.artifact import Artifact
from acip.errors import AcipError, BudgetError
from acip.layers.integer_linear import PreciseIntegerLinear, supports_precise_integers
from acip.sizing.budget import Budget
from acip.sizing.cut_table import Cut
from tests.serve.conftest import in_bytes, save_codes_only, save_with_codes
from tests.support.application import Application
from tests.support.engines import Resident, embedded_only
from tests.support.waiting import PATIENCE_S, until

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
PROMPT = list(b"It was a bright cold day and ")
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact in bfloat16, as most models are."""
    return save_with_codes(tmp_path_factory.mktemp("narrow"), 128, torch.bfloat16)


def resident(artifact: Artifact, **options: Any) -> ResidentModel:
    version: Any = SimpleNamespace(name="small", version="7", uri=str(artifact.folder))
    return Resident(version, artifact, **{"packed": False, **options})


def layer_bytes(model: ResidentModel) -> int:
    """Return the bytes of the compressed layers of the base model in 16 bit, without biases."""
    return sum(2 * layer.M * layer.N for layer in model.any_size.table.layers)


def rest_bytes(artifact: Artifact) -> int:
    return artifact.tensors("rest").decoded_bytes


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


def tokens(engine: Engine, model: ResidentModel, budget: Budget, count: int = 8) -> list[int]:
    # without drafts, whose copies are made in the background, so that the bytes in memory do not depend on the moment
    request = GenerationRequest([PROMPT], budget, max_tokens=count, sampling=GREEDY, end_tokens=frozenset(), speculative=False)
    return [event.token.token for event in engine.events(model, request) if isinstance(event, TokenSampled)]


# ---- memory


def test_a_coded_size_takes_at_most_six_tenths_of_the_layers_in_16_bit(narrow: Artifact, engine: Engine) -> None:
    model = resident(narrow)
    engine.add(model)
    rest, layers = rest_bytes(narrow), layer_bytes(model)
    assert model.bytes - rest <= 0.6 * layers
    for share in (0.45, 0.4, 0.5, 0.35, 0.45):
        assert len(tokens(engine, model, Budget(ratio=share, convention="bytes"))) == 8
        until(lambda: not model.weights.in_use, "the request keeps its size")
        assert model.bytes - rest <= 0.6 * layers
    assert len(tokens(engine, model, Budget(ratio=1.0))) == 8
    assert model.bytes - rest <= 1.6 * layers
    assert len(tokens(engine, model, Budget(ratio=0.6))) == 8
    assert model.bytes - rest > 1.6 * layers, "a size in ranks loads the factors"
    assert all(layer.stored_rank > 0 for layer in model.any_size.layers.values())


@embedded_only
@pytest.mark.skipif(not supports_precise_integers("cpu", torch.bfloat16), reason="this CPU has no VNNI")
def test_codes_in_integers_are_served_alike(narrow: Artifact, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = in_bytes(narrow.table(), 0.44)
    outputs = []
    for least in (0, resident_weights.LEAST_INTEGERS):
        monkeypatch.setattr(resident_weights, "LEAST_INTEGERS", least)
        model = resident(narrow)
        engine.add(model)
        assert len(tokens(engine, model, Budget(ratio=0.44, convention="bytes"))) == 8
        layer = next(iter(model.any_size.layers.values()))
        with model.holding(cut), torch.inference_mode():
            coded = layer.coded[str((cut.versions or {})[narrow.table().layers[0].name])]
            assert isinstance(coded, PreciseIntegerLinear) == (least == 0)
            outputs.append(coded(torch.ones(3, narrow.table().layers[0].N).bfloat16()))
        assert model.weights.code_bytes <= model.weights.codes_limit and model.bytes - rest_bytes(narrow) <= 0.6 * layer_bytes(model)
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)


def test_sizes_above_the_largest_that_is_served_are_refused_and_their_weights_not_loaded(narrow: Artifact, engine: Engine) -> None:
    model = resident(narrow, max_size="0.44", packed=True)
    engine.add(model)
    for budget in (Budget(ratio=0.4, convention="bytes"), Budget(ratio=0.44, convention="bytes")):
        assert len(tokens(engine, model, budget)) == 8
    for budget in (Budget(ratio=0.5, convention="bytes"), Budget(ratio=1.0), Budget(ratio=0.4), Budget(stored_bytes=10**12)):
        with pytest.raises(BudgetError, match=r"which is 0\.44 \(bytes\)"):
            tokens(engine, model, budget)
    assert all(layer.original.weight.is_meta and not layer.stored_rank for layer in model.any_size.layers.values())
    assert model.bytes - rest_bytes(narrow) <= 0.6 * layer_bytes(model) and not model.drafts
    assert size_range(model)["largest"] <= 0.44 and size_range(model)["ranks"] is None
    assert {row["asked"] for row in trade_off(model)["sizes"]} <= {percent / 100 for percent in range(45)}


def test_the_check_loads_no_larger_size_than_is_served(narrow: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    held = list[Cut]()
    hold = resident_weights.ResidentWeights.hold

    def recorded(self: resident_weights.ResidentWeights, cut: Cut) -> None:
        held.append(cut)
        hold(self, cut)

    monkeypatch.setattr(resident_weights.ResidentWeights, "hold", recorded)
    largest = resident(narrow, max_size="0.44").largest
    assert len(held) == 2 and held[0].key == largest.key and held[1].key > largest.key


def test_the_largest_size_may_be_one_in_ranks(small_artifact: Artifact, engine: Engine) -> None:
    model = resident(small_artifact, max_size="0.7")
    engine.add(model)
    assert len(tokens(engine, model, Budget(ratio=0.6))) == 8
    with pytest.raises(BudgetError, match=r"which is 0\.7 \(linear\)"):
        tokens(engine, model, Budget(ratio=0.8))
    assert all(layer.original.weight.is_meta == (rank is not None) for layer, rank in zip(
        model.any_size.layers.values(), model.largest.ranks.values(), strict=True
    ))  # fmt: skip


def test_sizes_share_versions_and_unused_ones_leave(narrow: Artifact) -> None:
    model = resident(narrow)
    weights, table = model.weights, model.any_size.table
    small, large = in_bytes(table, 0.43), in_bytes(table, 0.45)
    one = sum(layer.M * layer.N + 4 * layer.M for layer in table.layers)
    with model.holding(small), model.holding(large):
        held = {(name, int(version)) for name, layer in weights.layers.items() for version in layer.coded}
        assert held >= {*(small.versions or {}).items(), *(large.versions or {}).items()}
        assert one < weights.code_bytes < 2 * one, "versions that both sizes use are held once"
    assert weights.code_bytes <= one
    assert weights.is_loaded(large) != weights.is_loaded(small)
    generous = resident(narrow, code_copies=2.0)
    for cut in (small, large):
        with generous.holding(cut):
            pass
    assert generous.weights.is_loaded(small) and generous.weights.is_loaded(large)


def test_a_size_in_use_is_never_dropped(coded_artifact: Artifact, engine: Engine) -> None:
    model = resident(coded_artifact)
    engine.add(model)
    budgets = [Budget(ratio=share, convention="bytes") for share in (0.36, 0.44, 0.38, 0.42, 0.4, 0.44)]
    alone = [tokens(engine, model, budget, 30) for budget in budgets]
    until(lambda: not model.weights.in_use, "a request keeps its size")
    with ThreadPoolExecutor(len(budgets)) as pool:
        together = list(pool.map(lambda budget: tokens(engine, model, budget, 30), budgets * 4))
    assert together == alone * 4
    until(lambda: not model.weights.in_use, "a request keeps its size")
    assert model.weights.code_bytes <= model.weights.codes_limit


def test_loading_a_size_does_not_stop_other_requests(coded_artifact: Artifact, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resident(coded_artifact)
    engine.add(model)
    budget = Budget(ratio=0.44, convention="bytes")
    tokens(engine, model, budget)
    release, reading = threading.Event(), threading.Event()
    read = type(model.weights.loader.codes).read

    def slow(stored: Any, chosen: Any) -> Any:
        reading.set()
        assert release.wait(PATIENCE_S)
        return read(stored, chosen)

    monkeypatch.setattr(type(model.weights.loader.codes), "read", slow)
    with ThreadPoolExecutor(1) as pool, model.holding(model.cut(budget)):
        waiting = pool.submit(tokens, engine, model, Budget(ratio=0.36, convention="bytes"))
        assert reading.wait(PATIENCE_S)
        assert len(tokens(engine, model, budget)) == 8
        assert not waiting.done()
        release.set()
        assert len(waiting.result(PATIENCE_S)) == 8


def test_a_damaged_version_fails_one_request_and_is_not_counted(
    coded_artifact: Artifact, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resident(coded_artifact)
    engine.add(model)
    before = model.bytes

    def damaged(stored: Any, chosen: Any) -> Any:
        raise AcipError("the stream is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.weights.loader.codes), "read", damaged)
        with pytest.raises(AcipError, match="the stream is damaged"):
            tokens(engine, model, Budget(ratio=0.36, convention="bytes"))
    assert not model.weights.in_use
    assert model.bytes <= before
    assert len(tokens(engine, model, Budget(ratio=0.36, convention="bytes"))) == 8


def cache(engine: Engine, artifact: Artifact, limit_bytes: int) -> tuple[ModelCache, ResidentModel]:
    store: Any = SimpleNamespace(fetch=lambda uri: artifact.folder)
    models = ModelCache(engine, store, "cpu", limit_bytes, kind=Resident)
    version: Any = SimpleNamespace(name="small", version="7", uri=str(artifact.folder))
    return models, models.get(version)


def test_the_cache_counts_what_is_held(narrow: Artifact, engine: Engine) -> None:
    models, model = cache(engine, narrow, 1 << 30)
    for budget in (Budget(ratio=0.4, convention="bytes"), Budget(ratio=1.0), Budget(ratio=0.6), Budget(ratio=0.45, convention="bytes")):
        tokens(engine, model, budget)
        until(lambda: not model.weights.in_use, "the request keeps its size")
        assert models.used_bytes == pytest.approx(model.bytes, rel=0.02)  # packed copies may be padded


def test_a_size_that_does_not_fit_into_memory_is_refused(narrow: Artifact, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = narrow.table().byte_sizes
    assert codes is not None
    models, model = cache(engine, narrow, int(1.3 * codes.memory(codes.versions(0))))
    assert len(tokens(engine, model, Budget(ratio=0.4, convention="bytes"))) == 8
    until(lambda: not model.weights.in_use, "the request keeps its size")
    with pytest.raises(MemoryFullError, match=r"small needs .* bytes of memory .* may use .* Request a smaller size, or raise memory_gb"):
        tokens(engine, model, Budget(ratio=1.0))
    assert len(tokens(engine, model, Budget(ratio=0.35, convention="bytes"))) == 8
    until(lambda: not model.weights.in_use, "the request keeps its size")
    assert models.used_bytes <= models.limit_bytes
    monkeypatch.setattr(model_cache, "WAIT_S", 0.2)
    version: Any = SimpleNamespace(name="other", version="1", uri=str(narrow.folder))
    with model.holding(in_bytes(model.any_size.table, 0.35)), pytest.raises(MemoryFullError, match="every model in memory is in use"):
        models.get(version)
    assert models.get(version).name == "other"
    assert models.resident == [models.get(version)]


def test_a_request_waits_for_the_memory_of_another_size(narrow: Artifact, engine: Engine) -> None:
    codes = narrow.table().byte_sizes
    assert codes is not None
    models, model = cache(engine, narrow, int(1.3 * codes.memory(codes.versions(0))))
    small, large = (in_bytes(narrow.table(), size) for size in (0.35, 0.45))
    with ThreadPoolExecutor(1) as pool:
        with model.holding(small):
            waiting = pool.submit(model.weights.hold, large)
            until(lambda: model.weights.sizes == 2, "the request does not wait")
            assert not model.weights.is_loaded(large)
        waiting.result(PATIENCE_S)
    assert model.weights.is_loaded(large) and not model.weights.is_loaded(small)
    assert models.used_bytes <= models.limit_bytes
    model.weights.release(large)


def test_weights_that_no_request_needs_leave_if_memory_is_short(narrow: Artifact, engine: Engine) -> None:
    first = resident(narrow)
    models, model = cache(engine, narrow, rest_bytes(narrow) + int(1.2 * layer_bytes(first)))
    sizes = [Budget(ratio=0.4, convention="bytes"), Budget(ratio=1.0)] * 2
    found = []
    for budget in sizes:
        found.append(tokens(engine, model, budget))
        until(lambda: not model.weights.in_use, "the request keeps its size")
        assert models.used_bytes <= models.limit_bytes
        assert model.weights.is_loaded(model.cut(budget))
    assert found[:2] == found[2:]
    assert not model.weights.is_loaded(model.cut(sizes[0]))


def test_a_model_with_codes_is_refused_if_one_size_exceeds_the_memory(narrow: Artifact, engine: Engine) -> None:
    with pytest.raises(AcipError, match=r"needs .* bytes of memory for a coded size"):
        cache(engine, narrow, 1000)


# ---- tokens


def test_mixed_sizes_give_the_tokens_of_each_alone(coded_artifact: Artifact, engine: Engine) -> None:
    model = resident(coded_artifact)
    engine.add(model)
    budgets = [
        Budget(ratio=1.0), Budget(ratio=0.6), *(Budget(ratio=share, convention="bytes") for share in (0.44, 0.4, 0.36)),
    ]  # fmt: skip
    expected = []
    for budget in budgets:
        plain: Any = coded_artifact.load(size=budget).materialize()
        ids = torch.tensor([PROMPT])
        whole = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        expected.append(whole[0, len(PROMPT) :].tolist())
    assert len({tuple(each) for each in expected}) > 2, "the sizes must differ for this test to mean anything"
    collected: list[list[TokenEvent]] = [[] for _ in budgets * 2]
    for budget, events in zip(budgets * 2, collected, strict=True):
        request = GenerationRequest([PROMPT], budget, max_tokens=20, sampling=GREEDY, end_tokens=frozenset())
        engine.submit(model, request, events.extend)
    until(lambda: all(events and isinstance(events[-1], RequestDone) for events in collected), "the requests do not end")
    found = [[event.token.token for event in events if isinstance(event, TokenSampled)] for events in collected]
    assert found == expected * 2


def test_a_model_of_codes_only_is_served_in_bytes(tmp_path: Path, engine: Engine) -> None:
    artifact = save_codes_only(tmp_path)
    model = resident(artifact)
    engine.add(model)
    codes = model.any_size.table.byte_sizes
    assert codes is not None
    for share in (codes.share(0), 1.0):
        assert len(tokens(engine, model, Budget(ratio=share, convention="bytes"))) == 8
    assert codes.share(None) < 1.0, "the base model is stored in fewer bytes"
    body = trade_off(model)
    assert (body["size"]["convention"], body["size"]["ranks"], body["ranks"]) == ("bytes", None, None)
    base = [row for row in body["sizes"] if row["bits_per_weight"] is None]
    assert {row["bytes"] for row in base} == {codes.exact}
    assert {row["memory_bytes"] for row in base} == {codes.base}
    assert base[-1]["asked"] - codes.share(None) < 0.01
    assert set(body["heatmap"]["full"][0]) == {16}
    with pytest.raises(BudgetError, match="holds codes only"):
        engine.submit(model, GenerationRequest([PROMPT], Budget(ratio=0.8)), lambda events: None)


def test_requests_without_a_size_get_the_default_size(coded_artifact: Artifact) -> None:
    model = resident(coded_artifact)
    engine = TextEngine(default_size="40%")
    engine.add(model)
    text = engine.submit(model, CompletionRequest(prompt="a", max_tokens=1), lambda events: None)
    assert (text.active.cut.asked, text.active.cut.convention) == (0.4, "bytes")
    named = engine.submit(model, CompletionRequest(prompt="a", max_tokens=1, convention="linear"), lambda events: None)
    assert (named.active.cut.asked, named.active.cut.convention) == (0.4, "linear")
    engine.close()


# ---- HTTP


@pytest.fixture(scope="module")
def application(coded_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with pytest.MonkeyPatch.context() as environment:
        home = tmp_path_factory.mktemp("home")
        environment.setenv("ACIP_HOME", str(home))
        application = Application(home, coded_artifact)
        yield application
        application.close()


def ask(application: Application, **fields: Any) -> dict[str, Any]:
    status, body = application.post("/v1/completions", prompt="It was", max_tokens=2, temperature=0, **fields)
    assert status == 200, body
    return body["size"]


def test_a_ratio_counts_bytes_unless_the_request_says_otherwise(application: Application, coded_artifact: Artifact) -> None:
    table = coded_artifact.table()
    cut = in_bytes(table, 0.4)
    sizes = [ask(application, size_ratio=0.4), ask(application, model="small@0.4"), ask(application, model="small@40%")]
    assert sizes == [sizes[0]] * 3
    assert sizes[0] == {
        "asked": 0.4, "got": cut.got, "unit": "ratio", "convention": "bytes", "ratio": cut.got, "params": cut.params, "bytes": cut.bytes,
        "bits_per_weight": cut.bits_per_weight, "extrapolated": False,
    }  # fmt: skip
    linear = ask(application, model="small@0.6", convention="linear")
    assert (linear["convention"], linear["bits_per_weight"]) == ("linear", None)
    assert linear["got"] == table.cut(Budget(ratio=0.6)).got
    base = ask(application)
    assert (base["asked"], base["convention"], base["bits_per_weight"]) == (1.0, "bytes", None)


@pytest.mark.parametrize(
    "fields",
    [
        {"stored_bytes": 180_000},
        {"memory_mb": 256.3, "context": 16},
        {"max_perplexity": 10.0},
        {"max_loss_increase": 0.3},
        {"max_flops": 150_000},
        {"params": 100_000},
    ],
)
def test_every_kind_of_budget_is_a_field(application: Application, coded_artifact: Artifact, fields: dict[str, Any]) -> None:
    kind = next(iter(fields))
    cut = coded_artifact.table().cut(Budget(**(fields | ({"batch": 1} if kind == "memory_mb" else {}))))
    size = ask(application, **fields)
    assert (size["convention"], size["asked"], size["got"], size["bytes"]) == (kind, fields[kind], cut.got, cut.bytes)
    assert (size["bits_per_weight"] is None) == (cut.versions is None)


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"size_ratio": 0.01}, "size_ratio", "invalid_size", "size 0.01 (bytes) can't be reached: the smallest is 0."),
        ({"stored_bytes": 10}, "stored_bytes", "invalid_size", "can't be reached: the smallest is "),
        ({"max_kl": 0.1}, "max_kl", "invalid_size", "no curve was measured"),
        ({"max_perplexity": 2.0}, "max_perplexity", "invalid_size", "the base model has 7.38"),
        ({"size_ratio": 0.3, "stored_bytes": 10}, "stored_bytes", "size_twice", "give one of them"),
        ({"model": "small@0.4", "size_ratio": 0.45}, "size_ratio", "size_twice", "give one of them"),
        ({"size_ratio": 0.3, "convention": "letters"}, "convention", "invalid_value", '"bytes" (stored bytes'),
        ({"stored_bytes": 10**6, "convention": "bytes"}, "convention", "invalid_value", "leave it out with stored_bytes"),
        ({"memory_mb": 300.0}, "context", "missing_field", "the number of tokens per sequence"),
        ({"context": 16}, "memory_mb", "invalid_value", "belong to memory_mb"),
    ],
)
def test_a_size_that_is_not_available_is_refused(
    application: Application, fields: dict[str, Any], param: str, code: str, message: str
) -> None:
    status, body = application.post("/v1/completions", prompt="a", **fields)
    assert status == 400
    assert (body["error"]["param"], body["error"]["code"]) == (param, code)
    assert message in body["error"]["message"]


def get(application: Application, path: str) -> Any:
    status, body = application.ask("GET", path)
    assert status == 200, body
    return json.loads(body)


def test_card_and_trade_off_describe_sizes_in_bytes(application: Application, coded_artifact: Artifact) -> None:
    table = coded_artifact.table()
    codes = table.byte_sizes
    assert codes is not None
    card, body = get(application, "/v1/models/small"), get(application, "/v1/models/small/tradeoff")
    assert card["size"] == body["size"]
    size = card["size"]
    assert (size["convention"], size["smallest"], size["largest"]) == ("bytes", codes.share(0), 1.0)
    assert (size["base_from"], size["base_bytes"]) == (codes.share(None), table.base_bytes)
    assert size["ranks"]["convention"] == "linear"
    assert [row["asked"] for row in body["sizes"][:2]] == [1.0, 0.99]
    assert body["sizes"][-1]["asked"] - size["smallest"] < 0.01
    for row in body["sizes"]:
        cut = in_bytes(table, row["asked"])
        assert (row["bytes"], row["bits_per_weight"], row["got"]) == (cut.bytes, cut.bits_per_weight, cut.got)
        assert row["memory_bytes"] == codes.memory(cut.versions or {})
    at = {row["asked"]: row for row in body["sizes"]}
    assert (at[0.44]["perplexity"], at[0.44]["predicted"]) == (pytest.approx(8.166, abs=1e-3), False)
    assert at[0.4]["predicted"] and at[0.44]["perplexity"] < at[0.4]["perplexity"] < at[0.36]["perplexity"]
    assert [row["asked"] for row in body["measured"]] == [1.0, 0.44, 0.36]
    worst = {"name": "code", "kl": 0.2, "mean_kl": pytest.approx(0.15), "own": "held-out", "times": pytest.approx(2.0)}
    assert [row.get("worst_domain") for row in body["measured"]] == [None, worst, None], "only some rows have domains"
    assert [row.get("worst_domain") for row in card["curve"] if "worst_domain" in row] == [worst]
    heat = body["heatmap"]
    assert set(map(float, heat["bits"])) <= set(at)
    cut = in_bytes(table, 0.4)
    bits = heat["bits"]["0.4"]
    assert all(0 < value < 10 for rows in bits for value in rows)
    assert sum(map(len, bits)) == len(cut.versions or {})
    ranks = body["ranks"]
    assert [row["asked"] for row in ranks["measured"]] == [1.0, 0.8, 0.6]
    assert ranks["sizes"][0]["asked"] == 1.0 and ranks["sizes"][40]["got"] == table.cut(Budget(ratio=0.6)).got
    assert "ranks" in ranks["heatmap"]
