"""Concurrent clients of an OpenAI-compatible endpoint that use little CPU, because they share the cores with the server they measure.

    each client: one keep-alive connection -> a streamed completion -> the next one -> ...; counted: what arrives in the window

One process with one event loop writes HTTP/1.1 directly (`Load.client_cpu_s` is its CPU time). This file imports neither torch nor
the server.
"""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 300.0  # a request that takes longer is an error
POLL_S = 0.05  # interval of the check that all clients have received text
PAUSE_S = 0.2  # pause of a client after an error, so that it does not flood a server that is down
ROUTE = "/v1/completions"


class RequestError(Exception):
    """A status other than 200, or an error in the stream."""


class Connection:
    """One HTTP/1.1 keep-alive connection."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self.host, self.port = address.hostname or "127.0.0.1", address.port or 80
        self.writer: asyncio.StreamWriter | None = None

    async def post(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """Send a request and return the parts of the answer as they arrive. Raises RequestError for any status but 200."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        await self.send(body)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        parts = self._parts(head)
        if status != 200:
            raise RequestError(f"status {status}: {b''.join([part async for part in parts]).decode(errors='replace')[:200]}")
        return parts

    async def send(self, body: dict[str, Any]) -> None:
        assert self.writer is not None
        content = json.dumps(body).encode()
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        self.writer.write(head.encode() + b"\r\n\r\n" + content)
        await self.writer.drain()

    async def _parts(self, head: bytes) -> AsyncIterator[bytes]:
        if b"transfer-encoding: chunked" in head:
            while size := int((await self.reader.readline()).partition(b";")[0], 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        else:
            length = head.partition(b"content-length:")[2].split(maxsplit=1)[0]
            yield await self.reader.readexactly(int(length))

    def close(self) -> None:
        """Close the connection at once, without reading the rest of an answer."""
        if self.writer is not None:
            self.writer.transport.abort()
            self.writer = None


async def events(parts: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Parse server-sent events from parts that may end anywhere. The end mark, which not every server sends, is skipped."""
    rest = b""
    async for part in parts:
        *complete, rest = (rest + part).split(b"\n\n")
        for event in complete:
            if event.startswith(b"data: {"):
                yield json.loads(event[6:])


@dataclass
class Request:
    """One completion as its client received it. Times are seconds of time.perf_counter."""

    size: float | None
    sent_at: float
    arrivals: list[float] = field(default_factory=list)  # one time for each piece of text
    prompt_tokens: int = 0
    tokens: int = 0  # as counted by the server
    error: str = ""

    async def run(self, connection: Connection, body: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async for event in events(await connection.post(body)):
                    if "error" in event:
                        raise RequestError(str(event["error"])[:200])
                    if event["choices"] and event["choices"][0].get("text"):
                        self.arrivals.append(time.perf_counter())
                    if event.get("usage"):
                        self.prompt_tokens, self.tokens = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]
            if self.tokens != body["max_tokens"]:
                self.error = f"{self.tokens} tokens instead of {body['max_tokens']}"
        except (RequestError, OSError, EOFError, ValueError, KeyError, TimeoutError) as error:
            self.error = f"{type(error).__name__}: {error}"
            connection.close()
            await asyncio.sleep(PAUSE_S)


@dataclass(frozen=True)
class Workload:
    """The requests of all clients. They take the `sizes` in turn; None means a server with only one size."""

    url: str
    model: str
    prompts: Sequence[str]
    sizes: Sequence[float | None]
    max_tokens: int
    extra_fields: Mapping[str, Any] = field(default_factory=dict)  # of the request

    def body(self, number: int, max_tokens: int | None = None, stream: bool = True) -> dict[str, Any]:
        size = self.sizes[number % len(self.sizes)]
        return {
            "model": self.model,
            "prompt": self.prompts[number % len(self.prompts)],
            "max_tokens": max_tokens or self.max_tokens,
            "temperature": 0,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
            **({} if size is None else {"size_ratio": size}),
            **self.extra_fields,
        }


@dataclass
class Load:
    """The measurements of one load; counts refer to the window."""

    clients: int
    seconds: float
    tokens: dict[str, float] = field(default_factory=dict)  # by size
    burst_s: float = 0.0  # time until the last client has its first piece of text, if all start at once
    first_s: list[float] = field(default_factory=list)  # time from sending a request to its first piece of text
    per_token_s: list[float] = field(default_factory=list)  # mean time per token of a request, after its first one
    requests: int = 0  # that ended in the window
    errors: list[str] = field(default_factory=list)  # in the window and outside
    prompt_tokens: float = 0.0  # mean
    client_cpu_s: float = 0.0  # CPU time of this process, per second

    @property
    def tokens_per_s(self) -> float:
        return sum(self.tokens.values()) / self.seconds


def load(workload: Workload, clients: int, warm_s: float, window_s: float) -> Load:
    """Keep `clients` busy and measure a window.

    The window begins `warm_s` after each client has received text. After it, requests in progress are completed.
    """
    return asyncio.run(_load(workload, clients, warm_s, window_s))


async def _load(workload: Workload, clients: int, warm_s: float, window_s: float) -> Load:
    result, sent, start = Load(clients, window_s), list[Request](), time.perf_counter()
    begin = end = float("inf")

    async def client(index: int) -> None:
        connection, number = Connection(workload.url), index
        # the first answers have different lengths, so that clients are out of step: else all prompts would be prefilled at the same time
        max_tokens = 1 + (index * workload.max_tokens) // clients
        while time.perf_counter() < end:
            body = workload.body(number, max_tokens)
            sent.append(Request(body.get("size_ratio"), time.perf_counter()))
            await sent[-1].run(connection, body)
            number, max_tokens = number + clients + (clients % len(workload.sizes) == 0), workload.max_tokens
        connection.close()

    async def clock() -> None:
        nonlocal begin, end
        while len(sent) < clients or not all(request.arrivals or request.tokens or request.error for request in sent[:clients]):
            await asyncio.sleep(POLL_S)
        result.burst_s = max((request.arrivals[0] for request in sent[:clients] if request.arrivals), default=start) - start
        await asyncio.sleep(warm_s)
        begin, cpu = time.perf_counter(), time.process_time()
        end = begin + window_s
        await asyncio.sleep(window_s)
        result.client_cpu_s = (time.process_time() - cpu) / window_s

    await asyncio.gather(clock(), *(client(i) for i in range(clients)))
    return _window(sent, result, begin, end)


def _window(sent: list[Request], result: Load, begin: float, end: float) -> Load:
    """Fill in the numbers of the window.

    The tokens of a request are spread evenly over its pieces of text, because a piece may contain no token or several.
    """
    tokens = defaultdict[str, float](float)
    for request in sent:
        if request.error:
            result.errors.append(request.error)
        elif arrivals := request.arrivals:
            tokens[str(request.size)] += request.tokens * sum(begin <= at < end for at in arrivals) / len(arrivals)
            if begin <= arrivals[0] < end:
                result.first_s.append(arrivals[0] - request.sent_at)
            if begin <= arrivals[-1] < end:
                result.requests += 1
                if request.tokens > 1:
                    result.per_token_s.append((arrivals[-1] - arrivals[0]) / (request.tokens - 1))
    result.tokens = dict(tokens)
    prompts = [request.prompt_tokens for request in sent if not request.error]
    result.prompt_tokens = sum(prompts) / max(1, len(prompts))
    return result
