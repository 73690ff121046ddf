"""Every size of a curve is also compared with the base model on several domains of text."""

import json
from typing import Any

import pytest
import torch
from acip_platform.scheduling.fleet import Job
from acip_platform.training.completion import Heldout, measured_curve

from acip.artifact.artifact import Artifact
from acip.base import Base
from acip.data import chat_text, documents
from acip.errors import ArtifactError, DataError, EvaluationError
from acip.evaluate import (
    CurveSetup,
    DivergenceOn,
    OnDomains,
    PerplexityOn,
    Text,
    divergence_of,
    evaluate,
    extended,
    streamed_trade_off,
    trade_off,
)
from acip.evaluate.domains import CONTEXT, EVERY_DOMAIN, chat_windows, prompts_of_chat, text_windows
from acip.evaluate.measurement import Subject
from acip.sizing.budget import Budget
from acip.sizing.domains import WorstDomain, domain_name, worst_domain
from tests.acip.artifact.test_codes_file import calibrated_with_codes, llama
from tests.support.near_ties import assert_close_divergence, assert_greedy_ids
from tests.support.server import CHAT

TEXT = Text("package:austen", context=32, windows=3)
CODE = Text("package:code", "spread", 24, 4)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    base, calibration, codes = calibrated_with_codes(llama())
    return Artifact.save(tmp_path_factory.mktemp("coded") / "artifact", base, calibration, {}, codes)


@pytest.fixture(scope="module")
def domains(coded: Artifact) -> dict[str, list[torch.Tensor]]:
    """Return a domain of equal windows and one whose windows differ in length."""
    windows = text_windows(CODE.source, coded.tokenizer(), CODE.context, CODE.windows, [])
    return {"code": windows, "short": [windows[0][:9], windows[1][:20]]}


