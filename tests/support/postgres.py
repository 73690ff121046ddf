"""A PostgreSQL server from the Debian package, on a free port and in a temporary folder.

PostgreSQL refuses to run as root, so root runs it as the user postgres.
"""

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ports import free_port


def binary(name: str) -> str:
    """Return the path of a program of the newest installed version. Debian does not put them on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    assert found, "PostgreSQL is not installed; infra/test installs it: apt-get install postgresql"
    return str(found[-1])


@contextmanager
def running() -> Iterator[str]:
    """Run a server and yield its URI in MLflow's form."""
    folder = Path(tempfile.mkdtemp(prefix="acip-postgres-"))  # other users cannot read pytest's temporary folders
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    password, port = secrets.token_hex(8), free_port()
    (folder / "password").write_text(password)
    if as_user:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")

    def command(*args: str) -> None:
        done = subprocess.run([*as_user, *args], cwd=folder, capture_output=True, text=True, check=False)
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
