"""The prompt as part of a completion: `echo`, and with `logprobs` the log-probability of each of its tokens.

    prompt -> Detokenizer.read -> its text, and the place of each token in it
    PromptScored event of the engine -> Echo.logprobs

The first token has no log-probability, because nothing comes before it.
"""

from collections.abc import Sequence
from typing import Any

from acip_platform.serve.engine.sampling import ScoredToken
from acip_platform.serve.text.detokenizer import Detokenizer
from acip_platform.serve.text.errors import InvalidRequestError
from acip_platform.serve.text.token_logprobs import scored


class Echo:
    """The prompt of one sequence for an answer that repeats it. `prompt` is the text in the request, or None for token ids."""

    def __init__(self, detokenizer: Detokenizer, tokenizer: Any, ids: Sequence[int], prompt: str | None) -> None:
        self.table = detokenizer.bytes
        self.text, self.offsets = detokenizer.read(ids)
        if prompt is not None and prompt != self.text:  # the tokenizer changes texts; the answer repeats the original
            self.offsets = _aligned(tokenizer, prompt, ids, self.offsets)
            self.text, detokenizer.length = prompt, len(prompt)

    def logprobs(self, tokens: Sequence[ScoredToken]) -> list[dict[str, Any]]:
        """Return the log-probabilities of the prompt in the form of `token_logprobs`."""
        return [scored(self.table, token, offset) for token, offset in zip(tokens, self.offsets, strict=True)]


def wants_echo(request: Any) -> bool:
    """Return whether the answer repeats the prompt. Raise an InvalidRequestError if the answer would be empty."""
    echo = bool(getattr(request, "echo", False))  # a chat has no such field
    if request.limit == 0 and not echo:
        message = "max_tokens is 0; it must be at least 1, or 0 with echo true, which scores the prompt and generates nothing."
        raise InvalidRequestError(message, "max_tokens")
    return echo


def _aligned(tokenizer: Any, prompt: str, ids: Sequence[int], decoded: Sequence[int]) -> list[int]:
    """Return the place of each token in the original prompt, although its tokens decode to another text (places `decoded`)."""
    starts = list(decoded)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(prompt, return_offsets_mapping=True)
        if list(encoded["input_ids"]) == list(ids):
            starts = [start for start, _ in encoded["offset_mapping"]]
    latest, aligned = 0, []
    for start in starts:  # the tokenizer places special tokens at 0
        latest = min(max(latest, start), len(prompt))
        aligned.append(latest)
    return aligned
