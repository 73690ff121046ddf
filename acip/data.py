"""Calibration text -> token windows: packed, deterministic, and resumable because batch i is a function of (seed, i).

    source                         what it is
    package:wikipedia, ...:austen  the texts that ship with acip (licenses in acip/corpora/README.md)
    c4, wikitext2                  the hub's, through `datasets`; C4 is streamed and stopped when enough is read
    a file, a folder, a pattern    local text, see acip.text_files: .txt, JSON lines, CSV, Parquet, Arrow. A row holds "text", or
                                   "messages" that the tokenizer's chat template turns into text

Of local text, and of the texts that ship, every eighth document is held out; the hub's have splits of their own.

A window starts as the tokenizer starts a text: with the tokens that it puts before every text (`start_tokens`), where it does so.
They are part of the window's length, and the first of them is not predicted. After them the window holds consecutive tokens of the
documents, without padding. A document ends with the end token (`eos_token_id`), where the tokenizer has one, so the end token is
learned; what else the tokenizer may put after a text is left out. Between documents inside a window the start is not repeated. A chat
template that writes the start itself keeps it, and a window that begins with it gets no second one.

A document is tokenized whole up to PIECE characters, and in pieces beyond that, so that memory and time depend on how many tokens are
needed. Pieces are cut where the tokens around the cut stay what they are in the whole text; where there is no such place (a tokenizer
that puts a space before every text), at white space, and the first token behind the cut may differ from that of the whole text.
"""

import importlib.resources
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from acip import text_files
from acip.errors import DataError
from acip.text_files import Document, LongText
from acip.utils.coerce import did_you_mean

Split = Literal["train", "heldout", "all"]
HELDOUT_EVERY = 8  # of local documents, every eighth is held out
WINDOWS_VERSION = 2  # of how text becomes windows, in fingerprints: 2 = with the tokenizer's start tokens
PIECE = text_files.LONG  # characters that are tokenized at once
AROUND = 256  # characters on each side of a cut whose tokens are compared
CUTS = 16  # places of each kind that are tried for a cut


def documents(source: str, split: Split) -> Iterator[Document]:
    """Yield the documents of one split of `source` in a fixed order.

    "train" and "heldout" share no document; "all" is for text that nothing is calibrated on (of the hub's: the held-out split).
    DataError for a source that is not known, that can't be read, or that holds no document of this split.
    """
    if source.startswith("package:"):
        name = source.removeprefix("package:")
        shipped = [
            p.name.removesuffix(".txt") for p in importlib.resources.files("acip").joinpath("corpora").iterdir() if p.name.endswith(".txt")
        ]
        if name not in shipped:
            raise DataError(f"no text {name!r} ships with acip{did_you_mean(name, shipped)}. Shipped: {', '.join(shipped)}.")
        path = importlib.resources.files("acip").joinpath("corpora", name + ".txt")
        yield from (doc for i, doc in enumerate(text_files.parted([path.read_text(encoding="utf-8")])) if _belongs(i, split))
    elif source in HUB:
        try:
            yield from HUB[source](split)
        except OSError as error:  # no network, or nobody there
            raise DataError(
                f"{source} can't be fetched from the hub: {error}. Without it, use package:wikipedia, package:austen or local text."
            ) from error
    elif files := text_files.files(source):
        count = 0
        for file in files:
            for doc in text_files.read(file):
                if _belongs(count, split):
                    yield doc
                count += 1
        if not count:
            raise DataError(f"{source} holds no text.")
        if split == "heldout" and count < HELDOUT_EVERY:
            raise DataError(
                f"{source} has {count} documents, and of local text every eighth is held out: it needs {HELDOUT_EVERY} (two blank lines "
                "part those of a .txt; those of other files are their rows). To measure on all of it: jobs/evaluate.py --whole."
            )
    else:
        raise DataError(
            f"data source {source!r} is neither a file or folder here nor a known name{did_you_mean(source, list(HUB))}. "
            f"Allowed: package:wikipedia, package:austen, {', '.join(HUB)}, or a path to local text. {text_files.ALLOWED}"
        )


