"""The bytes of each token of a vocabulary.

A token can be a part of a character, so its value is bytes and not text. The bytes are determined by the output of the tokenizer's own
decoder, and not by the tokenizer's class:

    byte-level BPE      each letter of the token's name stands for a byte, by the table of GPT-2, or by its code point, as in ByT5
    byte fallback       the name <0xE2> stands for this byte
    all others          the text between two anchors when the decoder decodes anchor, token, anchor: it has a leading space for a
                        metaspace or for a word that does not begin with ##, and a trailing space for </w>

The concatenated bytes of tokens are the text that the tokenizer decodes, except that some tokenizers drop a space at the beginning
of a text (`at_start`).
"""

import re
import weakref
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

GPT2_LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}
CODE_POINTS = {chr(byte): byte for byte in range(256)}
FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BEFORE, AFTER = "a", "b"  # the anchors
SENTENCEPIECE_SPACE = "▁"

_by_tokenizer: "weakref.WeakValueDictionary[int, TokenBytes]" = (
    weakref.WeakValueDictionary()
)  # by the id of the tokenizer; a table keeps its tokenizer alive, so ids stay unique


class TokenBytes:
    """The bytes by token id, computed on first use. Use `TokenBytes.of`, which makes one table per tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self.added = {int(id): str(token) for id, token in added.items()}
        self.special = {int(id) for id, token in added.items() if getattr(token, "special", False)} | set(tokenizer.all_special_ids)
        # a Python tokenizer over a SentencePiece model decodes only pieces of its vocabulary, so the anchors do not work there
        self.sentencepiece = not getattr(tokenizer, "is_fast", False) and hasattr(tokenizer, "sp_model")
        self.byte_of = next((letters for letters in (GPT2_LETTERS, CODE_POINTS) if self._uses_letters(letters)), None)
        self.fallback = not self.byte_of and (self.sentencepiece or self._decodes_euro("<0xE2>", "<0x82>", "<0xAC>"))
        pair = self._decode([BEFORE, AFTER])
        self.joint = pair[len(BEFORE) : -len(AFTER)] if not self.sentencepiece else ""  # between any two tokens
        self._bytes: dict[int, bytes] = {}
        self._at_start: dict[int, bytes] = {}

    @classmethod
    def of(cls, tokenizer: Any) -> "TokenBytes":
        """Return the table of this tokenizer."""
        table = _by_tokenizer.get(id(tokenizer))
        if table is None:
            table = _by_tokenizer[id(tokenizer)] = cls(tokenizer)
        return table

    def __getitem__(self, id: int) -> bytes:
        """Return the bytes of a token within a text. They are empty for an id outside the vocabulary."""
        if id not in self._bytes:
            self._bytes[id] = self._find(id)
        return self._bytes[id]

    def at_start(self, id: int) -> bytes:
        """Return the bytes of a token at the beginning of a text, where most decoders drop a leading space."""
        if id not in self._at_start:
            inside, name = self[id], self._name(id)
            if self.byte_of or id in self.added or not isinstance(name, str) or (self.fallback and FALLBACK.fullmatch(name)):
                first = inside.removeprefix(self.joint.encode()) if id in self.added else inside
            elif self.sentencepiece:
                first = inside.removeprefix(b" ")
            else:
                first = self._decode([name, AFTER])[: -len(self.joint + AFTER)].encode()
            self._at_start[id] = first
        return self._at_start[id]

    def name(self, id: int) -> str:
        """Return the text of a token, or its bytes as `\\xNN` if they are not complete characters."""
        return readable(self[id])

    def _find(self, id: int) -> bytes:
        name = self._name(id)
        if isinstance(name, bytes):  # tokenizers over tiktoken
            return name
        if not name:
            return b""
        if id in self.added:
            inner = "" if id in self.special else self.joint
            return (inner + self.added[id]).encode()
        if self.byte_of:
            try:
                return bytes(self.byte_of[letter] for letter in name)
            except KeyError:
                return name.encode()
        if self.fallback and (byte := FALLBACK.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        if self.sentencepiece:
            return name.replace(SENTENCEPIECE_SPACE, " ").encode()
        decoded = self._decode([BEFORE, name, AFTER])
        return decoded[len(BEFORE) : len(decoded) - len(self.joint + AFTER)].encode()

    def _name(self, id: int) -> Any:
        try:
            return self.tokenizer.convert_ids_to_tokens(id)
        except (IndexError, KeyError, ValueError, OverflowError):  # an id outside the vocabulary, because embeddings can be padded
            return None

    def _uses_letters(self, letters: dict[str, int]) -> bool:
        """Return whether the decoder converts names to bytes by this table of letters."""
        letter_of = {byte: letter for letter, byte in letters.items()}
        return self._decodes_euro(*(letter_of[byte] for byte in "€".encode()))

    def _decodes_euro(self, *names: str) -> bool:
        try:
            return "€" in self._decode([BEFORE, *names, AFTER])
        except Exception:  # some decoders raise for names outside the vocabulary
            return False

    def _decode(self, names: list[str]) -> str:
        return str(self.tokenizer.convert_tokens_to_string(names))


def readable(value: bytes) -> str:
    """Return the text of bytes, or each byte as `\\xNN` if they are not complete characters."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in value)
