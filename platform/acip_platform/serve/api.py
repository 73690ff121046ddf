"""Any-size models on Ray Serve: an HTTP deployment on the CPU, and engine deployments that hold the weights.

    client -> Serve's proxy -> Api (routes, keys, limits, metrics) -> EngineReplica (models, batches)
                                                                   -> Coordinator (choices of versions, exports)

Any number of Api and EngineReplica may run. An Api holds nothing that another one lacks: what is served follows from the registry, from
`user_config`, and from the choices in the Coordinator (`served_versions`); Ray sums the metrics; exports are found in the Coordinator and
in the store.

`build` returns the application for `serve.run` and for a serve.yaml:

    import_path: acip_platform.serve.api:build
    args: {models: [smollm2-135m], alias: champion, num_gpus: 1}
"""

import asyncio
import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from acip.errors import AcipError
from acip.sizing.budget import Budget
from acip.utils.coerce import did_you_mean
from acip.utils.malloc import HUGE_PAGES
from acip_platform.serve.autoscaling import SequencesPolicy
from acip_platform.serve.coordinator import LOST, Coordinator
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
from acip_platform.serve.replica_errors import converted, queue_full
from acip_platform.serve.served_versions import ServedVersions, registered
from acip_platform.settings import Settings
from acip_platform.tracking.registry import CHAMPION, ModelVersion, RegistryAwayError, RegistryError

