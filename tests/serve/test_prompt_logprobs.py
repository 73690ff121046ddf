"""Log probabilities of prompts: `echo` with `logprobs` returns those of the base model, however the prompt is split into chunks."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.http.requests import CompletionRequest
from acip_platform.serve.text.detokenizer import Detokenizer
from acip_platform.serve.text.errors import InvalidRequestError
from acip_platform.serve.text.prompt_logprobs import Echo
from acip_platform.serve.text_engine import TextEngine
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from acip.artifact.artifact import Artifact
from acip.evaluate.measurement import Subject
from acip.evaluate.tasks import TaskScore, harness
from tests.serve.test_engine import whole_answer
from tests.support.server import Server

PROMPT = "It was a bright cold day and the clocks were striking thirteen. "
LONG = (PROMPT * 6)[:300]  # longer than one prefill chunk

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask(engine: TextEngine, served: ResidentModel) -> Ask:
    return lambda **fields: whole_answer(engine, served, CompletionRequest.parse({"temperature": 0, "echo": True, **fields}))


@pytest.fixture(scope="module")
def expected(small_base: str) -> Callable[[list[int]], torch.Tensor]:
    """Return a function from [t] token ids to the base model's [t - 1, V] log probabilities of the tokens after the first."""
    base = AutoModelForCausalLM.from_pretrained(small_base).eval()

    @torch.no_grad()
    def logprobs(ids: list[int]) -> torch.Tensor:
        return base(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)

    return logprobs


def check(choice: dict[str, Any], ids: list[int], logprobs_nV: torch.Tensor, alternatives: int) -> None:
    """Compare the log probabilities of a choice's prompt with the expected ones."""
    reported = choice["logprobs"]
    count = len(ids)
    assert reported["token_logprobs"][0] is None and reported["top_logprobs"][0] is None
    own = logprobs_nV.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    assert reported["token_logprobs"][1:count] == pytest.approx(own.tolist(), abs=1e-3)
    for i, top in enumerate(reported["top_logprobs"][1:count]):
        assert alternatives <= len(top) <= alternatives + 1
        best = logprobs_nV[i].topk(alternatives).values.tolist()
        assert sorted(top.values(), reverse=True)[:alternatives] == pytest.approx(best, abs=1e-3)
        assert reported["token_logprobs"][i + 1] in top.values(), "lm-eval compares these values exactly"


@pytest.mark.parametrize("prompt", [PROMPT, LONG, "Größe 🦙!", "a"])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_prompt_logprobs_equal_those_of_the_base_model(ask: Ask, expected: Any, prompt: str, max_tokens: int) -> None:
    ids = list(prompt.encode())
    answer = ask(prompt=prompt, max_tokens=max_tokens, logprobs=3)
    choice = answer["choices"][0]
    check(choice, ids, expected(ids), 3)
    assert choice["text"].startswith(prompt)
    assert len(choice["logprobs"]["tokens"]) == len(ids) + max_tokens
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": max_tokens, "total_tokens": len(ids) + max_tokens}
    offsets = [len(prompt.encode()[:i].decode(errors="ignore")) for i in range(len(ids))]
    assert choice["logprobs"]["text_offset"][: len(ids)] == offsets
    if max_tokens == 0:
        assert choice["text"] == prompt


def test_echo_does_not_change_the_generated_text(ask: Ask) -> None:
    echoed = ask(prompt=LONG, max_tokens=8, logprobs=2)["choices"][0]
    alone = ask(prompt=LONG, max_tokens=8, logprobs=2, echo=False)["choices"][0]
    assert echoed["text"] == LONG + alone["text"]
    assert echoed["logprobs"]["tokens"][-8:] == alone["logprobs"]["tokens"]
    assert echoed["logprobs"]["text_offset"][-8:] == [len(LONG) + offset for offset in alone["logprobs"]["text_offset"]]
    assert ask(prompt=PROMPT, max_tokens=3)["choices"][0]["logprobs"] is None
    assert ask(prompt=PROMPT, max_tokens=3, stop="bright")["choices"][0]["text"].startswith(PROMPT), (
        "stop texts must apply only to generated text"
    )


