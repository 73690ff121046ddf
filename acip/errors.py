"""The errors that users can meet. Each message states the value that was given, the allowed values, and the remedy.

    AcipError (ValueError)
    ├── RecipeError        a field of a Recipe or of a fleet file is missing, unknown or out of range
    ├── BaseModelError     a base model can't be found, read, or compressed by this method
    ├── DataError          a text or token source can't be read, or is too short for the recipe
    ├── BudgetError        a size is malformed or can't be reached
    ├── CalibrationError   a calibration failed (loss not finite, stop ratio not reached)
    ├── EvaluationError    a measurement is unknown, not available, or not possible for this model
    ├── ArtifactError      a folder is not an artifact, is incomplete, or is newer than this code
    └── HubError           a repository of the hub can't be read or written

Assertions check the code itself; these errors report invalid input.
"""

import errno
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class AcipError(ValueError):
    """The root of the tree. `except AcipError` catches every error that the caller can correct."""


class RecipeError(AcipError):
    pass


class BaseModelError(AcipError):
    pass


class DataError(AcipError):
    pass


class BudgetError(AcipError):
    pass


class CalibrationError(AcipError):
    pass


class EvaluationError(AcipError):
    pass


class ArtifactError(AcipError):
    pass


class HubError(AcipError):
    pass


@contextmanager
def foreign_errors(error: type[AcipError], failed: str, remedy: str = "") -> Iterator[None]:
    """Convert exceptions of a library into `error`, with a message of one line that begins with `failed` and ends with `remedy`.

    Use it around calls that read a user's input. `failed` names the input, for example "base 'x' can't be loaded". An AcipError
    passes unchanged. An out-of-memory error does too, because the input may be valid and another worker may have more memory.
    """
    try:
        yield
    except AcipError:
        raise
    except Exception as raised:
        if lacks_memory(raised):
            raise
        raise error(f"{failed}: {one_line(raised)}. {remedy}".strip()) from raised


def lacks_memory(raised: BaseException) -> bool:
    """Return whether `raised` is an out-of-memory error of Python, PyTorch or the operating system."""
    return (
        isinstance(raised, MemoryError)
        or type(raised).__name__ == "OutOfMemoryError"
        or (isinstance(raised, OSError) and raised.errno == errno.ENOMEM)
    )


def one_line(raised: BaseException, longest: int = 400) -> str:
    """Return the message of an exception on one line, at most `longest` characters. Short messages are prefixed with the type."""
    text = " ".join(str(raised).split()).rstrip(".")
    if len(text) > longest:
        text = text[: longest - 4].rstrip() + " ..."
    plain = isinstance(raised, OSError | ValueError | RuntimeError | ImportError) and len(text.split()) > 2
    return text if plain else f"{type(raised).__name__}: {text}" if text else type(raised).__name__


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 200


def cited(value: Any) -> str:
    """Return a short representation of `value` for an error message."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python does not format an int of more than 4300 digits
        return "a number with thousands of digits"
