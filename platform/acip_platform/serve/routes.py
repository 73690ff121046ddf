"""The HTTP face: OpenAI's routes over three functions of an engine that may be anywhere. Knows nothing of Ray.

GET  /v1/models          what is served: version, context, sizes, measured curve
GET  /v1/models/{id}     one of them; {id} may be NAME@RATIO
POST /v1/completions     text at a size
GET  /health             200 when the engine answers
"""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acip_platform.serve.errors import RequestError, as_response, error_body
from acip_platform.serve.request import CompletionRequest, explain, split_name

BODY_LIMIT_BYTES = 4 << 20
RETRY_AFTER_S = {429: 2, 503: 10}

Answer = tuple[int, dict[str, Any]]  # status, body


def routes(
    cards: Callable[[], Awaitable[list[dict[str, Any]]]],
    complete: Callable[[CompletionRequest], Awaitable[Answer]],
    health: Callable[[], Awaitable[Answer]],
) -> FastAPI:
    app = FastAPI(title="acip", description="Any-size language models. One model, every size: NAME@0.6 or size_ratio.")
    app.add_middleware(BodyLimit)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": await cards()}

    @app.get("/v1/models/{model:path}")
    async def show_model(model: str) -> dict[str, Any]:
        by_name = {card["id"]: card for card in await cards()}
        name, _ = split_name(model, list(by_name))
        return by_name[name] | {"id": model}

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> JSONResponse:
        return answer(*await complete(request))

    @app.get("/health")
    async def healthy() -> JSONResponse:
        return answer(*await health())

    there = [route for route in app.routes if isinstance(route, Route)]

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(*as_response(explain(error.errors(), error.body), ""))

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return answer(*as_response(error, ""))

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> JSONResponse:
        asked, code = f"{request.method} {request.url.path}", None
        message = f"{error.detail}. Send a JSON object in UTF-8."
        if error.status_code in (404, 405):
            have = ", ".join(f"{method} {route.path}" for route in there for method in sorted(route.methods or ()) if "/v1" in route.path)
            message, code = f"there is no {asked}; there are {have} and GET /health.", "unknown_route"
        elif error.status_code == 413:
            message, code = error.detail, "body_too_large"
        return answer(error.status_code, error_body(error.status_code, message, None, code), error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:  # and Starlette raises it on, for the log
        return answer(*as_response(error, uuid4().hex))

    return app


def answer(status: int, body: dict[str, Any], headers: Any = None) -> JSONResponse:
    more = {"Retry-After": str(RETRY_AFTER_S[status])} if status in RETRY_AFTER_S else {}
    if status == 408:
        more["x-should-retry"] = "false"  # OpenAI's clients would ask for the same again
    return JSONResponse(body, status, {**(headers or {}), **more})


class BodyLimit:
    """Stops reading a body that no request needs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > BODY_LIMIT_BYTES:
                raise HTTPException(
                    413, f"the body is larger than {BODY_LIMIT_BYTES:,} bytes, the most this server reads; shorten the prompt."
                )
            return message

        await self.app(scope, limited, send)
