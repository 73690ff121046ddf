"""The API reference: the OpenAPI schema describes the server, and /docs loads nothing from other hosts."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from acip_platform.serve.api import Api, check_limits
from acip_platform.serve.http.keys import Keys
from acip_platform.serve.http.requests import ChatRequest, CompletionRequest
from acip_platform.tracking.registry import ModelVersion

from acip.errors import AcipError
from tests.support.server import Server

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
KEY = "a-key-of-enough-characters"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACIP_HOME", str(tmp_path))


def ask(method: str, path: str, keys: str = "", origins: Sequence[str] = (), **headers: str) -> httpx.Response:
    """Return the response of the routes without an engine."""
    version = ModelVersion("small", "1", "here", (), {})
    api = Api(None, None, [version], 8, Keys.from_env({"ACIP_API_KEYS": keys}), cors_origins=origins)  # type: ignore[arg-type]

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(api.__serve_build_asgi_app__(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


def test_docs_load_nothing_from_other_hosts_and_need_no_key() -> None:
    page = ask("GET", "/docs", KEY)
    assert page.status_code == 200
    assert not re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", page.text)
    schema = ask("GET", "/openapi.json", KEY).json()
    for path in schema["paths"]:
        assert path in page.text
    for field in (*ChatRequest.model_fields, *CompletionRequest.model_fields):
        assert f"<code>{field}</code>" in page.text


def test_openapi_describes_errors_keys_bodies_and_streams() -> None:
    schema: dict[str, Any] = ask("GET", "/openapi.json").json()
    for path, route in schema["paths"].items():
        for operation in route.values():
            assert "422" not in operation["responses"]
            assert operation["description"]
            assert ("security" in operation) == ("401" in operation["responses"]) == path.startswith("/v1/")
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert response["content"] == {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for path, model in (("/v1/completions", "CompletionRequest"), ("/v1/chat/completions", "ChatRequest")):
        operation = schema["paths"][path]["post"]
        assert operation["responses"].keys() >= {"200", "400", "401", "404", "408", "413", "415", "429", "503"}
        assert operation["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{model}"}


def test_only_configured_origins_may_send_requests() -> None:
    preflight = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    for origins, allowed in (([], None), (["https://app.example"], "https://app.example"), (["https://b.example"], None), (["*"], "*")):
        for answer in (
            ask("OPTIONS", "/v1/completions", KEY, origins, **preflight),
            ask("GET", "/health", KEY, origins, Origin="https://app.example"),
            ask("GET", "/v1/models", KEY, origins, Origin="https://app.example"),
        ):
            assert answer.headers.get("access-control-allow-origin") == allowed
    response = ask("OPTIONS", "/v1/completions", KEY, ["https://app.example"], **preflight)
    assert response.status_code == 200, "a preflight request has no key"
    assert "authorization" in response.headers["access-control-allow-headers"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("default_max_tokens", 0, "a whole number, at least 1"),
        ("max_answers", 1.5, "a whole number, at least 1"),
        ("drain_s", -1, "a number of seconds, at least 0"),
        ("timeout_s", float("nan"), "a number of seconds, at least 1"),
        ("cors_origins", "https://a", "a list of origins"),
        ("cors_origins", ["https://a/b"], "a list of origins"),
        ("cors_origins", ["a.example"], "a list of origins"),
    ],
)
def test_invalid_settings_are_refused(name: str, value: Any, message: str) -> None:
    usual: dict[str, Any] = {
        "default_max_tokens": 5,
        "max_answers": 5,
        "timeout_s": 5,
        "drain_s": 5,
        "cors_origins": ["https://a:8443", "*"],
    }
    check_limits(**usual)
    with pytest.raises(AcipError, match=rf"{name} (is|has) .*{message}"):
        check_limits(**(usual | {name: value}))


@pytest.mark.slow  # sends a thousand generated requests
def test_server_conforms_to_its_schema(server: Server, tmp_path: Path) -> None:
    """Run the coverage phase of Schemathesis. Valid data may be refused, because a schema can't list the served models."""
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, "run", f"{server.url}/openapi.json", "--phases=coverage", "--continue-on-failure", "--no-color"]
    command += ["--exclude-checks=positive_data_acceptance", "--request-timeout=120"]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500, check=False)
    assert completed.returncode == 0, completed.stdout[-5000:] + completed.stderr[-2000:]
    assert "Tested: 12" in completed.stdout
