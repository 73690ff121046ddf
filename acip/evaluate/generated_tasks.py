"""Tasks whose answers are generated and checked by a program: `generated:arithmetic` and `generated:instructions`.

    arithmetic      word problems of one or two steps; the last number of the answer must be the result
    instructions    requests with a constraint: length, lines, capital letters, a word, JSON; the answer must meet it

The problems are made by this file from a seed, so they need no download and have no license. A chat model gets them through its chat
template, another model as a question after two examples. Answers are greedy.

A share of right answers alone says little about a size of a model, so it is compared with the base model's answers:

    acc, base_acc    shares of right answers of the size and of its base model
    kept             share of the base model's right answers that the size has right, too
    flipped          share of items that one of the two has right and the other wrong
    same_answer      share of equal answers
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from acip.base import room
from acip.data import start_tokens
from acip.errors import EvaluationError
from acip.evaluate.measurement import Measurement, Part, Subject, label
from acip.utils.coerce import did_you_mean
from acip.utils.generation import continued, end_tokens

PREFIX = "generated:"
ITEMS = 200  # by default
VERSION = 1  # of the items and of the checks
BATCH = 32  # answers that are generated at once


@dataclass(frozen=True)
class Item:
    """A request, an example of a right answer, and the check of an answer."""

    request: str
    example: str
    is_right: Callable[[str], bool]


@dataclass(frozen=True)
class GeneratedTask(Measurement):
    """The answers of a model to the first `limit` items of a task, beside those of its base model, if there is one."""

    kind: ClassVar[str] = "task"
    task: str  # generated:arithmetic or generated:instructions
    limit: int = 0  # items; 0 = ITEMS
    new_tokens: int = 96
    start: tuple[int, ...] = ()  # token ids that each prompt begins with; set by `read_by`

    def __post_init__(self) -> None:
        if self.task not in names():
            raise EvaluationError(f"unknown task {self.task!r}{did_you_mean(self.task, names())}. Generated tasks: {', '.join(names())}.")
        if self.limit < 0 or self.new_tokens < 1:
            raise EvaluationError(f"limit is {self.limit} and new_tokens is {self.new_tokens}; they must be at least 0 and 1.")

    def read_by(self, tokenizer: Any) -> Self:
        return replace(self, start=start_tokens(tokenizer))

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "limit": self.limit or ITEMS, "version": VERSION}

    def measure(self, subject: Subject) -> Part:
        items = list(items_of(self.task, self.limit or ITEMS))
        answers = self.answers(subject.model, subject.tokenizer, items)
        right = [item.is_right(answer) for item, answer in zip(items, answers, strict=True)]
        values = shares(acc=right)
        if subject.any_size is not None or subject.reference is not None:
            with subject.base() as base:
                of_base = self.answers(base, subject.tokenizer, items)
            base_right = [item.is_right(answer) for item, answer in zip(items, of_base, strict=True)]
            values |= shares(
                base_acc=base_right,
                kept=[mine for mine, theirs in zip(right, base_right, strict=True) if theirs],
                flipped=[mine != theirs for mine, theirs in zip(right, base_right, strict=True)],
                same_answer=[mine == theirs for mine, theirs in zip(answers, of_base, strict=True)],
            )
        return {"label": self.label, "values": values, "items": len(items), "shots": None}

    @property
    def label(self) -> str:
        """The label of the part."""
        return f"{self.kind}/{label(self.task, f'first{self.limit}' if self.limit else '')}"

    def answers(self, model: Any, tokenizer: Any, items: Sequence[Item]) -> list[str]:
        """Return the greedy answer of `model` to each item, up to the end token, or for a plain model the end of the line.

        An answer has at most `new_tokens` tokens, fewer if the context of the model is too short for them after the longest prompt.
        EvaluationError if that prompt fills the context.
        """
        chat = getattr(tokenizer, "chat_template", None) is not None
        prompts = [self.prompt(tokenizer, item, chat) for item in items]
        longest, ends = max(map(len, prompts), default=0), end_tokens(model, tokenizer)
        most = room(model.config, longest, self.new_tokens, EvaluationError, f"a prompt of {self.task}", "Leave this task out.")
        found: dict[int, str] = {}
        order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
        for at in range(0, len(order), BATCH):
            some = order[at : at + BATCH]
            for i, ids in zip(some, continued(model, [prompts[i] for i in some], most, ends), strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                found[i] = text if chat else text.partition("\nQuestion:")[0].strip()
        return [found[i] for i in range(len(items))]

    def prompt(self, tokenizer: Any, item: Item, chat: bool) -> list[int]:
        """Return the token ids of a request."""
        if chat:
            messages = [{"role": "user", "content": item.request}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            shown = items_of(self.task, 2, seed=1)
            text = "".join(f"Question: {each.request}\nAnswer: {each.example}\n\n" for each in shown) + f"Question: {item.request}\nAnswer:"
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return ids if tuple(ids[: len(self.start)]) == self.start else [*self.start, *ids]


def names() -> list[str]:
    """Return the names of all generated tasks."""
    return [PREFIX + name for name in TASKS]


def items_of(task: str, count: int, seed: int = 0) -> Iterator[Item]:
    """Yield the first `count` items of a task. They depend on the seed alone."""
    name = task.removeprefix(PREFIX)
    kinds = list(TASKS[name].values())
    for number in range(count):
        yield kinds[number % len(kinds)](random.Random(f"{name} {seed} {number}"))


def shares(**outcomes: Sequence[bool]) -> dict[str, float]:
    """Return each share with its standard error; a share of nothing is NaN."""
    values: dict[str, float] = {}
    for name, each in outcomes.items():
        share = sum(each) / len(each) if each else math.nan
        values |= {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / len(each)) if each else math.nan}
    return values


# ---- arithmetic

NAMES = ("Amira", "Ben", "Chen", "Dora", "Emil", "Fatou", "Goran", "Hana", "Ivan", "Jana")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers", "tickets")


def _number(text: str, result: int) -> Item:
    def is_right(answer: str) -> bool:
        numbers = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", answer)
        return bool(numbers) and float(numbers[-1].replace(",", "")) == result

    return Item(f"{text} Give the result as a number at the end.", f"The result is {result}.", is_right)


def _gives_away(rng: random.Random) -> Item:
    first, second = rng.sample(NAMES, 2)
    have, gives, thing = rng.randint(10, 60), rng.randint(2, 9), rng.choice(THINGS)
    return _number(
        f"{first} has {have} {thing} and gives {gives} of them to {second}. How many {thing} does {first} have left?", have - gives
    )


def _boxes(rng: random.Random) -> Item:
    boxes, each, thing = rng.randint(2, 12), rng.randint(2, 12), rng.choice(THINGS)
    return _number(f"There are {boxes} boxes with {each} {thing} in each box. How many {thing} are there in all?", boxes * each)


def _shares(rng: random.Random) -> Item:
    people, each, thing = rng.randint(2, 9), rng.randint(2, 12), rng.choice(THINGS)
    return _number(f"{people} friends share {people * each} {thing} equally. How many {thing} does each of them get?", each)


def _buys(rng: random.Random) -> Item:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    count, price, paid = rng.randint(2, 9), rng.randint(2, 9), 100
    return _number(
        f"{name} buys {count} {thing} for {price} euros each and pays with {paid} euros. How many euros does {name} get back?",
        paid - count * price,
    )


def _two_days(rng: random.Random) -> Item:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    monday, more = rng.randint(3, 30), rng.randint(2, 20)
    return _number(
        f"{name} found {monday} {thing} on Monday and {more} more than that on Tuesday. How many {thing} did {name} find on both days?",
        2 * monday + more,
    )


# ---- instructions

TOPICS = ("the sea", "a small garden", "winter", "bread", "trains", "the moon", "music", "a market", "bees", "a library")
WORDS = ("bright", "slowly", "river", "seven", "because", "green", "window", "early", "stone", "together")
LISTS = ("fruits", "countries", "colors", "animals", "tools", "cities", "vegetables", "sports")


def _word_count(text: str) -> int:
    return len(re.findall(r"[\w'-]+", text))


def _has_word(rng: random.Random) -> Item:
    topic, word = rng.choice(TOPICS), rng.choice(WORDS)
    return Item(
        f'Write one sentence about {topic} that contains the word "{word}".',
        f'I think of {topic} when I hear the word "{word}".',
        lambda answer: re.search(rf"\b{word}\b", answer, re.IGNORECASE) is not None,
    )


def _short(rng: random.Random) -> Item:
    topic, most = rng.choice(TOPICS), rng.randint(8, 20)
    return Item(f"Describe {topic} in at most {most} words.", f"I like {topic}.", lambda answer: 1 <= _word_count(answer) <= most)


def _bullets(rng: random.Random) -> Item:
    things, count = rng.choice(LISTS), rng.randint(3, 6)

    def is_right(answer: str) -> bool:
        lines = [line for line in answer.splitlines() if line.strip()]
        return len(lines) == count and all(line.startswith("- ") for line in lines)

    example = "\n".join(f"- number {i + 1} of the {things}" for i in range(count))
    return Item(f'List {count} {things}. Write one per line, begin every line with "- ", and write nothing else.', example, is_right)


def _capitals(rng: random.Random) -> Item:
    topic = rng.choice(TOPICS)
    return Item(
        f"Write one sentence about {topic} in capital letters only.",
        f"I LIKE {topic.upper()}.",
        lambda answer: any(char.isalpha() for char in answer) and answer == answer.upper(),
    )


def _yes_or_no(rng: random.Random) -> Item:
    a, b = rng.sample(range(2, 99), 2)
    right = "yes" if a > b else "no"
    return Item(
        f'Is {a} larger than {b}? Answer with the word "yes" or "no" and nothing else.',
        right,
        lambda answer: answer.strip().strip(".").lower() == right,
    )


def _json(rng: random.Random) -> Item:
    name, age = rng.choice(NAMES), rng.randint(18, 80)
    wanted = {"name": name, "age": age}

    def is_right(answer: str) -> bool:
        found = re.search(r"\{.*\}", answer, re.DOTALL)
        try:
            return found is not None and json.loads(found[0]) == wanted
        except ValueError:
            return False

    return Item(f'{name} is {age} years old. Write this as a JSON object with the keys "name" and "age".', json.dumps(wanted), is_right)


TASKS: dict[str, dict[str, Callable[[random.Random], Item]]] = {
    "arithmetic": {"gives away": _gives_away, "boxes": _boxes, "shares": _shares, "buys": _buys, "two days": _two_days},
    "instructions": {
        "a word": _has_word, "at most": _short, "lines": _bullets, "capitals": _capitals, "yes or no": _yes_or_no, "JSON": _json,
    },
}  # fmt: skip
