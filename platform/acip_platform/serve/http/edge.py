"""The outermost HTTP layer: it normalizes requests and formats errors that do not come from a route.

`Edge` wraps the application. It also wraps the proxy of Ray Serve, which loads `middlewares` by an environment variable (`PROXY_ENV`):

    client -> uvicorn (`Http`) -> Edge -> proxy of Ray Serve -> Edge -> routes

In the proxy, `Edge` converts plain-text errors of Ray Serve to the server's error format, so that clients retry while the application
starts, stops or is replaced. It ends an interrupted stream with an error event.
"""

import json
import re
import sys
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acip_platform.serve.http.answers import error_event
from acip_platform.serve.http.errors import error_body, retry_after

HEADER_LIMIT_BYTES = 64 << 10
HOST = re.compile(rb"(?im)^host[ \t]*:")
PROXY_ENV = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "acip_platform.serve.http.edge:middlewares"}  # for the processes of Ray
AWAY = "the server is starting or stopping. Try again in a moment."
LOST = "the server stopped or was replaced before the response was complete. Try again in a moment."


class Edge:
    """An ASGI middleware that normalizes requests, rejects requests that no route can answer, and formats errors.

    It normalizes absolute request targets (http://host/path) and trailing slashes, and drops the body of responses to HEAD.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if rejection := _refusal(scope):
            await rejection(scope, receive, send)
            return
        scope = {**scope, "path": _path(scope["path"])}
        answer = _Answer(send, scope["method"] == "HEAD")
        try:
            await self.app(scope, receive, answer)
        finally:
            await answer.finish()


class _Answer:
    """A filter for the ASGI messages of one response."""

    def __init__(self, send: Send, head: bool) -> None:
        self.send, self.head = send, head
        self.status, self.streams, self.ended = 0, False, False
        self.plain: bytes | None = None  # the text of an error that is being replaced

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kind = Headers(raw=message.get("headers", [])).get("content-type", "")
            self.streams = kind.startswith("text/event-stream")
            if self.status >= 400 and (not kind or kind.startswith("text/plain")):
                self.plain, self.headers = b"", message.get("headers", [])
                return
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
            if self.plain is not None:
                self.plain += message.get("body", b"")
                if self.ended:
                    await self._replace()
                return
            if self.head:
                message = {**message, "body": b""}
        await self.send(message)

    async def _replace(self) -> None:
        """Send the plain-text error in the server's error format."""
        text = (self.plain or b"").decode(errors="replace").strip()
        status, code = self.status, {408: "timeout", 429: "queue_full", 503: "unavailable"}.get(self.status, "http_error")
        if status == 404 and text.startswith("Path '"):  # Ray Serve has no application at this path
            status, text, code = 503, AWAY, "not_ready"
        elif status == 500:
            status, text, code = 503, LOST, "engine_restarting"
        kept = [(name, value) for name, value in self.headers if name.lower() in (b"x-request-id", b"retry-after")]
        await self._error(status, text or "the request failed.", code, kept)

    async def _error(self, status: int, message: str, code: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        response = _json(status, message, code)
        more = MutableHeaders(raw=headers or [])
        response.headers.update({name: value for name, value in more.items() if name not in response.headers})
        await self.send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
        await self.send({"type": "http.response.body", "body": b"" if self.head else bytes(response.body)})

    async def finish(self) -> None:
        """Complete a response that the application left incomplete because its process died."""
        if self.ended or sys.exception() is not None:
            return
        if not self.status:
            await self._error(503, LOST, "engine_restarting")
        elif self.plain is not None:
            await self._replace()
        elif self.streams and not self.head:
            await self.send({"type": "http.response.body", "body": b"\n\n" + error_event(503, LOST, "engine_restarting")})


def _refusal(scope: Scope) -> JSONResponse | None:
    """Return an error response for a request that no route can answer, or None."""
    headers = Headers(scope=scope)
    size = sum(len(name) + len(value) for name, value in headers.raw) + len(scope["query_string"]) + len(scope["path"])
    if size > HEADER_LIMIT_BYTES:
        message = f"the request line and headers have {size:,} bytes; at most {HEADER_LIMIT_BYTES:,} are allowed."
        return _json(431, message, "headers_too_large", close=True)
    if headers.get("upgrade", "").lower() == "websocket":
        message = 'this server does not support WebSockets. Send POST with "stream": true, and read server-sent events.'
        return _json(400, message, "upgrade_not_supported", close=True)
    if scope["method"] == "CONNECT":
        return _json(405, "this server is not a proxy and does not support CONNECT.", "unknown_route", close=True)
    return None


def _path(path: str) -> str:
    """Return the path of a request target of any form."""
    if path.startswith(("http://", "https://")):
        try:
            path = urlsplit(path).path
        except ValueError:  # an invalid host
            path = "/" + path.split("/", 3)[-1]
    if path in ("", "*"):
        return "/"
    return path[:-1] if path.endswith("/") and len(path) > 1 else path


def _json(status: int, message: str, code: str, close: bool = False) -> JSONResponse:
    headers = retry_after(status) | ({"Connection": "close"} if close else {})
    return JSONResponse(error_body(status, message, None, code), status, headers)


def middlewares() -> list[Middleware]:
    """Return the middlewares of Ray Serve's proxy, and make uvicorn parse requests with `Http`.

    Ray Serve calls this function in the proxy's process before it listens.
    """
    import uvicorn.config

    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:Http"
    uvicorn.config.WS_PROTOCOLS["auto"] = None  # so that `Edge` receives a WebSocket upgrade as an HTTP request
    return [Middleware(Edge)]


def __getattr__(name: str) -> Any:
    """Define `Http` on first use, because only the proxy needs uvicorn."""
    if name != "Http":
        raise AttributeError(name)
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Http(H11Protocol):  # type: ignore[misc, unused-ignore]
        """HTTP/1.1 by h11, which reads the body of a request with an upgrade to h2c; httptools drops it.

        Invalid HTTP is answered in the server's error format.
        """

        def data_received(self, data: bytes) -> None:
            """Parse received bytes. Add an empty Host header if it is missing: HTTP/1.1 requires it, but some health checks omit it."""
            line, _, rest = data.partition(b"\r\n")
            head, complete, _ = data.partition(b"\r\n\r\n")
            if self.conn.their_state is h11.IDLE and complete and line.endswith(b" HTTP/1.1") and not HOST.search(head):
                data = line + b"\r\nHost: \r\n" + rest
            super().data_received(data)

        def send_400_response(self, msg: str) -> None:
            reason = f"{msg.rstrip('.')}: {sys.exception() or 'unknown'}."
            body = json.dumps(error_body(400, reason, None, "invalid_http")).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            try:
                for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event))
            except h11.LocalProtocolError:  # a response has already started
                pass
            self.transport.close()

        def _unsupported_upgrade_warning(self) -> None:
            """Log nothing, because ignoring an upgrade is allowed."""

    return Http
