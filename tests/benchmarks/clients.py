"""Concurrent clients of an OpenAI-shaped endpoint, cheap enough to share the cores with the server they measure.

    clients -> one connection each, kept -> a completion, streamed -> the next one ... -> what arrived in the window

One process, one event loop and HTTP/1.1 by hand, to take little (`Load.client_cpu_s` says how much it was). Nothing of
torch or of the server is imported here.
"""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 300.0  # a request that takes longer is an error
LOOK_S = 0.05  # between looks at whether all have heard something
PAUSE_S = 0.2  # after an error, so that a server that is down is not asked without end
ROUTE = "/v1/completions"


class Refused(Exception):  # noqa: N818 - a status is an answer too
    """Any status but 200, or an error in the stream."""


class Connection:
    """One HTTP/1.1 connection that is kept open."""

    def __init__(self, url: str) -> None:
        at = urlsplit(url)
        self.host, self.port = at.hostname or "127.0.0.1", at.port or 80
        self.writer: asyncio.StreamWriter | None = None

    async def post(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """The parts of the answer as they come. Refused for any status but 200."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        await self.send(body)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        parts = self._parts(head)
        if status != 200:
            raise Refused(f"status {status}: {b''.join([part async for part in parts]).decode(errors='replace')[:200]}")
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
        """At once, whatever is on its way."""
        if self.writer is not None:
            self.writer.transport.abort()
            self.writer = None


async def events(parts: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events, wherever they were cut. The end mark, which not every server sends, is left out."""
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: {"):
                yield json.loads(event[6:])


@dataclass
class Request:
    """One completion, as its client saw it. Times are seconds of time.perf_counter."""

    size: float | None
    asked: float
    arrivals: list[float] = field(default_factory=list)  # of pieces of text
    prompt_tokens: int = 0
    tokens: int = 0  # by the server's own count
    error: str = ""

    async def run(self, connection: Connection, body: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for event in events(await connection.post(body)):
                    if "error" in event:
                        raise Refused(str(event["error"])[:200])
                    if event["choices"] and event["choices"][0].get("text"):
                        self.arrivals.append(time.perf_counter())
                    if event.get("usage"):
                        self.prompt_tokens, self.tokens = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]
            if self.tokens != body["max_tokens"]:
                self.error = f"{self.tokens} tokens instead of {body['max_tokens']}"
        except (Refused, OSError, EOFError, ValueError, KeyError, TimeoutError) as error:
            self.error = f"{type(error).__name__}: {error}"
            connection.close()
            await asyncio.sleep(PAUSE_S)


@dataclass(frozen=True)
class Ask:
    """What all clients of a load ask. `sizes` in turns; None where the server has one size only."""

    url: str
    model: str
    prompts: Sequence[str]
    sizes: Sequence[float | None]
    max_tokens: int
    more: Mapping[str, Any] = field(default_factory=dict)  # fields of the request

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
            **self.more,
        }


@dataclass
class Load:
    """What arrived in the window of a load."""

    clients: int
    seconds: float
    tokens: dict[str, float] = field(default_factory=dict)  # of each size
    burst_s: float = 0.0  # until the last client has its first piece of text, when all ask at once
    first_s: list[float] = field(default_factory=list)  # from asking to the first piece of text, in the window
    per_token_s: list[float] = field(default_factory=list)  # between the first and the last token of a request, each
    requests: int = 0  # that ended in the window
    errors: list[str] = field(default_factory=list)  # window or not
    prompt_tokens: float = 0.0  # mean
    client_cpu_s: float = 0.0  # of this process, per second

    @property
    def tokens_per_s(self) -> float:
        return sum(self.tokens.values()) / self.seconds


def load(ask: Ask, clients: int, warm_s: float, window_s: float) -> Load:
    """Keep `clients` busy: until each has heard something, for `warm_s`, for the window, and until what is on its way is answered."""
    return asyncio.run(_load(ask, clients, warm_s, window_s))


async def _load(ask: Ask, clients: int, warm_s: float, window_s: float) -> Load:
    result, done, asked = Load(clients, window_s), list[Request](), time.perf_counter()
    begin = end = float("inf")

    async def client(index: int) -> None:
        connection, number = Connection(ask.url), index
        # the first answer is cut somewhere, so that clients are not in step: they would all be read at once and end at once
        max_tokens = 1 + (index * ask.max_tokens) // clients
        while time.perf_counter() < end:
            body = ask.body(number, max_tokens)
            done.append(Request(body.get("size_ratio"), time.perf_counter()))
            await done[-1].run(connection, body)
            number, max_tokens = number + clients + (clients % len(ask.sizes) == 0), ask.max_tokens
        connection.close()

    async def clock() -> None:
        nonlocal begin, end
        while len(done) < clients or not all(request.arrivals or request.tokens or request.error for request in done[:clients]):
            await asyncio.sleep(LOOK_S)
        result.burst_s = max((request.arrivals[0] for request in done[:clients] if request.arrivals), default=asked) - asked
        await asyncio.sleep(warm_s)
        begin, cpu = time.perf_counter(), time.process_time()
        end = begin + window_s
        await asyncio.sleep(window_s)
        result.client_cpu_s = (time.process_time() - cpu) / window_s

    await asyncio.gather(clock(), *(client(i) for i in range(clients)))
    return _window(done, result, begin, end)


def _window(done: list[Request], result: Load, begin: float, end: float) -> Load:
    """A request's tokens are spread over the pieces of text that it came in: a piece may hold none, or more than one."""
    tokens = defaultdict[str, float](float)
    for request in done:
        if request.error:
            result.errors.append(request.error)
        elif arrivals := request.arrivals:
            tokens[str(request.size)] += request.tokens * sum(begin <= at < end for at in arrivals) / len(arrivals)
            if begin <= arrivals[0] < end:
                result.first_s.append(arrivals[0] - request.asked)
            if begin <= arrivals[-1] < end:
                result.requests += 1
                if request.tokens > 1:
                    result.per_token_s.append((arrivals[-1] - arrivals[0]) / (request.tokens - 1))
    result.tokens = dict(tokens)
    asked = [request.prompt_tokens for request in done if not request.error]
    result.prompt_tokens = sum(asked) / max(1, len(asked))
    return result
