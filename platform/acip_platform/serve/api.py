"""Any-size models on Ray Serve: an HTTP deployment on the CPU, and engine deployments that hold the weights.

    client -> Serve's proxy -> Api (routes, keys, limits, metrics) -> EngineReplica (models, batches)
                                                                   -> Ray tasks (materializations)

`build` returns the application for `serve.run` and for a serve.yaml:

    import_path: acip_platform.serve.api:build
    args: {models: [smollm2-135m], alias: champion, num_gpus: 1}
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from acip.errors import AcipError
from acip.sizing.budget import Budget
from acip.utils.coerce import did_you_mean
from acip_platform.serve.autoscaling import SequencesPolicy
from acip_platform.serve.engine.request import DEFAULT_MAX_TOKENS
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.http.keys import Keys
from acip_platform.serve.http.metrics import Metrics
from acip_platform.serve.http.requests import (
    DEFAULT_SIZE,
    ChatRequest,
    CompletionRequest,
    MaterializationRequest,
    ModelSizeRequest,
    split_name,
)
from acip_platform.serve.http.routes import EventStream, routes
from acip_platform.serve.materializations import Materializations
from acip_platform.serve.replica import EngineReplica, model_kind
from acip_platform.settings import Settings, masked, sqlite_path
from acip_platform.tracking.registry import CHAMPION, ModelVersion, Registry, RegistryAwayError, RegistryError, few_retries, reached

BUILD_ARGS: dict[str, Any] = {
    "models": None,  # names in the registry; None = every model with the alias
    "alias": CHAMPION,
    "engine": "acip",  # the embedded engine; "vllm" = vLLM, which must be installed
    "num_cpus": 1,  # of each engine; also its number of threads
    "num_gpus": 0,
    "memory_gb": None,  # limit for the weights in each engine; None = most of the free memory
    "timeout_s": 300.0,  # of a request, including waiting; it then ends with the text so far and finish_reason "length"
    "default_max_tokens": DEFAULT_MAX_TOKENS,  # of a chat without max_tokens
    "default_size": DEFAULT_SIZE,  # of requests that name none, as after the @ of a name: "0.4", "8GB", ...; also of the first token
    "code_copies": 1.0,  # limit for the coded layers in memory, in units of 8 bits per weight; sizes in use may exceed it
    "max_answers": 128,  # limit for prompts times n of a request
    "drain_s": 30.0,  # time for running requests to end after the server received a signal to stop
    "cors_origins": [],  # origins of web pages that may send requests from a browser: ["https://host"], or ["*"] for all
    "max_requests": 64,  # of each engine, running or waiting; further requests receive status 429
    "replicas": 1,  # number of engines; their maximum if min_replicas is less
    "min_replicas": None,
    "export_cpus": 1,  # reserved for POST /v1/materializations; 0 = share those of the engine
}
ENGINE_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait would take cores from the HTTP deployment
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",  # plans of matrix products; `acip.layers.mixed_sizes` limits the number of shapes
}
ENGINE_LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
READY_TIMEOUT_S = 5.0
REGISTRY_TIMEOUT_S = 30.0  # to resolve a version
RETRY_S = 1.0
STREAM_END_S = 5.0  # the HTTP deployment runs longer than the engines, to end interrupted streams

log = logging.getLogger("ray.serve")


class Api:
    """The HTTP deployment. It holds the served version of each name, and limits the requests that it passes to the engines."""

    def __init__(
        self, engine: "DeploymentHandle[Any]", versions: list[ModelVersion], capacity: int, keys: Keys, export_cpus: float,
        max_answers: int = BUILD_ARGS["max_answers"], cors_origins: Sequence[str] = (), default_size: str = DEFAULT_SIZE,
    ) -> None:  # fmt: skip
        self.engine, self.capacity, self.keys = engine, capacity, keys
        self.max_answers, self.cors_origins, self.default_size = max_answers, cors_origins, default_size
        self.materializations = Materializations(Settings.from_env(), num_cpus=export_cpus)
        self.versions = {version.name: version for version in versions}
        self.metrics = Metrics()
        self.running = 0
        self._cards: dict[tuple[str, str], dict[str, Any]] = {}

    def __serve_build_asgi_app__(self) -> FastAPI:
        return routes(self, self.cors_origins)

    # ---- the interface of the routes, an `Endpoint`

    @property
    def names(self) -> list[str]:
        return list(self.versions)

    async def cards(self) -> list[dict[str, Any]]:
        """Return the cards of models in memory, and short cards of the others. It loads no model, so a broken one does not hide others."""
        if any((name, version.version) not in self._cards for name, version in self.versions.items()):
            self._cards |= {(card["id"], card["version"]): card for card in await self._call("cards")}
        return [self._cards.get((name, version.version)) or brief(version) for name, version in self.versions.items()]

    async def card(self, name: str) -> dict[str, Any]:
        """Return the card of a model. It is loaded if it is not in memory."""
        version = self.versions[name]
        key = (name, version.version)
        if key not in self._cards:
            self._cards[key] = await self._call("card", version)
        return self._cards[key]

    async def size(self, name: str, request: ModelSizeRequest) -> dict[str, Any]:
        return await self._call("size", self.versions[name], request)

    async def trade_off(self, name: str) -> dict[str, Any]:
        return await self._call("trade_off", self.versions[name])

    async def load(self, name: str, which: str) -> dict[str, Any]:
        """Serve this version under this name from now on. Running requests keep their version."""
        try:
            async with asyncio.timeout(REGISTRY_TIMEOUT_S):
                version = await asyncio.to_thread(_resolved, name, which)
        except RegistryError as error:
            raise RequestError(str(error), "model", "model_not_found", 404) from error
        except (RegistryAwayError, TimeoutError) as error:
            reason = str(error) or f"the registry does not answer within {REGISTRY_TIMEOUT_S:g} s."
            message = f"{reason} Version {self.versions[name].version} of {name} is served as before."
            raise RequestError(message, None, "registry_unavailable", 503) from error
        card = await self._call("card", version)
        self._cards[name, version.version], self.versions[name] = card, version
        return card

    async def materialize(self, request: MaterializationRequest) -> dict[str, Any]:
        name, _ = split_name(request.model, self.names)
        convention = await self.materializations.convention(self.versions[name])
        _, budget = request.name_and_budget(self.names, convention, self.default_size)
        return await self.materializations.start(self.versions[name], budget, request.quantize)

    async def ready(self) -> list[str]:
        """Return the names of the models once one of them has generated a token. Otherwise raise a RequestError with the reason."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                state = await self.engine.ready.remote()
        except (TimeoutError, BackPressureError, *ENGINE_LOST) as error:
            raise RequestError("the engine does not answer; it may be starting.", code="not_ready", status=503) from error
        if state["warm"]:
            return self.names
        if len(state["failed"]) == len(self.names):
            reasons = " ".join(f"{name} can't be loaded: {reason}" for name, reason in state["failed"].items())
            raise RequestError(reasons, code="load_failed", status=503)
        raise RequestError("the model is being loaded.", code="not_ready", status=503)

    async def answer(self, request: CompletionRequest | ChatRequest) -> EventStream:
        """Return the events of one request, in batches. The first event is the head or an error."""
        name, _ = request.name_and_budget(self.names)  # the size is known where the model is
        prompts, n = len(request.prompts) if isinstance(request, CompletionRequest) else 1, request.n or 1
        if prompts * n > self.max_answers:
            message = f"{prompts} prompts times n = {n} is more than {self.max_answers} answers; request fewer at once."
            raise RequestError(message, "n" if n > 1 else "prompt")
        if self.running >= self.capacity:
            raise _queue_full()
        return self._events(self.versions[name], request)

    async def _events(self, version: ModelVersion, request: CompletionRequest | ChatRequest) -> EventStream:
        self.running += 1
        measured = self.metrics.begin(version.name)
        try:
            async for events in self._with_retry(version, request):
                for event in events:
                    measured.on_event(event.kind, event.data)
                yield events
        except RequestError as error:
            measured.status = str(error.status)
            raise
        finally:
            self.running -= 1
            measured.end()

    async def _with_retry(self, version: ModelVersion, request: CompletionRequest | ChatRequest) -> EventStream:
        """Yield the events of a request. If the engine is lost before anything was sent to the client, try once more."""
        sent = False
        for is_last in (False, True):
            stream: Any = self.engine.options(stream=True).stream.remote(version, request)
            try:
                with _converted_errors():
                    async for events in stream:
                        sent |= bool(request.stream)
                        yield events
                return
            except RequestError as error:
                if error.code != "engine_restarting" or sent or is_last:
                    raise
                await asyncio.sleep(RETRY_S)
            finally:
                stream.cancel()

    async def _call(self, method: str, *args: Any) -> Any:
        with _converted_errors():
            result = await getattr(self.engine, method).remote(*args)
        if "status" in result:
            error = result["body"]["error"]
            raise RequestError(error["message"], error["param"], error["code"], result["status"])
        return result["body"]


