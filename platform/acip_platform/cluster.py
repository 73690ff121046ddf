"""The connection of a job to Ray: an existing cluster, or a local one that ends with the job.

    RAY_ADDRESS is set (`ray job submit` sets it)     connect to it; ClusterError if it can't be reached
    `ray start --head` was run on this machine        connect to that cluster
    neither                                           start a local cluster for this process

A local cluster that another process started for itself is not used, because it ends with that process.
"""

import logging
import os
import secrets
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acip.errors import AcipError, foreign_errors
from acip_platform.settings import Settings, masked

CLIENT = "ray://"
ALLOWED = "Allowed: HOST:PORT of a cluster (127.0.0.1:6379), auto, local, ray://HOST:10001, or none."
OBJECT_STORE_BYTES = 1 << 30  # Ray's default is 30% of the memory; weights and checkpoints do not pass through the object store


class ClusterError(AcipError):
    """The Ray cluster can't be reached, or its address is not valid."""


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that this process is connected to."""

    own: bool  # started for this process, and ends with it
    dashboard: str  # its URL, or "" if it has no dashboard


def connect(settings: Settings, log_to_driver: bool = False) -> Cluster:
    """Connect this process to Ray and give its workers the same settings. ClusterError if that fails.

    With `log_to_driver`, the output of the workers is printed. Call `ray.shutdown()` at the end; it also stops a local cluster.
    """
    import ray
    from ray._private import ray_constants

    if "RAY_ENABLE_UV_RUN_RUNTIME_ENV" not in os.environ:
        # Under `uv run`, Ray would upload the current folder, with all artifacts, to every worker. Ray reads the environment
        # variable when it is imported, which may have happened already, so the constant is set instead.
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    # Inside `ray job submit`, the job and this call both set variables. These settings were read from the job's, so they may override it.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    common: dict[str, Any] = {"runtime_env": {"env_vars": settings.worker_env()}, "log_to_driver": log_to_driver}
    address = os.environ.get("RAY_ADDRESS", "").strip()
    _check_address(address)
    if address == "local" or not (address or _is_listening(_address_of_ray_start())):
        _set_private_token()
        return _cluster(True, ray.init(address="local", object_store_memory=OBJECT_STORE_BYTES, **common))
    if _is_on_loopback_only(address if address not in ("", "auto") else _address_of_ray_start()):
        ray_constants.ENABLE_RAY_CLUSTER = False  # as in infra/demo; else Ray connects to this machine's network address
    where = f"RAY_ADDRESS={address}" if address else "the address that `ray start` wrote on this machine"
    remedy = "Start that cluster, or unset RAY_ADDRESS to use a local one."
    if address and address != "auto":  # checked first, because Ray retries for minutes
        if not _is_listening(address.removeprefix(CLIENT)):
            raise ClusterError(f"nothing answers at {where}. {remedy}")
        if _is_http_server(address.removeprefix(CLIENT)):
            raise ClusterError(f"{where} is an HTTP server, for example Ray's dashboard, not a Ray cluster. {ALLOWED}")
    with foreign_errors(ClusterError, f"can't connect to Ray at {where}", remedy):
        return _cluster(False, ray.init(**common))  # Ray reads the address, and the token if the cluster needs one


def _check_address(address: str) -> None:
    """Raise ClusterError for an address that a job can't connect to: a dashboard's URL, or an address without a valid port."""
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS is {masked(address)}, the URL of a dashboard: it accepts jobs (`ray job submit -- python jobs/...`), but not "
            f"connections. Set RAY_API_SERVER_ADDRESS to this URL for `ray job submit`, and RAY_ADDRESS to the cluster. {ALLOWED}"
        )
    if address in ("", "local", "auto"):
        return
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if "://" in address.removeprefix(CLIENT) or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(f"RAY_ADDRESS is {masked(address)!r}. {ALLOWED}")


def _cluster(own: bool, context: Any) -> Cluster:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` acts like Ctrl-C; Ray's own handler exits at once
    return Cluster(own, f"http://{context.dashboard_url}" if getattr(context, "dashboard_url", "") else "")


def _set_private_token() -> None:
    """Protect a local cluster with a token that exists only in the environment of this process.

    Its ports listen on every network interface. Ray itself would write a token into the home folder; from then on,
    `ray start --head` would require it, and `ray job submit` in another shell would not send it. An existing token, or
    RAY_AUTH_MODE (`disabled` opens the dashboard without a token), is left as it is.
    """
    configured = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not configured and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that authentication is on


def _address_of_ray_start() -> str:
    """Return host:port of the last `ray start --head` on this machine, or "". Ray's file stays behind after a crash."""
    from ray._common.utils import get_ray_address_file

    try:
        return Path(get_ray_address_file(None)).read_text().strip()
    except OSError:
        return ""


def _is_on_loopback_only(address: str) -> bool:
    """Return whether Ray listens at 127.0.0.1, but not at this machine's network address."""
    from ray._private.services import node_ip_address_from_perspective

    host, _, port = address.rpartition(":")
    return (
        host in ("127.0.0.1", "localhost") and _is_listening(address) and not _is_listening(f"{node_ip_address_from_perspective()}:{port}")
    )


def _is_http_server(address: str) -> bool:
    """Return whether an HTTP/1 server listens at `address`. A Ray cluster speaks only HTTP/2: it waits, or closes the connection."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
            connection.settimeout(2)
            connection.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
            return connection.recv(5) == b"HTTP/"
    except OSError:
        return False


def _is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except (OSError, ValueError):
        return False
