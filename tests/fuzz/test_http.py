"""Fuzz tests of the HTTP routes with a real engine: each request gets a response or a client error in OpenAI's format.

Headers and paths contain bytes that no client library sends.
"""

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from acip_platform.serve.http.errors import RequestError
from acip_platform.serve.http.keys import Keys
from hypothesis import strategies as st

from acip.artifact.artifact import Artifact
from tests.support.application import Application, Headers
from tests.support.fuzzing import JSON, fuzz, harmed

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
KEY = "a-key-of-enough-characters"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("ACIP_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


@pytest.fixture(scope="module")
def app(home: Path, small_artifact: Artifact) -> Iterator[Application]:
    app = Application(home, small_artifact)
    yield app
    app.close()


def check(status: int, response: bytes) -> None:
    """Assert that the response is a success or a well-formed client error, never a server error."""
    assert status in (200, 202, 204, 400, 401, 404, 405, 408, 413, 415, 429, 431), (status, response[:500])
    if status >= 400:
        error = json.loads(response, parse_constant=_no_constant)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] in ("invalid_request_error", "rate_limit_error")
        assert error["message"] and len(error["message"]) < 10_000


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


COMPLETION: dict[str, Any] = {
    "model": "small@0.6", "prompt": ["It was", "a"], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "n": 2,
    "stop": ["\n"], "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"65": 1.5}, "logprobs": 2, "stream": False,
    "stream_options": {"include_usage": True}, "echo": False, "best_of": 1, "suffix": "", "user": "me", "ignore_eos": True,
}  # fmt: skip
CHAT: dict[str, Any] = {
    "model": "small", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}],
    "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 1, "tools": [], "tool_choice": "none",
    "response_format": {"type": "text"},
}  # fmt: skip
BODIES = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/v1/materializations": {"model": "small", "size_ratio": 0.6, "quantize": "nf4"},
    "/v1/models/small/load": {"version": "1"},
}


def test_valid_bodies_are_accepted(app: Application) -> None:
    for path, body in BODIES.items():
        status, response = app.ask("POST", path, json.dumps(body).encode())
        assert status == {"/v1/chat/completions": 400, "/v1/materializations": 429}.get(path, 200), (path, response)


def as_json(value: Any) -> bytes:
    """Return the JSON that a lenient client sends: with escaped lone surrogates, NaN, and infinite numbers."""
    return json.dumps(value, default=str).encode()


@pytest.mark.parametrize("path", BODIES)
@fuzz(st.data(), share=0.8)
def test_bodies_with_random_changes(app: Application, path: str, data: st.DataObject) -> None:
    body = data.draw(harmed(BODIES[path]))
    try:
        content = as_json(body)
    except ValueError:  # Python refuses to print very long ints
        content = b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"
    check(*app.ask("POST", path, content))


RAW = [
    b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": "a", "prompt": "b"}', b'{"prompt": NaN}', b"\xff\xfe", b"\xef\xbb\xbf{}",
    b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"prompt": "\\u0000"}', b"null", b"1", b'"a"', b"1" * 5000, b"1e99999", b"{}" * 9,
    b'{"model": "small@' + b"9" * 500 + b'"}', '{"prompt": "a"}'.encode("utf-16"), b"prompt=a&model=small", b"\x80\x04K\x01.",
]  # fmt: skip
TYPES = st.just(b"application/json") | st.sampled_from(
    [b"application/json", b"application/json; charset=utf-16", b"text/plain", b"multipart/form-data; boundary=a", b"application/x+json",
     b""]
) | st.binary(max_size=20)  # fmt: skip


@fuzz(st.sampled_from(RAW) | st.binary(max_size=40), TYPES, st.sampled_from(list(BODIES)), share=1.5)
def test_raw_bodies(app: Application, body: bytes, kind: bytes, path: str) -> None:
    check(*app.ask("POST", path, body, [(b"content-type", kind)]))


NAMES = st.sampled_from([b"authorization", b"content-length", b"host", b"accept", b"x-request-timeout-seconds", b"content-type", b"range"])
VALUES = st.binary(max_size=30) | st.sampled_from([b"bearer " + KEY.encode(), b"Bearer", b"-1", b"9" * 400, b"bytes=0-99", b"\xff"])
PATHS = st.text(max_size=30) | st.lists(
    st.sampled_from(["v1", "models", "small", "small@0.6", "small@fit:1GB@9k", "load", "tradeoff", "materializations", "..", "", "%2e",
                     "\0", "completions", "health", "mat-0123456789abcdef", "a" * 3000]), max_size=6,
).map("/".join)  # fmt: skip


@fuzz(
    st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS", "DELETE", "TRACE"]) | st.text(string.ascii_letters, min_size=1, max_size=8),
    PATHS.map(lambda path: "/" + path),
    st.binary(max_size=20),
    st.lists(st.tuples(NAMES, VALUES), max_size=4),
    share=2.0,
)
def test_paths_methods_and_headers(app: Application, method: str, path: str, query: bytes, headers: Headers) -> None:
    status, response = app.ask(method, path, b'{"prompt": "a", "max_tokens": 1}', headers, query)
    if not path.strip("/"):  # the page is a file, so clients may request ranges
        assert status in (200, 204, 206, 400, 404, 405, 416)
    elif method != "HEAD":
        check(status, response)


@fuzz(st.sampled_from(["version", "alias"]), JSON | st.from_regex(r"[a-z0-9'\"\\ %;-]{1,12}", fullmatch=True), share=0.5)
def test_versions_to_load(app: Application, field: str, value: Any) -> None:
    check(*app.ask("POST", "/v1/models/small/load", as_json({field: value}) if not _is_unprintable(value) else b"{}"))


def _is_unprintable(value: Any) -> bool:
    try:
        json.dumps(value)
    except ValueError:
        return True
    return False


@fuzz(st.binary(max_size=60) | st.sampled_from([b"Bearer " + KEY.encode()[:-1], b"Basic " + KEY.encode(), KEY.encode()]), share=0.5)
def test_only_the_exact_key_is_accepted(value: bytes) -> None:
    keys = Keys.from_env({"ACIP_API_KEYS": KEY})
    with pytest.raises(RequestError) as caught:
        keys.check(value.decode("latin-1"))
    assert caught.value.status == 401
