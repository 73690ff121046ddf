"""Losses: of the task, and of distance from the base model's own distribution."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.linear import Compressible

CHUNK = 1 << 24  # numbers of the logits that are float32 at once


@dataclass(frozen=True)
class Task:
    """What a model is calibrated on: its `logits(model, batch)` [..., classes], which are distilled, and their `loss(logits, batch)`."""

    logits: Callable[[nn.Module, Any], Tensor]
    loss: Callable[[Tensor, Any], Tensor]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.loss(self.logits(model, batch), batch)


def _next_token_logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


def _next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())


next_token = Task(_next_token_logits, _next_token_loss)  # mean cross-entropy of each next token, nats


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


def objective(model: nn.Module, layers: Mapping[str, Compressible], batch: Any, task: Task, distill: float) -> Tensor:
    """(1 - distill) * task loss + distill * KL(base || model) per position."""
    if not distill:
        return task(model, batch)
    with torch.no_grad(), as_base(layers):
        base = task.logits(model, batch)
    logits = task.logits(model, batch)
    kl: Tensor = Divergence.apply(logits, base)
    return kl if distill == 1 else (1 - distill) * task.loss(logits, batch) + distill * kl


class Divergence(torch.autograd.Function):
    """KL(base || model), mean over positions, of logits [..., classes].

    The gradient softmax(model) - softmax(base) is computed on the way, in chunks, so that of all float32 probabilities only a chunk is
    ever held: with 128k classes they are what a calibration's memory goes to.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, base: Tensor) -> Tensor:
        classes = logits.shape[-1]
        rows, base_rows = logits.detach().view(-1, classes), base.view(-1, classes)
        grad = torch.empty_like(rows) if logits.requires_grad else None
        total = torch.zeros((), device=logits.device)
        at = 0
        for chunk, base_chunk in zip(*(x.split(max(1, CHUNK // classes)) for x in (rows, base_rows)), strict=True):
            ours, theirs = F.log_softmax(chunk.float(), -1), F.log_softmax(base_chunk.float(), -1)
            p = theirs.exp()
            total += torch.linalg.vecdot(p, theirs.sub_(ours)).sum()
            if grad is not None:
                grad[at : at + len(chunk)] = ours.exp_().sub_(p).div_(len(rows))
            at += len(chunk)
        ctx.grad = None if grad is None else grad.view_as(logits)
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_grad, ctx.grad = ctx.grad, None  # it is as large as the logits, and not needed twice
        return logits_grad.mul_(grad), None
