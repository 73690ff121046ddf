"""The HTTP routes: those of OpenAI's API, and routes for sizes. They are independent of Ray: an `Endpoint` answers the requests.

GET  /                        the page
GET  /docs                    this list as HTML; /openapi.json has it as JSON
GET  /health                  200 while the process runs
GET  /ready                   200 once a model is loaded and has generated a token, else 503
GET  /metrics                 metrics for Prometheus, summed over all replicas
GET  /v1/models               the served models: version, context, sizes, measured curve
GET  /v1/models/{id}          one model; {id} may be NAME@0.6 or NAME@fit:8GB, and the response then describes that size
GET  /v1/models/{id}/tradeoff every size with its bytes and quality, ranks or bits by layer, recorded samples
POST /v1/models/{id}/load     serve another version from the registry
POST /v1/completions          complete a text at a size
POST /v1/chat/completions     answer a chat at a size, for models with a chat template
POST /v1/materializations     export a size to the store, in the background
GET  /v1/materializations     all materializations; /{id} gives one; /{id}/archive its folder as a tar file (download.py)

Every GET route also answers HEAD, every route answers OPTIONS, and trailing slashes are ignored.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acip_platform.serve.http.answers import DONE, Answer, error_event, sse
from acip_platform.serve.http.api_reference import STREAM, describe, errors, page
from acip_platform.serve.http.body import JsonRoute
from acip_platform.serve.http.download import downloads
from acip_platform.serve.http.edge import Edge
from acip_platform.serve.http.errors import RequestError, as_response, error_body, retry_after
from acip_platform.serve.http.keys import Keys
from acip_platform.serve.http.metrics import CONTENT_TYPE, Metrics
from acip_platform.serve.http.requests import ChatRequest, CompletionRequest, MaterializationRequest, ModelSizeRequest, explain, split_name
from acip_platform.serve.materializations import Materializations
from acip_platform.serve.text.events import TextEvent

BODY_LIMIT_BYTES = 4 << 20
OPEN = ("/", "/docs", "/openapi.json", "/health", "/ready", "/metrics")  # paths that need no API key
INSTEAD = {  # routes of OpenAI's API that this server lacks, and the route to use instead
    "/v1/responses": "POST /v1/chat/completions",
    "/v1/engines": "GET /v1/models",
    "/v1/edits": "POST /v1/chat/completions",
    "/v1/chat": "POST /v1/chat/completions",
    "/v1/messages": "POST /v1/chat/completions",
}
PAGE = Path(__file__).parents[1] / "page" / "index.html"
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

log = logging.getLogger("ray.serve")
EventStream = AsyncIterator[list[TextEvent]]


class Endpoint(Protocol):
    metrics: Metrics
    keys: Keys
    materializations: Materializations

    @property
    def names(self) -> list[str]: ...
    async def cards(self) -> list[dict[str, Any]]: ...
    async def card(self, name: str) -> dict[str, Any]: ...
    async def size(self, name: str, request: ModelSizeRequest) -> dict[str, Any]: ...
    async def trade_off(self, name: str) -> dict[str, Any]: ...
    async def load(self, name: str, which: str) -> dict[str, Any]: ...
    async def materialize(self, request: MaterializationRequest) -> dict[str, Any]: ...
    async def ready(self) -> list[str]: ...
    async def answer(self, request: CompletionRequest | ChatRequest) -> EventStream: ...


class LoadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: str | None = Field(default=None, pattern=r"^\d{1,9}$", description='a version number as a text, like "2"')
    alias: str | None = Field(default=None, min_length=1, max_length=200, pattern=r"^\D", description='an alias, like "champion"')


REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest, "/v1/materializations": MaterializationRequest,
}  # fmt: skip


def routes(endpoint: Endpoint, cors_origins: Sequence[str] = ()) -> FastAPI:
    """Return the application. Browsers allow requests from pages of `cors_origins` and from the server's own page only."""
    app = FastAPI(
        title="acip", version="1", description="Any-size language models. One model, every size: NAME@0.6 or size_ratio.",
        docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, responses=errors(400, 401, 500, 503),
        generate_unique_id_function=lambda route: route.name,
    )  # fmt: skip
    app.router.route_class = JsonRoute
    app.add_middleware(BodyLimit)
    app.add_middleware(Guard, keys=endpoint.keys)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )  # fmt: skip
    app.add_middleware(Edge)

    _add_open_routes(app, endpoint)

    @app.get("/v1/models", responses=errors(429))
    async def list_models() -> dict[str, Any]:
        """List the served models with their version, context, sizes and measured curve."""
        return {"object": "list", "data": await endpoint.cards()}

    @app.get("/v1/models/{model:path}/tradeoff", responses=errors(404, 429))
    async def trade_off(model: str) -> dict[str, Any]:
        """Return every size of a model with its bytes and quality, its ranks or bits by layer, and recorded samples."""
        name, _ = split_name(model, endpoint.names)
        return await endpoint.trade_off(name)

    @app.post("/v1/models/{model:path}/load", responses=errors(404, 413, 415, 429))
    async def load(model: str, request: LoadRequest) -> dict[str, Any]:
        """Serve another version of a model from the registry."""
        name, _ = split_name(model, endpoint.names)
        if (request.version is None) == (request.alias is None):
            raise RequestError('give exactly one of "version" (a number) and "alias".', "version")
        return await endpoint.load(name, request.version or request.alias or "")

    @app.get("/v1/models/{model:path}", responses=errors(404, 429))
    async def show_model(model: str) -> dict[str, Any]:
        """Return one model. With NAME@0.6 or NAME@fit:8GB, the response also describes that size."""
        name, budget = split_name(model, endpoint.names)
        card = await endpoint.card(name) | {"id": model}
        return card if budget is None else card | {"got": await endpoint.size(name, ModelSizeRequest(model=model))}

    @app.post("/v1/completions", responses=errors(404, 408, 413, 415, 429) | STREAM)
    async def completions(request: CompletionRequest) -> Response:
        """Complete a text at a size. After timeout_s, the response ends with the text so far and finish_reason "length"."""
        return await respond(request)

    @app.post("/v1/chat/completions", responses=errors(404, 408, 413, 415, 429) | STREAM)
    async def chat_completions(request: ChatRequest) -> Response:
        """Answer a chat at a size. The model needs a chat template. Without max_tokens, a default limit applies; the response states it."""
        return await respond(request)

    @app.post(
        "/v1/materializations",
        responses=errors(404, 413, 415, 429) | {202: {"description": "The materialization was started or is running."}},
    )
    async def materialize(request: MaterializationRequest) -> JSONResponse:
        """Export a size to the store in the background. Returns 202 while it runs and 200 when it is complete."""
        record = await endpoint.materialize(request)
        return answer(200 if record["status"] == "succeeded" else 202, record)

    @app.get("/v1/materializations")
    async def list_materializations() -> dict[str, Any]:
        """List all materializations, newest first."""
        return {"object": "list", "data": await endpoint.materializations.list()}

    @app.get("/v1/materializations/{id}", responses=errors(404))
    async def show_materialization(id: str) -> dict[str, Any]:
        """Return one materialization."""
        return await endpoint.materializations.get(id)

    async def respond(request: CompletionRequest | ChatRequest) -> Response:
        events = await endpoint.answer(request)
        first = await anext(events)
        if request.stream and first[0].kind != "error":
            return StreamingResponse(_stream(Answer(request), first, events), media_type="text/event-stream", headers=SSE_HEADERS)
        response = Answer(request)
        async for event in _one_by_one(first, events):
            if event.kind == "error":
                return answer(event.data["status"], event.data["body"])
            for _ in response.add(event):
                pass
        return answer(200, response.complete_body())

    app.include_router(downloads(endpoint.materializations))
    _answer_errors(app)
    describe(app, OPEN)
    for route in app.routes:
        if isinstance(route, Route) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")  # not in the reference; `Edge` drops the body
    return app


