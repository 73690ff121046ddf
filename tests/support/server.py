"""A running `python jobs/serve.py`, started as users start it. All tests share one server, because a start takes 20 seconds.

The fixture `served_home` is an ACIP_HOME with two models. `Shared.get` returns a server that is ready and has no open requests.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import psutil
import torch
from acip_platform.serve.http.metrics import Metrics
from transformers import AutoTokenizer

from acip.artifact.artifact import Artifact
from acip.evaluate import CurveSetup, trade_off
from acip.utils.checksums import sha256
from tests.support.engines import ENGINE
from tests.support.ports import free_port
from tests.support.waiting import PATIENCE_S, until

JOB = Path(__file__).parents[2] / "jobs" / "serve.py"
PROMPT = "It was a bright cold day and "
SIZES = (1.0, 0.8, 0.6, 0.4)  # the sizes in the models' curves
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def make_home(home: Path, small: Artifact, tokens: torch.Tensor) -> Path:
    """Create an ACIP_HOME with two champions, `small` and `talker`, which is `small` with a chat template. Both have a measured curve."""
    from acip_platform.settings import Settings
    from acip_platform.tracking.registry import Registry
    from acip_platform.tracking.runs import Tracking

    settings = Settings.from_env({"ACIP_HOME": str(home)})
    registry = Registry(settings)
    rows = list(trade_off(small.load(), SIZES, CurveSetup(tokens, "held-out", small.recipe.stop_ratio)))
    for name in ("small", "talker"):
        artifact = Artifact.open(copytree(small.folder, home / name)).record_curve(rows)
        if name == "talker":
            give_template(artifact)
        run = Tracking(settings, "test").start(name, "f", {})
        registry.set_alias(registry.register(name, str(artifact.folder), run.run_id, {}))
    return home


def give_template(artifact: Artifact, template: str = CHAT) -> None:
    """Add a chat template to the tokenizer of an artifact."""
    tokenizer = AutoTokenizer.from_pretrained(artifact.folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(artifact.folder)
    manifest = artifact.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    for file, facts in content["files"].items():
        facts |= {"bytes": (artifact.folder / file).stat().st_size, "sha256": sha256(artifact.folder / file)}
    manifest.write_text(json.dumps(content))


class Server:
    """A process of jobs/serve.py with `home` as ACIP_HOME, and an HTTP client for it."""

    def __init__(self, home: Path, *options: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = home / "serve.log"
        # the time until metrics are seen; every second would take a third of a core
        env = {**os.environ, "ACIP_HOME": str(home), "RAY_ADDRESS": "local", "RAY_metrics_report_interval_ms": "4000"}
        with self.log.open("w") as log:
            command = [sys.executable, str(JOB), "--port", self.url.rpartition(":")[2], "--engine", ENGINE, *options]
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        self._processes: set[psutil.Process] = set()  # its processes; a process whose parent has ended cannot be found later

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_until_free(self) -> None:
        """Wait until the log says that it serves, the engine is ready, and no request is open."""

        def free() -> bool:
            assert self.alive, f"the server ended:\n{self.log.read_text()}"
            return "stop: Ctrl-C" in self.log.read_text() and self.client.get("/ready").status_code == 200 and not self.open

        until(free, lambda: f"the server is not free:\n{self.log.read_text()}")
        self._processes.update(self.processes())

    def post(self, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        return self.client.post(path, json={"model": "small", **fields})

    def ask(self, **fields: Any) -> dict[str, Any]:
        """Request a completion, greedy by default, and return the parsed response."""
        response = self.post(**{"prompt": PROMPT, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str, label: str = "") -> float:
        """Return the sum of a metric's rows that contain `label`, or 0 if nothing was counted yet. Counts arrive after a second or two."""
        lines = self.client.get("/metrics").text.splitlines()
        assert any(name.startswith(each.info["name"]) for each in Metrics().all), f"there is no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and label in line)

    @property
    def open(self) -> float:
        """The number of requests that are running or waiting."""
        return self.metric("acip_requests_waiting") + self.metric("acip_requests_running")

    @contextlib.contextmanager
    def generating(self, **fields: Any) -> Iterator[Iterator[str]]:
        """Open a stream, and yield the lines of its response once text has arrived."""
        with self.client.stream("POST", "/v1/completions", json={"model": "small", "stream": True, **fields}) as response:
            lines = (line for line in response.iter_lines() if line)
            head = [next(lines)]
            while '"text":"' not in head[-1] or '"text":""' in head[-1]:
                head.append(next(lines))
            yield chain(head, lines)

    def processes(self) -> list[psutil.Process]:
        """Return the server's process and all its descendants."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def stop(self) -> None:
        """Stop the server and make sure that all its processes end, whatever state it is in."""
        self.client.close()
        if self.alive:
            self._processes.update(self.processes())
            self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_S)
        for process in psutil.wait_procs(self._processes, timeout=60)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


class Shared:
    """At most one running server. The first use starts it, and so does the first use after a test has stopped it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._server: Server | None = None

    def get(self) -> Server:
        """Return the server once it is free. Start it if it does not run."""
        if self._server is None or not self._server.alive:
            self.stop()
            self._server = Server(self.home)
        try:
            self._server.wait_until_free()
        except BaseException:  # only this test fails; the next one starts a new server
            self.stop()
            raise
        return self._server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._server = None


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["text"]
