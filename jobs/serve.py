"""Serve any-size models from the registry over HTTP, until Ctrl-C.

    python jobs/serve.py                                        every model that has a champion
    python jobs/serve.py --model smollm2-135m                   one model; repeat --model for more
    python jobs/serve.py --model smollm2-135m@3 --port 8080     version 3, on another port
    python jobs/serve.py --engine vllm                          vLLM computes, at every size (pip install "acip[vllm]")

It listens on this machine only. With API keys (ACIP_API_KEYS or ACIP_API_KEYS_FILE) other addresses are allowed (--host).

Exit codes: 0 stopped by Ctrl-C or SIGTERM, the normal end of a server; 1 Ray Serve failed; 2 wrong arguments, or a model, port or
cluster that cannot be used.
"""

import argparse
import contextlib
import io
import ipaddress
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from acip_platform import cli
from acip_platform.cluster import ClusterError, connect
from acip_platform.serve.api import BUILD_ARGS, application, check_limits
from acip_platform.serve.http.edge import PROXY_ENV
from acip_platform.serve.http.keys import Keys
from acip_platform.serve.replica import ENGINES, model_kind
from acip_platform.serve.served_versions import registered
from acip_platform.settings import Settings, masked
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.registry import CHAMPION, ModelVersion

from acip.errors import AcipError

APPLICATION = "acip"
LIMITS = {  # arguments of `build` that are options here
    "timeout_s": (float, "seconds per request, including time in the queue; after that, the answer is the tokens so far"),
    "default_max_tokens": (int, "tokens of a chat request without max_tokens"),
    "default_size": (str, "size of requests that name none: a ratio (0.4 or 40%%), bytes (8GB), a perplexity (ppl<=20), ..."),
    "max_size": (str, "largest size that is served, in the same form; it needs less memory, because larger weights are not loaded"),
    "memory_gb": (float, "gigabytes for the weights, KV cache not included; None: 80%% of the free memory"),
    "max_answers": (int, "largest number of prompts times n in a request"),
    "drain_s": (float, "seconds that running requests have to finish when the server stops"),
}
MAX_CPUS = 8  # decoding a few tokens at a time is not faster with more threads


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model", action="append", metavar="NAME[@ALIAS]", help="name in the registry; may be repeated (default: all models with --alias)"
    )
    parser.add_argument("--alias", default=CHAMPION, help="alias or version number to serve (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need keys (default: %(default)s)")
    parser.add_argument("--port", type=cli.whole_number(1, 65535), default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        default=[],
        help="origin whose web pages may send requests, like https://host, or *; may be repeated (default: the server's own page only)",
    )
    parser.add_argument(
        "--engine", choices=ENGINES, default="acip",
        help="acip: the embedded engine; vllm: vLLM, for GPUs and many requests (default: %(default)s)",
    )  # fmt: skip
    for name, (kind, meaning) in LIMITS.items():
        option = f"--{name.removesuffix('_s').replace('_', '-')}"
        parser.add_argument(option, dest=name, type=kind, default=BUILD_ARGS[name], help=f"{meaning} (default: %(default)s)")
    args = cli.parse(parser, argv)
    try:
        check_limits(
            args.default_max_tokens, args.max_answers, args.timeout_s, args.drain_s, args.cors_origin, args.default_size,
            max_size=args.max_size, memory_gb=args.memory_gb,
        )  # fmt: skip
        model_kind(args.engine)
        args.keys = Keys.from_env()
    except AcipError as error:
        parser.error(str(error))
    if not args.keys and not _is_loopback(args.host):
        parser.error(
            f"--host is {args.host!r}; without API keys only a loopback address (127.0.0.1) is allowed, because the server would be "
            "open to everyone. Set ACIP_API_KEYS or ACIP_API_KEYS_FILE (`openssl rand -hex 24` makes a key), or use a tunnel: "
            "ssh -L 8000:127.0.0.1:8000 HOST."
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    _stop_by_signal()
    return cli.exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Serve until a signal stops it."""
    try:
        settings = Settings.from_env()
        versions = registered(settings, args.model, args.alias)
        _check_artifacts(settings, versions)
        _check_port(args.host, args.port)
        os.environ.update(PROXY_ENV)  # for the proxy of Ray Serve, which is another process
        own = connect(settings).own
        _stop_by_signal()  # again, because Ray installs its own handlers
        _serve(versions, args, own)
    except KeyboardInterrupt:  # the normal end of a server
        print("stopped.", flush=True)
        return 0
    except RuntimeError as error:  # Ray Serve could not deploy
        print(f"error: {error}", file=sys.stderr)
        return cli.FAILED
    return 0


def _serve(versions: list[ModelVersion], args: argparse.Namespace, own: bool) -> None:
    """Deploy the application and wait until a signal stops it; ClusterError if it or the cluster is lost."""
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        raise ClusterError("Ray Serve already runs on this cluster. Deploy with `serve deploy`, or stop it with `serve shutdown`.")
    try:
        resources = ray.cluster_resources()
        options = {key: value for key, value in BUILD_ARGS.items() if key not in ("models", "alias")}
        options |= {name: getattr(args, name) for name in LIMITS} | {"cors_origins": args.cors_origin, "engine": args.engine}
        options["num_gpus"] = min(1, resources.get("GPU", 0))
        if own:  # no other program uses this Ray
            options["num_cpus"] = max(1, min(MAX_CPUS, resources["CPU"] - 1))  # one core is for HTTP, or for an export
            options["export_cpus"] = min(1, resources["CPU"] - options["num_cpus"])
        config = {"models": args.model, "alias": args.alias}
        serve.start(http_options={"host": args.host, "port": args.port})
        try:
            serve.run(
                application(versions, config, keys=args.keys, **options),
                name=APPLICATION,
                route_prefix="/",
            )
        except RuntimeError as error:  # it names the deployment only; the status of the deployment holds the cause
            failed = serve.status().applications[APPLICATION].deployments.values()
            causes = [part.message.strip().splitlines()[-1] for part in failed if part.message.strip()]
            raise ClusterError("\n".join(["the engine cannot start.", *causes])) from error
        url = f"http://{_reachable(args.host)}:{args.port}"
        print(f"loading the weights; the page is available already: {url}/", flush=True)
        _wait_until_ready(url)
        print(first_screen(versions, url, bool(args.keys)), flush=True)
        while not _stopping and APPLICATION in serve.status().applications:  # raises if the cluster is lost
            time.sleep(2)
        if _stopping:
            raise KeyboardInterrupt
        raise ClusterError("the application was removed from Ray Serve by another program.")
    finally:
        # Ray Serve kills its own controller at the end, and Ray then prints that this call failed
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(RayError, RayServeException):
            _delete(args.drain_s)  # waits for running requests; shutdown alone would cut them off
            serve.shutdown()


def _delete(drain_s: float) -> None:
    """Remove the application after its running requests. Meanwhile the proxy refuses new ones: the server is stopping."""
    from ray import serve

    for _ in range(2 + int(drain_s // 60)):
        with contextlib.suppress(TimeoutError):  # Ray Serve waits for at most a minute
            serve.delete(APPLICATION)
            return


def _wait_until_ready(url: str) -> None:
    """Wait until a model has generated a token; ClusterError if it cannot be loaded."""
    from ray import serve

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # an HTTP proxy may not reach this machine
    while not _stopping:
        try:
            with direct.open(f"{url}/ready", timeout=30):
                return
        except urllib.error.HTTPError as answer:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the body may come from Ray Serve's proxy
                error = json.load(answer)["error"]
                if error["code"] == "load_failed":
                    raise ClusterError(error["message"]) from None
        except OSError:  # it does not listen yet
            pass
        time.sleep(0.5)
        serve.status()  # raises if the cluster is lost


def first_screen(versions: list[ModelVersion], url: str, keys: bool = False) -> str:
    """Return what is served, and commands that query it."""
    name = versions[0].name
    long = json.dumps({"model": name, "size_ratio": 0.6, "prompt": "The capital of France is", "max_tokens": 24})
    short = json.dumps({"model": f"{name}@0.6", "prompt": "Once upon a time", "temperature": 0, "stream": True})
    key = " -H 'Authorization: Bearer KEY'" if keys else ""
    served = "\n".join(f"  {version.name}  version {version.version}  {masked(version.uri)}" for version in versions)
    return f"""
serving, each at any size:
{served}

the page with the slider
  {url}/

list the models
  curl -s {url}/v1/models{key}

generate text at 60 % of the size
  curl -s {url}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(long)}
  curl -s {url}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(short)}

