"""Published clients of OpenAI's API work with our server. Each is installed in its own virtual environment."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import Server

PROGRAM = Path(__file__).parents[1] / "support" / "clients.py"
PACKAGES = {  # each takes less than a minute to install
    "langchain": "langchain-openai==1.7.4",
    "pydantic_ai": "pydantic-ai-slim[openai]==2.68.0",
    "instructor": "instructor==1.17.0",
    "llama_index": "llama-index-llms-openai-like==0.8.1",
    "haystack": "haystack-ai==3.4.1",
}
TIMEOUT_S = 1200


def run(*command: str) -> None:
    completed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert completed.returncode == 0, (completed.stdout + completed.stderr)[-3000:]


@pytest.mark.slow  # installs packages
@pytest.mark.parametrize("client", PACKAGES)
def test_client_chats_in_several_turns(server: Server, tmp_path: Path, client: str) -> None:
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "install", "-q", PACKAGES[client])
    run(python, str(PROGRAM), client, f"{server.url}/v1", "talker@0.6")
