"""The next token of each sequence of a batch, by its own settings.

greedy      the largest logit
sampled     softmax(logits / temperature), cut to the `top_k` most likely tokens and to those of them that make `top_p` of their sum,
            and one uniform random number of the sequence's own generator: what others in the batch do changes nothing

Logits first get biases, and penalties for what was generated already, as OpenAI defines them. Where a model's generation config states
more than temperature, top_p and top_k, transformers' own logits processors do the rest, temperature and cuts included.

A row of logits that holds NaN or infinity gives no token, nor does one of which the settings leave none: its `SampledToken` has an error.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessorList

if TYPE_CHECKING:  # llguidance is needed only where a grammar is
    from acip_platform.serve.text.grammar import Constraint

GREEDY_BELOW = 1e-5  # dividing logits by a temperature much smaller than this overflows float32
FEW = 256  # most likely tokens that are sorted at first


@dataclass
class SamplingParams:
    """The settings of one sequence, and what they need to remember."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int | None = None  # so many of the most likely tokens are told with each
    processors: LogitsProcessorList | None = None  # transformers' own; None = temperature, top_p and top_k are all there is
    ids: list[int] = field(default_factory=list)  # the sequence so far, prompt included; processors read it
    constraint: "Constraint | None" = None  # what may come next

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.counts: Counter[int] = Counter()

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def limited(self) -> bool:
        return self.processors is None and (self.top_p < 1 or self.top_k > 0)


@dataclass(frozen=True)
class SampledToken:
    token: int  # -1 with an error
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # token, log-probability; most likely first
    error: str | None = None  # why there is no token


@torch.no_grad()
def sample(logits_nV: Tensor, samplers: Sequence[SamplingParams]) -> list[SampledToken]:
    """One token for each row. Log-probabilities are the model's own, before temperature, biases and penalties."""
    logits_nV = logits_nV.float()
    errors = _not_finite(logits_nV)
    told = {i: logits_nV[i].log_softmax(-1) for i, sampler in enumerate(samplers) if sampler.logprobs is not None}
    _change(logits_nV, samplers, errors)
    tokens = logits_nV.argmax(-1)
    for limited in (False, True):
        rows = [i for i, s in enumerate(samplers) if not s.greedy and s.limited == limited and i not in errors]
        if rows:
            tokens[rows] = _sample(logits_nV[rows], [samplers[i] for i in rows], limited)
    choices = []
    for i, token in enumerate(tokens.tolist()):
        if i in errors:
            choices.append(SampledToken(-1, error=errors[i]))
            continue
        samplers[i].counts[token] += 1
        if (constraint := samplers[i].constraint) is not None:
            constraint.take(token)
        if i in told:
            most = told[i].topk(min(samplers[i].logprobs or 0, told[i].numel()))
            top = tuple((id, value) for id, value in zip(most.indices.tolist(), most.values.tolist(), strict=True) if value > -math.inf)
            choices.append(SampledToken(token, float(told[i][token]), top))
        else:
            choices.append(SampledToken(token))
    return choices


def _change(logits_nV: Tensor, samplers: Sequence[SamplingParams], errors: dict[int, str]) -> None:
    """Biases, penalties and processors, in place. Rows of which they leave no token are added to the errors."""
    for i, sampler in enumerate(samplers):
        change = dict(sampler.logit_bias)
        if sampler.presence_penalty or sampler.frequency_penalty:
            for token, count in sampler.counts.items():
                change[token] = change.get(token, 0.0) - sampler.presence_penalty - sampler.frequency_penalty * count
        if change:
            ids = torch.tensor(list(change), device=logits_nV.device)
            logits_nV[i, ids] += torch.tensor(list(change.values()), device=logits_nV.device)
        if sampler.constraint is not None and i not in errors:
            sampler.constraint.limit(logits_nV[i])
        if sampler.processors is not None and i not in errors:
            before = torch.tensor([sampler.ids], device=logits_nV.device)
            logits_nV[i] = sampler.processors(before, logits_nV[i : i + 1])[0]  # type: ignore[arg-type]
    changed = any(sampler.processors or sampler.constraint for sampler in samplers)
    for i in _not_finite(logits_nV).keys() - errors.keys() if changed else ():
        errors[i] = "the request's settings and the model's generation_config.json together leave no token to choose"


def _not_finite(logits_nV: Tensor) -> dict[int, str]:
    """The rows that hold NaN or infinity, with an error. Minus infinity is a token that is excluded; a row of nothing else is no logits."""
    finite = logits_nV.amax(-1).isfinite()  # NaN is the largest of all
    return {i: "the model's logits are not finite" for i, good in enumerate(finite.tolist()) if not good}


def _sample(logits_nV: Tensor, samplers: Sequence[SamplingParams], limited: bool) -> Tensor:
    device = logits_nV.device
    probs_nV = (logits_nV / torch.tensor([[1.0 if s.processors else s.temperature] for s in samplers], device=device)).softmax(-1)
    ids_nk = None
    if limited:
        probs_nV, ids_nk = _limit(probs_nV, samplers)
    cdf = probs_nV.double().cumsum(-1)
    drawn = torch.tensor([[s.random.random()] for s in samplers], dtype=torch.float64, device=device) * cdf[:, -1:]
    at = torch.searchsorted(cdf, drawn, right=True).clamp_max(cdf.shape[1] - 1)
    at = torch.where(probs_nV.gather(1, at) > 0, at, probs_nV.argmax(-1, keepdim=True))  # by rounding only
    return (at if ids_nk is None else ids_nk.gather(1, at)).squeeze(1)


def _limit(probs_nV: Tensor, samplers: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """(probabilities [n, k], zero where cut off; token ids [n, k]). A whole vocabulary is sorted only where it is needed."""
    V = probs_nV.shape[1]
    top_p = torch.tensor([[s.top_p] for s in samplers], device=probs_nV.device)
    top_k = torch.tensor([[s.top_k or V] for s in samplers], device=probs_nV.device)
    k = min(FEW, V)
    while True:
        most, ids = probs_nV.topk(k)
        before = most.cumsum(-1) - most
        enough = torch.where(top_k < V, top_k <= k, before[:, -1:] >= top_p)
        if k == V or bool(enough.all()):
            among = torch.arange(k, device=most.device) < top_k
            sum_n1 = torch.where(top_k < V, (most * among).sum(-1, keepdim=True), 1.0)
            kept = (before < top_p * sum_n1) & among
            kept[:, 0] = True
            return most * kept, ids
        k = min(8 * k, V)
