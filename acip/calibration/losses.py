"""The losses of a calibration: the task loss, the KL divergence from the base model, and the likelihood of the model's own predictions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acip.errors import CalibrationError
from acip.layers.compressible import Compressible
from acip.modeling_acip import accumulation_dtype, widened

CHUNK = 1 << 24  # logits that are held in the accumulation dtype at once


@dataclass(frozen=True)
class Task:
    """A training task: `logits(model, batch)` [..., classes] and `loss(logits, batch)`. Distillation compares the logits.

    If the loss is a mean cross-entropy, `labels(batch)` [...] may give the class at each position of the logits, -1 = no label.
    Distillation then computes the task loss without another pass over the logits.
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
    """Make every layer compute the output of the base model's layer, inside the context."""
    for core in layers.values():
        core.bypass = True
    try:
        yield
    finally:
        for core in layers.values():
            core.bypass = False


def objective(model: nn.Module, layers: Mapping[str, Compressible], batch: Any, task: Task, distill_weight: float) -> tuple[Tensor, Tensor]:
    """Return ((1 - distill_weight) * task loss + distill_weight * KL(base || model), task loss alone).

    The KL divergence is the mean over positions, in nats. The task loss alone is detached, and NaN if it was not computed.
    """
    if not distill_weight:
        loss = task(model, batch)
        return loss, loss.detach()
    with torch.no_grad(), as_base(layers):
        base = task.logits(model, batch)
    logits = task.logits(model, batch)
    kl, task_loss = Divergence.apply(logits, base, None if task.labels is None else task.labels(batch))
    return kl if distill_weight == 1 else (1 - distill_weight) * task.loss(logits, batch) + distill_weight * kl, task_loss


class Divergence(torch.autograd.Function):
    """The function (logits, base logits, labels) -> (KL(base || model), mean cross-entropy of the labels).

    Logits are [..., classes], labels [...]. KL is the mean over positions; the cross-entropy has no gradient, and is NaN without labels.
    The forward pass also computes the gradient softmax(model) - softmax(base). It works in chunks, so that only one chunk of
    probabilities is held in the accumulation dtype: with 128k classes, all of them would take most of the memory of a calibration.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, base: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        classes = logits.shape[-1]
        rows, base_rows = logits.detach().view(-1, classes), base.view(-1, classes)
        grad = torch.empty_like(rows) if logits.requires_grad else None
        total, task_loss = torch.zeros(2, dtype=accumulation_dtype(logits.dtype), device=logits.device)
        index = None if labels is None else labels.reshape(-1, 1).to(logits.device)
        at = 0
        for chunk, base_chunk in zip(*(x.split(max(1, CHUNK // classes)) for x in (rows, base_rows)), strict=True):
            log_q, log_p = F.log_softmax(widened(chunk), -1), F.log_softmax(widened(base_chunk), -1)
            if index is not None:
                labels_chunk = index[at : at + len(chunk)]
                task_loss -= (log_q.gather(1, labels_chunk.clamp(min=0)) * (labels_chunk >= 0)).sum()
            p = log_p.exp()
            total += torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
            if grad is not None:
                grad[at : at + len(chunk)] = log_q.exp_().sub_(p).div_(len(rows))
            at += len(chunk)
        ctx.grad = None if grad is None else grad.view_as(logits)
        task_loss = task_loss / (index >= 0).sum() if index is not None else task_loss + torch.nan
        ctx.mark_non_differentiable(task_loss)
        return total / len(rows), task_loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _task_loss_grad: Tensor) -> tuple[Tensor, None, None]:
        logits_grad, ctx.grad = ctx.grad, None  # freed after use: it is as large as the logits
        return logits_grad.mul_(grad), None, None


def sampled_loss(logits_SV: Tensor, window: int, seed: int) -> Tensor:
    """Return the negative log likelihood of classes that are drawn from the predictions [S, V] themselves, summed over the window.

    The draws depend on the number of the window and on the seed only, so that several workers, or several passes, get the same ones.
    Raises CalibrationError for logits that are not finite.
    """
    logits_SV = logits_SV.float()
    return F.cross_entropy(logits_SV, _drawn(logits_SV.detach(), seed * 1_000_003 + window), reduction="sum")


def _drawn(logits_SV: Tensor, seed: int) -> Tensor:
    """Return a class [S] of each row: that of a random place in its cumulative distribution."""
    cumulative_SV = logits_SV.softmax(-1).cumsum(-1)
    if not bool(cumulative_SV[:, -1].isfinite().all()):
        raise CalibrationError("the logits of the base model are not finite. Use dtype float32 or bfloat16, or check its weights.")
    generator = torch.Generator().manual_seed(seed)
    places_S1 = torch.rand(len(logits_SV), 1, generator=generator, dtype=torch.float32).clamp_max(1 - 1e-6)  # rounding may reach 1
    return torch.searchsorted(cumulative_SV, places_S1.to(logits_SV.device) * cumulative_SV[:, -1:], right=True)[:, 0]
