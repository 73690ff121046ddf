"""The held-out text that a model is measured on, cut into windows of tokens by a named protocol.

    protocol   documents are joined by    windows
    packed     their end token            full ones (acip.data)
    spread     the same                   full ones, evenly over all of the text where not all are read: the first would be one document
    field      "\\n\\n", C4's by " "        full ones, of C4 at most 256: GPTQ's, and nearly everybody's since, at 2048 tokens
    paper      "\\n\\n", C4's by " "        all, the short last one too, at 2048 tokens (LLaMA-1) or 4096

Where the tokenizer puts start tokens before a text (`acip.data.start_tokens`), every window of packed and spread begins with them:
a model is fed what it sees in use. The literature's two, field and paper, join the documents as text, tokenize it at once, and cut the
tokens: only the first window, where the text begins, has the start. A model that depends on its start token (Gemma 3) is far worse by
field and paper than it is in use, and its curve may not even fall with size.

WikiText-2 is one document; of C4, the first 1100 of its validation. Texts above WHOLE characters are tokenized in pieces. Numbers of
different protocols, contexts, starts or tokenizers can't be compared.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from acip import text_files
from acip.data import Split, blocks_of, documents, pieces, start_tokens, token_windows
from acip.errors import DataError, EvaluationError
from acip.utils.coerce import did_you_mean

Protocol = Literal["packed", "spread", "field", "paper"]
FIELD_C4_WINDOWS = 256
STARTED: tuple[Protocol, ...] = ("packed", "spread")  # the protocols whose windows all begin with the tokenizer's start
WHOLE = 2**24  # characters that field and paper tokenize at once: all of WikiText-2, and of what is read of C4


@dataclass(frozen=True)
class Text:
    """Windows of `context` tokens of a corpus: all, or `windows` of them, the first ones unless they are spread."""

    source: str = "package:wikipedia"  # see acip.data
    protocol: Protocol = "packed"
    context: int = 2048
    windows: int = 0  # 0 = all
    split: Split = "heldout"  # "all" of a text that nothing was calibrated on
    start: tuple[int, ...] = ()  # token ids that each window begins with; `read_by` knows them

    def __post_init__(self) -> None:
        if self.protocol not in (known := get_args(Protocol)):
            raise EvaluationError(f"unknown protocol {self.protocol!r}{did_you_mean(self.protocol, known)}; allowed: {', '.join(known)}.")
        if self.context < 2 or self.windows < 0:
            raise EvaluationError(f"{self.context} tokens and {self.windows} windows: a window has 2 tokens or more; 0 windows are all.")

    def tokens(self, tokenizer: Any) -> list[Tensor]:
        """[context] int64 each; by the paper's protocol the last one may be shorter."""
        docs = documents(self.source, self.split)
        if self.protocol in STARTED:
            read = token_windows(docs, tokenizer, self.context, self.windows if self.protocol == "packed" and self.windows else None)
            return [read[i].long() for i in evenly(len(read), self.windows or len(read))]
        most = self.windows or (FIELD_C4_WINDOWS if (self.source, self.protocol) == ("c4", "field") else 0)
        ids = array("i", start_tokens(tokenizer))
        for piece in pieces(self._joined(docs, tokenizer), tokenizer, WHOLE):
            ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
            if most and len(ids) >= most * self.context:
                break
        found = list(torch.from_numpy(np.array(ids, dtype=np.int64)).split(self.context))
        least = 2 if self.protocol == "paper" else self.context
        if found and len(found[-1]) < least:
            found.pop()
        if not found:
            raise DataError(
                f"{self.source} has {len(ids):,} tokens held out, less than one window of {self.context:,}; use a smaller context."
            )
        return found[: most or len(found)]

    def _joined(self, docs: Iterator[text_files.Document], tokenizer: Any) -> Iterator[str]:
        for i, doc in enumerate(docs):
            if i:
                yield " " if self.source == "c4" else "\n\n"
            yield from blocks_of(doc, tokenizer)

    def read_by(self, tokenizer: Any) -> "Text":
        """The same text as `tokenizer` reads it: with the start that its windows have, which is part of what a number was measured on."""
        return replace(self, start=start_tokens(tokenizer) if self.protocol in STARTED else ())


def said(start: Iterable[int]) -> str:
    """The start of windows as a row of a curve holds it: token ids parted by spaces."""
    return " ".join(map(str, start))


def cut_by(row: Mapping[str, Any]) -> str:
    """The protocol of a row of a curve, or of a part of one, in words."""
    return row.get("protocol", "packed") + (", each window begins with the tokenizer's start" if row.get("start") else "")


def evenly(n: int, count: int) -> list[int]:
    """At most `count` of the indices below n, each from the middle of its share."""
    count = min(n, count)
    return [(2 * i + 1) * n // (2 * count) for i in range(count)]


def content(path: str) -> str:
    """sha256 of a local file, or of all files of a folder or a pattern with their names; "" of what is not here (a name on the hub)."""
    root = Path(path)
    here = bool(path) and root.exists()
    found = _files(root) if here else text_files.files(path) if path else []
    if not (here or found):
        return ""
    sha = hashlib.sha256()
    for file in found:
        sha.update(f"{file.relative_to(root) if here else file}\n".encode())
        with file.open("rb") as opened:
            sha.update(hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()


def _files(root: Path) -> list[Path]:
    return [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
