"""A running `python jobs/serve.py`, as its users start it, for the tests of HTTP and of the page."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.conftest import free_port

JOB = Path(__file__).parents[1] / "jobs" / "serve.py"
PROMPT = "It was a bright cold day and "
START_TIMEOUT_S = 180.0


class Server:
    """A running jobs/serve.py."""

    def __init__(self, home: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = home / "serve.log"
        env = {**os.environ, "ACIP_HOME": str(home), "RAY_ADDRESS": "local"}
        with self.log.open("w") as log:
            command = [sys.executable, str(JOB), "--port", self.url.rpartition(":")[2]]
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.client = httpx.Client(base_url=self.url, timeout=120)
        deadline = time.monotonic() + START_TIMEOUT_S
        while "stop: Ctrl-C" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def ask(self, **fields: Any) -> dict[str, Any]:
        response = self.client.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def processes(self) -> list[psutil.Process]:
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]


@contextlib.contextmanager
def running(home: Path) -> Iterator[Server]:
    """Whatever happens, none of its processes stays."""
    server = Server(home)
    everything = server.processes()
    try:
        yield server
    finally:
        server.client.close()
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGINT)
            server.process.wait(60)
        for process in psutil.wait_procs(everything, timeout=20)[1]:
            process.kill()
