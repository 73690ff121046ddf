"""Free ports for servers that the tests start."""

import os
import random
import socket

# The system takes the ports of outgoing connections from 32768 upward, and Ray those of its workers from 10002 to 19999. A port of
# those ranges that is free now may be taken a second later, before the server listens on it.
_FIRST, _END = 20_000, 22_768
_SEAWEEDFS = 10_000  # SeaweedFS listens on a port `p` and on `p + 10000`
_returned: set[int] = set()


def free_port() -> int:
    """Return a port `p` such that `p` and `p + 10000` are free, and that no other worker of pytest-xdist gets.

    A process gets each port once. `AssertionError` if no port is free.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = [port for port in range(_FIRST, _END) if port % workers == own and port not in _returned]
    random.SystemRandom().shuffle(ports)  # another run of the tests on this machine takes other ports
    for port in ports:
        if _is_free(port) and _is_free(port + _SEAWEEDFS):
            _returned.add(port)
            return port
    raise AssertionError(f"no port from {_FIRST} to {_END - 1} is free together with the one {_SEAWEEDFS} above it")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))  # fails if the port is taken on any address
        except OSError:
            return False
    return True
