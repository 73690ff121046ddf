"""Tokens -> text as it grows: whole characters only, and nothing of a stop text.

A token may be half a character, and a leading space shows only beside the token before, so text is the difference of two
decodings that share their beginning. What may yet become a stop text is held back. (The tokenizers package has a stream of this
kind, which knows its own tokenizers only, and drops half a character at the end.)
"""

from collections.abc import Sequence
from typing import Any

BEFORE = 6  # tokens of the prompt that the first ones are decoded with
HALF = "�"  # what half a character decodes to


class Text:
    """The growing answer of one sequence."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids = list(prompt[-BEFORE:])
        self.begin, self.done = 0, len(self.ids)  # ids before `done` are in the text; those before `begin` help no more
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be said now that this token is there. After `stopped`, nothing more."""
        self.ids.append(token)
        shown = self._decode(self.ids[self.begin : self.done])
        whole = self._decode(self.ids[self.begin :])
        if whole.endswith(HALF) or len(whole) < len(shown):
            return ""
        self.begin, self.done = self.done, len(self.ids)
        return self._say(whole[len(shown) :])

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        said = ""
        if not self.stopped and self.done < len(self.ids):  # half a character stays one
            shown, whole = self._decode(self.ids[self.begin : self.done]), self._decode(self.ids[self.begin :])
            self.done = len(self.ids)
            said = self._say(whole[len(shown) :])
        said, self.held = said + self.held, ""
        return said

    def _say(self, new: str) -> str:
        text = self.held + new
        at = min((text.index(stop) for stop in self.stops if stop in text), default=None)
        if at is not None:
            self.stopped, self.held = True, ""
            return text[:at]
        held = max((n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
