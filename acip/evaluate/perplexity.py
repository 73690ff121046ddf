"""Held-out perplexity, and the trade-off curve of it over sizes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acip.artifact import Artifact
from acip.cut import Budget
from acip.errors import BudgetError
from acip.losses import next_token
from acip.materialise import AnySize


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean of the windows' losses. `loss` in nats per token, `stderr` of that mean over windows."""

    loss: float
    stderr: float
    windows: int
    context: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch_size: int = 1) -> Perplexity:
    """`windows` [n, T] token ids, full windows only (the field's usual protocol); each predicts its T - 1 next tokens."""
    device = next(model.parameters()).device
    losses = []
    for batch in windows.split(batch_size):
        loss = next_token(model, batch.long().to(device))  # equal lengths: the mean over the batch is the windows' mean
        losses.extend([float(loss)] * len(batch))
    values = torch.tensor(losses, dtype=torch.float64)
    stderr = float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.inf
    return Perplexity(float(values.mean()), stderr, len(windows), windows.shape[1])


def trade_off(artifact: Artifact, any_size: AnySize, windows: Tensor, corpus: str, sizes: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """One row per size, largest first, from the model as it is served. A size that can't be reached is left out."""
    return curve(any_size, windows, corpus, sizes, artifact.recipe.stop_ratio)


def curve(any_size: AnySize, windows: Tensor, corpus: str, sizes: tuple[float, ...], stop: float) -> Iterator[dict[str, Any]]:
    """The same of a model in memory, calibrated down to the size `stop`."""
    bytes_per_number = torch.finfo(any_size.model.dtype).bits // 8
    for asked in sorted(sizes, reverse=True):
        try:
            cut = any_size.resize(Budget(ratio=asked))
        except BudgetError:
            continue
        result = perplexity(any_size.model, windows)
        yield {
            "asked": asked,
            "got": cut.sizes["linear"],
            "convention": "linear",
            "got_paper": cut.sizes["paper"],
            "got_model": cut.sizes["model"],
            "params": cut.params,
            "bytes": cut.params * bytes_per_number,
            "loss": result.loss,
            "stderr": result.stderr,
            "perplexity": result.perplexity,
            "corpus": corpus,
            "context": result.context,
            "windows": result.windows,
            "extrapolated": asked < stop,
        }
