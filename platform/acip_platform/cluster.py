"""One way into Ray for every job: the cluster that is there, else one of our own that ends with the job.

    RAY_ADDRESS is set (`ray job submit` sets it)     attach to it; it is an error if it can't be reached
    `ray start --head` was run on this machine        attach to it
    neither                                           start a local cluster, for this process alone

A cluster that another program started for itself is left alone: it would end with that program.
"""

import logging
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acip.errors import AcipError, foreign_errors
from acip_platform.settings import Settings, masked

CLIENT = "ray://"
ALLOWED = "Allowed: HOST:PORT of a cluster (127.0.0.1:6379), auto, local, ray://HOST:10001, or none."
OBJECT_STORE_BYTES = 1 << 30  # Ray's default is 30 % of the memory; weights and checkpoints don't go through the object store


class ClusterError(AcipError):
    """The Ray cluster that was named can't be reached."""


@dataclass(frozen=True)
class Cluster:
    """The Ray that this process is connected to. `own`: it was started for this process, and ends with it."""

    own: bool
    dashboard: str  # its address, "" where there is none


def connect(settings: Settings, log_to_driver: bool = False) -> Cluster:
    """Connect this process to Ray, workers seeing the same settings.

    `log_to_driver` prints what workers print. Ends with `ray.shutdown()`, which stops what was started here.
    """
    import ray
    from ray._private import ray_constants

    if "RAY_ENABLE_UV_RUN_RUNTIME_ENV" not in os.environ:
        # Under `uv run`, Ray would upload the current folder to every worker, artifacts and all. Its switch is read when
        # ray is imported, which may have been before us.
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    # Inside `ray job submit` both the job and we set variables; ours were read from the job's, so ours may win.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    common: dict[str, Any] = {"runtime_env": {"env_vars": settings.worker_env()}, "log_to_driver": log_to_driver}
    address = os.environ.get("RAY_ADDRESS", "").strip()
    _check_address(address)
    if address == "local" or not (address or _answers(_noted_by_ray_start())):
        _token_of_our_own()
        return _cluster(True, ray.init(address="local", object_store_memory=OBJECT_STORE_BYTES, **common))
    if _on_the_loopback_alone(address if address not in ("", "auto") else _noted_by_ray_start()):
        ray_constants.ENABLE_RAY_CLUSTER = False  # as infra/demo's; Ray would ask at this machine's other address
    where = f"RAY_ADDRESS={address}" if address else "the cluster that `ray start` left here"
    remedy = "Start that cluster, or unset RAY_ADDRESS to use a local one."
    if address and address != "auto":  # Ray would try for minutes
        if not _answers(address.removeprefix(CLIENT)):
            raise ClusterError(f"nothing answers at {where}. {remedy}")
        if _speaks_http(address.removeprefix(CLIENT)):
            raise ClusterError(f"{where} is an HTTP server, for example Ray's dashboard, and not a Ray cluster. {ALLOWED}")
    with foreign_errors(ClusterError, f"can't connect to Ray at {where}", remedy):
        return _cluster(False, ray.init(**common))  # finds the address as above, and the token if the cluster asks for one


def _check_address(address: str) -> None:
    """ClusterError for what a job can't connect to: the dashboard's URL, which `ray job submit` takes, and an address without a port."""
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS is {masked(address)}, a dashboard: it takes jobs (`ray job submit -- python jobs/...`), but no connections. "
            f"Set RAY_API_SERVER_ADDRESS to it, which `ray job submit` reads, too, and RAY_ADDRESS to the cluster. {ALLOWED}"
        )
    if address in ("", "local", "auto"):
        return
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if "://" in address.removeprefix(CLIENT) or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(f"RAY_ADDRESS is {masked(address)!r}. {ALLOWED}")


def _cluster(own: bool, context: Any) -> Cluster:
    return Cluster(own, f"http://{context.dashboard_url}" if getattr(context, "dashboard_url", "") else "")


def _token_of_our_own() -> None:
    """Guard a local cluster by a token that lives in this process' environment.

    Its ports listen on every interface, so it needs one. Ray would write it into the home folder, and from then on
    `ray start --head` would ask for it while `ray job submit` in another shell would not send it. Whoever has a token
    already, or sets RAY_AUTH_MODE=disabled to see the dashboard without one, keeps that.
    """
    given = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not given and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it would warn that this is on


def _noted_by_ray_start() -> str:
    """host:port of the last `ray start --head` on this machine; after a crash the note stays behind. '' if there is none."""
    from ray._common.utils import get_ray_address_file

    try:
        return Path(get_ray_address_file(None)).read_text().strip()
    except OSError:
        return ""


def _on_the_loopback_alone(address: str) -> bool:
    """Whether a Ray listens at 127.0.0.1, and not at this machine's address in its network."""
    from ray._private.services import node_ip_address_from_perspective

    host, _, port = address.rpartition(":")
    return host in ("127.0.0.1", "localhost") and _answers(address) and not _answers(f"{node_ip_address_from_perspective()}:{port}")


def _speaks_http(address: str) -> bool:
    """Whether an HTTP/1 server listens there. A Ray cluster speaks HTTP/2 alone, and waits or closes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
            connection.settimeout(2)
            connection.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
            return connection.recv(5) == b"HTTP/"
    except OSError:
        return False


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except (OSError, ValueError):
        return False
