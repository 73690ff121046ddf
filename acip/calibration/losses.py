"""Losses: of the task, and of distance from the base model's own distribution."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.layers.compressible import Compressible
from acip.modeling_acip import accumulation_dtype, widened

CHUNK = 1 << 24  # numbers of the logits that are in the accumulation dtype at once


@dataclass(frozen=True)
class Task:
    """What a model is calibrated on: its `logits(model, batch)` [..., classes], which are distilled, and their `loss(logits, batch)`.

    `labels(batch)` [...] is the class at each position of the logits, -1 = none, where the loss is their mean cross-entropy: a
    distillation then tells it without another pass over the logits.
    """

    logits: Callable[[nn.Module, Any], Tensor]
    loss: Callable[[Tensor, Any], Tensor]
    labels: Callable[[Any], Tensor] | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.loss(self.logits(model, batch), batch)


def _next_token_logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


def _next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    return F.cross_entropy(widened(logits_BTV[:, :-1].flatten(0, 1)), ids_BT[:, 1:].flatten())


def _next_token_labels(ids_BT: Tensor) -> Tensor:
    return F.pad(ids_BT[:, 1:], (0, 1), value=-1)


next_token = Task(_next_token_logits, _next_token_loss, _next_token_labels)  # mean cross-entropy of each next token, nats


@contextmanager
def as_base(layers: Mapping[str, Compressible]) -> Iterator[None]:
    """Inside, every layer is the base model's."""
    for core in layers.values():
        core.bypass = True
    try:
        yield
    finally:
        for core in layers.values():
            core.bypass = False


def objective(model: nn.Module, layers: Mapping[str, Compressible], batch: Any, task: Task, distill_weight: float) -> tuple[Tensor, Tensor]:
    """((1 - distill) * task loss + distill * KL(base || model) per position, the task's loss alone, NaN where it is not known)."""
    if not distill_weight:
        loss = task(model, batch)
        return loss, loss.detach()
    with torch.no_grad(), as_base(layers):
        base = task.logits(model, batch)
    logits = task.logits(model, batch)
    kl, own = Divergence.apply(logits, base, None if task.labels is None else task.labels(batch))
    return kl if distill_weight == 1 else (1 - distill_weight) * task.loss(logits, batch) + distill_weight * kl, own


class Divergence(torch.autograd.Function):
    """(KL(base || model), mean over positions, of logits [..., classes]; the mean cross-entropy of `labels` [...], without a gradient).

    The forward pass computes the gradient softmax(model) - softmax(base), too. It works in chunks, so that only one chunk of the
    probabilities is held in the accumulation dtype: with 128k classes they would take most of a calibration's memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, base: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        classes = logits.shape[-1]
        rows, base_rows = logits.detach().view(-1, classes), base.view(-1, classes)
        grad = torch.empty_like(rows) if logits.requires_grad else None
        total, own = torch.zeros(2, dtype=accumulation_dtype(logits.dtype), device=logits.device)
        index = None if labels is None else labels.reshape(-1, 1).to(logits.device)
        at = 0
        for chunk, base_chunk in zip(*(x.split(max(1, CHUNK // classes)) for x in (rows, base_rows)), strict=True):
            ours, theirs = F.log_softmax(widened(chunk), -1), F.log_softmax(widened(base_chunk), -1)
            if index is not None:
                of_chunk = index[at : at + len(chunk)]
                own -= (ours.gather(1, of_chunk.clamp(min=0)) * (of_chunk >= 0)).sum()
            p = theirs.exp()
            total += torch.linalg.vecdot(p, theirs.sub_(ours)).sum()
            if grad is not None:
                grad[at : at + len(chunk)] = ours.exp_().sub_(p).div_(len(rows))
            at += len(chunk)
        ctx.grad = None if grad is None else grad.view_as(logits)
        own = own / (index >= 0).sum() if index is not None else own + torch.nan
        ctx.mark_non_differentiable(own)
        return total / len(rows), own

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _own: Tensor) -> tuple[Tensor, None, None]:
        logits_grad, ctx.grad = ctx.grad, None  # it is as large as the logits, and not needed twice
        return logits_grad.mul_(grad), None, None