stop: Ctrl-C
"""


def _check_artifacts(settings: Settings, versions: list[ModelVersion]) -> None:
    """Raise StoreError if the artifact of a version is missing."""
    store = Store.of(settings)
    for version in versions:
        if not store.exists(version.uri):
            raise StoreError(
                f"version {version.version} of {version.name!r} points at {version.uri}, where there is no artifact. "
                "Was it moved or deleted? Calibrate again, or give another --alias."
            )


def _check_port(host: str, port: int) -> None:
    """Raise ClusterError if the port is taken. Ray Serve would notice only after it has loaded the weights."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"cannot listen on {host}:{port} ({error.strerror}). Stop the program that uses the port, or choose another --port."
            ) from error


_stopping: list[int] = []  # the signals received


def _stop_by_signal() -> None:
    """End the job at the first Ctrl-C or SIGTERM. The exception may be lost, if a destructor is running; `_stopping` is not."""

    def stop(received: int, _frame: object) -> None:
        _stopping.append(received)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # shutting down takes seconds and must not be cut short
        os.write(1, b"stopping after the running requests ...\n")  # the signal may have interrupted print
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _reachable(host: str) -> str:
    """Return the address at which this machine reaches a server that listens on `host`."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - binds nothing
    return f"[{address}]" if ":" in address else address


def _is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
