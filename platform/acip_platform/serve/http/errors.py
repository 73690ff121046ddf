"""The error format of the server, which is OpenAI's: {"error": {"message", "type", "param", "code"}}.

status    type                    when
4xx       invalid_request_error   the request is invalid; the message states what is allowed
429       rate_limit_error        the queue is full; Retry-After is the time to wait
503       service_unavailable     the server starts or stops, or the engine is being replaced; Retry-After is the time to wait
500       server_error            the server failed; the details are in its log, never in the response

Errors of the engine have no HTTP status: `ENGINE_ERRORS` assigns one.
"""

import logging
from typing import Any
from uuid import uuid4

from acip.errors import AcipError, BudgetError
from acip_platform.serve.engine import errors as engine
from acip_platform.serve.text.errors import InvalidRequestError

RETRY_AFTER_S = {429: 2, 503: 10}
PARAMS = {"prompts": "prompt"}  # fields of the engine's request -> their names in the HTTP API
ENGINE_ERRORS: dict[type[engine.EngineError], tuple[int, str, str | None]] = {  # status, code, invalid field
    engine.InvalidTokensError: (400, "invalid_value", "prompt"),
    engine.SizePartsError: (400, "unsupported_value", "size_ratio"),
    engine.ContextTooLongError: (400, "context_length_exceeded", "prompt"),
    engine.DeadlineExceededError: (408, "timeout", None),
    engine.NotFiniteError: (500, "not_finite", None),
    engine.ModelUnloadedError: (503, "unloaded", "model"),
    engine.ModelUnavailableError: (503, "artifact_unavailable", "model"),
    engine.MemoryFullError: (503, "memory_full", "model"),
    engine.BrokenEngineError: (503, "engine_restarting", None),
}

log = logging.getLogger("ray.serve")


class RequestError(InvalidRequestError):
    """A request that cannot be answered, or not at this time, with the HTTP status of the response."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message, param, code)
        self.status = status


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error response."""
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable"}
    return {"error": {"message": message, "type": kinds.get(status, "invalid_request_error"), "param": param, "code": code}}


def retry_after(status: int) -> dict[str, str]:
    """Return the header Retry-After for a status after which a client may try again."""
    return {"Retry-After": str(RETRY_AFTER_S[status])} if status in RETRY_AFTER_S else {}


def as_response(error: Exception, request_id: str) -> tuple[int, dict[str, Any]]:
    """Return (status, body) of any exception that was raised while a request was answered."""
    if isinstance(error, RequestError):
        return error.status, error_body(error.status, str(error), error.param, error.code)
    if isinstance(error, InvalidRequestError):
        return 400, error_body(400, str(error), error.param, error.code)
    if isinstance(error, BudgetError):
        return 400, error_body(400, str(error), getattr(error, "field", "size_ratio"), "invalid_size")
    for kind, (status, code, param) in ENGINE_ERRORS.items():
        if isinstance(error, kind):
            field = getattr(error, "field", None)
            return status, error_body(status, str(error), PARAMS.get(field, field) if field else param, code)
    if isinstance(error, AcipError):
        return 400, error_body(400, str(error))
    return 500, error_body(500, f"the server failed on request {request_id}; the reason is in its log.", code="internal_error")


def logged_response(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return (status, body) of an exception, and log it if it is a failure of the server. The log and the body have the same id."""
    request_id = uuid4().hex
    status, body = as_response(error, request_id)
    if status >= 500 and status != 503:
        log.error("request %s failed", request_id, exc_info=error)
    return status, body
