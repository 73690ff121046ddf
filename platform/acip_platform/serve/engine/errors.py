"""Errors of the engine. `serve/http/errors.py` assigns an HTTP status to each."""

from acip.errors import AcipError


class EngineError(AcipError):
    """A request that the engine cannot answer."""


class InvalidTokensError(EngineError):
    """A prompt that is empty, or token ids that the model does not have. `field` is the field of the request."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class SizePartsError(EngineError):
    """Parts of different sizes, for an engine that computes a sequence at one size."""


class ContextTooLongError(EngineError):
    """A prompt and its continuation that are longer than the model's context together."""

    def __init__(self, name: str, prompt_tokens: int, max_tokens: int, context: int) -> None:
        room = context - max_tokens
        advice = f"shorten the prompt to {room} tokens" if room > 0 else f"set max_tokens to at most {context - 1} tokens"
        if room > 0 and context > prompt_tokens:
            advice += f", or set max_tokens to at most {context - prompt_tokens}"
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together {prompt_tokens + max_tokens}; "
            f"the context of {name} is {context} tokens: {advice}."
        )
        self.field = "prompts" if room > 0 else "max_tokens"


class DeadlineExceededError(EngineError):
    """A request without a token at its deadline."""


class NotFiniteError(EngineError):
    """Logits from which no token can be sampled: NaN or infinity, or no token is left."""


class ModelUnloadedError(EngineError):
    """A model that left memory before the request was submitted."""


class ModelUnavailableError(EngineError):
    """A model whose artifact cannot be fetched or opened."""


class MemoryFullError(EngineError):
    """A model that cannot be loaded now, because every other model in memory is in use."""


class BrokenEngineError(EngineError):
    """An engine that cannot compute any more, and will be replaced."""
