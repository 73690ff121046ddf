"""Convert text into packed windows of tokens. The process is deterministic and resumable: batch i is a function of (seed, i).

    source                         content
    package:wikipedia, package:austen, package:code
                                   texts included in acip (licenses in acip/corpora/README.md)
    c4, wikitext2                  data sets of the hub, through `datasets`; C4 is streamed only as far as needed
    a file, a folder, a pattern    local text, see acip.text_files: .txt, JSON lines, CSV, Parquet, Arrow. A row holds "text", or
                                   "messages", which the tokenizer's chat template converts to text
    self                           text sampled from the base model (acip.self_text); for calibration only

Several sources can be mixed for a calibration (acip.mixture).

Every eighth document of local and included texts is held out. Data sets of the hub have their own splits.

A window begins with the tokens that the tokenizer puts before every text (`start_tokens`), if any. They count towards the length of
the window, and the first of them is not predicted. Consecutive tokens of the documents follow, without padding. Each document ends
with the end token (`eos_token_id`) if the tokenizer has one, so that the model is trained to end a text. Other tokens that the tokenizer
puts after a text are omitted. The start tokens are not repeated between documents inside a window. If a chat template writes the
start tokens itself, they are kept, and a window that begins with them gets no second copy.

Documents of up to `PIECE_CHARACTERS` are tokenized as a whole. Longer ones are tokenized in pieces, so that memory and time depend
on the number of tokens that are needed. A cut is made where the tokens on both sides equal those of the uncut text. If there is no such
place (for example with a tokenizer that puts a space before every text), the cut is at white space, and the first token after the cut
may differ from that of the uncut text.
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
HELDOUT_EVERY = 8  # of local documents, one in this many is held out
WINDOWS_VERSION = 2  # version of this conversion, part of fingerprints; 2 = windows have the tokenizer's start tokens
PIECE_CHARACTERS = text_files.LONG_TEXT_CHARACTERS  # tokenized in one call
SELF = "self"  # the source whose text is sampled from the base model
AROUND = 256  # characters on each side of a cut whose tokens are compared with those of the uncut text
CUTS = 16  # candidates of each kind for a cut


def documents(source: str, split: Split) -> Iterator[Document]:
    """Yield the documents of one split of `source` in a fixed order.

    "train" and "heldout" share no document. "all" is for text that is not used for calibration; for data sets of the hub it is the
    held-out split. Raises DataError if the source is unknown, can't be read, or has no document in this split.
    """
    if source.startswith("package:"):
        check_source(source)
        name = source.removeprefix("package:")
        path = importlib.resources.files("acip").joinpath("corpora", name + ".txt")
        yield from (doc for i, doc in enumerate(text_files.parted([path.read_text(encoding="utf-8")])) if _belongs(i, split))
    elif source in HUB:
        try:
            yield from HUB[source](split)
        except OSError as error:  # no network, or the hub is down
            raise DataError(
                f"{source} can't be fetched from the hub: {error}. Without the hub, use package:wikipedia, package:austen or local text."
            ) from error
    elif source != SELF and (files := text_files.files(source)):
        count = 0
        for file in files:
            for doc in text_files.read(file):
                if _belongs(count, split):
                    yield doc
                count += 1
        if not count:
            raise DataError(f"{source} contains no text.")
        if split == "heldout" and count < HELDOUT_EVERY:
            raise DataError(
                f"{source} has {count} documents; at least {HELDOUT_EVERY} are needed, because every eighth is held out. Two blank lines "
                "separate documents in a .txt file; in other files each row is one. To measure on all documents: "
                "jobs/evaluate.py --all-documents."
            )
    else:
        raise unknown_source(source)


def check_source(source: str) -> None:
    """Raise DataError if `source` is neither a known name nor local text. An absolute path may exist on other machines only."""
    if source.startswith("package:"):
        name, names = source.removeprefix("package:"), included_texts()
        if name not in names:
            raise DataError(f"acip includes no text {name!r}{did_you_mean(name, names)}. Included: {', '.join(names)}.")
    elif source not in HUB and source != SELF and not source.startswith("/") and not text_files.files(source):
        raise unknown_source(source)


def included_texts() -> list[str]:
    """Return the names of the texts that are included in acip."""
    folder = importlib.resources.files("acip").joinpath("corpora")
    return sorted(path.name.removesuffix(".txt") for path in folder.iterdir() if path.name.endswith(".txt"))


def unknown_source(source: str) -> DataError:
    """Return, but do not raise, the error for a source that `documents` cannot read."""
    allowed = ", ".join([*(f"package:{name}" for name in included_texts()), *HUB])
    what = "can be used for calibration only" if source == SELF else "is neither a local file or folder nor a known name"
    return DataError(
        f"data source {source!r} {what}{did_you_mean(source, [*HUB, SELF] if source != SELF else [])}. "
        f"Allowed: {allowed}, or a path to local text. {text_files.ALLOWED}"
    )


def _belongs(i: int, split: Split) -> bool:
    """Return whether document i belongs to `split`."""
    return split == "all" or (i % HELDOUT_EVERY == HELDOUT_EVERY - 1) == (split == "heldout")


def _c4(split: Split) -> Iterator[str]:
    from datasets import load_dataset

    rows = load_dataset("allenai/c4", "en", split="train" if split == "train" else "validation", streaming=True)
    # the paper evaluates on the first 1100 validation documents
    return (row["text"] for row in (rows if split == "train" else islice(rows, 1100)))


def _wikitext2(split: Split) -> Iterator[str]:
    from datasets import load_dataset

    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train" if split == "train" else "test")
    yield "\n\n".join(rows["text"])  # one document, as is usual for perplexity on WikiText-2


HUB = {"c4": _c4, "wikitext2": _wikitext2}


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids that `tokenizer` puts before every text, () for none.

    They are found by tokenizing a short text with and without special tokens. Raises DataError if the two do not match.
    """
    for text in ("a", "the", "0", "."):
        bare, whole = (list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]) for special in (False, True))
        for at in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[at : at + len(bare)] == bare:
                return tuple(whole[:at])
    raise DataError(
        f"this base model's tokenizer ({type(tokenizer).__name__}) converts {text!r} to {whole} with special tokens and to {bare} without "
        "them, so the tokens that it puts before a text can't be determined. Use another tokenizer for this model."
    )


