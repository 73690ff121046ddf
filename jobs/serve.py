"""Serve any-size models from the registry over HTTP, until Ctrl-C.

    python jobs/serve.py                          every model that has a champion
    python jobs/serve.py --model smollm2-135m     this one

Ends with 0 when it was stopped, 1 when it can't serve or lost its cluster, 2 for wrong arguments.
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

from acip_platform.cluster import ClusterError, connect
from acip_platform.serve.api import BUILD_ARGS, application, check_limits, choose
from acip_platform.serve.http.edge import PROXY_ENV
from acip_platform.serve.http.keys import Keys
from acip_platform.settings import Settings, masked
from acip_platform.storage.store import Store, StoreError
from acip_platform.tracking.registry import CHAMPION, ModelVersion

from acip.errors import AcipError

APPLICATION = "acip"
LIMITS = {  # arguments of `build` that are options here
    "timeout_s": (float, "seconds of a request, waiting included; then what is there is the answer"),
    "default_max_tokens": (int, "tokens of a chat that does not say max_tokens"),
    "max_answers": (int, "prompts times n of a request"),
    "drain_s": (float, "seconds that answers have to end when the server is told to stop"),
}
MAX_CPUS = 8  # more threads don't make a few tokens at a time faster


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME[@ALIAS]",
        help="name in the registry; may be given more than once (default: all with the alias)",
    )
    parser.add_argument("--alias", default=CHAMPION, help="alias or version number to serve (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; with API keys not only loopback (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        default=[],
        help="whose web pages may ask from a browser, like https://host, or *; may be given more than once (default: only the own page)",
    )
    for name, (kind, what) in LIMITS.items():
        option = f"--{name.removesuffix('_s').replace('_', '-')}"
        parser.add_argument(option, dest=name, type=kind, default=BUILD_ARGS[name], help=f"{what} (default: %(default)s)")
    args = parser.parse_args()
    try:
        check_limits(args.default_max_tokens, args.max_answers, args.timeout_s, args.drain_s, args.cors_origin)
        args.keys = Keys.from_env()
    except AcipError as error:
        parser.error(str(error))
    if not 0 < args.port < 65536:
        parser.error(f"--port is {args.port}; it must be from 1 to 65535.")
    if not args.keys and not _is_loopback(args.host):
        parser.error(
            f"--host is {args.host!r}; without API keys only a loopback address (127.0.0.1) is allowed, because the server would be "
            "open to everyone. Set ACIP_API_KEYS or ACIP_API_KEYS_FILE (`openssl rand -hex 24` makes a key), or use a tunnel: "
            "ssh -L 8000:127.0.0.1:8000 HOST."
        )
    return args


def main() -> int:
    args = arguments()
    _stop_by_signal()
    try:
        settings = Settings.from_env()
        versions = choose(settings, args.model, args.alias)
        _check_artifacts(settings, versions)
        _check_port(args.host, args.port)
        os.environ.update(PROXY_ENV)  # for Serve's proxy, in a process of Ray
        own = connect(settings).own
        _stop_by_signal()  # again: Ray sets its own
        return _serve(versions, args, own)
    except KeyboardInterrupt:
        print("stopped.", flush=True)
        return 0
    except (AcipError, RuntimeError) as error:  # RuntimeError: Serve could not deploy
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        import ray

        ray.shutdown()  # stops Ray if it was started here, else lets go of it


def _serve(versions: list[ModelVersion], args: argparse.Namespace, own: bool) -> int:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        raise ClusterError("Serve already runs on this cluster. Deploy with `serve deploy`, or stop it with `serve shutdown`.")
    try:
        there = ray.cluster_resources()
        options = {key: value for key, value in BUILD_ARGS.items() if key not in ("models", "alias")}
        options |= {name: getattr(args, name) for name in LIMITS} | {"cors_origins": args.cors_origin}
        options["num_gpus"] = min(1, there.get("GPU", 0))
        if own:  # nobody else wants the cores
            options["num_cpus"] = max(1, min(MAX_CPUS, there["CPU"] - 1))  # one is busy with HTTP, or with an export
            options["export_cpus"] = min(1, there["CPU"] - options["num_cpus"])
        serve.start(http_options={"host": args.host, "port": args.port})
        try:
            serve.run(application(versions, keys=args.keys, **options), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:  # names the deployment only; its message ends with what was raised in it
            failed = serve.status().applications[APPLICATION].deployments.values()
            causes = [part.message.strip().splitlines()[-1] for part in failed if part.message.strip()]
            raise ClusterError("\n".join(["the engine can't start.", *causes])) from error
        url = f"http://{_reached(args.host)}:{args.port}"
        print(f"loading; the page is there already: {url}/", flush=True)
        _wait_until_ready(url)
        print(first_screen(versions, url, bool(args.keys)), flush=True)
        while not _stopping and APPLICATION in serve.status().applications:  # raises when the cluster is gone
            time.sleep(2)
        if _stopping:
            raise KeyboardInterrupt
        raise ClusterError("the application was removed from Serve by someone else.")
    finally:
        # Serve kills its own controller in the end, and Ray then prints that this call of it failed
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(RayError, RayServeException):
            _delete(args.drain_s)  # waits for what is being answered; shutdown alone would cut it off
            serve.shutdown()


def _delete(drain_s: float) -> None:
    """Remove the application when its answers have ended. Meanwhile the proxy tells others that the server stops."""
    from ray import serve

    for _ in range(2 + int(drain_s // 60)):
        with contextlib.suppress(TimeoutError):  # Serve waits for a minute at most
            serve.delete(APPLICATION)
            return


def _wait_until_ready(url: str) -> None:
    """Until a model has made a token. ClusterError where it can't be loaded."""
    from ray import serve

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy elsewhere can't reach this machine's server
    while not _stopping:
        try:
            with direct.open(f"{url}/ready", timeout=30):
                return
        except urllib.error.HTTPError as answer:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the proxy's own words, not ours
                error = json.load(answer)["error"]
                if error["code"] == "load_failed":
                    raise ClusterError(error["message"]) from None
        except OSError:  # not yet
            pass
        time.sleep(0.5)
        serve.status()  # raises when the cluster is gone