def test_prompts_of_token_ids_are_scored_beside_other_requests(ask: Ask, expected: Any) -> None:
    prompts = [list(text.encode()) for text in (LONG, PROMPT, "ab")]
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(ask, prompt=LONG[:200], max_tokens=40, echo=False, size_ratio=ratio) for ratio in (1.0, 0.5)]
        answer = pool.submit(ask, prompt=prompts, max_tokens=1, logprobs=1, n=2).result()
        assert all(other.result() for other in others)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for index, choice in enumerate(answer["choices"]):
        ids = prompts[index // 2]
        check(choice, ids, expected(ids), 1)
        assert choice["text"].startswith(bytes(ids).decode())


def test_prompt_of_ids_may_end_within_a_character(ask: Ask) -> None:
    incomplete = list("🦙".encode())[:3]
    assert ask(prompt=[97, *incomplete], max_tokens=0)["choices"][0]["text"] == "a�"
    bias = {str("🦙".encode()[3]): 100}
    assert ask(prompt=[97, *incomplete], max_tokens=1, logit_bias=bias)["choices"][0]["text"] == "a🦙"
    assert ask(prompt=[97, *incomplete], max_tokens=1, logit_bias=bias, echo=False)["choices"][0]["text"] == "🦙"


def test_zero_tokens_without_echo_is_refused(ask: Ask) -> None:
    with pytest.raises(InvalidRequestError, match=r"max_tokens is 0.*echo true"):
        ask(prompt="a", max_tokens=0, echo=False)


def test_echo_is_the_given_prompt_even_if_the_tokenizer_changes_it() -> None:
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2, "##s": 3}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer, core.decoder = normalizers.Lowercase(), pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    prompt = "The   CATS"
    ids = tokenizer(prompt)["input_ids"]
    echo = Echo(Detokenizer(tokenizer, [], []), tokenizer, ids, prompt)
    assert (echo.text, echo.offsets) == (prompt, [0, 6, 9])
    assert Echo(Detokenizer(tokenizer, [], []), tokenizer, ids, None).text == "the cats"


def test_official_client_streams_an_echo(server: Server) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    fields: Any = {"model": "small@0.5", "prompt": [PROMPT, "ab"], "max_tokens": 2, "logprobs": 2, "echo": True, "temperature": 0}
    whole = client.completions.create(**fields)
    texts, tokens, offsets = ["", ""], [[], []], [[], []]  # type: tuple[list[str], list[list[str]], list[list[int]]]
    for chunk in client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens or []
                offsets[choice.index] += choice.logprobs.text_offset or []
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices if choice.logprobs]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices if choice.logprobs]


TASK = {
    "task": "continuations", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "train",
    "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Write an lm-eval task with 24 documents: choose which of four strings continues a text."""
    text = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="ascii", errors="ignore")
    documents = []
    for i in range(24):
        at = 200 + 97 * i
        wrong = [text[at + 500 * n : at + 500 * n + 6] or "nothing" for n in (1, 2, 3)]
        choices = [text[at : at + 6], *wrong]
        documents.append({"question": text[at - 60 : at], "choices": choices[i % 4 :] + choices[: i % 4], "answer": (4 - i % 4) % 4})
    (tmp_path / "continuations.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = TASK | {"dataset_kwargs": {"data_files": str(tmp_path / "continuations.jsonl")}}
    (tmp_path / "continuations.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def test_lm_eval_client_agrees_with_measurements_in_memory(
    server: Server, small_artifact: Artifact, task_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The task runs through `local-completions` at two sizes, with token ids as prompts and four prompts per request."""
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    any_size = small_artifact.load()
    for ratio in (1.0, 0.5):
        any_size.resize(ratio)
        ours = TaskScore("continuations", str(task_folder)).measure(Subject(any_size.model, small_artifact.tokenizer()))["values"]
        arguments = {
            "model": f"small@{ratio}", "base_url": f"{server.url}/v1/completions", "tokenizer": str(small_artifact.folder),
            "tokenizer_backend": "huggingface", "tokenized_requests": True, "max_length": 512, "num_concurrent": 1, "batch_size": 4,
        }  # fmt: skip
        found = simple_evaluate(
            model="local-completions", model_args=arguments, tasks=["continuations"], bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        )  # fmt: skip
        assert found is not None
        theirs = found["results"]["continuations"]
        for metric in ("acc", "acc_norm"):
            assert theirs[f"{metric},none"] == pytest.approx(ours[metric], abs=1 / 24 + 1e-6), (
                "at most one document may differ, by a near tie"
            )
        samples = found["samples"]["continuations"]
        instances = [Instance("loglikelihood", sample["doc"], arguments, 0) for sample in samples for arguments in sample["arguments"]]
        scores = harness(any_size.model, small_artifact.tokenizer()).loglikelihood(instances, disable_tqdm=True)
        logprobs = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
        assert len(logprobs) == 4 * 24
        assert logprobs == pytest.approx([score for score, _ in scores], abs=1e-2)
