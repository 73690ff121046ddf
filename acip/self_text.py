"""Sample calibration text from the base model itself, for a model without any other text at hand.

    document   start token, random token -> text
    chat       chat template up to a user's message -> message -> chat template -> answer

Documents are those of data-free calibration (LLM-QAT, Liu et al. 2023). Their first token is drawn uniformly from those that are text by
themselves, so that they are of many kinds; the other tokens are drawn from the whole distribution of the model. Chats are those of Magpie
(Xu et al. 2024). Every second text is a chat if the tokenizer has a chat template. A text ends at the end token, or at the length of a
window; a user's message takes at most half of it.

Batch i is a function of the model, the seed and i on one machine. On other machines the model's probabilities, and so the texts, may
differ.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from transformers import PreTrainedModel

from acip.base import require_positions
from acip.data import chat_text, start_tokens
from acip.errors import BaseModelError, DataError
from acip.utils.generation import continued, end_tokens

SAMPLING = 2  # version of this process, part of fingerprints
TEMPERATURE = 1.0
BATCH = 64  # texts
TOGETHER = 32  # texts that are sampled at once; they limit the memory
REMEDY = "Use a longer seq_len, or another source than self."
MARK = "MESSAGE"  # stands for a user's message in the chat template

Row = dict[str, Any]  # "text" or "messages", and the number of sampled "tokens"


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: Any, seq_len: int, seed: int, batch: int) -> list[Row]:
    """Return batch number `batch` of the texts that `model` writes: at most BATCH, without empty ones, documents and chats in turn.

    The state of torch's random number generators does not change. Raises DataError if the model writes less than one token per text, if
    its tokenizer has no token to start from, or if its chat template fills half of a window; BaseModelError if `seq_len` is longer than
    the context of the model.
    """
    require_positions(model.config, seq_len, BaseModelError, f"seq_len is {seq_len:,}", "Use a smaller seq_len.")
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + batch)
        has_chats = getattr(tokenizer, "chat_template", None) is not None
        parts = [kind(model, tokenizer, seq_len) for kind in (_documents, _chats if has_chats else _documents)]
    for rows in parts:
        if sum(row["tokens"] for row in rows) < TOGETHER:
            raise DataError("the base model ends its texts at once, so no text can be sampled from it. Use another source than self.")
    return [row for pair in zip_longest(*parts) for row in pair if row is not None]


def _documents(model: PreTrainedModel, tokenizer: Any, seq_len: int) -> list[Row]:
    start = first_tokens(tokenizer)
    prompts = [[*start, word] for word in _words(model, tokenizer)] or [start]
    prompts = (prompts * TOGETHER)[:TOGETHER]
    written = _continued(model, tokenizer, prompts, max(1, seq_len - len(prompts[0])))
    rows = []
    for prompt, ids in zip(prompts, written, strict=True):
        text = tokenizer.decode(prompt[len(start) :] + ids, skip_special_tokens=True)
        if ids and text.strip():
            rows.append({"text": text, "tokens": len(ids)})
    return rows


def _words(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return at most TOGETHER random tokens that are text by themselves: no special tokens, white space or parts of a character."""
    embeddings: Any = model.get_input_embeddings().weight
    drawn, special = torch.randint(min(len(tokenizer), len(embeddings)), (8 * TOGETHER,)).tolist(), _special(tokenizer)
    texts = zip(drawn, tokenizer.batch_decode([[token] for token in drawn]), strict=True)
    return [token for token, text in texts if token not in special and text.strip() and "\ufffd" not in text][:TOGETHER]


def _special(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}


def first_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a document begins with: those that the tokenizer puts before a text, else `bos`, else `eos`."""
    some = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if start := list(start_tokens(tokenizer)) or [token for token in some if token is not None][:1]:
        return start
    raise DataError("the tokenizer of the base model has no start token and no end token, so no text can be sampled. Use another source.")


def _chats(model: PreTrainedModel, tokenizer: Any, seq_len: int) -> list[Row]:
    before, mark, after = chat_text([{"role": "user", "content": MARK}], tokenizer).rpartition(MARK)
    if not mark:
        raise DataError("the chat template omits the user's message, so no chats can be sampled. Use another source than self.")
    special, prompt = _special(tokenizer), _ids(tokenizer, before) or first_tokens(tokenizer)
    if len(prompt) >= seq_len // 2:
        raise DataError(
            f"the chat template takes {len(prompt):,} of the {seq_len:,} tokens of a window: no message fits into its first half. {REMEDY}"
        )
    stops = [token for token in _ids(tokenizer, after) if token in special][:1]
    rows: list[Row] = []
    for ids in _continued(model, tokenizer, [prompt] * TOGETHER, seq_len // 2 - len(prompt), stops):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if message := (text.partition(after.strip())[0] if after.strip() else text).strip():
            rows.append({"messages": [{"role": "user", "content": message}], "tokens": len(ids)})
    asked = [_ids(tokenizer, chat_text(row["messages"], tokenizer, add_generation_prompt=True)) for row in rows]
    fitting = [(row, ids) for row, ids in zip(rows, asked, strict=True) if len(ids) < seq_len]
    if rows and not fitting:
        raise DataError(f"the chat template and a message fill the {seq_len:,} tokens of a window, so no answer fits. {REMEDY}")
    rows, prompts = [row for row, _ in fitting], [ids for _, ids in fitting]
    most = seq_len - max(map(len, prompts), default=0)
    for row, ids in zip(rows, _continued(model, tokenizer, prompts, most, stops) if rows else [], strict=True):
        row["messages"].append({"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True).strip()})
        row["tokens"] += len(ids)
    return [row for row in rows if row["messages"][1]["content"]]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _continued(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[int]], most: int, stops: Sequence[int] = ()
) -> list[list[int]]:
    """Return a continuation of each prompt, of at most `most` tokens, without the end token or the token of `stops` that ends it."""
    ends = end_tokens(model, tokenizer, stops)
    return continued(model, prompts, most, ends, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0)  # the whole distribution
