"""The engine: resident any-size models that complete text, one request at a time.

    request -> which model, which size -> tokens -> [lock: set the ranks, generate, ...] -> text, and what it was made with

Every size of a model is served from one copy of its sorted factors: a size is a rank per layer. Size and the random
generator are state of the process, so they are set under one lock, and a request keeps them for all its tokens.
"""

import threading
import time
import uuid
from dataclasses import dataclass
from secrets import randbits
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from acip.cut import Budget
from acip_platform.serve.errors import RequestError
from acip_platform.serve.request import CompletionRequest
from acip_platform.serve.served import Served

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Cancelled(Exception):  # noqa: N818 - no error: nobody waits for the answer
    """Whoever asked is gone."""


class Engine:
    def __init__(self, models: list[Served], timeout_s: float = 300.0) -> None:
        self.models = {served.version.name: served for served in models}
        self.timeout_s = timeout_s
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """One token of every model, so that what can't run is noticed before anyone asks."""
        for name in self.models:
            self.complete(CompletionRequest(prompt="a", model=name, max_tokens=1, temperature=0.0))

    def complete(self, request: CompletionRequest, cancelled: threading.Event | None = None) -> dict[str, Any]:
        """Answer a request. Raises RequestError or BudgetError for what can't be answered, Cancelled once that is set."""
        received = time.monotonic()
        name, ratio = request.name_and_size(list(self.models))
        served, max_tokens = self.models[name], request.max_tokens or DEFAULT_MAX_TOKENS
        prompts = [served.encode(prompt, max_tokens) for prompt in request.prompts]
        config = served.generation_config(request, max_tokens)
        seed = randbits(63) if request.seed is None else request.seed
        cancelled = cancelled or threading.Event()
        if not self._lock.acquire(timeout=self.timeout_s):
            raise _too_slow(self.timeout_s)
        try:
            began = time.monotonic()
            cut = served.any_size.resize(Budget(ratio=ratio))
            watches = []
            for index, ids_1T in enumerate(prompts):
                if cancelled.is_set():
                    raise Cancelled
                watch = Watch(served.tokenizer, ids_1T, request.stops, cancelled, received + self.timeout_s)
                watches.append(watch)
                torch.manual_seed((seed + index) % 2**63)  # of its own for each, so that a prompt repeated in a list varies
                watch.generate(served.any_size.model, config)
                if cancelled.is_set():
                    raise Cancelled
                if watch.late:
                    raise _too_slow(self.timeout_s)
        finally:
            self._lock.release()
        done = time.monotonic()
        asked, made = sum(ids.shape[1] for ids in prompts), sum(watch.made for watch in watches)
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "version": served.version.version,
            "choices": [
                {"index": index, "text": watch.text, "logprobs": None, "finish_reason": watch.finish_reason}
                for index, watch in enumerate(watches)
            ],
            "usage": {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made},
            "size": served.size(cut),
            "seed": seed,
            "timings": {
                "queued_s": began - received,
                "first_token_s": watches[0].first_token - began,
                "generate_s": done - began,
                "tokens_per_s": made / (done - began),
            },
        }


@dataclass
class Watch(StoppingCriteria):
    """One prompt on its way: stops at a stop text, at the deadline, or when nobody waits any more."""

    tokenizer: Any
    prompt: Tensor  # [1, T] token ids
    stops: list[str]
    cancelled: threading.Event
    deadline: float
    made: int = 0  # tokens
    text: str = ""
    finish_reason: str = "length"
    first_token: float = 0.0  # when it was there, seconds of time.monotonic
    late: bool = False

    def generate(self, model: Any, config: GenerationConfig) -> None:
        """Run transformers' `generate` and keep what it made."""
        ids_1T = model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([self]),
        )
        self.made = ids_1T.shape[1] - self.prompt.shape[1]
        text = self._decode(ids_1T)
        ends = [text.index(stop) for stop in self.stops if stop in text]
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if ends or int(ids_1T[0, -1]) in eos:
            self.finish_reason = "stop"
        self.text = text[: min(ends, default=None)]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        now = time.monotonic()
        self.first_token = self.first_token or now
        self.late = now > self.deadline
        done = self.late or self.cancelled.is_set()
        if not done and self.stops:
            text = self._decode(input_ids)
            done = any(stop in text for stop in self.stops)
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)

    def _decode(self, ids_1T: Tensor) -> str:
        """The text that continues the prompt. Decoded with the prompt: on its own it would lose a leading space."""
        before, whole = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in (self.prompt[0], ids_1T[0])
        )
        return whole[len(before) :]


def _too_slow(timeout_s: float) -> RequestError:
    message = f"no answer within {timeout_s:g} s, waiting included; ask for fewer max_tokens or prompts, or later."
    return RequestError(message, code="timeout", status=408)
