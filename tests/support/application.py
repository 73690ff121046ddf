"""The routes with a real engine behind them, in this process: the engine is asked as Serve's handles are, the routes as a server asks
an ASGI application. Nothing of Ray runs, so it starts in a second.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from acip_platform.serve.api import Api
from acip_platform.serve.http.keys import Keys
from acip_platform.serve.replica import EngineReplica
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry
from acip_platform.tracking.runs import Tracking

from acip.artifact.artifact import Artifact
from tests.support.waiting import PATIENCE_S

Headers = list[tuple[bytes, bytes]]
JSON_TYPE: Headers = [(b"content-type", b"application/json")]


class Here:
    """An engine in this process, with the face of Serve's handle: `engine.method.remote(...)`."""

    def __init__(self, replica: EngineReplica) -> None:
        self.replica = replica

    def options(self, stream: bool) -> "Here":
        assert stream
        return self

    def __getattr__(self, name: str) -> "Method":
        return Method(getattr(self.replica, name))


class Method:
    def __init__(self, method: Any) -> None:
        self.method = method

    def remote(self, *args: Any) -> Any:
        made = self.method(*args)
        return Stream(made) if hasattr(made, "__aiter__") else made


class Stream:
    def __init__(self, items: AsyncIterator[Any]) -> None:
        self.items = items

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.items

    def cancel(self) -> None:
        """What is read to its end has nothing to cancel."""


class Application:
    """The routes, and one event loop that they are asked in."""

    def __init__(self, home: Path, artifact: Artifact) -> None:
        settings = Settings.from_env({"ACIP_HOME": str(home)})
        self.registry = Registry(settings)
        run = Tracking(settings, "test").start("small", "f", {})
        self.version = self.registry.register("small", str(artifact.folder), run.run_id, {})
        self.registry.set_alias(self.version)
        self.start()

    def start(self) -> None:
        """The engine and the routes, as after a restart."""
        self.replica = EngineReplica([self.version], timeout_s=PATIENCE_S, device="cpu", num_cpus=1, memory_gb=None)
        api = Api(Here(self.replica), [self.version], 64, Keys(), 0)  # type: ignore[arg-type]
        api.materializations.max_active = 0  # all of a request is checked; no Ray task is begun
        self.app: Any = api.__serve_build_asgi_app__()
        self.runner = asyncio.Runner()

    def ask(self, method: str, path: str, body: bytes = b"", headers: Headers = JSON_TYPE, query: bytes = b"") -> tuple[int, bytes]:
        return self.runner.run(self._ask(method, path, body, headers, query))

    def post(self, path: str, **fields: Any) -> tuple[int, Any]:
        status, body = self.ask("POST", path, json.dumps(fields).encode())
        return status, json.loads(body)

    async def _ask(self, method: str, path: str, body: bytes, headers: Headers, query: bytes) -> tuple[int, bytes]:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(), "query_string": query, "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        incoming = iter([{"type": "http.request", "body": body[:7], "more_body": True}, {"type": "http.request", "body": body[7:]}])
        status, answered = 0, b""

        async def receive() -> Any:
            for message in incoming:
                return message
            return await asyncio.Event().wait()  # the client stays

        async def send(message: Any) -> None:
            nonlocal status, answered
            status, answered = message.get("status", status), answered + message.get("body", b"")

        await self.app(scope, receive, send)
        return status, answered

    def close(self) -> None:
        self.runner.close()
        self.replica.warm = True  # nothing is tried again
        self.replica.engine.close()