BUILD_ARGS: dict[str, Any] = {
    "models": None,  # names in the registry; None = every model with the alias. `user_config` of Api changes it without a restart
    "alias": CHAMPION,  # likewise
    "engine": "acip",  # the embedded engine; "vllm" = vLLM, which must be installed
    "num_cpus": 1,  # of each engine; also its number of threads
    "num_gpus": 0,
    "memory_gb": None,  # limit for the weights in each engine; None = most of the free memory
    "timeout_s": 300.0,  # of a request, including waiting; it then ends with the text so far and finish_reason "length"
    "default_max_tokens": DEFAULT_MAX_TOKENS,  # of a chat without max_tokens
    "default_size": DEFAULT_SIZE,  # of requests that name none, as after the @ of a name: "0.4", "8GB", ...; also of the first token
    "max_size": None,  # the largest size that is served; weights that only larger ones need are not loaded. None = all sizes
    "code_copies": 1.0,  # limit for the coded layers in memory, in units of 8 bits per weight; sizes in use may exceed it
    "max_answers": 128,  # limit for prompts times n of a request
    "drain_s": 30.0,  # time for running requests to end after the server received a signal to stop
    "cors_origins": [],  # origins of web pages that may send requests from a browser: ["https://host"], or ["*"] for all
    "max_requests": 64,  # of each engine, running or waiting; further requests receive status 429
    "replicas": 1,  # number of engines; their maximum if min_replicas is less
    "min_replicas": None,
    "http_replicas": 1,  # number of processes that answer HTTP
    "export_cpus": 1,  # reserved for POST /v1/materializations; 0 = share those of the engine
}
ENGINE_ENV = {
    **HUGE_PAGES,
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait would take cores from the HTTP deployment
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",  # plans of matrix products; `acip.layers.mixed_sizes` limits the number of shapes
}
READY_TIMEOUT_S = 5.0
RETRY_S = 1.0  # before the second attempt of a request whose engine was lost
OVERLOAD = 4  # times max_requests: the limit for requests with min_size, which become cheaper while others wait
STREAM_END_S = 5.0  # the HTTP deployment runs longer than the engines, to end interrupted streams


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application that `args` describe.

    Aliases are resolved here. The served versions change with `user_config`, and with the route /v1/models/{id}/load.
    """
    for key in args:
        if key not in BUILD_ARGS:
            raise ValueError(f"unknown argument {key!r}{did_you_mean(key, BUILD_ARGS)}. Allowed: {', '.join(BUILD_ARGS)}.")
    chosen = BUILD_ARGS | args
    config = {"models": chosen.pop("models"), "alias": chosen.pop("alias")}
    return application(registered(Settings.from_env(), config["models"], config["alias"]), config, keys=Keys.from_env(), **chosen)


def application(
    versions: list[ModelVersion],
    config: dict[str, Any],
    *,
    engine: str,
    num_cpus: float,
    num_gpus: float,
    memory_gb: float | None,
    timeout_s: float,
    max_requests: int,
    replicas: int,
    min_replicas: int | None,
    http_replicas: int,
    export_cpus: float,
    default_max_tokens: int,
    default_size: str,
    max_size: str | None,
    code_copies: float,
    max_answers: int,
    drain_s: float,
    cors_origins: Sequence[str],
    keys: Keys,
) -> serve.Application:
    """Return the application that serves these versions, which `config` selects. `BUILD_ARGS` describes the arguments."""
    default_size = str(default_size)  # a ratio in YAML is a number
    check_limits(default_max_tokens, max_answers, timeout_s, drain_s, cors_origins, default_size, code_copies, max_size, memory_gb)
    _check_counts(max_requests=max_requests, replicas=replicas, http_replicas=http_replicas)
    if max_size is not None:
        max_size = str(max_size)
        default_size = max_size if default_size == DEFAULT_SIZE else default_size
    model_kind(engine)  # raises an AcipError
    scaling: dict[str, Any] = {"num_replicas": replicas}
    if min_replicas is not None and min_replicas < replicas:
        policy = {"policy_function": SequencesPolicy, "policy_kwargs": {"per_engine": max(1, max_requests // 2)}}
        scaling = {"autoscaling_config": {"min_replicas": min_replicas, "max_replicas": replicas, "policy": policy}}
    replica = serve.deployment(
        name="Engine",
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus, "runtime_env": {"env_vars": ENGINE_ENV}},
        max_ongoing_requests=OVERLOAD * max_requests + 16,  # 16 more for cards and readiness
        max_queued_requests=-1,  # unlimited, because `Api` limits the requests
        health_check_period_s=5,
        max_constructor_retry_count=1,  # further attempts to load would fail too
        graceful_shutdown_timeout_s=drain_s,
        **scaling,
    )(EngineReplica)
    api = serve.deployment(
        name="Api",
        num_replicas=http_replicas,
        ray_actor_options={"num_cpus": 0},
        user_config=config,
        max_ongoing_requests=10 * max_requests * replicas,  # well above the limit of `Api`, which formats the errors of a full queue
        max_queued_requests=1024,
        backpressure_config={"status_code": 429, "retry_after_s": 2},
        graceful_shutdown_timeout_s=drain_s + STREAM_END_S,
    )(serve.ingress()(Api))
    coordinator = serve.deployment(
        name="Coordinator",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,  # each HTTP replica holds a stream open
        graceful_shutdown_timeout_s=1,
    )(Coordinator).bind(export_cpus)
    threads = max(1, int(num_cpus))
    device = "cuda" if num_gpus else "cpu"
    bound = replica.bind(versions, timeout_s, device, threads, memory_gb, default_max_tokens, default_size, code_copies, engine, max_size)
    capacity = math.ceil(max_requests * replicas / http_replicas)
    return api.bind(bound, coordinator, versions, capacity, keys, max_answers, cors_origins, default_size)


def check_limits(
    default_max_tokens: int,
    max_answers: int,
    timeout_s: float,
    drain_s: float,
    cors_origins: Sequence[str],
    default_size: str = DEFAULT_SIZE,
    code_copies: float = 1.0,
    max_size: str | None = None,
    memory_gb: float | None = None,
) -> None:
    """Raise an AcipError if an argument of `build` is invalid."""
    if memory_gb is not None and not (isinstance(memory_gb, int | float) and 0 < memory_gb < float("inf")):
        raise AcipError(f"memory_gb is {memory_gb!r}; it must be a number of gigabytes above 0, or None for most of the free memory.")
    for size in (default_size, max_size):
        if size is not None:
            Budget.parse(str(size))
    _check_counts(default_max_tokens=default_max_tokens, max_answers=max_answers)
    for name, value, unit, minimum in (
        ("timeout_s", timeout_s, " of seconds", 1), ("drain_s", drain_s, " of seconds", 0), ("code_copies", code_copies, "", 0),
    ):  # fmt: skip
        if not isinstance(value, int | float) or isinstance(value, bool) or not minimum <= value < float("inf"):
            raise AcipError(f"{name} is {value!r}; it must be a number{unit}, at least {minimum}.")
    for origin in [cors_origins] if isinstance(cors_origins, str) else cors_origins:
        if isinstance(cors_origins, str) or not re.fullmatch(r"\*|https?://[^/\s]+", str(origin)):
            raise AcipError(f'cors_origins has {origin!r}; it must be a list of origins like ["https://host:8443"], or ["*"] for all.')


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise AcipError(f"{name} is {count!r}; it must be a whole number, at least 1.")


class Api:
    """One replica of the HTTP deployment. It limits the requests that it passes to the engines.

    `versions` are those that `build` found; they are served until the registry answers.
    """

    def __init__(
        self, engine: "DeploymentHandle[Any]", coordinator: "DeploymentHandle[Coordinator]", versions: list[ModelVersion], capacity: int,
        keys: Keys, max_answers: int = BUILD_ARGS["max_answers"], cors_origins: Sequence[str] = (), default_size: str = DEFAULT_SIZE,
    ) -> None:  # fmt: skip
        self.engine, self.capacity, self.keys = engine, capacity, keys
        self.max_answers, self.cors_origins, self.default_size = max_answers, cors_origins, default_size
        self.materializations = Materializations(Settings.from_env(), coordinator)
        self.metrics = Metrics()
        self.versions = ServedVersions(versions, coordinator, self._load, self.metrics.show_failed)
        self.running = 0
        self._cards: dict[tuple[str, str], dict[str, Any]] = {}

    def __serve_build_asgi_app__(self) -> FastAPI:
        return routes(self, self.cors_origins)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serve the `models` with the `alias` of a new `user_config`. Ray Serve also calls this method at the start."""
        unknown = config.keys() - {"models", "alias"}
        if unknown:
            raise ValueError(f"user_config has {', '.join(sorted(unknown))}; allowed are models and alias.")
        await self.versions.configure(config)

    # ---- the interface of the routes, an `Endpoint`

    @property
    def names(self) -> list[str]:
        return list(self.versions)

    async def cards(self) -> list[dict[str, Any]]:
        """Return the cards of models in memory, and short cards of the others. It loads no model, so a broken one does not hide others."""
        if any((name, version.version) not in self._cards for name, version in self.versions.items()):
            self._cards |= {(card["id"], card["version"]): card for card in await self._call("cards")}
        known = {name: self._cards.get((name, version.version)) or brief(version) for name, version in self.versions.items()}
        return [card | self._error(name) for name, card in known.items()]

    def _error(self, name: str) -> dict[str, str]:
        """Return the field of a card that explains why the selected version of a model is not served; {} if it is."""
        return {"load_error": self.versions.failed[name]} if name in self.versions.failed else {}

    async def card(self, name: str) -> dict[str, Any]:
        """Return the card of a model. It is loaded if it is not in memory."""
        version = self.versions[name]
        key = (name, version.version)
        if key not in self._cards:
            self._cards[key] = await self._call("card", version)
        return self._cards[key] | self._error(name)

    async def size(self, name: str, request: ModelSizeRequest) -> dict[str, Any]:
        return await self._call("size", self.versions[name], request)

    async def trade_off(self, name: str) -> dict[str, Any]:
        return await self._call("trade_off", self.versions[name])

    async def load(self, name: str, which: str) -> dict[str, Any]:
        """Serve this version under this name from now on, at all HTTP replicas. Running requests keep their version."""
        try:
            version = await self.versions.resolve(name, which)
        except RegistryError as error:
            raise RequestError(str(error), "model", "model_not_found", 404) from error
        except RegistryAwayError as error:
            message = f"{error} Version {self.versions[name].version} of {name} is served as before."
            raise RequestError(message, None, "registry_unavailable", 503) from error
        card = await self._load(version)
        with converted("coordinator"):
            await self.versions.choose(version, which)
        return card

    async def _load(self, version: ModelVersion, instead_of: ModelVersion | None = None) -> dict[str, Any]:
        """Load a version into all engines, where it generates a token, and return its card. RequestError if one of them can't load it.

        `instead_of` stays in memory meanwhile.
        """
        card: dict[str, Any] = await self._call("load", version, instead_of)  # this also starts an engine if there is none
        with converted():
            for result in await self.engine.broadcast("load", version, instead_of).results_async():
                _body(result)
        self._cards[version.name, version.version] = card
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
                state = await self.engine.ready.remote()  # this also starts an engine if there is none
                states = [state] if state["warm"] else await self.engine.broadcast("ready").results_async()
        except (TimeoutError, BackPressureError, *LOST) as error:
            raise RequestError("the engine does not answer; it may be starting.", code="not_ready", status=503) from error
        if any(state["warm"] for state in states):
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
        if self.running >= self.capacity * (OVERLOAD if request.min_size else 1):
            raise queue_full()
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
                with converted():
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
        with converted():
            result = await getattr(self.engine, method).remote(*args)
        return _body(result)


def _body(result: dict[str, Any]) -> Any:
    """Return the result of a method of the engine. Raise its error as a RequestError."""
    if "status" in result:
        error = result["body"]["error"]
        raise RequestError(error["message"], error["param"], error["code"], result["status"])
    return result["body"]


def brief(version: ModelVersion) -> dict[str, Any]:
    """Return the short card of a model that is not in memory."""
    return {
        "id": version.name, "object": "model", "created": 0, "owned_by": "acip", "version": version.version, "artifact": version.uri,
    }  # fmt: skip
