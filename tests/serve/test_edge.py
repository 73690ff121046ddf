"""Raw HTTP requests, sent as bytes: upgrades, methods, hosts, targets, headers and encodings."""

import json
import socket
from typing import Any

import httpx
import pytest

from tests.support.server import Server

BODY = b'{"model": "small", "prompt": "a", "max_tokens": 1}'
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
HOST = b"Host: x\r\n"


def get(target: bytes = b"/health", headers: bytes = HOST, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return method + b" " + target + b" HTTP/" + version + b"\r\n" + headers + b"\r\n"


def post(body: bytes = BODY, headers: bytes = HOST, kind: bytes = b"application/json", version: bytes = b"1.1") -> bytes:
    more = headers + b"Content-Type: " + kind + b"\r\nContent-Length: " + str(len(body)).encode() + b"\r\n"
    return get(b"/v1/completions", more, b"POST", version) + body


def field(value: bytes) -> bytes:
    return b'{"model": "small", "prompt": "a", "max_tokens": 1, "metadata": ' + value + b"}"


def exchange(server: Server, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send these bytes and return (status, headers, body) of the response."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=120) as client:
        client.sendall(sent)
        reader = client.makefile("rb")
        status = int(reader.readline().split()[1])
        headers = {}
        while line := reader.readline().strip():
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        if status == 100:
            return after_continue(reader)
        length = int(headers.get("content-length", 0))
        return status, headers, b"" if sent.startswith(b"HEAD") else reader.read(length)


def after_continue(reader: Any) -> tuple[int, dict[str, str], bytes]:
    """Return (status, {}, b"") of the response after 100 Continue."""
    return int(reader.readline().split()[1]), {}, b""


ANSWERED = {
    "a completion": post(),
    "a POST that offers h2c, as Java's client sends it": post(headers=HOST + UPGRADE),
    "a GET that offers h2c": get(headers=HOST + UPGRADE),
    "HTTP/1.0 without a host": get(headers=b"", version=b"1.0"),
    "HTTP/1.1 without a host": get(headers=b""),
    "a POST of HTTP/1.0": post(version=b"1.0"),
    "HEAD of the page": get(b"/", method=b"HEAD"),
    "HEAD of a route": get(b"/v1/models/small", method=b"HEAD"),
    "a trailing slash": get(b"/health/"),
    "a trailing slash behind a list": get(b"/v1/models/"),
    "an absolute target": get(b"http://other.example:99/health"),
    "an absolute target of TLS": get(b"https://other.example/v1/models/small@0.6?a=b"),
    "a strange host": get(headers=b"Host: [::1]:99999\r\n"),
    "OPTIONS": get(b"/v1/completions", method=b"OPTIONS"),
    "OPTIONS of everything": get(b"*", method=b"OPTIONS"),
    "OPTIONS as HAProxy sends it": get(b"/", b"", b"OPTIONS", b"1.0"),
    "a body of chunks": get(b"/v1/completions", HOST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n", b"POST")
    + f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n",
    "a body that waits to be wanted": post(headers=HOST + b"Expect: 100-continue\r\n"),
    "a byte order mark": post(b"\xef\xbb\xbf" + BODY),
    "another type of JSON": post(kind=b"application/vnd.api+json; charset=UTF-8"),
    "the reference": get(b"/docs"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERED)
def test_request_is_answered(server: Server, case: str) -> None:
    status, headers, _ = exchange(server, ANSWERED[case])
    assert status in (200, 204)
    if "OPTIONS" in case:
        assert "OPTIONS" in headers["allow"]


REFUSED: dict[str, tuple[bytes, int, str, str]] = {  # sent bytes, status, code, part of the message
    "a WebSocket": (get(b"/v1/completions", HOST + WEBSOCKET + KEY), 400, "upgrade_not_supported", '"stream": true'),
    "a WebSocket without its key": (get(headers=HOST + WEBSOCKET), 400, "upgrade_not_supported", "does not support WebSockets"),
    "a POST that would be a WebSocket": (post(headers=HOST + WEBSOCKET), 400, "upgrade_not_supported", "does not support WebSockets"),
    "CONNECT": (get(b"example.com:443", method=b"CONNECT"), 405, "unknown_route", "not a proxy"),
    "TRACE": (get(method=b"TRACE"), 405, "unknown_route", "there is no route TRACE /health"),
    "an unknown method": (get(method=b"BREW"), 405, "unknown_route", "there is no route BREW /health"),
    "two hosts": (get(headers=b"Host: a\r\nHost: b\r\n"), 400, "invalid_http", "Host"),
    "large headers": (get(headers=HOST + b"X-A: " + b"a" * 100_000 + b"\r\n"), 431, "headers_too_large", "at most 65,536"),
    "a long target": (get(b"/" + b"a" * 70_000), 431, "headers_too_large", "at most 65,536"),
    "TLS to a plain port": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid_http", "Invalid HTTP"),
    "no length": (post(headers=HOST + b"Content-Length: many\r\n"), 400, "invalid_http", "Content-Length"),
    "a compressed body": (post(headers=HOST + b"Content-Encoding: gzip\r\n"), 415, "unsupported_encoding", "'gzip'"),
    "UTF-16": (post(BODY.decode().encode("utf-16")), 400, "invalid_json", "UTF-8"),
    "half a character": (post(b'{"prompt": "\xff"}'), 400, "invalid_json", "UTF-8"),
    "a form": (post(b"prompt=a", kind=b"application/x-www-form-urlencoded"), 400, "invalid_json", "Content-Type: application/json"),
    "NaN": (post(field(b"NaN")), 400, "invalid_json", "NaN is not a JSON number"),
    "a field twice": (post(field(b'{"a": 1, "a": 2}')), 400, "invalid_json", "'a' occurs twice"),
    "a number of many digits": (post(field(b"9" * 5000)), 400, "invalid_json", "4,300 digits"),
    "nested deeply": (post(field(b"[" * 500 + b"]" * 500)), 400, "invalid_json", "nested deeper than 64"),
    "nested more deeply than Python reads": (post(b"[" * 100_000), 400, "invalid_json", "nested deeper than 64"),
    "a path that is not UTF-8": (get(b"/v1/models/%ff"), 404, "model_not_found", "served: small, talker"),
    "the Responses API": (get(b"/v1/responses", method=b"POST"), 404, "unknown_route", "Use POST /v1/chat/completions"),
    "an answer of the Responses API": (get(b"/v1/responses/resp_1"), 404, "unknown_route", "Use POST /v1/chat/completions"),
    "a route without /v1": (get(b"/chat/completions", method=b"POST"), 404, "unknown_route", "Use POST /v1/chat/completions"),
    "a route with /v1 twice": (get(b"/v1/v1/completions", method=b"POST"), 404, "unknown_route", "Use POST /v1/completions"),
    "embeddings": (get(b"/v1/embeddings", method=b"POST"), 404, "unknown_route", "POST /v1/completions"),
    "too little time": (post(headers=HOST + b"X-Request-Timeout-Seconds: 0.0001\r\n"), 408, "timeout", "timed out"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_request_is_refused_with_a_json_error(server: Server, case: str) -> None:
    sent, expected, code, message_part = REFUSED[case]
    status, headers, body = exchange(server, sent)
    assert status == expected
    assert headers["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert message_part in error["message"]


def test_head_has_the_status_and_headers_of_get(server: Server) -> None:
    for path in ("/", "/health", "/ready", "/v1/models", "/v1/models/small", "/docs", "/openapi.json", "/v1/nothing"):
        head, get_response = server.client.head(path), server.client.get(path)
        assert head.status_code == get_response.status_code
        assert head.headers["content-type"] == get_response.headers["content-type"]
        assert head.headers.get("content-length") == get_response.headers.get("content-length")
        assert head.content == b""
