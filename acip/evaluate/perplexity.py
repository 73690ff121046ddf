"""Held-out perplexity."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from acip.base import positions
from acip.calibration.losses import next_token
from acip.errors import EvaluationError
from acip.evaluate.heldout_text import Text, content, said
from acip.evaluate.measurement import Measurement, Part, Subject, label
from acip.export.folder import compressed_model
from acip.export.quantization import Kind, rounded
from acip.sizing.budget import QUANTIZED, as_perplexity


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean of the windows' losses. `loss` in nats per token, `stderr` of that mean over windows."""

    loss: float
    stderr: float
    windows: int
    context: int

    @property
    def perplexity(self) -> float:
        return as_perplexity(self.loss)

    @property
    def values(self) -> dict[str, float]:
        return {"perplexity": self.perplexity, "loss_nats": self.loss, "loss_stderr_nats": self.stderr}


@torch.no_grad()
def perplexity(model: nn.Module, windows: Iterable[Tensor], batch_size: int = 1) -> Perplexity:
    """`windows` [T] or [n, T] token ids; each predicts its T - 1 next tokens. Each counts alike, short ones too.

    EvaluationError where a loss is not finite.
    """
    device = next(model.parameters()).device
    losses: list[float] = []
    longest = 0
    for batch in _batches(windows, batch_size):
        ids_BT = batch.long().to(device)
        logits_BTV = next_token.logits(model, ids_BT)
        losses.extend(float(next_token.loss(logits_BTV[i : i + 1], ids_BT[i : i + 1])) for i in range(len(ids_BT)))
        longest = max(longest, ids_BT.shape[1])
    if lost := lost_windows(losses):
        raise EvaluationError(f"there is no perplexity: {lost}.")
    loss, stderr = mean_and_stderr(losses)
    return Perplexity(loss, stderr, len(losses), longest)


def _batches(windows: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    for _, group in groupby(windows, key=len):
        yield from torch.stack(list(group)).split(batch_size)


def lost_windows(losses: list[float]) -> str:
    """A clause that says how many windows have a loss that is not finite; "" where none has."""
    lost = sum(not math.isfinite(loss) for loss in losses)
    return f"the loss is not finite on {lost} of {len(losses)} windows, so the model's numbers leave its dtype" if lost else ""


def mean_and_stderr(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error: infinite for a single value."""
    all_values = torch.tensor(values, dtype=torch.float64)
    return float(all_values.mean()), float(all_values.std() / len(values) ** 0.5) if len(values) > 1 else math.inf


@dataclass(frozen=True)
class OnText(Measurement):
    """Something that is measured on windows of held-out text."""

    text: Text = field(default_factory=Text)

    def read_by(self, tokenizer: Any) -> Self:
        return replace(self, text=self.text.read_by(tokenizer))

    def identity(self) -> dict[str, Any]:
        found = {**super().identity(), "content": content(self.text.source)}
        usual = {"split": "heldout", "start": ()}  # left out, as keys were formed before there were others
        found["text"] = {key: value for key, value in found["text"].items() if key not in usual or value != usual[key]}
        return found

    def windows(self, subject: Subject) -> list[Tensor]:
        most = positions(subject.model.config)
        if most is not None and self.text.context > most:
            raise EvaluationError(f"context is {self.text.context}; this model knows {most} positions. Give a smaller context.")
        if self.text not in subject.windows:
            subject.windows[self.text] = self.text.tokens(subject.tokenizer)
        return subject.windows[self.text]

    def facts(self, windows: int) -> Part:
        text = self.text
        source = "/".join(text.source.removeprefix("package:").split("/")[-2:])  # two files of one name differ in their folders
        whole = {} if text.split == "heldout" else {"split": text.split}
        start = {"start": said(text.start)} if text.start else {}
        name = label(source, text.protocol, text.context, "whole" if whole else "")
        about = {"corpus": text.source, "protocol": text.protocol, "context": text.context, "windows": windows, **whole, **start}
        return {"label": f"{self.kind}/{name}", **about}


@dataclass(frozen=True)
class PerplexityOn(OnText):
    kind: ClassVar[str] = "perplexity"

    def measure(self, subject: Subject) -> Part:
        found = perplexity(subject.model, self.windows(subject))
        return {**self.facts(found.windows), "values": found.values}


@dataclass(frozen=True)
class QuantizedOn(OnText):
    """Perplexity of the size as it is exported in 8 or 4 bit."""

    kind: ClassVar[str] = QUANTIZED
    quantize: Kind = "nf4"

    def measure(self, subject: Subject) -> Part:
        if subject.any_size is None:
            raise EvaluationError("what quantizing costs is measured of an artifact: give --model or --artifact.")
        model = rounded(compressed_model(subject.any_size, self.quantize))
        found = perplexity(model, self.windows(subject))
        facts = self.facts(found.windows)
        return {**facts, "label": f"{facts['label']}_{self.quantize}", "quantize": self.quantize, "values": found.values}
