"""Conversion between text and tokens: detokenizer, token bytes, chat templates, grammars, tools, log-probabilities.

It uses the engine and is independent of HTTP. Its error is `InvalidRequestError`.
"""

from typing import Any

from acip import renamed


def __getattr__(name: str) -> Any:
    return renamed.name_of_package(__name__, name)
