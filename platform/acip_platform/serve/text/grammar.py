"""Grammars that constrain the generated tokens, with llguidance.

    JSON schema -> checked -> Lark grammar -> compiled once for a vocabulary (`Grammars`) -> a state per sequence (`Constraint`)

A constraint works on the bytes of tokens (`TokenBytes`), which are the bytes of the text that clients receive. All code here except
`Constraint` runs before a request joins the engine's batch, in the thread of the caller.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from llguidance import LLMatcher, LLTokenizer

from acip.errors import AcipError
from acip.utils.coerce import did_you_mean
from acip_platform.serve.text.errors import InvalidRequestError
from acip_platform.serve.text.token_bytes import TokenBytes

MAX_COMPILED = 64  # grammars of one model in the cache
MAX_SCHEMA_DEPTH = 60
MAX_SCHEMA_CHARACTERS = 200_000
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": False}  # bounded white space
ANY_OBJECT = {"type": "object"}
# keywords by the kind of their value: a schema, a list of schemas, an object of schemas, or another value
SCHEMA_VALUED = (
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems",
    "unevaluatedProperties", "additionalItems", "contentSchema",
)  # fmt: skip
SCHEMA_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
OTHER_KEYWORDS = (
    "$anchor", "$comment", "$dynamicAnchor", "$dynamicRef", "$id", "$ref", "$schema", "$vocabulary", "const", "contentEncoding",
    "contentMediaType", "default", "dependencies", "dependentRequired", "deprecated", "description", "discriminator", "enum", "example",
    "examples", "exclusiveMaximum", "exclusiveMinimum", "format", "maxContains", "maxItems", "maxLength", "maxProperties", "maximum",
    "minContains", "minItems", "minLength", "minProperties", "minimum", "multipleOf", "nullable", "pattern", "readOnly", "required",
    "title", "type", "uniqueItems", "writeOnly",
)  # fmt: skip
KEYWORDS = sorted({*SCHEMA_VALUED, *SCHEMA_LISTS, *SCHEMA_MAPS, *OTHER_KEYWORDS})


class Constraint:
    """The state of a grammar for one sequence. Use it in the engine's thread."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def done(self) -> bool:
        """Whether the text is complete, so that no token can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> AcipError | None:
        """The error if a token needs more memory or time than llguidance allows, else None."""
        if not self._matcher.is_error():
            return None
        return InvalidRequestError(f"the schema is too complex: {_short(self._matcher.get_error())}", code="invalid_schema")

    def limit(self, logits_V: torch.Tensor) -> None:
        """Set the logits of the tokens that the grammar does not allow next to -inf, in place."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))[: len(logits_V)]
        logits_V[len(allowed) :] = -torch.inf
        logits_V[: len(allowed)].masked_fill_(~allowed.to(logits_V.device), -torch.inf)

    def take(self, token: int) -> None:
        """Advance the state by a token."""
        self._matcher.consume_token(token)


