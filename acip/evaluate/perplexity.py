"""Perplexity on held-out text."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.base import require_positions
from acip.calibration.losses import CHUNK, next_token
from acip.calibration.training_mode import evaluating
from acip.errors import EvaluationError
from acip.evaluate.heldout_text import Text, content, join_ids
from acip.evaluate.measurement import Measurement, Part, Subject, label
from acip.export.folder import compressed_model
from acip.export.quantization import Kind, kind_of, rounded
from acip.modeling_acip import widened
from acip.sizing.budget import QUANTIZED, as_perplexity


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, exp(loss). `loss` is the mean loss of the windows in nats per token, `stderr` its standard error over windows."""

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
    """Measure the perplexity on `windows`, token ids [n, T] or an iterable of [T]. Each window predicts its T - 1 next tokens.

    All windows have equal weight, including short ones. Raises EvaluationError if a loss is not finite, if there are no windows, or if one
    has fewer than two tokens.
    """
    device = next(model.parameters()).device
    losses: list[float] = []
    longest = 0
    with evaluating(model):
        for batch in _batches(windows, batch_size):
            ids_BT = batch.long().to(device)
            logits_BTV = next_token.logits(model, ids_BT)
            losses.extend(map(mean_loss, logits_BTV, ids_BT))
            longest = max(longest, ids_BT.shape[1])
    if lost := lost_windows(losses):
        raise EvaluationError(f"the perplexity cannot be measured: {lost}. Load the model in a wider dtype.")
    loss, stderr = mean_and_stderr(losses)
    return Perplexity(loss, stderr, len(losses), longest)


def mean_loss(logits_TV: Tensor, ids_T: Tensor) -> float:
    """Return the mean cross-entropy of each next token in nats. Only a chunk of the logits is in the accumulation dtype at once."""
    if len(ids_T) < 2:
        raise EvaluationError(f"a window has {len(ids_T)} tokens; it must have at least 2, because each token predicts the next one.")
    parts = max(1, CHUNK // logits_TV.shape[-1])
    chunks = zip(logits_TV[:-1].split(parts), ids_T[1:].split(parts), strict=True)
    return sum(float(F.cross_entropy(widened(logits), ids, reduction="sum")) for logits, ids in chunks) / (len(ids_T) - 1)


def _batches(windows: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    for _, group in groupby(windows, key=len):
        yield from torch.stack(list(group)).split(batch_size)


def lost_windows(losses: list[float]) -> str:
    """Return a clause with the number of windows whose loss is not finite; "" if there is none."""
    lost = sum(not math.isfinite(loss) for loss in losses)
    return f"the loss is not finite on {lost} of {len(losses)} windows, because numbers overflow the dtype of the model" if lost else ""


def mean_and_stderr(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is infinite for a single value. Raises EvaluationError if there are no values."""
    if not values:
        raise EvaluationError("there are no windows of text to measure. Give at least one.")
    all_values = torch.tensor(values, dtype=torch.float64)
    return float(all_values.mean()), float(all_values.std() / len(values) ** 0.5) if len(values) > 1 else math.inf


@dataclass(frozen=True)
class OnText(Measurement):
    """A measurement on windows of held-out text."""

    text: Text = field(default_factory=Text)

    def read_by(self, tokenizer: Any) -> Self:
        return replace(self, text=self.text.read_by(tokenizer))

    def identity(self) -> dict[str, Any]:
        fields = {**super().identity(), "content": content(self.text.source)}
        defaults = {"split": "heldout", "start": ()}  # omitted, so that keys from before these fields stay valid
        fields["text"] = {key: value for key, value in fields["text"].items() if key not in defaults or value != defaults[key]}
        return fields

    def windows(self, subject: Subject) -> list[Tensor]:
        """Return the windows of the text, read once per subject. EvaluationError if they are longer than the model's positions."""
        context = self.text.context
        require_positions(subject.model.config, context, EvaluationError, f"context is {context:,}", "Use a smaller context.")
        if self.text not in subject.windows:
            subject.windows[self.text] = self.text.tokens(subject.tokenizer)
        return subject.windows[self.text]

    def facts(self, windows: int) -> Part:
        """Return the label of the part, and the fields that describe its text."""
        text = self.text
        source = "/".join(text.source.removeprefix("package:").split("/")[-2:])  # with its folder, since file names may be equal
        whole = {} if text.split == "heldout" else {"split": text.split}
        start = {"start": join_ids(text.start)} if text.start else {}
        name = label(source, text.protocol, text.context, "whole" if whole else "")
        about = {"corpus": text.source, "protocol": text.protocol, "context": text.context, "windows": windows, **whole, **start}
        return {"label": f"{self.kind}/{name}", **about}


@dataclass(frozen=True)
class PerplexityOn(OnText):
    """Perplexity of the model at its present size."""

    kind: ClassVar[str] = "perplexity"

    def measure(self, subject: Subject) -> Part:
        result = perplexity(subject.model, self.windows(subject))
        return {**self.facts(result.windows), "values": result.values}


@dataclass(frozen=True)
class QuantizedOn(OnText):
    """Perplexity of the size in its exported form of 8 or 4 bit."""

    kind: ClassVar[str] = QUANTIZED
    quantize: Kind = "nf4"

    def measure(self, subject: Subject) -> Part:
        if subject.any_size is None:
            raise EvaluationError("the perplexity of a quantized size needs an artifact. Give --model or --artifact.")
        assert subject.any_size.cut is not None, "resize first"
        model = rounded(compressed_model(subject.any_size, kind_of(subject.any_size.cut, self.quantize)))
        result = perplexity(model, self.windows(subject))
        facts = self.facts(result.windows)
        return {**facts, "label": f"{facts['label']}_{self.quantize}", "quantize": self.quantize, "values": result.values}
