"""Token ids -> text as it grows: whole characters only, and nothing of a stop text.

    token -> its bytes (`TokenBytes`) -> whole characters -> what no stop text can take back

Each token is looked at once, so the work is linear in the length of the text. Special tokens are left out of the text, but stop
texts find them.
"""

import codecs
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from acip_platform.serve.text.token_bytes import TokenBytes

MOST_BYTES = 4  # of a character in UTF-8


class Detokenizer:
    """The growing answer of one sequence.

    `prompt` are the tokens before: what they leave incomplete is completed, and if there is text in them, the answer does not begin
    one. Special tokens in `shown` are part of the text, as they are for those who parse it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str], shown: Collection[int] = ()) -> None:
        self.bytes = TokenBytes.of(tokenizer)
        self.shown = shown
        specials = [self.bytes[id].decode(errors="replace") for id in self.bytes.special if id not in shown] if stops else []
        self.stops = StopTexts(stops, [stop for stop in stops if any(special and special in stop for special in specials)])
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.length = 0  # characters of the text so far, said or held back
        self.offset = 0  # of them before the last token
        self.unfinished = b""  # of a character that begins in the prompt
        self.started = False  # whether any text came before
        self._look_back(prompt)

    @property
    def stopped(self) -> bool:
        return self.stops.found

    def add(self, token: int) -> str:
        """Return what became certain with this token. After `stopped`, nothing more."""
        self.offset = self.length
        if token in self.bytes.special and token not in self.shown:
            return self.stops.add(self.bytes[token].decode(errors="replace"), hidden=True) if self.stops.marked else ""
        value = self.bytes[token] if self.started else self.bytes.at_start(token)
        self.started |= bool(self.bytes[token])
        if value and self.unfinished:
            value = self.unfinished + value if value[0] & 0xC0 == 0x80 else value
            self.unfinished = b""
        return self._say(self.utf8.decode(value))

    def read(self, prompt: Sequence[int]) -> tuple[str, list[int]]:
        """Return the text of a prompt that the answer repeats, and where each token begins. No stop text is looked for in it.

        The tokens that are added later continue it.
        """
        stops, self.stops = self.stops, StopTexts([])
        said, offsets = [], []
        for token in prompt:
            said.append(self.add(token))
            offsets.append(self.offset)
        self.stops = stops
        return "".join(said), offsets

    def end(self) -> str:
        """Return what was held back, when no more tokens come. Half a character at the end becomes U+FFFD."""
        if self.stopped:
            return ""
        return self._say(self.utf8.decode(b"", final=True)) + self.stops.end()

    def _say(self, new: str) -> str:
        self.length += len(new)
        return self.stops.add(new) if new else ""

    def _look_back(self, prompt: Sequence[int]) -> None:
        tail = b""
        for token in reversed(prompt):
            if token not in self.bytes.special or token in self.shown:
                tail = self.bytes[token] + tail
            if len(tail) >= MOST_BYTES:
                break
        self.started = bool(tail)
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(tail)
        self.unfinished = utf8.getstate()[0]


class StopTexts:
    """Finds the first of several texts in a stream of characters, by Knuth, Morris and Pratt: no character is compared twice.

    `marked` are those that hold a special token. They are looked for in the stream with hidden characters, which are never said;
    all are looked for in the stream without.
    """

    def __init__(self, stops: Sequence[str], marked: Sequence[str] = ()) -> None:
        self.plain, self.marked = [_Matcher(stop) for stop in stops], [_Matcher(stop) for stop in marked]
        self.found = False
        self._held: deque[str] = deque()
        # how many characters were visible before each of the last ones of the stream with hidden ones
        self._visible: deque[int] = deque(maxlen=max((len(stop) for stop in marked), default=0))
        self._count = 0  # of visible characters

    def add(self, text: str, hidden: bool = False) -> str:
        """Return what is certain not to be part of a stop text. Nothing after one was found."""
        if self.found or not self.plain:
            return "" if self.found or hidden else text
        said = []
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
            begin = self._count - len(self._held)  # of what is held
            if ends:
                self.found = True
                said += [self._held.popleft() for _ in range(min(ends) - begin)]
                self._held.clear()
                break
            said += [self._held.popleft() for _ in range(first - begin)]
        return "".join(said)

    def end(self) -> str:
        """Return what was held back."""
        held = "".join(self._held)
        self._held.clear()
        return held


class _Matcher:
    """How much of the beginning of a text the stream ends with."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self.shorter = [0] * (len(text) + 1)  # the longest beginning that also ends the first n characters
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
