"""Events of the engine -> OpenAI's bodies: a whole answer, or chunks of a stream; of completions or of a chat."""

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from acip_platform.serve.engine import Event
from acip_platform.serve.errors import error_body
from acip_platform.serve.request import Asked, ChatRequest


@dataclass
class Answer:
    """One answer on its way. `hear` every event in order; of a stream it returns the chunks to send."""

    request: Asked
    created: int = field(default_factory=lambda: int(time.time()))
    head: dict[str, Any] = field(default_factory=dict)
    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chat = isinstance(self.request, ChatRequest)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.kind = "chat.completion" if self.chat else "text_completion"
        self.offsets: dict[int, int] = {}  # characters told of each choice
        self.greeted: set[int] = set()

    def hear(self, event: Event) -> Iterator[dict[str, Any]]:
        """The chunks that tell of this event."""
        if event.kind == "head":  # once more if an engine was lost on the way: what it said is forgotten
            self.head, self.choices, self.offsets = event.data, {}, {}
            yield self._chunk([self._delta(0, "", None, None)]) | {
                key: event.data[key] for key in ("size", "version", "seed", "max_tokens")
            }
        elif event.kind in ("text", "end"):
            reason = event.data.get("finish_reason")
            logprobs = self._logprobs(event)
            choice = self.choices.setdefault(event.index, {"text": "", "logprobs": [], "finish_reason": None})
            choice["text"] += event.text
            choice["logprobs"] += event.logprobs or []
            choice["finish_reason"] = reason
            yield self._chunk([self._delta(event.index, event.text, logprobs, reason)])
        elif event.kind == "done":
            self.done = event.data
            if self.request.usage_wanted:
                yield self._chunk([]) | event.data

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in sorted(self.choices.items()):
            told = Event("text", index, choice["text"], choice["logprobs"] or None)
            self.offsets.pop(index, None)
            said = {"message": {"role": "assistant", "content": choice["text"], "refusal": None}} if self.chat else {"text": choice["text"]}
            choices.append({"index": index, **said, "logprobs": self._logprobs(told), "finish_reason": choice["finish_reason"]})
        return {
            "id": self.id, "object": self.kind, "created": self.created, "model": self.head["model"], "choices": choices,
            **self.done, "size": self.head["size"], "version": self.head["version"], "seed": self.head["seed"],
            "max_tokens": self.head["max_tokens"],
        }  # fmt: skip

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else self.kind
        chunk = {"id": self.id, "object": kind, "created": self.created, "model": self.head["model"], "choices": choices}
        return chunk | {"usage": None} if self.request.usage_wanted else chunk

    def _delta(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        if not self.chat:
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        delta: dict[str, Any] = {"content": text} if text or reason is None else {}
        if index not in self.greeted:
            self.greeted.add(index)
            delta = {"role": "assistant", **delta}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, event: Event) -> dict[str, Any] | None:
        if event.logprobs is None:
            return None
        if self.chat:
            return {"content": [_told(token) for token in event.logprobs], "refusal": None}
        offsets, at = [], self.offsets.get(event.index, 0)
        for token in event.logprobs:
            offsets.append(at)
            at += len(token["token"])
        self.offsets[event.index] = at
        return {
            "tokens": [token["token"] for token in event.logprobs],
            "token_logprobs": [token["logprob"] for token in event.logprobs],
            "top_logprobs": [dict(token["top"]) for token in event.logprobs],
            "text_offset": offsets,
        }


def sse(body: dict[str, Any] | str) -> bytes:
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


DONE = sse("[DONE]")


def broken(status: int, message: str, code: str) -> bytes:
    """The end of a stream that began well."""
    return sse(error_body(status, message, None, code))


def _told(token: dict[str, Any]) -> dict[str, Any]:
    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return one(token["token"], token["logprob"]) | {"top_logprobs": [one(*pair) for pair in token["top"]]}
