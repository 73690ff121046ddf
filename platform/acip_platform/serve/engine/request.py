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
class GenerationRequest:
    """Prompts to continue. Sequence `i` of the request continues prompt `i // choices`, with seed `seed + i`.

    `constraint` and `consumer` are called once for each sequence, in the thread that submits the request.
    """

    prompts: Sequence[Sequence[int]]
    budget: Budget = field(default_factory=lambda: Budget(ratio=1.0))
    _: KW_ONLY
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
