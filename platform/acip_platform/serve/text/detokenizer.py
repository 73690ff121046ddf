"""Incremental conversion of token ids to text: only complete characters, and no part of a stop text.

    token -> its bytes (`TokenBytes`) -> complete characters -> characters that cannot belong to a stop text

Each token is processed once, so the work is linear in the length of the text. Special tokens are not part of the text, but stop texts
can contain them.
"""

import codecs
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from acip_platform.serve.text.token_bytes import TokenBytes

MAX_CHARACTER_BYTES = 4  # in UTF-8


class Detokenizer:
    """The text of the answer of one sequence, which grows with its tokens.

    `prompt` are the tokens before the answer. The answer completes a character that they leave incomplete. If they contain text, the
    first token of the answer does not count as the beginning of a text. Special tokens in `shown` are part of the text, for parsers.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str], shown: Collection[int] = ()) -> None:
        self.bytes = TokenBytes.of(tokenizer)
        self.shown = shown
        specials = [self.bytes[id].decode(errors="replace") for id in self.bytes.special if id not in shown] if stops else []
        self.stops = StopTexts(stops, [stop for stop in stops if any(special and special in stop for special in specials)])
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.length = 0  # characters of the text so far, including those held back
        self.offset = 0  # characters before the last token
        self.unfinished = b""  # the first bytes of a character that begins in the prompt
        self.started = False  # whether there is text before the next token
        self._read_context(prompt)

    @property
    def stopped(self) -> bool:
        return self.stops.found

    def add(self, token: int) -> str:
        """Return the text that became certain with this token. It is empty once `stopped` is true."""
        self.offset = self.length
        if token in self.bytes.special and token not in self.shown:
            return self.stops.add(self.bytes[token].decode(errors="replace"), hidden=True) if self.stops.marked else ""
        value = self.bytes[token] if self.started else self.bytes.at_start(token)
        self.started |= bool(self.bytes[token])
        if value and self.unfinished:
            value = self.unfinished + value if value[0] & 0xC0 == 0x80 else value
            self.unfinished = b""
        return self._emit(self.utf8.decode(value))

    def read(self, prompt: Sequence[int]) -> tuple[str, list[int]]:
        """Return the text of a prompt that the answer repeats, and the offset of each token. Stop texts in it are ignored.

        Tokens that are added later continue this text.
        """
        stops, self.stops = self.stops, StopTexts([])
        texts, offsets = [], []
        for token in prompt:
            texts.append(self.add(token))
            offsets.append(self.offset)
        self.stops = stops
        return "".join(texts), offsets

    def end(self) -> str:
        """Return the text that was held back, after the last token. An incomplete character at the end becomes U+FFFD."""
        if self.stopped:
            return ""
        return self._emit(self.utf8.decode(b"", final=True)) + self.stops.end()

    def _emit(self, new: str) -> str:
        self.length += len(new)
        return self.stops.add(new) if new else ""

    def _read_context(self, prompt: Sequence[int]) -> None:
        tail = b""
        for token in reversed(prompt):
            if token not in self.bytes.special or token in self.shown:
                tail = self.bytes[token] + tail
            if len(tail) >= MAX_CHARACTER_BYTES:
                break
        self.started = bool(tail)
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(tail)
        self.unfinished = utf8.getstate()[0]


class StopTexts:
    """A search for the first of several texts in a stream of characters, by the Knuth-Morris-Pratt algorithm.

    Hidden characters are those of special tokens; they are never returned. Every stop text is searched for in the stream without them.
    The stop texts in `marked` contain a special token, so they are searched for in the stream with hidden characters too.
    """

    def __init__(self, stops: Sequence[str], marked: Sequence[str] = ()) -> None:
        self.plain, self.marked = [_Matcher(stop) for stop in stops], [_Matcher(stop) for stop in marked]
        self.found = False
        self._held: deque[str] = deque()
        # the number of visible characters before each of the last characters of the stream with hidden ones
        self._visible: deque[int] = deque(maxlen=max((len(stop) for stop in marked), default=0))
        self._count = 0  # of visible characters

    def add(self, text: str, hidden: bool = False) -> str:
        """Return the characters that cannot be part of a stop text. It is empty once a stop text was found."""
        if self.found or not self.plain:
            return "" if self.found or hidden else text
        certain = []
        for character in text:
            if self.marked:
                self._visible.append(self._count)
            if not hidden:
                self._count += 1
                self._held.append(character)
                for matcher in self.plain:
                    matcher.add(character)
            for matcher in self.marked:
                matcher.add(character)
            first = self._count - max([matcher.matched for matcher in self.plain], default=0)
            marked = max([matcher.matched for matcher in self.marked], default=0)
            if marked:
                first = min(first, self._visible[-marked])
            ends = [self._count - matcher.matched for matcher in self.plain if matcher.complete]
            ends += [self._visible[-matcher.matched] for matcher in self.marked if matcher.complete]
            begin = self._count - len(self._held)  # position of the first character held back
            if ends:
                self.found = True
                certain += [self._held.popleft() for _ in range(min(ends) - begin)]
                self._held.clear()
                break
            certain += [self._held.popleft() for _ in range(first - begin)]
        return "".join(certain)

    def end(self) -> str:
        """Return the characters that were held back."""
        held = "".join(self._held)
        self._held.clear()
        return held


class _Matcher:
    """The longest beginning of a text with which the stream ends."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self.shorter = [0] * (len(text) + 1)  # by n: the longest proper beginning of the first n characters that is also their end
        length = 0
        for n in range(1, len(text)):
            length = self._after(length, text[n])
            self.shorter[n + 1] = length

    @property
    def complete(self) -> bool:
        return self.matched == len(self.text)

    def add(self, character: str) -> None:
        self.matched = self._after(self.shorter[self.matched] if self.complete else self.matched, character)

    def _after(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self.shorter[matched]
        return matched + (self.text[matched] == character)
