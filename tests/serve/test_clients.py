"""Clients that people use with OpenAI's server, each as it is published, against ours. They are installed beside us, not among us."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import Server

PROGRAM = Path(__file__).with_name("clients.py")
PACKAGES = {  # each installs in less than a minute
    "langchain": "langchain-openai==1.7.4",
    "pydantic_ai": "pydantic-ai-slim[openai]==2.68.0",
    "instructor": "instructor==1.17.0",
    "llama_index": "llama-index-llms-openai-like==0.8.1",
    "haystack": "haystack-ai==3.4.1",
}
TIMEOUT_S = 1200


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow  # installs packages
@pytest.mark.parametrize("client", PACKAGES)
def test_a_client_talks_in_several_turns(server: Server, tmp_path: Path, client: str) -> None:
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "install", "-q", PACKAGES[client])
    run(python, str(PROGRAM), client, f"{server.url}/v1", "talker@0.6")
