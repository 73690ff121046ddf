"""Log-probabilities of tokens, in the form of a `TextEvent` and in the two forms of OpenAI's answers.

event         {"id", "bytes", "offset", "logprob", "top": [(id, bytes, logprob), ...]}; logprob and top of a text's first token are None
chat          a list of {"token", "logprob", "bytes", "top_logprobs"}
completions   four parallel lists; top_logprobs are objects by the token's text, so texts must differ: a token that is not whole
              characters is named "bytes:\\xNN", and of several tokens with one text all but the most likely "token_id:N"
"""

from collections.abc import Sequence
from typing import Any

from acip_platform.serve.engine.sampling import ScoredToken
from acip_platform.serve.text.token_bytes import TokenBytes, readable


def scored(table: TokenBytes, token: ScoredToken, offset: int) -> dict[str, Any]:
    """Return the form of events. `offset` is the number of characters of the text before the token."""
    alternatives = None if token.logprob is None else [(id, table[id], value) for id, value in token.top]
    return {"id": token.token, "bytes": table[token.token], "offset": offset, "logprob": token.logprob, "top": alternatives}


def as_chat(tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def one(value: bytes, logprob: float) -> dict[str, Any]:
        return {"token": readable(value), "logprob": logprob, "bytes": list(value)}

    content = [
        one(token["bytes"], token["logprob"]) | {"top_logprobs": [one(value, logprob) for _, value, logprob in token["top"]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def as_completion(tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": [_named(token["bytes"]) for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [None if token["top"] is None else _by_text(token) for token in tokens],
        "text_offset": [token["offset"] for token in tokens],
    }


def _by_text(token: dict[str, Any]) -> dict[str, float]:
    """Return the alternatives by their text. The token itself is always among them."""
    found: dict[str, float] = {}
    top = token["top"]
    if all(id != token["id"] for id, _, _ in top):
        top = [*top, (token["id"], token["bytes"], token["logprob"])]
    for id, value, logprob in top:
        name = _named(value)
        found[f"token_id:{id}" if name in found else name] = logprob
    return found


def _named(value: bytes) -> str:
    text = readable(value)
    return text if text.encode() == value else f"bytes:{text}"
