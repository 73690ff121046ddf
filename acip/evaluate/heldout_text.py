"""Held-out text for evaluation, cut into windows of tokens by a named protocol.

    protocol   documents are joined by    windows
    packed     their end token            full windows (acip.data)
    spread     their end token            full windows; if limited, spread evenly over the text, since the first ones may be one document
    field      "\\n\\n", in C4 " "          full windows, in C4 at most 256: the protocol of GPTQ and most later papers, at 2048 tokens
    paper      "\\n\\n", in C4 " "          all windows, including a short last one, at 2048 tokens (LLaMA-1) or 4096

If the tokenizer adds start tokens to a text (`acip.data.start_tokens`), every window of packed and spread begins with them, as
in use. The protocols of the literature, field and paper, join the documents as text, tokenize it at once, and split the tokens. Only the
first window then has start tokens. For a model that depends on its start token (Gemma 3), perplexity by field and paper is far higher
than in use, and may not be monotonic in size.

WikiText-2 is one document. C4 is the first 1100 documents of its validation set. Texts above WHOLE characters are tokenized in pieces.
Numbers of different protocols, contexts, start tokens or tokenizers are not comparable.
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
STARTED: tuple[Protocol, ...] = ("packed", "spread")  # protocols whose windows all begin with the start tokens
WHOLE = 2**24  # characters that field and paper tokenize at once; WikiText-2 and the documents of C4 are shorter


@dataclass(frozen=True)
class Text:
    """Windows of `context` tokens of a corpus: all, or `windows` of them, which are the first ones except for `spread`."""

    source: str = "package:wikipedia"  # see acip.data
    protocol: Protocol = "packed"
    context: int = 2048
    windows: int = 0  # 0 = all
    split: Split = "heldout"  # "all" for a text that was not used for calibration
    start: tuple[int, ...] = ()  # token ids that each window begins with; set by `read_by`

    def __post_init__(self) -> None:
        if self.protocol not in (known := get_args(Protocol)):
            raise EvaluationError(f"unknown protocol {self.protocol!r}{did_you_mean(self.protocol, known)}; allowed: {', '.join(known)}.")
        if self.context < 2 or self.windows < 0:
            raise EvaluationError(
                f"context is {self.context} and windows is {self.windows}; context must be at least 2, windows at least 0 (0 = all)."
            )

    def tokens(self, tokenizer: Any) -> list[Tensor]:
        """Return the windows, int64 [context] each; with protocol `paper` the last one may be shorter. DataError if there is none."""
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
        windows = list(torch.from_numpy(np.array(ids, dtype=np.int64)).split(self.context))
        least = 2 if self.protocol == "paper" else self.context
        if windows and len(windows[-1]) < least:
            windows.pop()
        if not windows:
            raise DataError(
                f"{self.source} has {len(ids):,} held-out tokens, less than one window of {self.context:,}. Use a smaller context."
            )
        return windows[: most or len(windows)]

    def _joined(self, docs: Iterator[text_files.Document], tokenizer: Any) -> Iterator[str]:
        for i, doc in enumerate(docs):
            if i:
                yield " " if self.source == "c4" else "\n\n"
            yield from blocks_of(doc, tokenizer)

    def read_by(self, tokenizer: Any) -> "Text":
        """Return this text with the start tokens of `tokenizer`, which are part of the identity of a measurement."""
        return replace(self, start=start_tokens(tokenizer) if self.protocol in STARTED else ())


def join_ids(start: Iterable[int]) -> str:
    """Return token ids joined by spaces, as rows of a curve store the start of windows."""
    return " ".join(map(str, start))


def cut_by(row: Mapping[str, Any]) -> str:
    """Describe the protocol of a row of a curve, or of a part."""
    return row.get("protocol", "packed") + (", each window begins with the start tokens" if row.get("start") else "")


def evenly(n: int, count: int) -> list[int]:
    """Return at most `count` indices below n, evenly spaced: the middle of each of `count` equal intervals."""
    count = min(n, count)
    return [(2 * i + 1) * n // (2 * count) for i in range(count)]


def content(path: str) -> str:
    """Return the sha256 of a local file, or of all files of a folder or pattern with their names; "" for a name on the hub."""
    root = Path(path)
    exists = bool(path) and root.exists()
    files = _files(root) if exists else text_files.files(path) if path else []
    if not (exists or files):
        return ""
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.relative_to(root) if exists else file}\n".encode())
        with file.open("rb") as opened:
            sha.update(hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()


def _files(root: Path) -> list[Path]:
    return [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