def first_screen(versions: list[ModelVersion], url: str, keys: bool = False) -> str:
    name = versions[0].name
    ask = json.dumps({"model": name, "size_ratio": 0.6, "prompt": "The capital of France is", "max_tokens": 24})
    short = json.dumps({"model": f"{name}@0.6", "prompt": "Once upon a time", "temperature": 0, "stream": True})
    key = " -H 'Authorization: Bearer KEY'" if keys else ""
    served = "\n".join(f"  {version.name}  version {version.version}  {masked(version.uri)}" for version in versions)
    return f"""
serving, each at any size:
{served}

the page with the slider
  {url}/

list them
  curl -s {url}/v1/models{key}

ask at 60 % of the size
  curl -s {url}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(ask)}
  curl -s {url}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(short)}

stop: Ctrl-C
"""


def _check_artifacts(settings: Settings, versions: list[ModelVersion]) -> None:
    store = Store.of(settings)
    for version in versions:
        if not store.exists(version.uri):
            raise StoreError(
                f"version {version.version} of {version.name!r} points at {version.uri}, where there is no artifact. "
                "Was it moved or deleted? Calibrate again, or give another --alias."
            )


def _check_port(host: str, port: int) -> None:
    """Serve would find out only after the weights are loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"can't listen on {host}:{port} ({error.strerror}). Stop what runs there, or choose another --port."
            ) from error


_stopping: list[int] = []  # the signal that asked for it


def _stop_by_signal() -> None:
    """Ctrl-C and SIGTERM end the job, once. The exception may land where it is lost (a destructor); the note stays."""

    def stop(received: int, _frame: object) -> None:
        _stopping.append(received)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # shutting down takes seconds and must not be cut short
        os.write(1, b"stopping, when what is being answered is done ...\n")  # print may have been interrupted itself
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _reached(host: str) -> str:
    """How this machine reaches a server that listens there."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - binds nothing
    return f"[{here}]" if ":" in here else here


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
