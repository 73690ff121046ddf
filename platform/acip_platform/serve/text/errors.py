"""The error of requests that cannot be answered as they are written."""

from acip.errors import AcipError


class InvalidRequestError(AcipError):
    """A request that the client has to change. `param` is the field at fault, `code` a name for programs."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code
