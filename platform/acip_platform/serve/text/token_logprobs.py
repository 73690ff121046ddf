"""Log-probabilities of tokens in the format of a `TextEvent` and in the two formats of OpenAI's API.

event         {"id", "bytes", "offset", "logprob", "top": [(id, bytes, logprob), ...]}; logprob and top of a text's first token are None
chat          a list of {"token", "logprob", "bytes", "top_logprobs"}
completions   four parallel lists; top_logprobs are objects with the token's text as key, so keys must differ: a token that is not
              complete characters has the key "bytes:\\xNN"; if several tokens have the same text, all but the most likely have the
              key "token_id:N"
"""

from collections.abc import Sequence
from typing import Any

from acip_platform.serve.engine.sampling import ScoredToken
from acip_platform.serve.text.token_bytes import TokenBytes, readable


def scored(table: TokenBytes, token: ScoredToken, offset: int) -> dict[str, Any]:
    """Return a token in the format of events. `offset` is the number of characters of the text before the token."""
    alternatives = None if token.logprob is None else [(id, table[id], value) for id, value in token.top]
    return {"id": token.token, "bytes": table[token.token], "offset": offset, "logprob": token.logprob, "top": alternatives}


def as_chat(tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return tokens of events in the format of chats."""

    def entry(value: bytes, logprob: float) -> dict[str, Any]:
        return {"token": readable(value), "logprob": logprob, "bytes": list(value)}

    content = [
        entry(token["bytes"], token["logprob"]) | {"top_logprobs": [entry(value, logprob) for _, value, logprob in token["top"]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def as_completion(tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return tokens of events in the format of completions."""
    return {
        "tokens": [_key(token["bytes"]) for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [None if token["top"] is None else _by_text(token) for token in tokens],
        "text_offset": [token["offset"] for token in tokens],
    }


def _by_text(token: dict[str, Any]) -> dict[str, float]:
    """Return the log-probabilities of the alternatives by their text. The token itself is always included."""
    logprobs: dict[str, float] = {}
    top = token["top"]
    if all(id != token["id"] for id, _, _ in top):
        top = [*top, (token["id"], token["bytes"], token["logprob"])]
    for id, value, logprob in top:
        name = _key(value)
        logprobs[f"token_id:{id}" if name in logprobs else name] = logprob
    return logprobs


def _key(value: bytes) -> str:
    text = readable(value)
    return text if text.encode() == value else f"bytes:{text}"
