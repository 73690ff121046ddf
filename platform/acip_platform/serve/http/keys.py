"""API keys of the server. Only their hashes are kept in memory, so that no log or error can show a key.

    ACIP_API_KEYS         keys, separated by commas
    ACIP_API_KEYS_FILE    a file with one key per line; text after # is a comment

Either or both can be set. Without keys, every request is accepted. A key has at least 16 characters; create one with
`openssl rand -hex 24`.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from acip.errors import AcipError
from acip_platform.serve.http.errors import RequestError

KEYS = "ACIP_API_KEYS"
SHORTEST = 16  # characters


@dataclass(frozen=True)
class Keys:
    """The API keys of a server. An empty set is false and accepts every request."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "Keys":
        """Read the keys from the environment. Raises AcipError if a variable is set but contains no keys or an invalid one."""
        env = os.environ if env is None else env
        keys: list[str] = []
        if listed := env.get(KEYS):
            keys += _checked(KEYS, "key", enumerate(listed.split(","), 1))
        if path := env.get(f"{KEYS}_FILE"):
            keys += _checked(path, "line", _lines(path))
        return cls(tuple(_digest(key) for key in dict.fromkeys(keys)))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def check(self, authorization: str | None) -> None:
        """Raise RequestError 401 if the value of the Authorization header is not a valid key."""
        if not self:
            return
        given = re.fullmatch(r"bearer +(\S+)\s*", authorization or "", re.IGNORECASE)
        if given is None:
            message = "this server requires an API key. Send the header 'Authorization: Bearer KEY'."
            raise RequestError(message, code="invalid_api_key", status=401)
        digest = _digest(given[1])
        if not sum(
            hmac.compare_digest(digest, known) for known in self.digests
        ):  # compare all keys, so that the time does not depend on the match
            message = "the API key is unknown. Check it, or request a key from the operator of this server."
            raise RequestError(message, code="invalid_api_key", status=401)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the number and content of the lines that are not empty."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: the user in ~user does not exist
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", "there is no such user")
        raise AcipError(f"{KEYS}_FILE is {path}, which can't be read: {reason}.") from None  # the cause could show the content
    for number, line in enumerate(lines, 1):
        if content := re.split(r"(?:^|\s)#", line)[0].strip():
            yield number, content


def _checked(where: str, what: str, numbered: Iterator[tuple[int, str]]) -> list[str]:
    """Return the keys. Error messages describe an invalid key without showing it."""
    keys = []
    for number, text in numbered:
        key = text.strip()
        if not re.fullmatch(rf"[!-~]{{{SHORTEST},}}", key):
            wrong = f"has {len(key)} characters" if len(key) < SHORTEST else "contains a space or a character outside of ASCII"
            raise AcipError(f"{where}: {what} {number} {wrong}; a key has at least {SHORTEST} printable ASCII characters and no spaces.")
        keys.append(key)
    if not keys:
        raise AcipError(f"{where} contains no key. Add a key, or unset the variable to accept every request.")
    return keys
