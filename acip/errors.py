"""Every error a user can meet, drawn as a tree. Each message says what came, what is allowed and what to do.

    AcipError (ValueError)
    ├── RecipeError        a field of a Recipe or of a fleet file is missing, unknown or out of range
    ├── BaseModelError     a base model can't be found, read, or compressed by this method
    ├── DataError          a text or token source can't be read, or is too short for the recipe
    ├── BudgetError        a size that is malformed or can't be reached
    ├── CalibrationError   the calibration itself went wrong (loss not finite, stop ratio never reached)
    ├── EvaluationError    something to measure that is unknown, not there, or not to be measured of this model
    ├── ArtifactError      a folder that is not an artifact, not whole, or newer than this code
    └── HubError           a repository of the hub that can't be read, or written to

Assertions are for us; these are for users.
"""

import errno
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class AcipError(ValueError):
    """Root of the tree: `except AcipError` catches everything the caller can mend."""


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
    """Raise what a library raises on a user's input as `error`: one line that begins with `failed` and ends with `remedy`.

    Put it around each call that reads what a user names. `failed` names the input, for example "base 'x' can't be loaded".
    Our own errors pass unchanged. So does a lack of memory: nothing is wrong with the input, and another worker may have more.
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
    """Return whether `raised` says that memory is exhausted: Python's, PyTorch's or the operating system's error."""
    return (
        isinstance(raised, MemoryError)
        or type(raised).__name__ == "OutOfMemoryError"
        or (isinstance(raised, OSError) and raised.errno == errno.ENOMEM)
    )


def one_line(raised: BaseException, longest: int = 400) -> str:
    """Return the message of a foreign exception on one line, with its type where the message alone says little."""
    said = " ".join(str(raised).split()).rstrip(".")
    if len(said) > longest:
        said = said[: longest - 4].rstrip() + " ..."
    plain = isinstance(raised, OSError | ValueError | RuntimeError | ImportError) and len(said.split()) > 2
    return said if plain else f"{type(raised).__name__}: {said}" if said else type(raised).__name__


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 200


def cited(value: Any) -> str:
    """`value` as a message shows it: short, whatever came."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python writes no int of more than 4300 digits
        return "a number of thousands of digits"
