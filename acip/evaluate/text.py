"""The held-out text that a model is measured on, cut into windows of tokens by a named protocol.

    protocol   documents are joined by    windows
    packed     their end token            full ones (acip.data)
    spread     the same                   full ones, evenly over all of the text where not all are read: the first would be one document
    field      "\\n\\n", C4's by " "        full ones, of C4 at most 256: GPTQ's, and nearly everybody's since, at 2048 tokens
    paper      "\\n\\n", C4's by " "        all, the short last one too, at 2048 tokens (LLaMA-1) or 4096

Joined as text, documents are tokenised at once, with whatever the tokenizer puts before a text. WikiText-2 is one document; of C4,
the first 1100 of its validation. Numbers of different protocols, contexts or tokenizers can't be compared.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from acip.data import Split, chat_text, documents, token_windows
from acip.errors import DataError, EvaluationError
from acip.recipe import did_you_mean

Protocol = Literal["packed", "spread", "field", "paper"]
FIELD_C4_WINDOWS = 256


@dataclass(frozen=True)
class Text:
    """Windows of `context` tokens of a corpus: all, or `windows` of them, the first ones unless they are spread."""

    source: str = "package:wikipedia"  # see acip.data
    protocol: Protocol = "packed"
    context: int = 2048
    windows: int = 0  # 0 = all
    split: Split = "heldout"  # "all" of a text that nothing was calibrated on

    def __post_init__(self) -> None:
        if self.protocol not in (known := get_args(Protocol)):
            raise EvaluationError(f"unknown protocol {self.protocol!r}{did_you_mean(self.protocol, known)}; allowed: {', '.join(known)}.")
        if self.context < 2 or self.windows < 0:
            raise EvaluationError(f"{self.context} tokens and {self.windows} windows: a window has 2 tokens or more; 0 windows are all.")

    def tokens(self, tokenizer: Any) -> list[Tensor]:
        """[context] int64 each; by the paper's protocol the last one may be shorter."""
        docs = documents(self.source, self.split)
        if self.protocol in ("packed", "spread"):
            read = token_windows(docs, tokenizer, self.context, self.windows if self.protocol == "packed" and self.windows else None)
            return [read[i].long() for i in evenly(len(read), self.windows or len(read))]
        texts = [doc if isinstance(doc, str) else chat_text(doc, tokenizer) for doc in docs]
        joined = (" " if self.source == "c4" else "\n\n").join(texts)
        ids = torch.tensor(tokenizer(joined, verbose=False)["input_ids"])
        found = list(ids.split(self.context))
        least = 2 if self.protocol == "paper" else self.context
        if found and len(found[-1]) < least:
            found.pop()
        if not found:
            raise DataError(
                f"{self.source} has {len(ids):,} tokens held out, less than one window of {self.context:,}; use a smaller context."
            )
        most = FIELD_C4_WINDOWS if (self.source, self.protocol) == ("c4", "field") else len(found)
        return found[: self.windows or most]


def evenly(n: int, count: int) -> list[int]:
    """At most `count` of the indices below n, each from the middle of its share."""
    count = min(n, count)
    return [(2 * i + 1) * n // (2 * count) for i in range(count)]


def content(path: str) -> str:
    """sha256 of a local file, or of all files in a folder with their names; "" of what is not here (a name on the hub)."""
    root = Path(path)
    if not path or not root.exists():
        return ""
    sha = hashlib.sha256()
    for file in _files(root):
        sha.update(f"{file.relative_to(root)}\n".encode())
        with file.open("rb") as opened:
            sha.update(hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    yield from [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
