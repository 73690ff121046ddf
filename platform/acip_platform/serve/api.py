"""Any-size models on Ray Serve: HTTP on the CPU in front of one engine that holds the weights.

    client -> Serve's proxy -> Api (routes, checks) -> Engine (one replica: queue, lock, generate)

`build` makes the application, for `serve.run` and for a serve.yaml:

    import_path: acip_platform.serve.api:build
    args: {models: [smollm2-135m], alias: champion, num_gpus: 1}
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from acip.artifact import Artifact
from acip.recipe import did_you_mean
from acip_platform.serve.engine import Engine
from acip_platform.serve.errors import RequestError, as_response, error_body
from acip_platform.serve.request import CompletionRequest
from acip_platform.serve.routes import Answer, routes
from acip_platform.serve.served import Served
from acip_platform.settings import Settings, masked
from acip_platform.store import Store
from acip_platform.tracking import CHAMPION, ModelVersion, Registry, RegistryError

BUILD_ARGS: dict[str, Any] = {
    "models": None,  # names in the registry; None = every model that has the alias
    "alias": CHAMPION,
    "num_cpus": 1,  # of the engine; also its threads
    "num_gpus": 0,
    "timeout_s": 300.0,  # of a request, waiting included
    "max_ongoing_requests": 8,  # in the engine: one generates, the others wait for it
    "max_queued_requests": 32,  # before the engine; more are answered 429
}
GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
HEALTH_TIMEOUT_S = 2.0
DRAIN_S = 20  # what is being answered when the server is told to stop has this long

log = logging.getLogger("ray.serve")


class EngineReplica:
    """The replica with the weights. Answers with plain values: an exception would reach the client as a Ray traceback."""

    def __init__(self, versions: list[ModelVersion], timeout_s: float, device: str) -> None:
        settings = Settings.from_env()
        store = Store(settings.store, settings.home / "cache")
        self.engine = Engine([Served(version, Artifact.open(store.fetch(version.uri)), device) for version in versions], timeout_s)
        self.engine.warm_up()

    async def cards(self) -> list[dict[str, Any]]:
        return [served.card() for served in self.engine.models.values()]

    async def complete(self, request: CompletionRequest) -> Answer:
        cancelled = threading.Event()
        try:
            return 200, await asyncio.to_thread(self.engine.complete, request, cancelled)
        except asyncio.CancelledError:  # the client is gone; the thread stops at its next token
            cancelled.set()
            raise
        except Exception as error:
            request_id = uuid4().hex
            status, body = as_response(error, request_id)
            if status >= 500:
                log.exception("request %s failed", request_id)
            return status, body


class Api:
    """HTTP in front of the engine. Counts what it passes on: Serve's own limit lets a burst through while replicas are asked."""

    def __init__(self, engine: DeploymentHandle, capacity: int) -> None:
        self.engine, self.capacity = engine, capacity
        self.running = 0
        self._cards: list[dict[str, Any]] = []

    def __serve_build_asgi_app__(self) -> FastAPI:
        return routes(self.cards, self.complete, self.health)

    async def cards(self) -> list[dict[str, Any]]:
        """Asked for once: the versions are pinned, so a restarted engine serves the same."""
        if not self._cards:
            with _told_apart():
                self._cards = await self.engine.cards.remote()
        return self._cards

    async def complete(self, request: CompletionRequest) -> Answer:
        if self.running >= self.capacity:
            raise _queue_full()
        self.running += 1
        try:
            with _told_apart():
                return await self.engine.complete.remote(request)
        finally:
            self.running -= 1

    async def health(self) -> Answer:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                cards = await self.engine.cards.remote()
            return 200, {"status": "ok", "models": [card["id"] for card in cards]}
        except (TimeoutError, BackPressureError):
            if self.running:
                return 200, {"status": "busy"}
        except GONE:
            pass
        return 503, error_body(503, "the engine does not answer; it may be starting.", code="engine_restarting")


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """Serve's reasons for not reaching the engine, as answers that say when to try again."""
    try:
        yield
    except BackPressureError as error:
        raise _queue_full() from error
    except GONE as error:
        message = "the engine stopped and is being replaced; try again in a moment."
        raise RequestError(message, code="engine_restarting", status=503) from error


def _queue_full() -> RequestError:
    return RequestError("the server is busy and its queue is full; try again in a moment.", code="queue_full", status=429)


def build(args: dict[str, Any]) -> serve.Application:
    """The application that `args` describe. Aliases are resolved here, once: what is served changes when it is deployed again."""
    for key in args:
        if key not in BUILD_ARGS:
            raise ValueError(f"unknown argument {key!r}{did_you_mean(key, BUILD_ARGS)}. Allowed: {', '.join(BUILD_ARGS)}.")
    chosen = BUILD_ARGS | args
    return application(choose(Settings.from_env(), chosen.pop("models"), chosen.pop("alias")), **chosen)


def application(
    versions: list[ModelVersion],
    *,
    num_cpus: float,
    num_gpus: float,
    timeout_s: float,
    max_ongoing_requests: int,
    max_queued_requests: int,
) -> serve.Application:
    engine = serve.deployment(
        name="Engine",
        num_replicas=1,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests + 16,  # the rest is for /health and /v1/models
        health_check_period_s=5,
        max_constructor_retry_count=1,  # what can't be loaded once can't be loaded the third time either
        graceful_shutdown_timeout_s=DRAIN_S,
    )(EngineReplica)
    api = serve.deployment(
        name="Api",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=256,  # well above what the engine queues, so that a full queue is answered here, in our shape
        max_queued_requests=256,
        backpressure_config={"status_code": 429, "retry_after_s": 2},
        graceful_shutdown_timeout_s=DRAIN_S,
    )(serve.ingress()(Api))
    return api.bind(engine.bind(versions, timeout_s, "cuda" if num_gpus else "cpu"), max_ongoing_requests + max_queued_requests)


def choose(settings: Settings, names: list[str] | None, alias: str) -> list[ModelVersion]:
    """The versions to serve: those of `names`, else of every registered model that has the alias."""
    database = settings.tracking_uri.removeprefix("sqlite:///")
    new = database != settings.tracking_uri and not Path(database).exists()  # asking would create it
    registry = None if new else Registry(settings)
    versions = []
    if registry is not None and names:
        versions = [registry.resolve(name, alias) for name in dict.fromkeys(names)]
    elif registry is not None:
        for name in registry.models():
            with contextlib.suppress(RegistryError):
                versions.append(registry.resolve(name, alias))
    if not versions:
        raise RegistryError(
            f"no model at {masked(settings.tracking_uri)} has the alias {alias!r}: there is nothing to serve. "
            "Calibrate some with `python jobs/calibrate_all.py`."
        )
    return versions