def token_windows(docs: Iterable[Document], tokenizer: Any, seq_len: int, count: int | None = None) -> Tensor:
    """Return the tokens of `docs` as full windows [n, T] int32 (see the head of this file).

    With `count`, read only as much text as that many windows need; n is smaller if the text ends first. Raises DataError if the
    text does not fill one window.
    """
    start = start_tokens(tokenizer)
    if seq_len <= len(start):
        raise DataError(f"seq_len is {seq_len}; it must exceed the {len(start)} tokens that this tokenizer puts before every text.")
    ids = array("i")
    for more in _token_ids(docs, tokenizer):
        ids.extend(more)
        if count is not None and len(ids) >= count * seq_len:
            break
    stream, head = torch.from_numpy(np.array(ids, dtype=np.int32)), torch.tensor(start, dtype=torch.int32)
    windows: list[Tensor] = []
    at = 0
    while count is None or len(windows) < count:
        before = head[:0] if stream[at : at + len(head)].equal(head) else head  # a chat template may have written the start tokens
        if (end := at + seq_len - len(before)) > len(stream):
            break
        windows.append(torch.cat([before, stream[at:end]]))
        at = end
    if not windows:
        raise DataError(f"the text has {len(ids):,} tokens, less than one window of {seq_len:,}. Use more text or a smaller seq_len.")
    return torch.stack(windows)


def check_windows(windows: Tensor) -> None:
    """Raise DataError unless `windows` are token ids [n, T] with a token to predict."""
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise DataError(f"the windows are {list(windows.shape)}; they must be [n, T] token ids, with n at least 1 and T at least 2.")


def _token_ids(docs: Iterable[Document], tokenizer: Any) -> Iterator[list[int]]:
    for doc in docs:
        for piece in pieces(blocks_of(doc, tokenizer), tokenizer):
            yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            yield [tokenizer.eos_token_id]


def blocks_of(doc: Document, tokenizer: Any) -> Iterator[str]:
    """Yield the text of a document in blocks. A chat is converted by the tokenizer's chat template."""
    if isinstance(doc, LongText):
        yield from doc
        return
    text = doc if isinstance(doc, str) else chat_text(doc, tokenizer)
    for at in range(0, len(text), PIECE_CHARACTERS):
        yield text[at : at + PIECE_CHARACTERS]


def pieces(blocks: Iterable[str], tokenizer: Any, most: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield a text, given in blocks, in pieces to tokenize: at most `most` characters each, and AROUND more in the last.

    The cuts depend on the text and the tokenizer, not on the blocks.
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
    """Return where to cut `text`: at `most` characters or shortly before (see the head of this file)."""

    def ids(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    low = max(AROUND, most // 2)
    spaces = [low + match.start() for match in re.finditer(r"\s", text[low:most])][-CUTS:]
    lines = [at for at in spaces if text[at] == "\n"]
    cuts = [*(at + 1 for at in reversed(lines)), *reversed(spaces), *(at + 1 for at in reversed(spaces)), *range(most, most - CUTS, -1)]
    for at in cuts:
        left, right = text[max(0, at - AROUND) : at], text[at : at + AROUND]
        if ids(left) + ids(right) == ids(left + right):
            return at
    return spaces[-1] if spaces else most


def chat_text(messages: text_files.Messages, tokenizer: Any, **options: Any) -> str:
    """Return a chat as text; `options` are those of the template. Raises DataError if there is no template, or it rejects the chat."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError('the text contains chats ("messages"), but this base model\'s tokenizer has no chat template. Use plain "text".')
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text
    except Exception as error:  # templates raise any exception, for example for roles in the wrong order
        raise DataError(f"the tokenizer's chat template rejects a chat that begins with {str(messages[0])[:80]!r}: {error}") from error


@dataclass(frozen=True)
class TokenBatches:
    """An endless sequence of batches: `batches[i]` is the i-th batch [B, T] int64 of `windows`, reshuffled by `seed` in each epoch."""

    windows: Tensor
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    def __getitem__(self, i: int) -> Tensor:
        n = len(self.windows)
        rows = []
        for at in range(i * self.batch_size, (i + 1) * self.batch_size):
            epoch, index = divmod(at, n)
            rows.append(int(_order(n, self.seed * 1_000_003 + epoch)[index]) if self.shuffle else index)
        return self.windows[rows].long()


@lru_cache(maxsize=4)
def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
