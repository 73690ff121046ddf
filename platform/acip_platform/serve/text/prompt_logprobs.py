"""The prompt as part of a completion: `echo`, and with `logprobs` the log-probability of each of its tokens.

    prompt -> Detokenizer.read -> its text and where each token begins
    logits of a piece of the prompt -> Echo.score -> log-probabilities of the tokens that follow

The first token has no log-probability: nothing comes before it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.text.detokenizer import Detokenizer
from acip_platform.serve.text.token_logprobs import scored

if TYPE_CHECKING:
    from acip_platform.serve.http.requests import ChatRequest, CompletionRequest


class Echo:
    """The prompt of one sequence as its answer repeats it. `logprobs`: so many alternatives with each token; None: text only."""

    def __init__(self, detokenizer: Detokenizer, tokenizer: Any, ids: Sequence[int], prompt: str | None, logprobs: int | None) -> None:
        self.ids, self.logprobs, self.table = list(ids), logprobs, detokenizer.bytes
        self.text, self.offsets = detokenizer.read(ids)
        if prompt is not None and prompt != self.text:  # a tokenizer that changes texts; the client gets its own back
            self.offsets = _aligned(tokenizer, prompt, ids, self.offsets)
            self.text, detokenizer.length = prompt, len(prompt)
        self.told = [self._told(0, None, ())] if self.scores else None

    @classmethod
    def of(
        cls, request: "CompletionRequest | ChatRequest", detokenizer: Detokenizer, tokenizer: Any, ids: Sequence[int], index: int
    ) -> "Echo | None":
        """Return the echo of the request's prompt `index`; None where none is wanted."""
        if not wanted(request):
            return None
        completion = cast("CompletionRequest", request)
        prompt = completion.prompts[index]
        return cls(detokenizer, tokenizer, ids, prompt if isinstance(prompt, str) else None, completion.logprobs)

    @property
    def scores(self) -> bool:
        return self.logprobs is not None

    def score(self, logits_nV: Tensor, first: int) -> None:
        """Take the logits of the prompt's tokens from `first` on: each predicts the token after it."""
        count = min(len(logits_nV), len(self.ids) - 1 - first)
        if count <= 0 or self.told is None:
            return
        logprobs_nV = logits_nV[:count].float().log_softmax(-1)
        after = torch.tensor(self.ids[first + 1 : first + 1 + count], device=logits_nV.device)
        own = logprobs_nV.gather(1, after[:, None]).squeeze(1).tolist()
        most = logprobs_nV.topk(min(self.logprobs or 0, logprobs_nV.shape[1]))
        for i, (ids, values) in enumerate(zip(most.indices.tolist(), most.values.tolist(), strict=True)):
            self.told.append(self._told(first + 1 + i, own[i], list(zip(ids, values, strict=True))))

    def _told(self, at: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        return scored(self.table, self.ids[at], self.offsets[at], logprob, top)


def wanted(request: "CompletionRequest | ChatRequest") -> bool:
    """Whether the answer repeats the prompt. RequestError where it would hold nothing at all."""
    echo = bool(getattr(request, "echo", False))  # a chat has none
    if request.limit == 0 and not echo:
        message = "max_tokens is 0; it must be at least 1, or 0 with echo true, which scores the prompt and generates nothing."
        raise RequestError(message, "max_tokens")
    return echo


def _aligned(tokenizer: Any, prompt: str, ids: Sequence[int], decoded: Sequence[int]) -> list[int]:
    """Return where each token begins in the prompt as it was given, though it decodes to another text."""
    starts = list(decoded)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(prompt, return_offsets_mapping=True)
        if list(encoded["input_ids"]) == list(ids):
            starts = [start for start, _ in encoded["offset_mapping"]]
    latest, aligned = 0, []
    for start in starts:  # special tokens are at 0, wherever they are
        latest = min(max(latest, start), len(prompt))
        aligned.append(latest)
    return aligned
