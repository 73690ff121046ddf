"""The windows of the domains of a curve: kinds of text on which every size is also compared with the base model.

    domain                     windows
    a source of acip.data      spread over its held-out documents
    chat                       conversations: prompts included in acip (corpora/chat.jsonl), answered greedily by the base model

A size that loses little on the text of its curve may lose several times as much on another domain. The numbers of a domain are in
the rows of the curve (acip.sizing.domains).
"""

import importlib.resources
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from acip import text_files
from acip.data import HUB, Split, chat_text, documents, start_tokens
from acip.errors import EvaluationError
from acip.evaluate.heldout_text import Text, evenly
from acip.evaluate.measurement import Subject
from acip.sizing.domains import domain_name
from acip.utils.generation import continued, end_tokens

CHAT = "chat"
EVERY_DOMAIN = ("package:wikipedia", "package:austen", "package:code", CHAT)
CONTEXT = 256  # most tokens of a window
ANSWER_TOKENS = 128  # most tokens of an answer
BATCH = 8  # conversations that are answered at once


def check_domains(sources: Sequence[str]) -> None:
    """Raise an AcipError for a source that is not known, and for two with the same name. Absolute paths are not read."""
    names: dict[str, str] = {}
    for source in sources:
        if source != CHAT and source not in HUB and not source.startswith("/"):
            next(documents(source, "all"))
        if (name := domain_name(source)) in names:
            raise EvaluationError(f"the domains {names[name]!r} and {source!r} have the same name, {name!r}. Leave one out, or rename it.")
        names[name] = source


def text_windows(source: str, tokenizer: Any, context: int, count: int, calibrated_on: Iterable[str]) -> list[Tensor]:
    """Return at most `count` windows of `context` tokens, spread over the held-out documents of `source`.

    All documents of local text that is not in `calibrated_on` are held out. DataError if the text can't be read or is too short.
    """
    whole = not source.startswith("package:") and source not in calibrated_on
    split: Split = "all" if whole else "heldout"
    return Text(source, "spread", context, count, split).tokens(tokenizer)


@torch.no_grad()
def chat_windows(subject: Subject, context: int, count: int) -> list[Tensor]:
    """Return at most `count` conversations of at most `context` tokens: an included prompt, and the answer of the base model.

    Answers are greedy and have at most `ANSWER_TOKENS` tokens. Raises DataError if the tokenizer has no chat template, and
    EvaluationError if no prompt fits.
    """
    tokenizer, model = subject.tokenizer, subject.model
    prompts = prompts_of_chat()
    questions = [prompts[i] for i in evenly(len(prompts), count)]
    asked = [_ids(chat_text(question, tokenizer, add_generation_prompt=True), tokenizer) for question in questions]
    fitting = [each for each in zip(questions, asked, strict=True) if len(each[1]) < context]
    if not fitting:
        raise EvaluationError(f"no prompt fits into windows of {context} tokens.")
    windows: list[Tensor] = []
    for at in range(0, len(fitting), BATCH):
        batch = fitting[at : at + BATCH]
        answers = _answers(subject, [ids for _, ids in batch], min(ANSWER_TOKENS, context - max(len(ids) for _, ids in batch)))
        for (question, _), answer in zip(batch, answers, strict=True):
            ids = _ids(chat_text([*question, {"role": "assistant", "content": answer}], tokenizer), tokenizer)
            windows.append(torch.tensor(ids[:context], device=model.device))
    return windows


def prompts_of_chat() -> list[text_files.Messages]:
    """Return the included prompts, each a chat of one message."""
    path = importlib.resources.files("acip").joinpath("corpora", "chat.jsonl")
    with importlib.resources.as_file(path) as file:
        return list(text_files.read(file))  # type: ignore[arg-type]


def _ids(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a chat, with the start tokens if the template has not written them."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    start = list(start_tokens(tokenizer))
    return ids if ids[: len(start)] == start else start + ids


def _answers(subject: Subject, asked: list[list[int]], new_tokens: int) -> list[str]:
    """Return the greedy answers of the base model."""
    ends = end_tokens(subject.model, subject.tokenizer)
    with subject.base() as base:
        written = continued(base, asked, new_tokens, ends)
    answers: list[str] = subject.tokenizer.batch_decode(written, skip_special_tokens=True)
    return answers
