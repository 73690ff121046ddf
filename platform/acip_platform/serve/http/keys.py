"""API keys: who may ask this server. Only their checksums are kept, so that nothing here can show a key.

    ACIP_API_KEYS         keys, with commas between them
    ACIP_API_KEYS_FILE    a file of keys, one a line; what follows a # is a comment

Either or both; without them everyone may ask. A key is at least 16 characters: `openssl rand -hex 24` makes one.
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
    """The keys of a server. False where it has none, and then every request passes."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "Keys":
        """AcipError where a variable is set, but holds no keys or one that is none."""
        env = os.environ if env is None else env
        keys: list[str] = []
        if listed := env.get(KEYS):
            keys += _checked(KEYS, "key", enumerate(listed.split(","), 1))
        if path := env.get(f"{KEYS}_FILE"):
            keys += _checked(path, "line", _lines(Path(path).expanduser()))
        return cls(tuple(_digest(key) for key in dict.fromkeys(keys)))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def check(self, authorization: str | None) -> None:
        """RequestError 401 where this value of the header Authorization does not hold one of the keys."""
        if not self:
            return
        given = re.fullmatch(r"bearer +(\S+)\s*", authorization or "", re.IGNORECASE)
        if given is None:
            message = "this server asks for an API key; send one in the header 'Authorization: Bearer KEY'."
            raise RequestError(message, code="invalid_api_key", status=401)
        digest = _digest(given[1])
        if not sum(hmac.compare_digest(digest, known) for known in self.digests):  # all are compared, whichever fits
            message = "the API key is not one of this server's. Check it, and ask who runs the server for one."
            raise RequestError(message, code="invalid_api_key", status=401)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that hold something, by number."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise AcipError(f"{KEYS}_FILE is {path}, which can't be read: {reason}.") from None  # the cause may hold what is in it
    for number, line in enumerate(lines, 1):
        if content := re.split(r"(?:^|\s)#", line)[0].strip():
            yield number, content


def _checked(where: str, what: str, numbered: Iterator[tuple[int, str]]) -> list[str]:
    """The keys. What is wrong with one is said without showing it."""
    keys = []
    for number, text in numbered:
        key = text.strip()
        if not re.fullmatch(rf"[!-~]{{{SHORTEST},}}", key):
            wrong = f"has {len(key)} characters" if len(key) < SHORTEST else "holds a space or a character beyond ASCII"
            raise AcipError(
                f"{where}: {what} {number} {wrong}; a key is at least {SHORTEST} letters, digits or signs of ASCII, without spaces."
            )
        keys.append(key)
    if not keys:
        raise AcipError(f"{where} holds no key, and a server without keys is open to everyone. Give one, or unset the variable.")
    return keys
