"""Events of a request in text, as the replica sends them to the HTTP side."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TextEvent:
    """An event of kind "head", "start" (the first token), "text" or "end" (of one choice). The last event is "done" or "error"."""

    kind: str
    index: int = 0  # of the choice
    text: str = ""
    logprobs: list[dict[str, Any]] | None = None  # of `token_logprobs.scored`
    data: dict[str, Any] = field(default_factory=dict)
