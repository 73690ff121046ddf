"""Calibration text -> token windows: packed, deterministic, and resumable because batch i is a function of (seed, i).

    source                         what it is
    package:wikipedia, ...:austen  the texts that ship with acip (licences in acip/corpora/README.md)
    c4, wikitext2                  the hub's, through `datasets`; C4 is streamed and stopped when enough is read
    path/to/file.txt, a folder     local text; documents are parted by two blank lines (.txt) or lines (.jsonl); a line holds
                                   "text", or "messages" that the tokenizer's chat template turns into text

Of local text, and of what ships, every eighth document is held out; the hub's have splits of their own.

Documents are tokenised with their end token and joined without padding, so the end token is learned.
"""

import importlib.resources
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from acip.errors import DataError
from acip.recipe import did_you_mean

Document = str | list[dict[str, str]]  # text, or the messages of a chat
Split = Literal["train", "heldout", "all"]
HELDOUT_EVERY = 8  # of local documents, every eighth is held out


def documents(source: str, split: Split) -> Iterator[Document]:
    """The documents of one split of `source`, in a fixed order. "train" and "heldout" share no document; "all" is for text that
    nothing is calibrated on (of the hub's: what is held out).
    """
    if source.startswith("package:"):
        name = source.removeprefix("package:")
        shipped = [
            p.name.removesuffix(".txt") for p in importlib.resources.files("acip").joinpath("corpora").iterdir() if p.name.endswith(".txt")
        ]
        if name not in shipped:
            raise DataError(f"no text {name!r} ships with acip{did_you_mean(name, shipped)}. Shipped: {', '.join(shipped)}.")
        path = importlib.resources.files("acip").joinpath("corpora", name + ".txt")
        yield from (doc for i, doc in enumerate(_split_text(path.read_text(encoding="utf-8"))) if _belongs(i, split))
    elif source in HUB:
        try:
            yield from HUB[source](split)
        except OSError as error:  # no network, or nobody there
            raise DataError(
                f"{source} can't be fetched from the hub: {error}. Without it, use package:wikipedia, package:austen or local text."
            ) from error
    elif Path(source).exists():
        count = 0
        for doc in _local(Path(source)):
            if _belongs(count, split):
                yield doc
            count += 1
        if not count:
            raise DataError(f"{source} holds no text.")
        if split == "heldout" and count < HELDOUT_EVERY:
            raise DataError(
                f"{source} has {count} documents, and of local text every eighth is held out: it needs {HELDOUT_EVERY} (two blank lines "
                "part those of a .txt, lines those of a .jsonl). To measure on all of it: jobs/evaluate.py --whole."
            )
    else:
        raise DataError(
            f"data source {source!r} is neither a file or folder here nor a known name{did_you_mean(source, list(HUB))}. "
            f"Allowed: package:wikipedia, package:austen, {', '.join(HUB)}, or a path to .txt or .jsonl text."
        )


def _belongs(i: int, split: Split) -> bool:
    """Is document i one of `split`?"""
    return split == "all" or (i % HELDOUT_EVERY == HELDOUT_EVERY - 1) == (split == "heldout")


def _split_text(text: str) -> list[str]:
    return [doc.strip() for doc in text.split("\n\n\n") if doc.strip()]


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages)
    )


def _local(path: Path) -> Iterator[Document]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
    if not files:
        raise DataError(f"folder {str(path)!r} holds no .txt or .jsonl file.")
    for file in files:
        try:
            if file.suffix == ".jsonl":
                for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                    row = json.loads(line)
                    if isinstance(row, dict) and isinstance(row.get("text"), str):
                        yield row["text"]
                    elif isinstance(row, dict) and _is_chat(row.get("messages")):
                        yield row["messages"]
                    else:
                        raise DataError(
                            f'{file}, line {n}: each line must be an object with a string "text", or with "messages", '
                            'a list of {"role": ..., "content": ...}.'
                        )
            else:
                yield from _split_text(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{file} can't be read as UTF-8 {file.suffix}: {error}.") from error


def _c4(split: Split) -> Iterator[str]:
    from datasets import load_dataset

    rows = load_dataset("allenai/c4", "en", split="train" if split == "train" else "validation", streaming=True)
    # the paper evaluates on the first 1100 validation documents
    return (row["text"] for row in (rows if split == "train" else islice(rows, 1100)))


def _wikitext2(split: Split) -> Iterator[str]:
    from datasets import load_dataset

    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train" if split == "train" else "test")
    yield "\n\n".join(rows["text"])  # one document, as the field's protocol joins it


HUB = {"c4": _c4, "wikitext2": _wikitext2}


def token_windows(docs: Iterable[Document], tokenizer: Any, seq_len: int, count: int | None = None) -> Tensor:
    """`docs` joined by the end token and cut into full windows: [n, T] int32, n = `count` where given.

    Reads only as many documents as `count` windows need. Raises DataError if there is not one full window.
    """
    need = None if count is None else count * seq_len
    ids: list[int] = []
    for doc in docs:
        text = doc if isinstance(doc, str) else chat_text(doc, tokenizer)
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if need is not None and len(ids) >= need:
            break
    n = len(ids) // seq_len if count is None else min(count, len(ids) // seq_len)
    if n == 0:
        raise DataError(f"the text has {len(ids):,} tokens, less than one window of {seq_len:,}; use more text or a smaller seq_len.")
    return torch.tensor(ids[: n * seq_len], dtype=torch.int32).view(n, seq_len)


def chat_text(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """A chat as the model reads it; DataError where its tokenizer has no template, or the template refuses it."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError('the text holds chats ("messages"), and this base model\'s tokenizer has no chat template; give it plain "text".')
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise what they like: wrong roles, wrong order
        raise DataError(f"the chat template refuses a chat that begins with {str(messages[0])[:80]!r}: {error}") from error


@dataclass(frozen=True)
class TokenBatches:
    """`batches[i]` -> [B, T] int64: the i-th batch of an endless run over `windows`, reshuffled each epoch by `seed`."""

    windows: Tensor
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    def __getitem__(self, i: int) -> Tensor:
        n = len(self.windows)
        rows = []
        for at in range(i * self.batch_size, (i + 1) * self.batch_size):
            epoch, place = divmod(at, n)
            rows.append(int(_order(n, self.seed * 1_000_003 + epoch)[place]) if self.shuffle else place)
        return self.windows[rows].long()


@lru_cache(maxsize=4)
def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
