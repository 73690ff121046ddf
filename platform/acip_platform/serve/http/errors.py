"""The one error shape of the server, OpenAI's: {"error": {"message", "type", "param", "code"}}.

status    type                    when
4xx       invalid_request_error   the request can't be answered as asked; the message says what is allowed
429       rate_limit_error        the queue is full; Retry-After says when to come back
503       service_unavailable     the server starts or stops, or the engine is being replaced; Retry-After too
500       server_error            our fault; details are in the server's log, never in the answer
"""

from typing import Any

from acip.errors import AcipError, BudgetError

RETRY_AFTER_S = {429: 2, 503: 10}


class RequestError(AcipError):
    """A request that can't be answered, or not now. `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable"}
    return {"error": {"message": message, "type": kinds.get(status, "invalid_request_error"), "param": param, "code": code}}


def retry_after(status: int) -> dict[str, str]:
    """The header that says when to come back, for a status that is worth it."""
    return {"Retry-After": str(RETRY_AFTER_S[status])} if status in RETRY_AFTER_S else {}


def as_response(error: Exception, request_id: str) -> tuple[int, dict[str, Any]]:
    """(status, body) of anything that was raised while a request was answered."""
    if isinstance(error, RequestError):
        return error.status, error_body(error.status, str(error), error.param, error.code)
    if isinstance(error, BudgetError):
        return 400, error_body(400, str(error), "size_ratio", "invalid_size")
    if isinstance(error, AcipError):
        return 400, error_body(400, str(error))
    return 500, error_body(500, f"the server failed on request {request_id}; its log says why.", code="internal_error")
