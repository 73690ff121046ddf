"""The windows of a job's calibration text, from one source or several, and the text that is sampled from the base model for `self`.

Sampled text is stored in batches, as JSON lines in ACIP_HOME/cache/sampled. A job reads the batches that are there and samples those that
are missing, so a retry, and other jobs on this machine, continue where an earlier job ended.
"""

import hashlib
import itertools
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from acip.base import Base
from acip.data import SELF, documents, token_windows
from acip.errors import CalibrationError, DataError
from acip.mixture import Mixture, interleaved
from acip.self_text import BATCH, SAMPLING, TEMPERATURE, first_tokens, sample
from acip.text_files import Document
from acip.utils.atomic import atomic_file
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.storage.checkpoints import Emit
from acip_platform.storage.disk import StoreError, reason

READ: OrderedDict[tuple[Any, ...], Any] = OrderedDict()  # the values of `read_once`, the last used one last
READ_LIMIT = 4


def read_once(key: tuple[Any, ...], read: Callable[[], Any]) -> Any:
    """Return `read()`, or the value for an equal key from before. The trials of a sweep in one process share their text this way."""
    if key not in READ:
        READ[key] = read()
        if len(READ) > READ_LIMIT:
            READ.popitem(last=False)
    READ.move_to_end(key)
    return READ[key]


def samples_text(job: Job) -> bool:
    """Return whether calibration text of `job` is sampled from its base model."""
    return SELF in Mixture.of(job.data).sources


@dataclass
class TextReader:
    """A reader of calibration text for one base model: windows of `seq_len` tokens of any source, also of `self`.

    `model` returns the base model, and is called only if text has to be sampled from it.
    """

    digest: str  # of the base model
    tokenizer: Any
    seq_len: int
    seed: int  # of the sampled text
    settings: Settings
    emit: Emit
    model: Callable[[], PreTrainedModel]
    sampled: dict[str, Any] = field(default_factory=dict)  # facts about the sampled text that was read, for the provenance

    def windows(self, source: str, count: int) -> Tensor:
        """Return `count` windows of one source, token ids [n, T], or fewer if its text ends first. DataError names the source."""
        try:
            docs = self._sampled_documents(count * self.seq_len) if source == SELF else documents(source, "train")
            return token_windows(docs, self.tokenizer, self.seq_len, count)
        except DataError as error:
            raise DataError(f"data {source}: {error}") from error

    def _sampled_documents(self, tokens: int) -> Iterator[Document]:
        """Yield sampled documents without end. Progress is reported as a share of `tokens`, the number that is probably needed."""
        self.emit("stage", text=f"text of the base model itself: about {tokens:,} tokens, kept in {self._folder}")
        counts, sha = dict.fromkeys(("documents", "chats", "tokens"), 0), hashlib.sha256()
        for batch in itertools.count():
            content = self._batch(batch)
            rows = [json.loads(line) for line in content.splitlines()]
            sha.update(content)
            counts["documents"] += len(rows)
            counts["chats"] += sum("messages" in row for row in rows)
            counts["tokens"] += sum(row["tokens"] for row in rows)
            self.sampled = {"sampling": SAMPLING, "seed": self.seed, "temperature": TEMPERATURE, **counts, "sha256": sha.hexdigest()}
            self.emit("code", what="sampled tokens", done=min(counts["tokens"], tokens), total=tokens)
            yield from (row.get("text") or row["messages"] for row in rows)

    @property
    def _folder(self) -> Path:
        """The folder of the batches. Its name identifies everything that decides them."""
        template = getattr(self.tokenizer, "chat_template", None)
        facts = [SAMPLING, BATCH, TEMPERATURE, self.digest, first_tokens(self.tokenizer), template, self.seq_len, self.seed]
        return self.settings.home / "cache" / "sampled" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _batch(self, batch: int) -> bytes:
        """Return the content of a batch; sample and store it if it is missing. One process of this machine samples at a time."""
        file = self._folder / f"{batch:05d}.jsonl"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.parent / ".lock"):
                if not file.exists():
                    began = time.monotonic()
                    rows = sample(self.model(), self.tokenizer, self.seq_len, self.seed, batch)
                    with atomic_file(file) as partial:
                        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
                    if not batch:
                        count = sum(row["tokens"] for row in rows)
                        self.emit("stage", text=f"sampled the first {count:,} tokens in {time.monotonic() - began:.0f} s")
            return file.read_bytes()
        except OSError as error:
            raise StoreError(f"can't write sampled text to {file.parent}: {reason(error)}. Free some space there.") from error


@dataclass(frozen=True)
class CalibrationText:
    """The windows of a job's calibration text, token ids [n, T], and the facts about text that was sampled for it ({} = none)."""

    windows: Tensor
    sampled: dict[str, Any]

    @classmethod
    def of(cls, job: Job, base: Base, settings: Settings, emit: Emit, streamed: bool = False) -> "CalibrationText":
        """Read the text of `job`, in the order of the recipe's seed, with the tokenizer of `base`.

        Text of the source `self` is sampled from `base.model` if that has not been done on this machine. The model must not be parametrized
        yet. CalibrationError if the model is `streamed`: it does not fit in memory. DataError if the text can't be read.
        """
        recipe, mixture = job.recipe, Mixture.of(job.data)
        counts = mixture.counts(job.windows)

        def whole_model() -> PreTrainedModel:
            if streamed:
                raise CalibrationError(
                    f"the calibration text is {job.data}, but the model does not fit in memory, so no text can be sampled from it. Use "
                    "another source as `data`, for example package:wikipedia, or a machine with more memory."
                )
            return base.model

        def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
            reader = TextReader(base.digest, base.tokenizer, recipe.seq_len, recipe.seed, settings, emit, whole_model)
            return {source: reader.windows(source, n) for source, n in counts.items()}, reader.sampled

        # a run that takes more steps than expected reads the windows again in another order
        key = (job.base, job.data, recipe.seq_len, job.windows, recipe.seed if SELF in mixture.sources else None)
        parts, facts = read_once(key, read)
        shuffled = {
            source: windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))]
            for source, windows in parts.items()
        }
        return cls(mixed(shuffled, counts, emit), facts)

    @property
    def provenance(self) -> dict[str, Any]:
        """The entry of the artifact's provenance."""
        return {"sampled_text": self.sampled} if self.sampled else {}


def mixed(parts: Mapping[str, Tensor], counts: Mapping[str, int], emit: Emit) -> Tensor:
    """Return the windows of all sources in one order, `counts` of each. A source of a mixture that has fewer repeats them."""
    for source, windows in parts.items():
        if len(windows) < (count := counts[source]):
            text = f"{source} has {len(windows):,} windows, and {count:,} are needed: each is used about {count / len(windows):.1f} times"
            emit("stage", text=text)
    if len(parts) == 1:
        return next(iter(parts.values()))
    return interleaved([windows[torch.arange(counts[source]) % len(windows)] for source, windows in parts.items()])
