"""API keys: read from the environment or a file, compared, and never shown."""

import os
import pickle
import traceback
from pathlib import Path

import pytest
from acip_platform.serve.http.errors import RequestError, as_response
from acip_platform.serve.http.keys import Keys
from acip_platform.settings import Settings

from acip.errors import AcipError

FIRST_KEY, SECOND_KEY = "0b5e7f12a9c44d63", "sk-Zr_81-uwTq0pLx"


def test_each_key_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"\ufeff# comment\n\n  {FIRST_KEY}  # the laptop's\n{SECOND_KEY}\r\n#{'x' * 20}\n")
    for env in (
        {"ACIP_API_KEYS": f"{FIRST_KEY}, {SECOND_KEY}"},
        {"ACIP_API_KEYS_FILE": str(file)},
        {"ACIP_API_KEYS": FIRST_KEY, "ACIP_API_KEYS_FILE": str(file)},
    ):
        keys = Keys.from_env(env)
        assert keys and len(keys.digests) == 2
        for header in (f"Bearer {FIRST_KEY}", f"bearer {SECOND_KEY}", f"BEARER   {SECOND_KEY} "):
            keys.check(header)
        copied = pickle.loads(pickle.dumps(keys))
        copied.check(f"Bearer {FIRST_KEY}")
        assert FIRST_KEY not in repr(keys) and FIRST_KEY.encode() not in pickle.dumps(keys)


@pytest.mark.parametrize(
    "header",
    [None, "", FIRST_KEY, "Bearer", "Bearer ", f"Basic {FIRST_KEY}", f"Bearer {FIRST_KEY}x", f"Bearer {FIRST_KEY[:-1]}",
     f"Bearer {FIRST_KEY} {SECOND_KEY}", f"Bearer {FIRST_KEY},{SECOND_KEY}", f"Bearer {FIRST_KEY.upper()}Ä", f"Bearer {FIRST_KEY}\udc80",
     f"Bearer\n{FIRST_KEY}", "Bearer " + "x" * 100_000],
)  # fmt: skip
def test_other_headers_are_refused(header: str | None) -> None:
    with pytest.raises(RequestError) as refused:
        Keys.from_env({"ACIP_API_KEYS": FIRST_KEY}).check(header)
    status, body = as_response(refused.value, "")
    assert status == 401 and body["error"]["code"] == "invalid_api_key"
    assert FIRST_KEY[:-1] not in str(body) and len(str(body)) < 300


def test_without_keys_every_request_is_accepted() -> None:
    for env in ({}, {"ACIP_API_KEYS": "", "ACIP_API_KEYS_FILE": ""}):
        keys = Keys.from_env(env)
        assert not keys
        keys.check(None)
        keys.check("Bearer whatever")


@pytest.mark.parametrize(
    ("listed", "content", "message"),
    [
        (" , ", None, "ACIP_API_KEYS: key 1 has 0 characters"),
        (f"{FIRST_KEY},", None, "key 2 has 0 characters"),
        (f"{FIRST_KEY},hunter2hunter2", None, "ACIP_API_KEYS: key 2 has 14 characters; a key has at least 16"),
        (f"{FIRST_KEY} hunter2", None, "key 1 contains a space"),
        (f"{FIRST_KEY}ä", None, "outside of ASCII"),
        ("", b"", "keys contains no key. Add a key, or unset"),
        (FIRST_KEY, b"# nobody yet\n\n", "keys contains no key"),
        ("", f"# ours\n{FIRST_KEY}\nhunter2".encode(), "keys: line 3 has 7 characters"),
        ("", b"hunter2\xff" + FIRST_KEY.encode(), "not UTF-8 text"),
        ("", None, "can't be read: No such file"),
    ],
)
def test_invalid_keys_are_reported_without_showing_them(tmp_path: Path, listed: str, content: bytes | None, message: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    env = {"ACIP_API_KEYS": listed} | ({} if listed and content is None else {"ACIP_API_KEYS_FILE": str(file)})
    with pytest.raises(AcipError) as refused:
        Keys.from_env(env)
    assert message in str(refused.value)
    shown = "".join(traceback.format_exception_only(refused.value)) + str(refused.value.__cause__)
    assert "hunter2" not in shown and FIRST_KEY not in shown


def test_file_of_an_unknown_user_is_reported() -> None:
    with pytest.raises(AcipError, match="can't be read: there is no such user"):
        Keys.from_env({"ACIP_API_KEYS_FILE": "~no-such-user/keys"})


def test_keys_are_not_passed_to_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACIP_API_KEYS", FIRST_KEY)
    monkeypatch.setenv("ACIP_API_KEYS_FILE", str(tmp_path / "keys"))
    settings = Settings.from_env()
    passed = settings.worker_env()
    assert not [name for name in passed if "API_KEY" in name] and FIRST_KEY not in passed.values()
    assert FIRST_KEY not in repr(settings) and os.environ["ACIP_API_KEYS"] == FIRST_KEY
