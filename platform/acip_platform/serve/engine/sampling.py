"""Sample the next token of each sequence of a batch, by its own settings.

greedy      the largest logit
sampled     from p = softmax(logits / temperature), restricted to the `top_k` most likely tokens and to those of them that make up `top_p`
            of their sum: the token with the largest p_v / e_v, where e_v are exponentially distributed random numbers (the Gumbel-max rule)

The random numbers are a function of the sequence's seed and of the position of the token, so that the other sequences of the batch change
nothing. With the same numbers, two distributions that are close give the same token almost always (`speculation.py` relies on it).

Biases and OpenAI's penalties for tokens that were generated already are added to the logits first. If a model's generation config states
more than temperature, top_p and top_k, transformers' own logits processors do the rest, temperature and restrictions included.

A row of logits with NaN or infinity gives no token, nor does a row of which the settings leave no token: its `SampledToken` has an error.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

GREEDY_BELOW = 1e-5  # dividing logits by a temperature much smaller than this overflows float32
FIRST_TOP_K = 256  # most likely tokens that are sorted at first


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled. None stands for the model's own setting, else for OpenAI's default: 1.0, 1.0 and 0."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 = all
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # alternatives with the log-probability of each token; None = no log-probabilities


class TokenConstraint(Protocol):
    """A restriction of what one sequence may contain, used in the engine's thread."""

    @property
    def done(self) -> bool:
        """Whether the sequence is complete, so that nothing may follow."""
        ...

    @property
    def error(self) -> Exception | None:
        """Why the constraint cannot be followed any more, or None. It fails the request."""
        ...

    def limit(self, logits_V: Tensor) -> None:
        """Set the logits of tokens that may not come next to minus infinity, in place."""
        ...

    def take(self, token: int) -> None:
        """Advance by the token that was sampled."""
        ...


