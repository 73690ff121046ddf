"""The HTTP routes and a real engine in one process.

The routes call the engine through a stand-in for Ray Serve's handle. Tests call the routes as an ASGI application. Ray does not run, so
the application starts in about a second.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from acip_platform.serve.api import Api
from acip_platform.serve.coordinator import Coordinator
from acip_platform.serve.http.keys import Keys
from acip_platform.serve.replica import EngineReplica
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Tracking

from acip.artifact.artifact import Artifact
from tests.support.engines import ENGINE
from tests.support.waiting import PATIENCE_S

Headers = list[tuple[bytes, bytes]]
JSON_TYPE: Headers = [(b"content-type", b"application/json")]


class LocalHandle:
    """An object in this process with the interface of Serve's handle: `handle.method.remote(...)`."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    def options(self, stream: bool) -> "LocalHandle":
        assert stream
        return self

    def broadcast(self, method: str, *args: Any) -> "LocalBroadcast":
        return LocalBroadcast(getattr(self.replica, method)(*args))

    def __getattr__(self, name: str) -> "LocalMethod":
        return LocalMethod(getattr(self.replica, name))


class LocalBroadcast:
    """A call of a method of the only replica, with the interface of Serve's broadcast."""

    def __init__(self, result: Any) -> None:
        self.result = result

    async def results_async(self) -> list[Any]:
        return [await self.result]


class LocalMethod:
    """A method of the object with the interface of a method of Serve's handle."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def remote(self, *args: Any) -> Any:
        result = self.method(*args)
        return LocalStream(result) if hasattr(result, "__aiter__") else result


class LocalStream:
    """A stream of items with the interface of Serve's response generator."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self.items = items

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.items

    def cancel(self) -> None:
        """Do nothing: a test reads every stream to its end."""


class Application:
    """The routes, and the event loop that runs them."""

    def __init__(self, home: Path, artifact: Artifact) -> None:
        settings = Settings.from_env({"ACIP_HOME": str(home)})
        self.registry = Registry(settings)
        run = Tracking(settings, "test").start("small", "f", {})
        self.version = self.registry.register("small", str(artifact.folder), run.run_id, {})
        self.registry.set_alias(self.version)
        self.start()

    def start(self) -> None:
        """Create the engine and the routes. A second call acts as a restart."""
        self.replica = EngineReplica([self.version], timeout_s=PATIENCE_S, device="cpu", num_cpus=1, memory_gb=None, engine=ENGINE)
        coordinator = Coordinator()
        coordinator.max_active = 0  # requests are validated, but no Ray task is started
        self.api = Api(LocalHandle(self.replica), LocalHandle(coordinator), [self.version], 64, Keys())  # type: ignore[arg-type]
        self.app: Any = self.api.__serve_build_asgi_app__()
        self.runner = asyncio.Runner()

    def ask(self, method: str, path: str, body: bytes = b"", headers: Headers = JSON_TYPE, query: bytes = b"") -> tuple[int, bytes]:
        """Send a request and return the status and the body of the response."""
        return self.runner.run(self._ask(method, path, body, headers, query))

    def post(self, path: str, **fields: Any) -> tuple[int, Any]:
        """Post `fields` as JSON and return the status and the parsed body."""
        status, body = self.ask("POST", path, json.dumps(fields).encode())
        return status, json.loads(body)

    async def _ask(self, method: str, path: str, body: bytes, headers: Headers, query: bytes) -> tuple[int, bytes]:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(), "query_string": query, "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        incoming = iter([{"type": "http.request", "body": body[:7], "more_body": True}, {"type": "http.request", "body": body[7:]}])
        status, content = 0, b""

        async def receive() -> Any:
            for message in incoming:
                return message
            return await asyncio.Event().wait()  # the client stays connected

        async def send(message: Any) -> None:
            nonlocal status, content
            status, content = message.get("status", status), content + message.get("body", b"")

        await self.app(scope, receive, send)
        return status, content

    def close(self) -> None:
        self.runner.close()
        self.replica.warm = True  # ends the retries of the loading thread
        self.replica.engine.close()
