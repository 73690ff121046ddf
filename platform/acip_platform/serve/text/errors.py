"""The error for invalid requests."""

from acip.errors import AcipError


class InvalidRequestError(AcipError):
    """An invalid request. `param` is the name of the invalid field, and `code` identifies the kind of error for programs."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code
