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

import reprlib
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


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 200


def cited(value: Any) -> str:
    """`value` as a message shows it: short, whatever came."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python writes no int of more than 4300 digits
        return "a number of thousands of digits"