class Grammars:
    """The compiled grammars of one model's vocabulary."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        self.table, self.vocabulary = TokenBytes.of(tokenizer), vocabulary
        self._tokenizer, self._ends = tokenizer, sorted(ends)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None

    def constraint(self, grammar: str, param: str) -> Constraint:
        """Return a new state of a Lark grammar. Raise an InvalidRequestError if llguidance cannot compile it."""
        with self._lock:
            matcher: LLMatcher | None
            if grammar not in self._compiled:
                if self._ll_tokenizer is None:
                    self._ll_tokenizer = _ll_tokenizer(self.table, self._tokenizer, self.vocabulary, self._ends)
                matcher = LLMatcher(self._ll_tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
                probe = matcher.deep_copy()
                probe.compute_bitmask()
                reason = "no text matches it" if probe.is_stopped() and not matcher.is_error() else matcher.get_error()
                if reason:
                    raise InvalidRequestError(f"{param} has a schema that cannot be used: {_short(reason)}", param, "invalid_schema")
                self._compiled[grammar] = matcher
                while len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return Constraint(self._compiled[grammar].deep_copy())

    def literal(self, text: str) -> str:
        """Return a Lark expression of a text. Special tokens in the text become tokens of the grammar."""
        found, rest = [], text
        special = {self.table[id].decode(errors="replace"): id for id in self.table.special if len(self.table[id]) > 1}
        while rest:
            at, name = min(((rest.index(name), name) for name in special if name in rest), default=(len(rest), ""))
            found += [quoted(rest[:at])] if at else []
            found += [f"<[{special[name]}]>"] if name else []
            rest = rest[at + len(name) :]
        return " ".join(found) or '""'


def json_rule(schema: Mapping[str, Any], param: str) -> str:
    """Return a Lark expression of a JSON schema. Raise an InvalidRequestError if the schema is invalid or not supported."""
    try:
        written = json.dumps(schema)
        if len(written) > MAX_SCHEMA_CHARACTERS:
            message = f"{param} has a schema of {len(written):,} characters; at most {MAX_SCHEMA_CHARACTERS:,} are allowed."
            raise InvalidRequestError(message, param, "invalid_schema")
        for where, keyword in _unknown(schema, "schema", 0, param):
            message = f"{param} has a schema with the unknown keyword {keyword!r} at {where}{did_you_mean(keyword, KEYWORDS)}"
            raise InvalidRequestError(f"{message}. Put notes in description, or in keywords that begin with x-.", param, "invalid_schema")
        Draft202012Validator.check_schema(schema)
    except InvalidRequestError:
        raise
    except SchemaError as error:
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        raise InvalidRequestError(
            f"{param} has an invalid schema at schema{where}: {_short(error.message)}", param, "invalid_schema"
        ) from error
    except (RecursionError, ValueError) as error:
        raise InvalidRequestError(f"{param} has a schema that can't be read: {_short(str(error))}", param, "invalid_schema") from error
    return "%json " + json.dumps({**schema, "x-guidance": LAYOUT})


def quoted(text: str) -> str:
    """Return a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def _unknown(schema: Any, where: str, depth: int, param: str) -> Iterator[tuple[str, str]]:
    """Yield the place and name of keywords that JSON Schema does not have. llguidance would ignore them, including misspelled ones."""
    if depth > MAX_SCHEMA_DEPTH:
        raise InvalidRequestError(f"{param} has a schema that is nested deeper than {MAX_SCHEMA_DEPTH} levels.", param, "invalid_schema")
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key == "x-guidance" or (key not in KEYWORDS and not key.startswith("x-")):
            yield where, key
        elif key in SCHEMA_MAPS and isinstance(value, dict):
            for name, inner in value.items():
                yield from _unknown(inner, f"{where}.{key}.{name}", depth + 1, param)
        elif key in SCHEMA_LISTS and isinstance(value, list):
            for i, inner in enumerate(value):
                yield from _unknown(inner, f"{where}.{key}[{i}]", depth + 1, param)
        elif key in SCHEMA_VALUED:
            yield from _unknown(value, f"{where}.{key}", depth + 1, param)


def _ll_tokenizer(table: TokenBytes, tokenizer: Any, vocabulary: int, ends: list[int]) -> LLTokenizer:
    """Return a vocabulary for llguidance. If the model has no end token, add one that it cannot generate, as llguidance needs one."""
    size = vocabulary if ends else vocabulary + 1
    wrapper: Any = _Vocabulary(table, tokenizer, size, ends or [vocabulary])
    return LLTokenizer(wrapper, n_vocab=size, eos_token=ends or [vocabulary])


class _Vocabulary:
    """The tokenizer interface that llguidance requires."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, table: TokenBytes, tokenizer: Any, size: int, ends: list[int]) -> None:
        self.eos_token_id = ends[0]
        self.special_token_ids = sorted({*(id for id in table.special if id < size), *ends})
        self.tokens = [table[id] for id in range(size)]
        self._table, self._tokenizer = table, tokenizer
        special = set(self.special_token_ids)
        self._id_of = {value: id for id, value in reversed(list(enumerate(self.tokens))) if value and id not in special}
        self._longest = max(map(len, self._id_of), default=1)

    def __call__(self, text: bytes | str) -> list[int]:
        value = text.encode() if isinstance(text, str) else text
        try:
            ids = list(self._tokenizer(value.decode(), add_special_tokens=False)["input_ids"])
            if b"".join(self._table[id] for id in ids) == value:
                return ids
        except UnicodeDecodeError:
            pass
        ids = []  # the tokenizer adds spaces before a text, so use the longest matching tokens instead
        while value:
            part = next((value[:n] for n in range(min(self._longest, len(value)), 0, -1) if value[:n] in self._id_of), None)
            if part is None:
                break
            ids.append(self._id_of[part])
            value = value[len(part) :]
        return ids


def _short(reason: str) -> str:
    """Return the beginning of an error message, without the grammar that llguidance appends."""
    text = " ".join(reason.split("\n<state>", maxsplit=1)[0].split())
    return text if len(text) <= 300 else text[:300] + "..."
