"""Tasks with generated answers: items come from a seed, a program checks the answers, and they are compared with the base model's."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from acip.artifact.artifact import Artifact
from acip.errors import EvaluationError
from acip.evaluate import GeneratedTask, evaluate, tasks
from acip.evaluate.generated_tasks import ITEMS, Item, items_of, names, shares
from tests.support.small import byte_tokenizer


def items(task: str, count: int = 60, seed: int = 0) -> list[Item]:
    return list(items_of(task, count, seed))


@pytest.mark.parametrize("task", names())
def test_items_depend_on_the_seed_alone_and_accept_their_examples(task: str) -> None:
    first = items(task, ITEMS)
    assert [item.request for item in first] == [item.request for item in items(task, ITEMS)]
    assert len({item.request for item in first}) > 0.7 * ITEMS
    for item in first:
        assert item.is_right(item.example), item
        assert not item.is_right(""), item
        assert not item.is_right(
            "I am not sure about this one, sorry, and I would rather talk for a while about some other thing than answer."
        ), item


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("16", True),
        ("12 + 4 = 16 apples.", True),
        ("16.0", True),
        ("It is 16, not 15", False),
        ("1,016", False),
        ("sixteen", False),
        ("-16", False),
    ],
)
def test_the_last_number_of_an_answer_counts(answer: str, right: bool) -> None:
    item = next(item for item in items("arithmetic", 1000) if item.example == "The result is 16.")
    assert item.is_right(answer) == right


@pytest.mark.parametrize(
    ("part", "right", "wrong"),
    [
        ("JSON object", 'Here it is: {"age": %d, "name": "%s"}', '{"name": "%s"}'),
        ("capital letters", "THE SEA IS 1 BIG THING.", "The sea."),
    ],
)
def test_constraints_are_checked(part: str, right: str, wrong: str) -> None:
    item = next(item for item in items("instructions") if part in item.request)
    if "%" in right:
        name, age = item.request.split()[0], int(item.request.split()[2])
        right, wrong = right % (age, name), wrong % name
    assert item.is_right(right)
    assert not item.is_right(wrong)


def test_lists_need_the_exact_number_of_lines() -> None:
    item = next(item for item in items("instructions") if item.request.startswith("List"))
    assert item.is_right(item.example + "\n")
    assert not item.is_right(item.example + "\n- one more")
    assert not item.is_right(f"Here is a list:\n{item.example}")


def test_shares_have_standard_errors() -> None:
    values = shares(acc=[True, True, False, True], kept=[])
    assert values["acc"] == 0.75
    assert values["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert math.isnan(values["kept"])


class Answering:
    """A model that answers every prompt with the same text, and records the prompts."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.device, self.config, self.generation_config = torch.device("cpu"), PreTrainedConfig(), GenerationConfig()
        self.tokenizer, self.text = tokenizer, text
        self.prompts: list[str] = []

    def generate(self, ids_BT: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        self.prompts += [self.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(ids_BT, attention_mask, strict=True)]
        answer = torch.tensor(self.tokenizer(self.text, add_special_tokens=False)["input_ids"])
        return torch.cat([ids_BT, answer.expand(len(ids_BT), -1)], 1)


def test_prompts_use_the_chat_template_or_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    task, some = GeneratedTask("generated:arithmetic", 40), items("generated:arithmetic", 40)
    plain = Answering(tokenizer, " The result is 3.\n\nQuestion: more")
    assert task.answers(plain, tokenizer, some) == ["The result is 3."] * 40
    assert len(plain.prompts) == 40
    assert all(prompt.count("Question:") == 3 and prompt.endswith("\nAnswer:") for prompt in plain.prompts)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = Answering(tokenizer, "3")
    assert task.answers(chat, tokenizer, some) == ["3"] * 40
    assert sorted(chat.prompts) == sorted(f"<user>{item.request}<assistant>" for item in some)


def test_a_size_is_compared_with_its_base_model(small_artifact: Artifact, small_base: str) -> None:
    """At full size all answers are those of the base model."""
    task = GeneratedTask("generated:arithmetic", limit=6, new_tokens=4)
    any_size, tokenizer = small_artifact.load(size=1.0), small_artifact.tokenizer()
    (part,) = evaluate(any_size, tokenizer, [task])["evaluation"]
    assert part["label"] == "task/generated_arithmetic_first6"
    assert part["items"] == 6
    assert tasks.score(part["values"])[0] == "acc"
    assert part["values"]["same_answer"] == 1.0
    assert part["values"]["flipped"] == 0.0
    any_size.resize(0.4)
    (small,) = evaluate(any_size, tokenizer, [task])["evaluation"]
    assert 0 <= small["values"]["same_answer"] <= 1
    alone = AutoModelForCausalLM.from_pretrained(small_base)
    (without_base,) = evaluate(alone, tokenizer, [task])["evaluation"]
    assert without_base["values"].keys() == {"acc", "acc_stderr"}


def test_unknown_names_and_limits_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"unknown task 'generated:arithmetics'.*did you mean.*generated:arithmetic"):
        tasks.check(["generated:arithmetics"])
    with pytest.raises(EvaluationError, match="limit is -1"):
        GeneratedTask("generated:arithmetic", -1)
    assert tasks.expand(["generated"]) == names()
    tasks.check(["generated"])


def test_the_key_counts_the_items_and_the_version() -> None:
    default, few = GeneratedTask("generated:arithmetic"), GeneratedTask("generated:arithmetic", 5)
    assert default.key == GeneratedTask("generated:arithmetic", ITEMS).key != few.key