@dataclass
class Sampler:
    """The sampling parameters of one sequence, and the state that they need."""

    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    processors: LogitsProcessorList | None = None  # transformers' own; None = temperature, top_p and top_k are all there is
    ids: list[int] = field(default_factory=list)  # the sequence so far, prompt included; processors read it
    constraint: TokenConstraint | None = None

    def __post_init__(self) -> None:
        params = self.params
        self.temperature = 1.0 if params.temperature is None else params.temperature
        self.top_p = 1.0 if params.top_p is None else params.top_p
        self.top_k = params.top_k or 0
        self.position = 0  # of the next token
        self.counts: Counter[int] = Counter()  # of the tokens that were generated

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def limited(self) -> bool:
        return self.processors is None and (self.top_p < 1 or self.top_k > 0)

    def noise(self, vocabulary: int, device: torch.device) -> Tensor:
        """Return exponentially distributed random numbers [vocabulary] for the next token."""
        generator = torch.Generator(device)
        generator.manual_seed(random.Random(f"{self.seed} {self.position}").getrandbits(63))
        bits = torch.empty((vocabulary + 1) // 2, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
        uniform = (bits.view(torch.int32)[:vocabulary].float().abs() + 0.5) * 2.0**-31  # exact near 0, where rare tokens are decided
        return -torch.log1p(-uniform)

    def for_drafts(self) -> "Sampler":
        """Return a sampler in the same state, whose tokens do not change this one. It ignores the constraint and log-probabilities."""
        other = replace(self, params=replace(self.params, logprobs=None), ids=list(self.ids), constraint=None)
        other.position, other.counts = self.position, self.counts.copy()
        return other


@dataclass(frozen=True)
class ScoredToken:
    """A token with its log-probability, if it was requested and something comes before the token."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability) of the most likely tokens, in descending order


@dataclass(frozen=True)
class SampledToken(ScoredToken):
    """A sampled token. With an error there is no token, and `token` is -1."""

    error: str | None = None
    drafted: bool = False  # a smaller size had drafted it, and the requested size has verified it


@torch.no_grad()
def sample(logits_nV: Tensor, samplers: Sequence[Sampler]) -> list[SampledToken]:
    """Return one token for each row. Log-probabilities are the model's own, before temperature, biases and penalties."""
    logits_nV = logits_nV.float()
    errors = _not_finite(logits_nV)
    scored = {i: logits_nV[i].log_softmax(-1) for i, sampler in enumerate(samplers) if sampler.params.logprobs is not None}
    _change(logits_nV, samplers, errors)
    tokens = logits_nV.argmax(-1)
    for limited in (False, True):
        rows = [i for i, s in enumerate(samplers) if not s.greedy and s.limited == limited and i not in errors]
        if rows:
            tokens[rows] = _sample(logits_nV[rows], [samplers[i] for i in rows], limited)
    sampled = []
    for i, token in enumerate(tokens.tolist()):
        if i in errors:
            sampled.append(SampledToken(-1, error=errors[i]))
            continue
        samplers[i].counts[token] += 1
        samplers[i].position += 1
        if (constraint := samplers[i].constraint) is not None:
            constraint.take(token)
        if i in scored:
            most = scored[i].topk(min(samplers[i].params.logprobs or 0, scored[i].numel()))
            top = tuple((id, value) for id, value in zip(most.indices.tolist(), most.values.tolist(), strict=True) if value > -math.inf)
            sampled.append(SampledToken(token, float(scored[i][token]), top))
        else:
            sampled.append(SampledToken(token))
    return sampled


@torch.no_grad()
def score(logits_nV: Tensor, tokens: Sequence[int], alternatives: int) -> list[ScoredToken]:
    """Return the log-probability of each token by its row of logits, with so many of the most likely tokens."""
    logprobs_nV = logits_nV.float().log_softmax(-1)
    own = logprobs_nV.gather(1, torch.tensor(tokens, device=logits_nV.device)[:, None]).squeeze(1).tolist()
    most = logprobs_nV.topk(min(alternatives, logprobs_nV.shape[1]))
    return [
        ScoredToken(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(tokens, own, most.indices.tolist(), most.values.tolist(), strict=True)
    ]


def _change(logits_nV: Tensor, samplers: Sequence[Sampler], errors: dict[int, str]) -> None:
    """Apply biases, penalties, constraints and processors in place. Rows of which they leave no token are added to the errors."""
    for i, sampler in enumerate(samplers):
        params = sampler.params
        change = dict(params.logit_bias)
        if params.presence_penalty or params.frequency_penalty:
            for token, count in sampler.counts.items():
                change[token] = change.get(token, 0.0) - params.presence_penalty - params.frequency_penalty * count
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
    """Return an error for each row with NaN or infinity. Minus infinity excludes a token, but a row cannot consist of it."""
    finite = logits_nV.amax(-1).isfinite()  # amax of a row with NaN is NaN
    return {i: "the model's logits are not finite" for i, good in enumerate(finite.tolist()) if not good}


def _sample(logits_nV: Tensor, samplers: Sequence[Sampler], limited: bool) -> Tensor:
    device = logits_nV.device
    probs_nV = (logits_nV / torch.tensor([[1.0 if s.processors else s.temperature] for s in samplers], device=device)).softmax(-1)
    ids_nk = None
    if limited:
        probs_nV, ids_nk = _limit(probs_nV, samplers)
    noise_nV = torch.stack([s.noise(logits_nV.shape[1], device) for s in samplers])
    if ids_nk is None:
        return (probs_nV / noise_nV).argmax(-1)
    return ids_nk.gather(1, (probs_nV / noise_nV.gather(1, ids_nk)).argmax(-1, keepdim=True)).squeeze(1)


def _limit(probs_nV: Tensor, samplers: Sequence[Sampler]) -> tuple[Tensor, Tensor]:
    """Return (probabilities [n, k], zero where cut off; token ids [n, k]). The whole vocabulary is sorted only if it is needed."""
    V = probs_nV.shape[1]
    top_p = torch.tensor([[s.top_p] for s in samplers], device=probs_nV.device)
    top_k = torch.tensor([[s.top_k or V] for s in samplers], device=probs_nV.device)
    k = min(FIRST_TOP_K, V)
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
