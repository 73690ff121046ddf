"""Between text and tokens: detokenizer, token bytes, chat templates, grammars, tools, log-probabilities.

It uses the engine, and has no notion of HTTP; `InvalidRequestError` is its error.
"""

from typing import Any

from acip import renamed


def __getattr__(name: str) -> Any:
    return renamed.name_of_package(__name__, name)
