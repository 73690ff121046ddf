"""A request to the engine: prompts of token ids, a budget, sampling parameters, and the caller's hooks for each sequence."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Protocol

from acip.sizing.budget import Budget
from acip_platform.serve.engine.sampling import SampledToken, SamplingParams, TokenConstraint

DEFAULT_MAX_TOKENS = 1024  # small models repeat themselves, and would fill the context


class TokenConsumer(Protocol):
    """A consumer of one sequence's tokens, called in the engine's thread as soon as they are sampled."""

    def take(self, token: SampledToken) -> bool:
        """Take the next token. Return whether the sequence ends with it."""
        ...


@dataclass(frozen=True)
class SizePart:
    """A part of a sequence with a size of its own. Keys and values of earlier parts stay in the cache.

    The first part begins with the prompt. The next token is sampled at the size of the part that it belongs to, by the pass over the token
    before it.
    """

    budget: Budget
    tokens: int | None = None  # of the answer, after which the next part begins; 0 = the first part is the prompt alone
    ends: Callable[[Sequence[int]], bool] | None = None  # whether the next part begins after these tokens, the part's own


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts to continue. Sequence `i` of the request continues prompt `i // choices`, with seed `seed + i`.

    `parts` take the place of `budget`. Sequences are computed at `min_budget` while others wait.

    `constraint` and `consumer` are called once for each sequence, in the thread that submits the request.
    """

    prompts: Sequence[Sequence[int]]
    budget: Budget = field(default_factory=lambda: Budget(ratio=1.0))
    _: KW_ONLY
    parts: Sequence[SizePart] = ()  # the last one has no end
    min_budget: Budget | None = None
    choices: int = 1  # sequences per prompt
    max_tokens: int | None = None  # of each sequence; None = the model's own limit, else the default; 0 = only score the prompt
    default_max_tokens: int = DEFAULT_MAX_TOKENS
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None  # None = random
    end_tokens: frozenset[int] | None = None  # that end a sequence; None = the model's own
    prompt_logprobs: int | None = None  # alternatives with the log-probability of each token of the prompt; None = no log-probabilities
    speculative: bool = True  # whether a smaller size may draft tokens, which changes the speed but not the tokens
    timeout_s: float | None = None  # from submission, time in the queue included; None = the engine's
    constraint: Callable[[], TokenConstraint] | None = None
    consumer: Callable[[int], TokenConsumer] | None = None  # by the index of the sequence