def _belongs(i: int, split: Split) -> bool:
    """Is document i one of `split`?"""
    return split == "all" or (i % HELDOUT_EVERY == HELDOUT_EVERY - 1) == (split == "heldout")


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


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The token ids that `tokenizer` puts before every text, () for none: found by asking it, whatever puts them there."""
    for text in ("a", "the", "0", "."):
        bare, whole = (list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]) for special in (False, True))
        for at in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[at : at + len(bare)] == bare:
                return tuple(whole[:at])
    raise DataError(
        f"this base model's tokenizer ({type(tokenizer).__name__}) turns {text!r} into {whole} as a text and into {bare} without what it "
        "adds to a text: what it puts before a text can't be told."
    )


def token_windows(docs: Iterable[Document], tokenizer: Any, seq_len: int, count: int | None = None) -> Tensor:
    """Return the tokens of `docs`, each with its end token, in full windows that begin with the tokenizer's start: [n, T] int32.

    Reads only as much text as `count` windows need, where that is given; n is smaller where the text is. Raises DataError if there
    is not one full window.
    """
    start = start_tokens(tokenizer)
    if seq_len <= len(start):
        raise DataError(f"a window of {seq_len} tokens has no room for text: this tokenizer begins each with {len(start)} of its own.")
    ids = array("i")
    for more in _token_ids(docs, tokenizer):
        ids.extend(more)
        if count is not None and len(ids) >= count * seq_len:
            break
    stream, head = torch.from_numpy(np.array(ids, dtype=np.int32)), torch.tensor(start, dtype=torch.int32)
    windows: list[Tensor] = []
    at = 0
    while count is None or len(windows) < count:
        before = head[:0] if stream[at : at + len(head)].equal(head) else head  # a chat template may have written it
        if (end := at + seq_len - len(before)) > len(stream):
            break
        windows.append(torch.cat([before, stream[at:end]]))
        at = end
    if not windows:
        raise DataError(f"the text has {len(ids):,} tokens, less than one window of {seq_len:,}; use more text or a smaller seq_len.")
    return torch.stack(windows)


def _token_ids(docs: Iterable[Document], tokenizer: Any) -> Iterator[list[int]]:
    for doc in docs:
        for piece in pieces(blocks_of(doc, tokenizer), tokenizer):
            yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            yield [tokenizer.eos_token_id]


def blocks_of(doc: Document, tokenizer: Any) -> Iterator[str]:
    """The text of a document in blocks, a chat's as its model reads it."""
    if isinstance(doc, LongText):
        yield from doc
        return
    text = doc if isinstance(doc, str) else chat_text(doc, tokenizer)
    for at in range(0, len(text), PIECE):
        yield text[at : at + PIECE]


def pieces(blocks: Iterable[str], tokenizer: Any, most: int = PIECE) -> Iterator[str]:
    """A text that comes in blocks, in pieces of at most `most` characters (and AROUND more in the last) that are tokenized one by one.

    Where they are cut depends on the text and the tokenizer, not on the blocks.
    """
    held = ""
    for block in blocks:
        held += block
        while len(held) > most + AROUND:
            at = _cut(held, tokenizer, most)
            yield held[:at]
            held = held[at:]
    yield held


def _cut(text: str, tokenizer: Any, most: int) -> int:
    """Where to cut `text`, at `most` characters or a little before. See the head of this file."""

    def ids(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    low = max(AROUND, most // 2)
    spaces = [low + found.start() for found in re.finditer(r"\s", text[low:most])][-CUTS:]
    lines = [at for at in spaces if text[at] == "\n"]
    tried = [*(at + 1 for at in reversed(lines)), *reversed(spaces), *(at + 1 for at in reversed(spaces)), *range(most, most - CUTS, -1)]
    for at in tried:
        left, right = text[max(0, at - AROUND) : at], text[at : at + AROUND]
        if ids(left) + ids(right) == ids(left + right):
            return at
    return spaces[-1] if spaces else most


def chat_text(messages: text_files.Messages, tokenizer: Any) -> str:
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
