"""Conversion of text events to OpenAI's response bodies: a complete response or the chunks of a stream, for completions and chats."""

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from acip_platform.serve.http.errors import error_body
from acip_platform.serve.http.requests import ChatRequest, OpenAIRequest
from acip_platform.serve.text.events import TextEvent
from acip_platform.serve.text.token_logprobs import as_chat, as_completion
from acip_platform.serve.text.tools import ToolParser


@dataclass
class Answer:
    """The response to one request. Pass every event to `add`, in order; send the chunks that it yields if the request streams."""

    request: OpenAIRequest
    created: int = field(default_factory=lambda: int(time.time()))
    head: dict[str, Any] = field(default_factory=dict)
    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chat = isinstance(self.request, ChatRequest)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.kind = "chat.completion" if self.chat else "text_completion"
        self.with_role: set[int] = set()
        self.parsers: dict[int, ToolParser] = {}

    def add(self, event: TextEvent) -> Iterator[dict[str, Any]]:
        """Add an event, and yield its chunks."""
        if event.kind == "head":  # a second head follows when an engine was lost: drop the events of the first one
            self.head, self.choices, self.parsers = event.data, {}, {}
            yield self._chunk([self._delta(0, "", None, None)]) | {
                key: event.data[key] for key in ("size", "version", "seed", "max_tokens")
            }
        elif event.kind in ("text", "end"):
            reason = event.data.get("finish_reason")
            logprobs = self._logprobs(event)
            choice = self.choices.setdefault(event.index, {"text": "", "calls": [], "logprobs": [], "finish_reason": None})
            text, calls = self._parsed(event)
            if reason == "stop" and (choice["calls"] or calls) and not self.request.named_tool:
                reason = "tool_calls"
            choice["text"] += text
            choice["logprobs"] += event.logprobs or []
            choice["finish_reason"] = reason
            for call in calls:
                _add_call(choice["calls"], call)
            drafted = {"drafted": True} if event.data.get("drafted") else {}
            yield self._chunk([self._delta(event.index, text, logprobs, reason, calls) | drafted])
        elif event.kind == "done":
            self.done = event.data
            if self.request.includes_usage or "sizes" in event.data:
                yield self._chunk([]) | event.data

    def complete_body(self) -> dict[str, Any]:
        """Return the body of a complete response."""
        choices = []
        for index, choice in sorted(self.choices.items()):
            logprobs = self._logprobs(TextEvent("text", index, choice["text"], choice["logprobs"] or None))
            content: dict[str, Any] = {"text": choice["text"]}
            if self.chat:
                message: dict[str, Any] = {"role": "assistant", "content": choice["text"], "refusal": None}
                if choice["calls"]:
                    message |= {"content": choice["text"] or None, "tool_calls": choice["calls"]}
                content = {"message": message}
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": choice["finish_reason"]})
        return {
            "id": self.id, "object": self.kind, "created": self.created, "model": self.head["model"], "choices": choices,
            **self.done, "size": self.head["size"], "version": self.head["version"], "seed": self.head["seed"],
            "max_tokens": self.head["max_tokens"],
        }  # fmt: skip

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else self.kind
        chunk = {"id": self.id, "object": kind, "created": self.created, "model": self.head["model"], "choices": choices}
        return chunk | {"usage": None} if self.request.includes_usage else chunk

    def _parsed(self, event: TextEvent) -> tuple[str, list[dict[str, Any]]]:
        """Return the text of an event without tool calls, and the deltas of its tool calls."""
        form = self.head.get("tools")
        if form is None:
            return event.text, []
        parser = self.parsers.setdefault(event.index, ToolParser(form))
        text, calls = parser.add(event.text)
        return text + (parser.end() if event.kind == "end" else ""), calls

    def _delta(self, index: int, text: str, logprobs: Any, reason: str | None, calls: Any = ()) -> dict[str, Any]:
        if not self.chat:
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        delta: dict[str, Any] = {"content": text} if text or (reason is None and not calls) else {}
        if calls:
            delta["tool_calls"] = calls
        if index not in self.with_role:
            self.with_role.add(index)
            delta = {"role": "assistant", **delta}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, event: TextEvent) -> dict[str, Any] | None:
        if event.logprobs is None:
            return None
        return as_chat(event.logprobs) if self.chat else as_completion(event.logprobs)


def _add_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    """Add the delta of a tool call to `calls`."""
    if delta["index"] == len(calls):
        calls.append({"id": delta["id"], "type": "function", "function": dict(delta["function"])})
    else:
        calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]


def sse(body: dict[str, Any] | str) -> bytes:
    """Return a server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


DONE = sse("[DONE]")


def error_event(status: int, message: str, code: str) -> bytes:
    """Return the server-sent event that ends an interrupted stream."""
    return sse(error_body(status, message, None, code))
