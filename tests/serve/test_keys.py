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

ONE, TWO = "0b5e7f12a9c44d63", "sk-Zr_81-uwTq0pLx"


def test_each_key_opens(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"\ufeff# whose\n\n  {ONE}  # the laptop's\n{TWO}\r\n#{'x' * 20}\n")
    for env in (
        {"ACIP_API_KEYS": f"{ONE}, {TWO}"},
        {"ACIP_API_KEYS_FILE": str(file)},
        {"ACIP_API_KEYS": ONE, "ACIP_API_KEYS_FILE": str(file)},
    ):
        keys = Keys.from_env(env)
        assert keys and len(keys.digests) == 2
        for header in (f"Bearer {ONE}", f"bearer {TWO}", f"BEARER   {TWO} "):
            keys.check(header)
        passed_on = pickle.loads(pickle.dumps(keys))
        passed_on.check(f"Bearer {ONE}")
        assert ONE not in repr(keys) and ONE.encode() not in pickle.dumps(keys)


@pytest.mark.parametrize(
    "header",
    [None, "", ONE, "Bearer", "Bearer ", f"Basic {ONE}", f"Bearer {ONE}x", f"Bearer {ONE[:-1]}", f"Bearer {ONE} {TWO}",
     f"Bearer {ONE},{TWO}", f"Bearer {ONE.upper()}Ä", f"Bearer {ONE}\udc80", f"Bearer\n{ONE}", "Bearer " + "x" * 100_000],
)  # fmt: skip
def test_nothing_else_opens(header: str | None) -> None:
    with pytest.raises(RequestError) as refused:
        Keys.from_env({"ACIP_API_KEYS": ONE}).check(header)
    status, body = as_response(refused.value, "")
    assert status == 401 and body["error"]["code"] == "invalid_api_key"
    assert ONE[:-1] not in str(body) and len(str(body)) < 300


def test_without_keys_everyone_may_ask() -> None:
    for env in ({}, {"ACIP_API_KEYS": "", "ACIP_API_KEYS_FILE": ""}):
        keys = Keys.from_env(env)
        assert not keys
        keys.check(None)
        keys.check("Bearer whatever")


@pytest.mark.parametrize(
    ("listed", "content", "says"),
    [
        (" , ", None, "ACIP_API_KEYS: key 1 has 0 characters"),
        (f"{ONE},", None, "key 2 has 0 characters"),
        (f"{ONE},hunter2hunter2", None, "ACIP_API_KEYS: key 2 has 14 characters; a key has at least 16"),
        (f"{ONE} hunter2", None, "key 1 contains a space"),
        (f"{ONE}ä", None, "outside of ASCII"),
        ("", b"", "keys contains no key. Add a key, or unset"),
        (ONE, b"# nobody yet\n\n", "keys contains no key"),
        ("", f"# ours\n{ONE}\nhunter2".encode(), "keys: line 3 has 7 characters"),
        ("", b"hunter2\xff" + ONE.encode(), "not UTF-8 text"),
        ("", None, "can't be read: No such file"),
    ],
)
def test_what_is_no_key_is_said_without_showing_it(tmp_path: Path, listed: str, content: bytes | None, says: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    env = {"ACIP_API_KEYS": listed} | ({} if listed and content is None else {"ACIP_API_KEYS_FILE": str(file)})
    with pytest.raises(AcipError) as refused:
        Keys.from_env(env)
    assert says in str(refused.value)
    shown = "".join(traceback.format_exception_only(refused.value)) + str(refused.value.__cause__)
    assert "hunter2" not in shown and ONE not in shown


def test_keys_are_not_passed_on_to_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACIP_API_KEYS", ONE)
    monkeypatch.setenv("ACIP_API_KEYS_FILE", str(tmp_path / "keys"))
    settings = Settings.from_env()
    passed = settings.worker_env()
    assert not [name for name in passed if "API_KEY" in name] and ONE not in passed.values()
    assert ONE not in repr(settings) and os.environ["ACIP_API_KEYS"] == ONE