def _resolved(name: str, which: str) -> ModelVersion:
    """Return the version of a number or an alias. Raise a RegistryError or RegistryAwayError."""
    settings = Settings.from_env()
    with reached(settings), few_retries():
        return Registry(settings).resolve(name, which)


@contextlib.contextmanager
def _converted_errors() -> Any:
    """Convert errors of Ray Serve to RequestErrors, whose responses state when to try again."""
    try:
        yield
    except BackPressureError as error:
        raise _queue_full() from error
    except ENGINE_LOST as error:
        message = "the engine stopped and is being replaced; try again in a moment."
        raise RequestError(message, code="engine_restarting", status=503) from error
    except RayTaskError as error:
        log.exception("the engine failed")
        raise RequestError("the engine failed; the reason is in the server's log.", code="internal_error", status=500) from error


def brief(version: ModelVersion) -> dict[str, Any]:
    """Return the short card of a model that is not in memory."""
    return {
        "id": version.name, "object": "model", "created": 0, "owned_by": "acip", "version": version.version, "artifact": version.uri,
    }  # fmt: skip


def _queue_full() -> RequestError:
    return RequestError("the server is busy and its queue is full; try again in a moment.", code="queue_full", status=429)


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application that `args` describe.

    Aliases are resolved here, once. The served versions change on a new deployment or with the route /v1/models/{id}/load.
    """
    for key in args:
        if key not in BUILD_ARGS:
            raise ValueError(f"unknown argument {key!r}{did_you_mean(key, BUILD_ARGS)}. Allowed: {', '.join(BUILD_ARGS)}.")
    chosen = BUILD_ARGS | args
    return application(choose(Settings.from_env(), chosen.pop("models"), chosen.pop("alias")), keys=Keys.from_env(), **chosen)


def application(
    versions: list[ModelVersion],
    *,
    engine: str,
    num_cpus: float,
    num_gpus: float,
    memory_gb: float | None,
    timeout_s: float,
    max_requests: int,
    replicas: int,
    min_replicas: int | None,
    export_cpus: float,
    default_max_tokens: int,
    default_size: str,
    code_copies: float,
    max_answers: int,
    drain_s: float,
    cors_origins: Sequence[str],
    keys: Keys,
) -> serve.Application:
    """Return the application that serves these versions. `BUILD_ARGS` describes the arguments."""
    check_limits(default_max_tokens, max_answers, timeout_s, drain_s, cors_origins, default_size, code_copies)
    model_kind(engine)  # raises an AcipError
    scaling: dict[str, Any] = {"num_replicas": replicas}
    if min_replicas is not None and min_replicas < replicas:
        policy = {"policy_function": SequencesPolicy, "policy_kwargs": {"per_engine": max(1, max_requests // 2)}}
        scaling = {"autoscaling_config": {"min_replicas": min_replicas, "max_replicas": replicas, "policy": policy}}
    replica = serve.deployment(
        name="Engine",
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus, "runtime_env": {"env_vars": ENGINE_ENV}},
        max_ongoing_requests=max_requests + 16,  # 16 more for cards and readiness
        max_queued_requests=-1,  # unlimited, because `Api` limits the requests
        health_check_period_s=5,
        max_constructor_retry_count=1,  # further attempts to load would fail too
        graceful_shutdown_timeout_s=drain_s,
        **scaling,
    )(EngineReplica)
    api = serve.deployment(
        name="Api",
        num_replicas=1,  # it holds the served versions and the number of running requests
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10 * max_requests * replicas,  # well above the limit of `Api`, which formats the errors of a full queue
        max_queued_requests=1024,
        backpressure_config={"status_code": 429, "retry_after_s": 2},
        graceful_shutdown_timeout_s=drain_s + STREAM_END_S,
    )(serve.ingress()(Api))
    threads = max(1, int(num_cpus))
    device = "cuda" if num_gpus else "cpu"
    bound = replica.bind(versions, timeout_s, device, threads, memory_gb, default_max_tokens, default_size, code_copies, engine)
    return api.bind(bound, versions, max_requests * replicas, keys, export_cpus, max_answers, cors_origins, default_size)


def check_limits(
    default_max_tokens: int,
    max_answers: int,
    timeout_s: float,
    drain_s: float,
    cors_origins: Sequence[str],
    default_size: str = DEFAULT_SIZE,
    code_copies: float = 1.0,
) -> None:
    """Raise an AcipError if an argument of `build` is invalid."""
    Budget.parse(str(default_size))
    for name, count in (("default_max_tokens", default_max_tokens), ("max_answers", max_answers)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise AcipError(f"{name} is {count!r}; it must be a whole number, at least 1.")
    for name, value, unit, minimum in (
        ("timeout_s", timeout_s, " of seconds", 1), ("drain_s", drain_s, " of seconds", 0), ("code_copies", code_copies, "", 0),
    ):  # fmt: skip
        if not isinstance(value, int | float) or isinstance(value, bool) or not minimum <= value < float("inf"):
            raise AcipError(f"{name} is {value!r}; it must be a number{unit}, at least {minimum}.")
    for origin in [cors_origins] if isinstance(cors_origins, str) else cors_origins:
        if isinstance(cors_origins, str) or not re.fullmatch(r"\*|https?://[^/\s]+", str(origin)):
            raise AcipError(f'cors_origins has {origin!r}; it must be a list of origins like ["https://host:8443"], or ["*"] for all.')


def choose(settings: Settings, names: list[str] | None, alias: str) -> list[ModelVersion]:
    """Return the versions to serve: those of `names`, or of every registered model with the alias.

    Raise a RegistryAwayError if the registry is not available, and a RegistryError if there is no such version.
    """
    with reached(settings):
        return _chosen(settings, names, alias)


def _chosen(settings: Settings, names: list[str] | None, alias: str) -> list[ModelVersion]:
    database = sqlite_path(settings.tracking_uri)
    new = database is not None and not database.exists()  # opening the registry would create it
    registry = None if new else Registry(settings)
    versions: list[ModelVersion] = []
    if registry is not None and names:
        for version in (registry.named(name, alias) for name in dict.fromkeys(names)):
            if other := next((known for known in versions if known.name == version.name), None):
                if other.version != version.version:
                    raise RegistryError(f"{version.name} is requested at versions {other.version} and {version.version}; choose one.")
                continue
            versions.append(version)
    elif registry is not None:
        for name in registry.models():
            with contextlib.suppress(RegistryError):
                versions.append(registry.resolve(name, alias))
    if not versions:
        aliases = _aliases(registry) if registry is not None else ""
        raise RegistryError(
            f"no model at {masked(settings.tracking_uri)} has the alias {alias!r}: there is nothing to serve. "
            + (f"Choose another --alias ({aliases})." if aliases else "Calibrate some with `python jobs/calibrate_all.py`.")
        )
    return versions


def _aliases(registry: Registry) -> str:
    """Return a text that lists the aliases of each model."""
    by_model = {name: [alias for version in registry.versions(name, {}) for alias in version.aliases] for name in registry.models()}
    return "; ".join(f"{name} has {', '.join(aliases) or 'none'}" for name, aliases in by_model.items())
