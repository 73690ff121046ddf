"""A PostgreSQL server of Debian's, on a port and in a folder of its own. As root it is run as the user postgres: it refuses root."""

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.server import free_port


def binary(name: str) -> str:
    """Of the newest version there is; Debian keeps them out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    assert found, "there is no PostgreSQL; infra/test installs it: apt-get install postgresql"
    return str(found[-1])


@contextmanager
def running() -> Iterator[str]:
    """Its URI, as MLflow takes it."""
    folder = Path(tempfile.mkdtemp(prefix="acip-postgres-"))  # not pytest's, which other users can't look into
    who = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    password, port = secrets.token_hex(8), free_port()
    (folder / "password").write_text(password)
    if who:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")

    def command(*args: str) -> None:
        done = subprocess.run([*who, *args], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"

    data, control = str(folder / "data"), binary("pg_ctl")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        command(binary("initdb"), "-D", data, "-U", "acip", "-A", "scram-sha-256", "--pwfile", str(folder / "password"), "--no-sync")
        command(control, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://acip:{password}@127.0.0.1:{port}/postgres"
        finally:
            command(control, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
