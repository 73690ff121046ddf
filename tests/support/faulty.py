"""A proxy in front of a real HTTP server that injects the faults of networks and overloaded servers.

Faults, chosen by request:  500, 503     an error response of S3; the server does not receive the request
                            reset        the connection is closed without a response
                            lost         the server handles the request, but its response is dropped
                            cut          the response ends in the middle of its body
                            slow         the response takes SLOW_S longer
                            flip         one bit of the request's body is flipped
"""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

from tests.support.waiting import PATIENCE_S

SLOW_S = 0.3
CODES = {"500": "InternalError", "503": "SlowDown"}
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}  # headers of one connection, not of the message
Choose = Callable[[str, str, int], str]  # (method, path with query, number of earlier requests with both) -> a fault or ""


class Proxy(ThreadingHTTPServer):
    """The proxy. `choose` selects the fault of each request; `requests` and `injected` count requests and faults."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = urlparse(target).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.choose: Choose = lambda method, path, before: ""
        self.requests: Counter[tuple[str, str]] = Counter()
        self.injected: Counter[str] = Counter()  # by fault
        self.lock = threading.Lock()

    def fault(self, method: str, path: str) -> str:
        """Choose the fault of a request and count both."""
        with self.lock:
            fault = self.choose(method, path, self.requests[method, path])
            self.requests[method, path] += 1
            self.injected[fault] += bool(fault)
        return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients may close their connections."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        self.handle_request()

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self.command, self.path)
        if fault == "reset":
            self.close_connection = True
        elif fault in CODES:
            text = f"<?xml version='1.0'?><Error><Code>{CODES[fault]}</Code><Message>injected</Message></Error>".encode()
            self.respond(int(fault), [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))], text)
        else:
            if fault == "flip" and body:
                body = bytes([body[0] ^ 1]) + body[1:]
            self.relay(body, fault)

    def relay(self, body: bytes, fault: str) -> None:
        """Forward the request to the server and return its response, with `fault`."""
        connection = http.client.HTTPConnection(self.server.target, timeout=PATIENCE_S)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in {*HOP_BY_HOP, "expect"}}
            connection.request(self.command, self.path, body or None, headers)
            response = connection.getresponse()
            content = response.read()
        except OSError:  # the server is down
            self.close_connection = True
            return
        finally:
            connection.close()
        if fault == "slow":
            time.sleep(SLOW_S)
        if fault == "lost":
            self.close_connection = True
            return
        headers_back = [(name, value) for name, value in response.getheaders() if name.lower() not in {*HOP_BY_HOP, "content-length"}]
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        cut = len(content) // 2 if fault == "cut" else len(content)
        self.respond(response.status, [*headers_back, ("Content-Length", length or "0")], content[:cut])
        self.close_connection |= fault == "cut"

    def respond(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    """Run a proxy in front of the server at the URL `target`."""
    server = Proxy(target)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