def _add_open_routes(app: FastAPI, endpoint: Endpoint) -> None:
    """Add the routes that need no API key: health, metrics, the page, and the reference."""

    @app.get("/", include_in_schema=False)
    async def show_page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html", headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def show_reference() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))

    @app.get("/openapi.json", include_in_schema=False)
    async def show_openapi() -> dict[str, Any]:
        return app.openapi()

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Return 200 while the process runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Return 200 once a model is loaded and has generated a token, else 503."""
        return answer(200, {"status": "ready", "models": await endpoint.ready()})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the metrics for Prometheus, summed over all replicas."""
        return Response(await endpoint.metrics.text(), media_type=CONTENT_TYPE)


def _answer_errors(app: FastAPI) -> None:
    """Convert exceptions to responses in the server's error format."""
    known_routes = [route for route in app.routes if isinstance(route, Route)]
    listed = ", ".join(
        f"{method} {route.path.replace(':path', '')}"
        for route in known_routes
        for method in sorted(route.methods or ())
        if "/v1" in route.path
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = REQUESTS.get(request.scope["path"], LoadRequest)  # Request.url fails if the query is not UTF-8
        return answer(*as_response(explain(error.errors(), error.body, kind), ""))

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return answer(*as_response(error, ""))

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        path, code = request.scope["path"], "invalid_json"
        message = f"{error.detail}. Send a JSON object in UTF-8."
        if error.status_code in (404, 405):
            matching = [route for route in known_routes if route.path_regex.match(path)]
            template = max((route.path for route in matching), key=len, default="")  # a model's name may contain slashes
            allow = [method for route in matching if route.path == template for method in sorted(route.methods or ())]
            allow = sorted({*allow, *(["HEAD"] if "GET" in allow else []), *(["OPTIONS"] if allow else [])})
            if allow and request.method == "OPTIONS":
                return Response(status_code=204, headers={"Allow": ", ".join(allow)})
            method = "GET" if request.method == "HEAD" else request.method  # their headers are equal
            missing = f"{method[:20]} {path[:200]}"
            message, code = f"there is no route {missing}. Allowed: {listed} and GET /health.", "unknown_route"
            moved = [
                known for known in (f"/v1{path}", path.removeprefix("/v1")) if any(_takes(route, method, known) for route in known_routes)
            ]
            instead = [INSTEAD[known] for known in INSTEAD if f"{path}/".startswith(f"{known}/")]
            if alternatives := [f"{method} {known}" for known in moved] or instead:
                message = f"there is no route {missing}. Use {alternatives[0]}."
            return answer(
                error.status_code, error_body(error.status_code, message, None, code), {"Allow": ", ".join(allow)} if allow else None
            )
        if error.status_code in (413, 415):
            message, code = error.detail, {413: "body_too_large", 415: "unsupported_encoding"}[error.status_code]
        return answer(error.status_code, error_body(error.status_code, message, None, code), error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:  # Starlette raises it again, for the log
        return answer(*as_response(error, uuid4().hex))


def _takes(route: Route, method: str, path: str) -> bool:
    return method in (route.methods or ()) and route.path_regex.match(path) is not None


async def _one_by_one(first: list[TextEvent], events: EventStream) -> AsyncIterator[TextEvent]:
    for event in first:
        yield event
    async for more in events:
        for event in more:
            yield event


async def _stream(response: Answer, first: list[TextEvent], events: EventStream) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream; events that arrive together are sent together. Errors become events of the stream."""
    try:
        yield _chunks(response, first)
        async for more in events:
            yield _chunks(response, more)
            if more[-1].kind == "error":
                return
        yield DONE
    except Exception as error:  # the status is already sent, so the error becomes an event
        status, body = as_response(error, request_id := uuid4().hex)
        if status >= 500:
            log.error("request %s failed", request_id, exc_info=error)
        yield error_event(status, body["error"]["message"], body["error"]["code"])


def _chunks(response: Answer, events: list[TextEvent]) -> bytes:
    out = []
    for event in events:
        if event.kind == "error":
            error = event.data["body"]["error"]
            out.append(error_event(event.data["status"], error["message"], error["code"]))
        out += [sse(chunk) for chunk in response.add(event)]
    return b"".join(out)


def answer(status: int, body: dict[str, Any], headers: Any = None) -> JSONResponse:
    more = retry_after(status)
    if status == 408:
        more["x-should-retry"] = "false"  # OpenAI's clients would repeat the request
    return JSONResponse(body, status, {**(headers or {}), **more})


class Guard:
    """A middleware that requires an API key on every route except those in `OPEN`."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            try:
                self.keys.check(Headers(scope=scope).get("authorization"))
            except RequestError as error:
                status, body = as_response(error, "")
                await answer(status, body, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """A middleware that rejects bodies larger than BODY_LIMIT_BYTES."""

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
                    413, f"the body is larger than {BODY_LIMIT_BYTES:,} bytes, the limit of this server; shorten the prompt."
                )
            return message

        await self.app(scope, limited, send)