def sizes_of(artifact: Artifact) -> list[Budget | float]:
    sizes = artifact.table().byte_sizes
    assert sizes is not None
    return [1.0, 0.5, Budget(sizes.share(0), "bytes"), Budget(sizes.share(len(sizes.order.steps) // 2), "bytes")]


@pytest.fixture(scope="module")
def rows(coded: Artifact, domains: dict[str, list[torch.Tensor]]) -> list[Row]:
    windows = TEXT.tokens(coded.tokenizer())
    setup = CurveSetup(windows, TEXT.source, 0.9, divergence=DivergenceOn(TEXT), domains={**domains, "austen": windows})
    return trade_off(coded.load(), sizes_of(coded), setup)


def test_a_domain_has_the_numbers_of_its_text_measured_alone(coded: Artifact, rows: list[Row]) -> None:
    any_size = coded.load()
    (base,) = evaluate(any_size, coded.tokenizer(), [PerplexityOn(CODE)])["evaluation"]
    for row in rows:
        any_size.resize(Budget(row["asked"], row["convention"]))
        perplexity, divergence = evaluate(any_size, coded.tokenizer(), [PerplexityOn(CODE), DivergenceOn(CODE)])["evaluation"]
        found = row["domains"]["code"]
        two = ("kl_nats", "same_top_share")
        assert_close_divergence({key: found[key] for key in two}, {key: divergence["values"][key] for key in two}, 1e-4, 4 * 24)
        assert found["ppl"] == pytest.approx(perplexity["values"]["perplexity"], rel=1e-4)
        assert found["base_ppl"] == pytest.approx(base["values"]["perplexity"], rel=1e-4)
        assert (found["windows"], found["tokens"]) == (4, 4 * 24)


def test_the_text_of_the_curve_is_a_domain_and_is_measured_once(rows: list[Row]) -> None:
    for row in rows:
        assert list(row["domains"]) == ["austen", "code", "short"]
        assert row["domains"]["austen"]["kl_nats"] == pytest.approx(divergence_of(row)["kl_nats"], rel=1e-6)
        assert row["domains"]["austen"]["ppl"] == pytest.approx(row["perplexity"], rel=1e-6)
        assert row["domains"]["austen"]["windows"] == TEXT.windows
    assert all(each["kl_nats"] == 0 and each["ppl"] == each["base_ppl"] for each in rows[0]["domains"].values()), "size 1.0 is the base"


def test_each_token_of_a_domain_counts_the_same(coded: Artifact, domains: dict[str, list[torch.Tensor]], rows: list[Row]) -> None:
    first, second = (
        trade_off(coded.load(), [0.5], CurveSetup([window], "short", 0.9, domains={}))[0]["domains"]["short"] for window in domains["short"]
    )
    expected = (9 * first["kl_nats"] + 20 * second["kl_nats"]) / 29
    assert rows[1]["domains"]["short"]["kl_nats"] == pytest.approx(expected, rel=1e-4)
    assert rows[1]["domains"]["short"]["tokens"] == 29


@pytest.mark.parametrize("hidden_bytes", [0, 2**30], ids=["a window at a time", "all windows at once"])
def test_domains_with_one_block_in_memory_equal_those_of_the_whole_model(
    coded: Artifact, domains: dict[str, list[torch.Tensor]], rows: list[Row], hidden_bytes: float
) -> None:
    done = list[tuple[int, int]]()
    setup = CurveSetup(TEXT.tokens(coded.tokenizer()), TEXT.source, 0.9, divergence=DivergenceOn(TEXT), domains=domains)
    streamed = streamed_trade_off(coded.unloaded(), sizes_of(coded), setup, hidden_bytes, lambda *each: done.append(each))
    for row, expected in zip(streamed, rows, strict=True):
        assert row["domains"].keys() == expected["domains"].keys()
        for name, values in row["domains"].items():
            other = expected["domains"][name]
            assert values["kl_nats"] == pytest.approx(other["kl_nats"], rel=1e-4, abs=1e-7)
            assert (values["ppl"], values["base_ppl"]) == (pytest.approx(other["ppl"]), pytest.approx(other["base_ppl"]))
            assert abs(values["same_top_share"] - other["same_top_share"]) * other["tokens"] < 2.5, "near ties"
    if hidden_bytes:
        assert done[-1][1] == 2, "all windows of all domains go through a block at once"


def test_no_domains_leave_the_rows_as_they_were(coded: Artifact, rows: list[Row]) -> None:
    setup = CurveSetup(TEXT.tokens(coded.tokenizer()), TEXT.source, 0.9, divergence=DivergenceOn(TEXT))
    plain = trade_off(coded.load(), sizes_of(coded), setup)
    assert plain == [{key: value for key, value in row.items() if key != "domains"} for row in rows]


def test_domains_are_stored_in_the_artifact(coded: Artifact, rows: list[Row]) -> None:
    """A curve from before there were domains is read, too. Malformed domains are refused."""
    older = {key: value for key, value in rows[0].items() if key != "domains"}
    coded.record_curve([older, *rows[1:]])
    read = Artifact.open(coded.folder).curve
    assert read == json.loads(json.dumps([older, *rows[1:]]))
    assert worst_domain(read[0]) is None and worst_domain(read[1]) is not None
    wrong: list[Any] = [[], {"code": 3}, {"code": {"kl_nats": [1]}}]
    for malformed in wrong:
        with pytest.raises(ArtifactError, match="malformed row of the curve"):
            Artifact.open(coded.record_curve([{**older, "domains": malformed}]).folder)


def test_a_curve_without_domains_gets_them_from_an_evaluation(small_artifact: Artifact, heldout_tokens: torch.Tensor) -> None:
    any_size, tokenizer = small_artifact.load(), small_artifact.tokenizer()
    windows = text_windows("package:code", tokenizer, CONTEXT, 2, [])
    older = trade_off(any_size, [1.0, 0.5], CurveSetup(heldout_tokens[:2], "held-out", 0.5))
    any_size.resize(0.5)
    row = evaluate(any_size, tokenizer, [OnDomains(("package:code", "chat"), 2)])
    curve, left_out = extended(older, [row], 0.5)
    assert left_out == [] and "domains" not in curve[0]
    (expected,) = trade_off(any_size, [0.5], CurveSetup(heldout_tokens[:2], "held-out", 0.5, domains={"code": windows}))
    assert list(curve[1]["domains"]) == ["code"], "the tokenizer has no chat template"
    found, wanted = curve[1]["domains"]["code"], expected["domains"]["code"]
    assert_close_divergence(found, wanted, 1e-4, sum(map(len, windows)))
    with pytest.raises(EvaluationError, match=r"domain 'chat' can't be measured: .* no chat template"):
        evaluate(any_size, tokenizer, [OnDomains(("chat",), 2)])


def test_the_worst_domain_is_the_one_with_the_highest_divergence() -> None:
    row = {"corpus": "package:wikipedia", "domains": {"wikipedia": {"kl_nats": 0.2}, "code": {"kl_nats": 0.5}, "chat": {"kl_nats": None}}}
    assert worst_domain(row) == WorstDomain("code", 0.5, pytest.approx(0.35), "wikipedia", pytest.approx(2.5))  # type: ignore[arg-type]
    other = worst_domain({**row, "corpus": "/my/text.txt"})
    assert other is not None and (other.own, other.times) == ("text.txt", None)
    assert worst_domain({"corpus": "x"}) is worst_domain({"domains": {"code": {"kl_nats": 0.0}}}) is None
    assert [domain_name(source) for source in ("package:code", "c4", "/data/my chats/*.jsonl")] == ["code", "c4", "_.jsonl"]


def test_local_text_that_was_not_calibrated_on_is_read_as_a_whole(coded: Artifact, tmp_path: Any) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("one document only. " * 9)
    (window, *_) = text_windows(str(path), coded.tokenizer(), 32, 2, ["package:wikipedia"])
    assert len(window) == 32
    with pytest.raises(DataError, match="every eighth is held out"):
        text_windows(str(path), coded.tokenizer(), 32, 2, [str(path)])


def test_the_included_texts_have_held_out_code_and_prompts() -> None:
    heldout = list(documents("package:code", "heldout"))
    assert len(heldout) == 7 and 200_000 < sum(len(str(each)) for each in documents("package:code", "all")) < 400_000
    prompts = [prompt for (message,) in prompts_of_chat() for prompt in [message["content"]]]
    assert len(set(prompts)) == 64 and all(message["role"] == "user" for (message,) in prompts_of_chat())


# ---- conversations


def subject(artifact: Artifact, template: str | None = CHAT) -> Subject:
    any_size, tokenizer = artifact.load(), artifact.tokenizer()
    tokenizer.chat_template = template
    return Subject(any_size.model, tokenizer, any_size)


def test_conversations_are_answers_of_the_base_model(small_artifact: Artifact) -> None:
    """The model has another size meanwhile. Answers of prompts that are padded to a batch equal those of each prompt alone."""
    about = subject(small_artifact)
    assert about.any_size is not None
    about.any_size.resize(0.5)
    windows = chat_windows(about, 120, 3)
    assert len(windows) == 3 and about.any_size.cut is not None and about.any_size.cut.asked == 0.5
    about.any_size.resize(1.0)
    prompts = {chat_text(prompt, about.tokenizer, add_generation_prompt=True): prompt for prompt in prompts_of_chat()}
    for window in windows:
        text = about.tokenizer.decode(window)
        (asked,) = (asked for asked in prompts if text.startswith(asked))
        question = about.tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"]
        whole = about.model.generate(question, attention_mask=torch.ones_like(question), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
        start, end = question.shape[1], min(question.shape[1] + 8, len(window))
        logits = about.model(window[None]).logits[0]
        assert_greedy_ids(logits, window[:end].tolist(), whole[0, :end].tolist(), start)


def test_conversations_need_a_template_and_space(small_artifact: Artifact) -> None:
    with pytest.raises(DataError, match="no chat template"):
        chat_windows(subject(small_artifact, None), 64, 3)
    with pytest.raises(EvaluationError, match="no prompt fits into windows of 16 tokens"):
        chat_windows(subject(small_artifact), 16, 3)


# ---- the curve of a job


def curve_of(artifact: Artifact, base: Base, streamed: bool = False, **fields: Any) -> tuple[list[Row], str]:
    """Return the curve of a job, and what it reported."""
    job = Job("small", base.source, artifact.recipe, "package:austen", eval_context=64, eval_windows=2, sizes=(1.0, 0.5), **fields)
    heldout, lines = Heldout.of(job, base), list[str]()
    model = artifact.unloaded(torch.device("cpu")) if streamed else artifact.load()
    rows = measured_curve(job, artifact, model, heldout, lambda kind, **facts: lines.append(facts.get("text", "")), streamed)
    return rows, " ".join(lines)


def test_a_job_measures_all_domains_and_leaves_chat_out_without_a_template(small_artifact: Artifact, calibrated: Any) -> None:
    rows, said = curve_of(small_artifact, calibrated[0], domain_windows=2, domains=EVERY_DOMAIN)
    assert [list(row["domains"]) for row in rows] == [["austen", "wikipedia", "code"]] * 2
    assert {name: each["tokens"] for name, each in rows[1]["domains"].items()} == {"austen": 128, "wikipedia": 128, "code": 128}
    assert "domain chat is left out" in said and "no chat template" in said


def test_a_job_without_domains_measures_its_text_only(small_artifact: Artifact, calibrated: Any) -> None:
    rows, said = curve_of(small_artifact, calibrated[0], domains=())
    assert not any("domains" in row for row in rows) and "chat" not in said


def test_a_streamed_curve_leaves_chat_out(small_artifact: Artifact, calibrated: Any) -> None:
    rows, said = curve_of(small_artifact, calibrated[0], streamed=True, domains=("package:code", "chat"), domain_windows=1)
    assert [list(row["domains"]) for row in rows] == [["austen", "code"]] * 2
    assert "domain chat is left out: the base model does not fit in memory" in said
