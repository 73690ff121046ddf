"""Fixtures for all tests: the small byte-level Llama of golden/, its tokenizer, and an artifact that is calibrated in seconds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two thread pools that spin on two cores are ten times slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_worker_niceness", "0")  # with 15, the default, a busy machine lets them wait for minutes
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of the machine may not resolve

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from botocore.exceptions import BotoCoreError, ClientError
from hypothesis import settings
from playwright.sync_api import Browser
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from acip.artifact.artifact import Artifact
from acip.base import Base, load_base
from acip.calibration.loop import calibrate
from acip.calibration.parametrize import parametrize
from acip.data import TokenBatches
from acip.export.folder import export
from acip.recipe import Recipe
from acip.sizing.elastic_model import ElasticModel
from acip.utils.half_products import speed_up_products
from tests.support import fuzzing
from tests.support.browser import Visit, launched, visiting
from tests.support.engines import ENGINE, write_wide_base
from tests.support.ports import free_port
from tests.support.server import Server, Shared, make_home
from tests.support.small import GOLDEN, byte_tokenizer, write_small_base  # noqa: F401  (other tests import these names from here)
from tests.support.waiting import stop, until

SEED = int(os.environ.get("ACIP_TEST_SEED", "0"))  # seed of the calibrated fixtures; the tests must pass with any seed

FLEET = """\
name: small
defaults:
  data: package:wikipedia
  eval_context: 64
  eval_windows: 8
  domains: [package:code]
  domain_windows: 2
  sizes: [1.0, 0.5]
  cpus: 1
  set: {sample_windows: 16, adapter_rank: 4, adapter_alpha: 4.0, dtype: float32, batch_size: 4, seq_len: 64, SET}
