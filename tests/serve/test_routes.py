"""The routes without an engine: API keys and unexpected failures."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from acip_platform.serve.api import Api
from acip_platform.serve.http.keys import Keys
from acip_platform.serve.http.routes import OPEN
from acip_platform.tracking.registry import ModelVersion
from starlette.routing import Route

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
KEY = "a-key-of-enough-characters"


class ApiWithoutEngine(Api):
    """Routes without an engine, in which every request that passes the key check fails."""

    def __init__(self, keys: Keys) -> None:
        super().__init__(None, None, [ModelVersion("small", "1", "here", (), {})], 8, keys)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACIP_HOME", str(tmp_path))


def ask(api: Api, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(api.__serve_build_asgi_app__(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def every_route(api: Api) -> list[tuple[str, str]]:
    routes = [route for route in api.__serve_build_asgi_app__().routes if isinstance(route, Route)]
    return [(method, route.path) for route in routes for method in sorted(route.methods or ())]


def test_every_route_except_the_open_ones_requires_a_key() -> None:
    api = ApiWithoutEngine(Keys.from_env({"ACIP_API_KEYS": KEY}))
    routes = every_route(api)
    assert len([path for _, path in routes if path.startswith("/v1/")]) >= 9
    guarded = [(method, path) for method, path in routes if path not in OPEN]
    assert {path for _, path in routes} - {path for _, path in guarded} == {"/", "/docs", "/openapi.json", "/health", "/ready", "/metrics"}
    for method, path in guarded:
        for headers in ({}, {"Authorization": "Bearer another-key-of-enough-characters"}, {"Authorization": KEY}):
            response = ask(api, method, path.replace("{model:path}", "small"), headers=headers, json={})
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert KEY not in response.text
        allowed = ask(api, method, path.replace("{model:path}", "small"), headers={"Authorization": f"Bearer {KEY}"}, json={})
        assert allowed.status_code != 401, (method, path)


def test_no_path_bypasses_the_key_check() -> None:
    api = ApiWithoutEngine(Keys.from_env({"ACIP_API_KEYS": KEY}))
    for path in ("//v1/models", "/v1//models", "/V1/models", "/./v1/models", "/health/../v1/models", "/%2e/v1/models", "/v1/models/", "/x"):
        assert ask(api, "GET", path).status_code == 401, path


def test_head_of_an_unknown_route_has_the_headers_of_get() -> None:
    head, get = (ask(ApiWithoutEngine(Keys()), method, "/v1/nothing") for method in ("HEAD", "GET"))
    assert (head.status_code, head.headers, head.content) == (404, get.headers, b"")


def test_no_key_is_required_if_none_is_configured() -> None:
    assert ask(ApiWithoutEngine(Keys()), "GET", "/v1/models").status_code == 500, (
        "the request passes the key check and fails at the missing engine"
    )


def test_unexpected_failure_is_a_500_that_leaks_nothing() -> None:
    class Broken(ApiWithoutEngine):
        async def answer(self, request: Any) -> Any:
            raise RuntimeError("password in /etc")

    response = ask(Broken(Keys()), "POST", "/v1/completions", json={"prompt": "a"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "password" not in response.text
