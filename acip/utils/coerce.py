"""Check values that come from files and requests, and convert them where no information is lost."""

import difflib
import math
import unicodedata
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from acip.errors import RecipeError, cited

LARGEST = 2**31  # integers must be smaller in absolute value
TYPE_NAMES = {int: "a whole number", float: "a number (write 1.0e-4, not 1e-4, in YAML)", str: "text", bool: "true or false"}


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a hint that names the entry of `known` that is closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(name if isinstance(name, str) else cited(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def coerce(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as the type `kind` if the conversion is lossless. `name` is the field's name in error messages.

    3 becomes a float; 3.5 does not become an int; "3" does not become a number. Numbers must be finite and smaller than `LARGEST`
    in absolute value. Text must not contain control characters. Raises RecipeError.
    """
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise RecipeError(f"{name} is {cited(value)}; allowed: {', '.join(map(repr, get_args(kind)))}.")
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            return tuple(coerce(name, item, get_args(kind)[0]) for item in value)
        raise RecipeError(f"{name} is {cited(value)}; it must be a list.")
    if type(None) in get_args(kind):
        if value is None:
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if kind is bool and isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise RecipeError(f"{name} is {cited(value)}; it must be {TYPE_NAMES[kind]}.")
    _check_range(name, value)
    if kind is str and isinstance(value, str):
        return value
    if kind is int and isinstance(value, int):
        return value
    if kind is float and not isinstance(value, str):
        return float(value)
    raise RecipeError(f"{name} is {cited(value)}; it must be {TYPE_NAMES[kind]}.")


def _check_range(name: str, value: float | str) -> None:
    if isinstance(value, str) and any(unicodedata.category(char) in ("Cc", "Cs") for char in value):
        raise RecipeError(f"{name} is {cited(value)}; it must be text without control characters.")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{name} is {value}; it must be finite.")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise RecipeError(f"{name} is {cited(value)}; it must be below {LARGEST:,}.")