models:
"""


settings.load_profile("quick")
for dtype in (torch.bfloat16, torch.float16):  # loading a model does this, and else results would depend on the order of the tests
    speed_up_products(dtype)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the number of fuzzed cases from a worker process of pytest-xdist to its controller."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["fuzzed"] = dict(fuzzing.CASES)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the number of fuzzed cases of a worker process."""
    fuzzing.CASES.update(getattr(node, "workeroutput", {}).get("fuzzed", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of fuzzed cases."""
    if fuzzing.CASES:
        terminalreporter.write_line(f"fuzzed: {sum(fuzzing.CASES.values()):,} cases in {len(fuzzing.CASES)} tests")


def write_fleet(path: Path, settings: str, *models: str) -> Path:
    """Write a fleet file of models that take seconds. `settings` and `models` are the contents of YAML flow mappings."""
    path.write_text(FLEET.replace("SET", settings) + "".join(f"  - {{{model}}}\n" for model in models))
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that stop the shared server last: the next test that uses it has to start it again."""
    items.sort(key=lambda item: "server_to_stop" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def golden_tokens() -> torch.Tensor:
    """Return [1404, 64] token windows of public-domain text."""
    return load_file(GOLDEN / "batches.safetensors")["batches"].long()


@pytest.fixture(scope="session")
def heldout_tokens() -> torch.Tensor:
    """Return [256, 64] held-out token windows."""
    return load_file(GOLDEN / "probe.safetensors")["hold"].long()


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write the model of golden/ and its tokenizer to a folder in the format of transformers."""
    write = write_small_base if ENGINE == "acip" else write_wide_base
    return str(write(tmp_path_factory.mktemp("base") / "small"))


@pytest.fixture(scope="session")
def quick_recipe() -> Recipe:
    """Return a recipe that prunes by L1, as the paper does, and reaches the stop ratio in about forty steps on the small model."""
    return Recipe(
        sample_windows=64, adapter_rank=4, adapter_alpha=4.0, adapter_dropout=0.05, dtype="float32", batch_size=4, seq_len=64,
        lr=3e-3, lambda_factor=1.2, post_tune_steps=60, scores="order", seed=SEED,
    )  # fmt: skip


@pytest.fixture(scope="session")
def calibrated(small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor) -> Any:
    """Return (base, calibration) of the small model with the quick recipe."""
    base = load_base(small_base, quick_recipe.dtype)
    parametrize(base.model, quick_recipe, golden_tokens)
    return base, calibrate(base.model, TokenBatches(golden_tokens, quick_recipe.batch_size), quick_recipe)


@pytest.fixture(scope="session")
def small_artifact(calibrated: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Save an artifact of the small model and open it."""
    base, calibration = calibrated
    return Artifact.save(tmp_path_factory.mktemp("artifact") / "small", base, calibration, {"seed": 0})


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Disable progress bars, because tests compare the output."""
    transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed torch before each test, so that its random numbers do not depend on earlier tests."""
    torch.manual_seed(SEED)


@pytest.fixture(scope="module")
def any_size(small_artifact: Artifact) -> ElasticModel:
    """Load the elastic model of the small artifact."""
    return small_artifact.load()


@pytest.fixture(scope="module")
def exported(any_size: ElasticModel, small_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the small model at size ratio 0.6."""
    any_size.resize(0.6)
    folder = tmp_path_factory.mktemp("exports") / "small-0.6"
    export(any_size, small_artifact, folder)
    return folder


def read(folder: Path) -> Any:
    """Load an export as a user does."""
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of a model without gradients."""
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a real S3 server (SeaweedFS) with the bucket `models`, and yield the environment variables that select it."""
    folder = tmp_path_factory.mktemp("s3")
    ports = {name: free_port() for name in ("s3", "master", "volume", "filer", "admin")}
    keys = {"AWS_ACCESS_KEY_ID": "admin", "AWS_SECRET_ACCESS_KEY": "adminsecret", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [
        str(Path(sys.executable).with_name("weed")), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-bucket=models",
        "-admin.ui=false", "-webdav=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}.port={port}" for name, port in ports.items()),
    ]  # fmt: skip
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env={**os.environ, **keys}, stdout=log, stderr=log, cwd=folder)
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="admin", aws_secret_access_key="adminsecret", region_name="us-east-1"
    )
    try:

        def is_ready() -> bool:
            assert server.poll() is None, f"the S3 server exited:\n{(folder / 'log').read_text()}"
            with contextlib.suppress(BotoCoreError, ClientError):
                client.put_object(Bucket="models", Key="ready", Body=b"")
                return True
            return False

        until(is_ready, lambda: f"the S3 server does not answer:\n{(folder / 'log').read_text()}")
        yield {**keys, "AWS_ENDPOINT_URL": endpoint}
    finally:
        stop(server)


@pytest.fixture(scope="session")
def served_home(small_artifact: Artifact, heldout_tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an ACIP_HOME with two served models."""
    return make_home(tmp_path_factory.mktemp("served"), small_artifact, heldout_tokens[:8])


@pytest.fixture(scope="session")
def shared(served_home: Path) -> Iterator[Shared]:
    """Yield the holder of the shared server, and stop the server at the end."""
    shared = Shared(served_home)
    yield shared
    shared.stop()


@pytest.fixture
def server(shared: Shared) -> Server:
    """Return the shared server, which is ready and has no open requests."""
    return shared.get()


@pytest.fixture
def server_to_stop(server: Server) -> Server:
    """Return the shared server, for a test that stops it."""
    return server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start a browser for one module only: asyncio.run does not work in other tests while Playwright runs."""
    with launched() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Visit]:
    """Open a tab. Its requests must all go to the server, and its console must stay empty."""
    with visiting(browser, server.url) as visit:
        yield visit


# ---- the model that methods compress, and their calibration data


@pytest.fixture(scope="module")
def base(small_base: str) -> Base:
    """Load the small base model in float32."""
    return load_base(small_base, "float32")


@pytest.fixture(scope="module")
def windows(golden_tokens: torch.Tensor) -> torch.Tensor:
    """Return 24 token windows for calibration."""
    return golden_tokens[:24]
